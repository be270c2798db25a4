"""Several processes of gloo on the CPU write the bytes of one, share the work and end together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError
from gptq_cli.planning.estimate import ROWS_OF_A_PART
from gptq_cli.quantization import reverse_pass
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.runtime.ranks import Ranks, owners_of
from tests.disks import Killed
from tests.families import save_model
from tests.quantization.ranks import ROWS, RUNS, team
from tests.quantization.test_routed_experts import save_mixture
from tests.runs import config, digest
from tests.tiny import WORK, killer
from tests.vision import save_chats, save_vision_model

SETTINGS = {"nsamples": 12, "batch_size": 1, "seqlen": 32, "group_size": 16}
DENSE = {"preset": "best", "lm_head": True}
MIXTURE = {"preset": "balanced", "moe_uncovered": "rtn"}


@pytest.fixture(autouse=True, scope="module")
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROWS_OF_A_PART, "cpu", (16, 16))
        yield


@dataclass(frozen=True)
class Case:
    """A model and the output of one process."""

    model: Path
    settings: QuantizeConfig
    tree: dict[str, str]


def made(directory: Path, model: Path, settings: QuantizeConfig) -> Case:
    quantize_checkpoint(str(model), directory / "alone", settings)
    return Case(model, settings, digest(directory / "alone"))


@pytest.fixture(scope="module")
def dense(small_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Case:
    del small_parts
    directory = tmp_path_factory.mktemp("dense")
    model = save_model(directory / "model", num_hidden_layers=2)
    return made(directory, model, config(**SETTINGS, **DENSE))


@pytest.fixture(scope="module")
def mixture(small_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Case:
    del small_parts
    directory = tmp_path_factory.mktemp("mixture")
    model = save_mixture(directory / "model", "qwen3_moe", num_experts=8)
    return made(directory, model, config(**SETTINGS, **MIXTURE))


@pytest.fixture(scope="module")
def images(small_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Case:
    del small_parts
    directory = tmp_path_factory.mktemp("images")
    model = save_vision_model(directory / "model", "gemma3")
    chats = {"dataset": str(save_chats(directory)), "nsamples": 4, "seqlen": 100}
    return made(directory, model, config(**(SETTINGS | DENSE | chats | {"lm_head": False})))


def balanced(work: list[int]) -> bool:
    return max(work) <= 1.15 * sum(work) / len(work)


FEW = pytest.mark.parametrize(
    "size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)


@FEW
@pytest.mark.parametrize("kind", ["dense", "mixture", "images"])
def test_several_processes_write_the_bytes_of_one_process(
    kind: str, size: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(kind)
    work, errors, _ = team(size, case.model, tmp_path / "out", case.settings)
    assert errors == [None] * size
    assert digest(tmp_path / "out") == case.tree
    if (kind, size) != ("images", 3):  # three cannot share four windows with images evenly
        assert balanced([done[RUNS] for done in work])
        assert balanced([done[ROWS] for done in work])


@pytest.mark.parametrize(
    "when", ["", pytest.param("few", marks=pytest.mark.slow)], ids=["many pieces", "one piece"]
)
def test_gradients_of_several_processes_are_those_of_one(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "few":
        monkeypatch.setattr(reverse_pass, "GRADIENT_TOKENS", 1)
    model = save_model(tmp_path / "model", num_hidden_layers=2)
    case = made(tmp_path, model, config(**SETTINGS, preset="balanced", loss_aware=True))
    _, errors, _ = team(2, model, tmp_path / "out", case.settings, when=when)
    assert errors == [None] * 2
    assert digest(tmp_path / "out") == case.tree


@pytest.mark.parametrize(
    ("first", "then"), [(2, 1), (1, 2), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_a_run_resumes_with_another_number_of_processes(
    first: int, then: int, dense: Case, tmp_path: Path
) -> None:
    model, settings = dense.model, dense.settings
    if first == 1:
        with pytest.raises(Killed):
            quantize_checkpoint(str(model), tmp_path / "out", settings, report=killer(0))
    else:
        _, errors, codes = team(first, model, tmp_path / "out", settings, dies=1, when="finished")
        assert errors[0] is not None
        assert errors[0].startswith(
            "E_RANK_LOST: process 1 of 2 (the first is 0) was killed or cannot be reached"
        )
        assert codes == [0, -signal.SIGKILL]
    assert len((tmp_path / WORK / "journal.jsonl").read_bytes().splitlines()) == 1
    if then == 1:
        assert quantize_checkpoint(str(model), tmp_path / "out", settings).resumed_blocks == 1
    else:
        assert team(then, model, tmp_path / "out", settings)[1] == [None] * then
    assert digest(tmp_path / "out") == dense.tree


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "dies"),
    [("start", 2), ("forward", 0), ("solve", 1), ("solve", 0), ("finished", 0), ("head", 2)],
)
def test_a_killed_process_is_reported_once_and_a_rerun_finishes(
    when: str, dies: int, dense: Case, tmp_path: Path
) -> None:
    model, settings = dense.model, dense.settings
    _, errors, codes = team(3, model, tmp_path / "out", settings, dies=dies, when=when)
    (error,) = filter(None, errors)
    assert error.startswith(f"E_RANK_LOST: process {dies} of 3")
    assert codes[dies] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert team(2, model, tmp_path / "out", settings)[1] == [None] * 2
    assert digest(tmp_path / "out") == dense.tree


def test_one_process_reports_the_error_that_ends_all(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    _, errors, codes = team(2, model, tmp_path / "out", config(**SETTINGS), dies=1, when="refused")
    (error,) = filter(None, errors)
    assert error.startswith("E_CKPT_NONFINITE: layer `model.layers.0.self_attn.")
    assert codes == [0, 0]
    assert not (tmp_path / WORK).exists()


def test_a_process_that_would_write_other_bytes_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    _, errors, _ = team(2, model, tmp_path / "out", config(**SETTINGS), dies=1, when="unlike")
    (error,) = filter(None, errors)
    assert error == "E_RANK_MISMATCH: process 1 differs from process 0: device.threads was 1, is 2"


def test_more_processes_than_batches_are_refused() -> None:
    ranks = Ranks()
    ranks.size = 5
    with pytest.raises(ConfigError, match=r"share 1 calibration batch$"):
        ranks.share(1)
    with pytest.raises(
        ConfigError, match="5 processes cannot share 4 calibration batches"
    ) as caught:
        ranks.share(4)
    assert (caught.value.code, caught.value.exit_code) == ("E_CFG_RANKS", 2)
    assert caught.value.hint == "use fewer processes, a smaller --batch-size or more --nsamples"


@pytest.mark.parametrize("size", range(1, 8))
def test_each_rank_gets_an_even_share_of_batches_in_order(size: int) -> None:
    shares = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        shares.append(ranks.share(7 + size))
    assert [number for share in shares for number in share] == list(range(7 + size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_costliest_unit_goes_to_the_least_loaded_rank() -> None:
    done = [0.0, 0.0]
    assert owners_of([1, 5, 2, 2, 3], done) == [1, 0, 1, 0, 1]
    assert done == [7, 6]
    assert owners_of([4], done) == [1]  # who has done less before
