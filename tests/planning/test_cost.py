"""The cost of a run on several devices against counts by hand, and the rates of this device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from gptq_cli.allocation.goals import starting_config
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import GPTQ
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.planning.device_rates import (
    H100,
    HESSIAN_PANEL,
    cost_model,
    described,
    n_candidates,
)
from gptq_cli.planning.estimate import (
    ROWS_WITH_GRADIENTS,
    WIDE_FACTOR,
    Term,
    estimate_memory,
    expert_cost,
    experts_at_once,
    gradient_disk,
    solve_cost,
    total,
)
from gptq_cli.planning.measuring import (
    QUICK,
    calibration_windows,
    measuring_disk,
    measuring_seconds,
    probe_windows,
)
from gptq_cli.planning.plan import plan_run
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.planning.seconds import (
    Calibration,
    Rates,
    beside_seconds,
    estimate_seconds,
    estimate_time,
    fixed_seconds,
    gradient_seconds,
    saving_seconds,
)
from gptq_cli.quantization import reverse_pass
from gptq_cli.runtime.rates import measure_rates
from gptq_cli.solver.factor import BLOCKED_FROM
from gptq_cli.solver.grid import SHRINKS
from gptq_cli.solver.hessian import CUDA_PANEL
from gptq_cli.solver.two_sided import ROW_BLOCK
from tests.allocation.measuring import goal, measure
from tests.families import save_model
from tests.quantization.test_routed_experts import save_mixture
from tests.runs import config, quantize

ONE = Rates(forward=1, hessian=1, factor=1, solve=1, columns=1, network=1, disk=1)
TEXT = Calibration(tokens=100, experts_per_token=2, batches=8, state_bytes=3, features=64)


def linear(name: str, rows: int, columns: int, settings: LayerConfig | None) -> LayerPlan:
    weight = TensorInfo(name, "F32", (rows, columns), Path("x"), 0, 0)
    return LayerPlan(name, 0, rows, columns, settings, "", weight)


PLAIN = LayerConfig()


DENSE = [
    linear("a.q_proj", 32768, 12, PLAIN),
    linear("a.k_proj", 32768, 12, PLAIN),
    linear("a.kept", 5, 6, None),
]


def test_one_device_does_all_dense_work() -> None:
    one = estimate_seconds(DENSE, TEXT, 1, 7, ONE)
    assert one.forward == 65536 * 12 * 100 + 5 * 6 * 100
    assert one.hessian == pytest.approx(9 / 16 * 100 * 12**2)
    assert one.factor == 12**3 / 6
    assert one.solve == 2 * 65536 * 12**2 + 65536 * 12
    assert (one.network, one.reading) == (0, 7)


def test_ranks_share_dense_work_except_the_factor() -> None:
    one, four = (estimate_seconds(DENSE, TEXT, devices, 7, ONE) for devices in (1, 4))
    assert (four.forward, four.hessian) == (one.forward / 4, one.hessian / 4)
    assert four.factor == one.factor
    assert four.solve == one.solve / 4  # four parts of 16384 rows
    assert four.network == pytest.approx(0.75 * (65536 * 12 + 2 * 9 / 16 * 4 * 12**2))
    shared = four.forward + four.hessian + four.factor + four.solve
    assert four.total == pytest.approx(shared + four.network)


def test_the_largest_share_of_uneven_work_counts() -> None:
    one, three = (estimate_seconds(DENSE, TEXT, devices, 7, ONE) for devices in (1, 3))
    assert (three.forward, three.solve) == (one.forward * 3 / 8, one.solve / 2)


@pytest.mark.parametrize("order", [1, -1])
def test_a_kept_layer_beside_a_quantized_one_costs_one_forward(order: int) -> None:
    quantized, kept = linear("a.gate_proj", 64, 12, PLAIN), linear("a.up_proj", 32, 12, None)
    found = estimate_seconds([quantized, kept][::order], TEXT, 2, 0, ONE)
    alone = estimate_seconds([quantized], TEXT, 2, 0, ONE)
    assert found.forward == alone.forward + 32 * 12 * 100 / 2
    assert replace(found, forward=0.0) == replace(alone, forward=0.0)


def test_ranks_take_whole_experts_with_their_share_of_tokens() -> None:
    layers = [linear(f"model.layers.0.mlp.experts.{n}.up_proj", 16, 12, PLAIN) for n in range(8)]
    one, four = (estimate_seconds(layers, TEXT, devices, 0, ONE) for devices in (1, 4))
    assert one.forward == 8 * 16 * 12 * 100 * 2 / 8
    assert one.factor == 8 * 12**3 / 6
    shares = (four.factor, four.solve, four.hessian)
    assert shares == (one.factor / 4, one.solve / 4, one.hessian / 4)
    assert four.network == pytest.approx(0.75 * (8 * 16 * 12 + 100 * 3))


def test_refinement_and_asymmetric_calibration_cost_more() -> None:
    plain = linear("a.up_proj", 16, 12, PLAIN)
    refined = replace(plain, config=LayerConfig(refine_sweeps=4))
    followed = replace(plain, config=LayerConfig(asymmetric_calibration=0.5))
    assert solve_cost(plain) == 2 * 16 * 12**2
    assert solve_cost(refined) == solve_cost(plain) + 5 * 16 * 12**2
    assert solve_cost(followed) == solve_cost(plain) + 3 * 16 * 12**2
    auto = replace(plain, config=LayerConfig(asymmetric_calibration="auto"))
    assert solve_cost(auto) == solve_cost(followed) + 0.5 * 16 * 12**2
    other_work = 10 * 16 * 12 + 9 / 16 * 10 * 12**2 + 12**3 / 6
    assert expert_cost([plain], 10) == other_work + solve_cost(plain)
    one_model = estimate_seconds([plain], TEXT, 1, 0, ONE).forward
    assert estimate_seconds([followed], TEXT, 1, 0, ONE).forward == 2 * one_model


def test_loss_aware_rounding_costs_a_second_solution_and_its_losses() -> None:
    aware = linear("a.o_proj", 16, 12, LayerConfig(loss_aware=True, refine_sweeps=4))
    plain = replace(aware, config=LayerConfig(refine_sweeps=4))
    rounding = 0.5 * 16 * 12**2 + 0.5 * 16**2 * 12 + 16**3 / 6
    losses = 2 * 16 * 12**2 + 2 * 16**2 * 12
    refining = 2 * 2 * 16 * 12**2 + 3 * 16**2 * 12
    assert solve_cost(aware) == pytest.approx(solve_cost(plain) + rounding + losses + refining)
    unrefined = replace(aware, config=LayerConfig(loss_aware=True))
    of_plain = solve_cost(replace(aware, config=LayerConfig()))
    assert solve_cost(unrefined) == pytest.approx(of_plain + rounding + losses)
    wide = linear("a.up_proj", 36, 12, LayerConfig(loss_aware=True))
    assert solve_cost(wide) == solve_cost(replace(wide, config=LayerConfig()))


def test_a_shift_is_a_whole_product_at_its_own_rate() -> None:
    followed = linear("a.up_proj", 16, 12, LayerConfig(asymmetric_calibration=0.5))
    once = estimate_seconds([followed], TEXT, 1, 0, replace(ONE, shift=math.inf)).hessian
    slow = estimate_seconds([followed], TEXT, 1, 0, replace(ONE, shift=0.5)).hessian
    assert once == 9 / 16 * 100 * 12**2
    assert slow == once + 2 * 100 * 12**2


def test_a_drift_is_a_product_with_each_output_and_is_sent() -> None:
    settings = LayerConfig(asymmetric_calibration=0.5)
    down, narrow = linear("a.down_proj", 64, 12, settings), linear("a.down_proj", 63, 12, settings)
    slow = replace(ONE, shift=0.5, network=math.inf)
    shift = estimate_seconds([down], TEXT, 1, 0, slow).hessian
    assert shift == 9 / 16 * 100 * 12**2 + 2 * 100 * 12 * (12 + 64)
    expert = replace(down, name="model.layers.0.mlp.experts.1.down_proj")
    for other in (narrow, expert):
        of_other = estimate_seconds([other], TEXT, 1, 0, slow).hessian
        assert of_other < shift / 2
    sent = []
    for layer in (down, narrow):
        sent.append(estimate_seconds([layer], TEXT, 2, 0, ONE).network)
    assert sent[0] - sent[1] == (12 + 2 * 4 * 2 * 12 * 64) / 2


def test_a_gpu_sums_shifts_of_rows_where_they_are_fewer() -> None:
    settings = LayerConfig(asymmetric_calibration=0.5)
    few, many = linear("a.down_proj", 7, 16, settings), linear("a.down_proj", 8, 16, settings)
    gpu = replace(ONE, shifts_of_rows=True)
    for layer, numbers, shift, products in ((few, 7, 14, 5 - 2), (many, 16, 16, 5)):
        found = estimate_seconds([layer], TEXT, 2, 0, replace(gpu, shift=0.5))
        assert found.hessian == (9 / 16 * 100 * 16**2 + 2 * 100 * 16 * shift) / 2
        sums = 2 * 4 * (9 / 16 * 16**2 + 2 * numbers * 16)
        assert found.network == (16 * layer.out_features + sums) / 2
        alone = estimate_seconds([layer], TEXT, 1, 0, replace(gpu, columns=math.inf))
        assert alone.solve == products * layer.out_features * 16**2
    beside = [few, replace(few, name="a.up_proj")]  # which sums C for both
    assert estimate_seconds(beside, TEXT, 1, 0, replace(gpu, shift=0.5)).hessian == (
        9 / 16 * 100 * 16**2 + 2 * 100 * 16 * 16
    )


def test_wide_layers_are_factorised_at_a_rate_of_their_own() -> None:
    assert WIDE_FACTOR == BLOCKED_FROM
    for columns, rate in ((WIDE_FACTOR - 1, 1.0), (WIDE_FACTOR, 4.0)):
        layer = linear("a.up_proj", 16, columns, PLAIN)
        seconds = estimate_seconds([layer], TEXT, 1, 0, replace(ONE, wide_factor=4.0))
        assert seconds.factor == columns**3 / 6 / rate


def test_numbers_of_linears_pass_memory_beside_products() -> None:
    followed = LayerConfig(asymmetric_calibration=0.5)
    passing = replace(ONE, states=0.5, expert_states=0.25)
    for settings, streams in ((PLAIN, 1), (followed, 2)):
        for parent, tokens, each in (("a", 100, 2), ("model.layers.0.mlp.experts.0", 100, 4)):
            stage = [linear(f"{parent}.{name}_proj", 16, 12, settings) for name in ("gate", "up")]
            plain = estimate_seconds(stage, TEXT, 1, 0, ONE)
            found = estimate_seconds(stage, TEXT, 1, 0, passing)
            assert found.forward - plain.forward == streams * (12 + 16 + 16) * tokens * each
            assert found.hessian - plain.hessian == streams * 12 * tokens * each
            assert (found.factor, found.solve) == (plain.factor, plain.solve)


def test_a_gpu_sums_the_rows_of_each_panel_of_a_hessian() -> None:
    assert HESSIAN_PANEL == CUDA_PANEL
    layer = linear("a.up_proj", 16, 12, PLAIN)
    for panel, products in ((4, 4 * 4 + 8 * 4 + 12 * 4), (6, 6 * 6 + 12 * 6), (64, 12 * 12)):
        found = estimate_seconds([layer], TEXT, 1, 0, replace(ONE, panel=panel))
        assert found.hessian == pytest.approx(100 * products)


def test_columns_take_turns_in_each_part_and_sweep() -> None:
    wide = linear("a.up_proj", 16384 + 1, 12, LayerConfig(refine_sweeps=4))
    one = [linear(f"model.layers.0.mlp.experts.{n}.up_proj", 16, 12, PLAIN) for n in range(64)]
    for layers, turns in (([wide], 5 * 2 * 12), (one, 2 * 12)):
        quick = estimate_seconds(layers, TEXT, 1, 0, ONE).solve
        slow = estimate_seconds(layers, TEXT, 1, 0, replace(ONE, turn=1e6)).solve
        assert slow - quick == pytest.approx(turns * 1e6)


def test_weights_are_copied_and_corrected_at_rates_of_their_own() -> None:
    plain = linear("a.up_proj", 16, 12, LayerConfig(bits=8))
    followed = replace(plain, config=LayerConfig(bits=8, asymmetric_calibration=0.5))
    for layer, more in ((plain, 2 * 3), (followed, 2 * 3 + 4)):
        quick = estimate_seconds([layer], TEXT, 1, 0, ONE).solve
        slow = estimate_seconds([layer], TEXT, 1, 0, replace(ONE, copies=0.5, followed=0.25)).solve
        assert slow - quick == 16 * 12 * more


def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path: Path) -> None:
    settings = config(nsamples=2, seqlen=16, batch_size=2)
    plan = plan_run(save_model(tmp_path / "model"), settings)
    quick = estimate_time(plan, settings, replace(ONE, writes=1e9))
    once = plan.n_blocks * 2 * 16 * 64 * 4 / 1e9  # float32 states of 64 features
    assert quick.saving == pytest.approx(once)
    slow = estimate_time(plan, settings, replace(ONE, writes=1e-3))
    assert slow.saving == pytest.approx(slow.working / 20)
    assert saving_seconds(plan, settings, replace(ONE, writes=1e9), 10 * once) == once / 2
    twice = config(nsamples=2, seqlen=16, batch_size=2, asymmetric_calibration=0.5)
    both = plan_run(tmp_path / "model", twice)
    assert saving_seconds(both, twice, replace(ONE, writes=1e9), 1e9) == pytest.approx(2 * once)


@pytest.mark.parametrize(
    ("settings", "tried"),
    [
        (LayerConfig(), 0),
        (LayerConfig(scale_search="mse"), len(SHRINKS)),
        (LayerConfig(scale_search="mse", signed_scales=True), 2 * len(SHRINKS)),
        (LayerConfig(scale_search="mse", sym=False), 3 * len(SHRINKS)),
    ],
    ids=str,
)
def test_the_cost_model_searches_as_many_scales_as_the_solver(
    settings: LayerConfig, tried: int
) -> None:
    assert n_candidates(settings) == tried
    rates = replace(H100, weight_seconds=1.0, sweep_seconds=0.5, candidates=0.25)
    assert cost_model(rates, settings).columns == 1 / (1 + 4 * tried)
    refined = replace(settings, refine_sweeps=4)
    assert cost_model(rates, refined).columns == 5 / (1 + 4 * 0.5 + 4 * tried)


def is_late(name: str) -> bool:
    """Whether a tensor of `save_model` is written by its last block."""
    return "layers.2" in name and name.endswith(GPTQ.parts)


def test_each_run_costs_a_start(tmp_path: Path) -> None:
    settings = config(nsamples=2, batch_size=2)
    plan = plan_run(save_model(tmp_path / "model"), settings)
    quick = replace(ONE, disk=math.inf)
    plain = estimate_time(plan, settings, quick)
    fixed = estimate_time(plan, settings, replace(quick, start=5.0, hashes=10.0))
    last = sum(spec.nbytes for name, spec in plan.layout.specs.items() if is_late(name))
    # The model is hashed, for 5 s while torch is imported; the last block is read back, and the
    # only file is hashed from there on.
    (shard,) = plan.layout.shards
    rest = shard.size - min(offset for name, offset in shard.offsets.items() if is_late(name))
    assert fixed.fixed == pytest.approx((plan.source.nbytes + last + rest) / 10)
    assert fixed.total == plain.total + fixed.fixed


def test_a_file_is_hashed_by_one_thread_while_kernels_compile(tmp_path: Path) -> None:
    settings = config(max_shard_size="200KB")
    plan = plan_run(save_model(tmp_path / "model"), settings)
    quick = replace(ONE, disk=math.inf, hashes=8.0)
    of_one = fixed_seconds(plan, quick)
    rates = replace(quick, hash_threads=4)
    of_four = fixed_seconds(plan, rates)
    rests = []
    for shard in plan.layout.shards:
        late = [offset for name, offset in shard.offsets.items() if is_late(name)]
        if late:
            rests.append(shard.size - late[0])
    assert max(rests) < sum(rests) < 4 * max(rests)
    assert of_one["manifest"] == sum(rests) / 8
    assert of_four["manifest"] == 4 * max(rests) / 8
    assert of_four["source"] == 4 * plan.source.nbytes / 8
    compiling = fixed_seconds(plan, replace(rates, kernels=1e9))
    assert compiling == of_four | {"source": 1e9}
    importing = fixed_seconds(plan, replace(rates, start=7.0))
    assert importing == of_four | {"start": 7.0, "source": of_four["source"] - 7}
    longer = fixed_seconds(plan, replace(rates, start=1e9))
    assert longer["source"] == 0
    # Kernels compile from 3 s on, while transformers is imported up to 7 s.
    both = replace(rates, hashes=math.inf, start=7.0, before_kernels=3.0)
    assert fixed_seconds(plan, replace(both, kernels=4.0))["source"] == 0
    assert fixed_seconds(plan, replace(both, kernels=9.0))["source"] == 5
    assert replace(both, kernels=9.0).ready == 12
    writing = fixed_seconds(plan, replace(rates, writes=2.0))
    last = sum(spec.nbytes for name, spec in plan.layout.specs.items() if is_late(name))
    assert writing == of_four | {"verify": last / 2 + last / 8}
    reading = fixed_seconds(plan, replace(rates, disk=1.0))
    assert reading == of_four | {"source": plan.source.nbytes}


def test_files_are_written_read_and_hashed_beside_the_blocks(tmp_path: Path) -> None:
    settings = config(nsamples=2, batch_size=2)
    plan = plan_run(save_model(tmp_path / "model"), settings)
    copied, written = sum(tensor.nbytes for tensor in plan.copied), plan.layout.nbytes
    quick = replace(ONE, disk=math.inf, hashes=8.0)
    rates = replace(quick, hash_threads=4, writes=2.0)
    hashed = copied + 2 * written  # when it is copied, as a tensor, and in its file
    assert beside_seconds(plan, quick) == hashed / 8
    assert beside_seconds(plan, rates) == 4 * hashed / 8 + written / 2
    short = estimate_time(plan, settings, rates)
    assert short.beside == beside_seconds(plan, rates)
    beside = estimate_time(plan, settings, replace(rates, writes=math.inf))
    assert short.total - short.saving - short.fixed == beside.total - beside.fixed
    long = estimate_time(plan, settings, replace(rates, writes=1e-9))
    copying = written * 1e9 + 4 * hashed / 8
    assert long.total == pytest.approx(copying + long.saving + long.fixed)


def test_rows_with_gradients_take_their_columns_in_turn() -> None:
    quick = replace(ONE, row_turn=0.5)
    aware = linear("a.o_proj", 80, 64, LayerConfig(loss_aware=True))
    assert ROWS_WITH_GRADIENTS == ROW_BLOCK == 32
    more = estimate_seconds([aware], TEXT, 1, 0, quick).solve
    assert more - estimate_seconds([aware], TEXT, 1, 0, ONE).solve == 3 * 64 * 0.5
    wide = linear("a.up_proj", 160, 64, LayerConfig(loss_aware=True))  # which sums no gradients
    assert estimate_seconds([wide], TEXT, 1, 0, quick) == estimate_seconds([wide], TEXT, 1, 0, ONE)


@dataclass
class Files:
    """The bytes of the tensors that a pass writes, and the most of them at once."""

    written: int = 0
    most: int = 0
    sizes: dict[Path, int] = field(default_factory=dict)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    """The files of the passes in reverse of this test."""
    found = Files()
    save, remove = reverse_pass.save_tensors, reverse_pass.remove

    def saving(path: Path, content: object) -> str:
        tensors = [item for item in tree_leaves(content) if isinstance(item, torch.Tensor)]
        found.sizes[path] = sum(tensor.nbytes for tensor in tensors)
        found.written += found.sizes[path]
        found.most = max(found.most, sum(found.sizes.values()))
        return save(path, content)

    def removing(path: Path) -> None:
        found.sizes.pop(path, None)
        remove(path)

    monkeypatch.setattr(reverse_pass, "save_tensors", saving)
    monkeypatch.setattr(reverse_pass, "remove", removing)
    return found


@pytest.mark.parametrize("nsamples", [6, 32])  # most bytes are those of sums, or of states
def test_the_plan_counts_the_bytes_that_the_pass_for_gradients_writes(
    nsamples: int, tmp_path: Path, files: Files
) -> None:
    model = save_model(tmp_path / "model", intermediate_size=192)
    changes = {"nsamples": nsamples, "seqlen": 64, "loss_aware": True}
    quantize(tmp_path, model, **changes)
    settings = config(**changes)
    plan = plan_run(model, settings)
    assert gradient_disk(plan, settings) == files.most
    rates = replace(ONE, hashes=8.0, hash_threads=4, writes=2.0)
    saving = gradient_seconds(plan, settings, rates).saving
    assert saving == files.written / 2 + 4 * files.written / 8


def test_the_plan_counts_the_bytes_that_a_measurement_writes(tmp_path: Path, files: Files) -> None:
    model = save_model(tmp_path / "model")
    wanted = goal(nsamples=64)
    measure(model, wanted, tmp_path / "found.yaml")
    settings = starting_config(wanted)
    plan = plan_run(model, settings)
    assert files.most <= measuring_disk(plan, settings) <= 1.25 * files.most
    rates = replace(ONE, writes=1.0, hashes=math.inf)
    # Scales, zero points and groups of the rounded weights are not counted
    assert 0.95 * files.written < measuring_seconds(plan, settings, rates).saving <= files.written


def test_a_measurement_takes_a_quarter_of_the_text_and_no_less_than_some_tokens() -> None:
    few = config(nsamples=64, seqlen=64, batch_size=8)
    assert (calibration_windows(few), probe_windows(few)) == (64, 32)
    some = config(nsamples=160, seqlen=64, batch_size=8)
    assert (calibration_windows(some), probe_windows(some)) == (128, 40)
    many = config(nsamples=4096, seqlen=64, batch_size=8)
    assert (calibration_windows(many), probe_windows(many)) == (1024, 256)
    alone = config(nsamples=400, seqlen=64, batch_size=1)  # a process may have each batch
    assert (calibration_windows(alone), probe_windows(alone)) == (400, 100)


def test_the_time_of_a_measurement_is_counted(tmp_path: Path) -> None:
    settings = config(nsamples=256, seqlen=64, batch_size=8)
    plan = plan_run(save_model(tmp_path / "model", intermediate_size=192), settings)
    weights = sum(layer.n_weights for layer in plan.quantized)
    found = measuring_seconds(plan, settings, replace(ONE, writes=math.inf, hashes=math.inf))
    rounding = estimate_time(plan, config(**QUICK, nsamples=128, seqlen=64), ONE)
    head = 512 * 64
    assert found.forward == rounding.forward + 4 * 4096 * weights + 2 * 4096 * head
    assert found.hessian == rounding.hessian
    assert found.saving == 0


def test_the_cost_model_takes_half_the_operations_of_an_h100() -> None:
    rates = cost_model(replace(H100, bfloat16=8.0, cholesky=4.0, hashes=3.0), PLAIN)
    assert (rates.forward, rates.hessian, rates.shift, rates.solve) == (4, 4, 4, 4)
    assert rates.factor == 2
    assert rates.hashes == 3 * H100.hash_threads


def test_each_rate_names_its_source_and_what_is_not_confirmed() -> None:
    rates = {rate.name: rate for rate in described(H100)}
    assert all(rate.source for rate in rates.values())
    assert rates["bfloat16"].value == H100.bfloat16
    facts = {name for name, rate in rates.items() if rate.known}
    assert facts == {"multiprocessors", "hash_threads"}


@pytest.mark.parametrize(
    "settings", [LayerConfig(group_size=32), LayerConfig(group_size=-1, refine_sweeps=2)]
)
def test_measured_rates_are_positive_and_finite(settings: LayerConfig, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(100_000))
    rates = measure_rates(torch.device("cpu"), torch.float32, 96, settings, file)
    measured = [rates.forward, rates.hessian, rates.factor, rates.solve, rates.columns, rates.disk]
    measured.append(rates.hashes)
    assert all(0 < rate < math.inf for rate in measured)
    assert rates.network == rates.shift == math.inf


def test_the_rate_of_the_shift_is_measured_if_there_is_one(tmp_path: Path) -> None:
    followed = LayerConfig(group_size=32, asymmetric_calibration=0.5)
    rates = measure_rates(torch.device("cpu"), torch.float32, 32, followed, tmp_path / "none")
    assert 0 < rates.shift < math.inf


def test_the_disk_of_an_absent_file_has_no_rate(tmp_path: Path) -> None:
    rates = measure_rates(
        torch.device("cpu"), torch.float32, 32, LayerConfig(group_size=32), tmp_path / "none"
    )
    assert rates.disk == math.inf
    seconds = estimate_seconds([linear("a.up_proj", 64, 32, PLAIN)], TEXT, 1, 10**9, rates)
    assert seconds.reading == 0


def nbytes_of(terms: Sequence[Term]) -> dict[str, int]:
    return {term.what: term.nbytes for term in terms}


def test_each_of_several_devices_holds_its_share_of_the_states(tmp_path: Path) -> None:
    settings: QuantizeConfig = config(nsamples=8, batch_size=1)
    plan = plan_run(save_model(tmp_path / "dense"), settings)
    one = nbytes_of(estimate_memory(plan, settings, 1).cpu)
    four = nbytes_of(estimate_memory(plan, settings, 4).cpu)
    assert four["hidden states"] == one["hidden states"] / 4
    assert four["waiting batches"] == one["waiting batches"] / 4
    assert four["block"] == one["block"]
    assert four["solver"] <= one["solver"]
    mixture = plan_run(save_mixture(tmp_path / "mixture", "qwen3_moe"), settings)
    alone, shared = (estimate_memory(mixture, settings, devices) for devices in (1, 4))
    terms = nbytes_of(shared.accelerator)
    assert terms["experts' inputs"] == 4 * terms["hidden states"]
    assert total(shared.cpu) < total(alone.cpu) + sum(terms.values())


def test_as_many_experts_are_solved_at_once_as_their_bytes_allow() -> None:
    first = [linear("0.gate_proj", 768, 2048, PLAIN), linear("0.up_proj", 768, 2048, PLAIN)]
    layers = [*first, linear("0.down_proj", 2048, 768, PLAIN)]
    bytes_of_one = 2 * 4 * 2048**2 + 1536 * 2048 * (3 * 4 + 2)
    assert experts_at_once(layers, "cpu", None) == 1
    assert experts_at_once(layers, "cuda", None) == 32 < 3 * 2**30 // bytes_of_one
    assert experts_at_once(layers, "cuda", 4 * 5 * bytes_of_one) == 5
    assert experts_at_once(layers, "cuda", 10**6) == experts_at_once([], "cuda", None) == 1
