"""Which linears write into the hidden states: the probe finds it in the numbers of a forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import InputError
from gptq_cli.models.paused_forwards import (
    Prober,
    Seen,
    Stage,
    pause_forwards,
    probe_block,
    watch_inputs,
)
from gptq_cli.runtime.open_model import open_stream
from tests.architectures import CPU, build, token_batches
from tests.families import save

pytestmark = pytest.mark.usefixtures("nothing_hangs_or_leaks")

LLAMA = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}
FOUND: dict[str, dict[str, str]] = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "granite": LLAMA,  # its multipliers are 1 here
    "gpt2": {"attn.c_proj": "", "mlp.c_proj": "ln_2"},  # Conv1D
    "opt": {"self_attn.out_proj": "", "fc2": "final_layer_norm"},  # flattens the windows
    "bloom": {"self_attention.dense": "", "mlp.dense_4h_to_h": "post_attention_layernorm"},
    "gemma2": {},  # a norm changes the outputs before they are added
    "olmo2": {},
    "gpt_neox": {},  # attention and MLP are added together
    "phi": {},
    "qwen3_moe": {"self_attn.o_proj": ""},  # experts are added together
    "llama4_text": {"self_attn.o_proj": ""},  # a router returns a tuple
}


@pytest.mark.parametrize("model_type", FOUND)
def test_the_probe_finds_which_linears_write_hidden_states(model_type: str, tmp_path: Path) -> None:
    source = open_checkpoint(save(build(model_type), tmp_path / "source"))
    with torch.inference_mode():
        stream = open_stream(source, device=CPU, dtype="float32", trust_remote_code=False)
        hidden, prober = stream.embed(token_batches()), Prober()
        found = []
        for index in range(2):
            with stream.block(index) as block:
                run = partial(block.run, 0, hidden[0])
                probe = prober(block.module, block.called, run, residuals=True)
                stages = probe.stages(block.called)
            found.append({})
            for stage in stages:
                if stage.residual is not None:
                    (name,) = stage.names
                    found[index][name.partition(f".{index}.")[2]] = stage.residual
    assert found == [FOUND[model_type]] * 2


class Block(nn.Module):
    """A block of two linears and their norms; `flow` is its forward."""

    def __init__(self, flow: Callable[[Block, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flow = flow
        self.norm, self.next_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.flow(self, x)

    @property
    def linears(self) -> dict[str, nn.Module]:
        return {"first": self.first, "last": self.last}


def usual(block: Block, x: Tensor) -> Tensor:
    x = x + block.first(block.norm(x))
    return x + block.last(block.next_norm(x))


def in_place(block: Block, x: Tensor) -> Tensor:
    x = x.clone()
    x += block.first(block.norm(x))
    x += block.last(block.next_norm(x))
    return x


def by_keyword(block: Block, x: Tensor) -> tuple[Tensor, None]:
    x = x + block.first(block.norm(input=x))
    return x + block.last(block.next_norm(input=x)), None


def inner_norms(block: Block, x: Tensor) -> Tensor:
    x = x + block.norm(block.first(x))
    return x + block.next_norm(block.last(x))


def twice(block: Block, x: Tensor) -> Tensor:
    x = x + block.first(block.norm(x))
    x = x + block.first(block.norm(x))
    return x + block.last(x)


def sums() -> dict[str, Callable[[Block, Tensor], Any]]:
    return {
        "parallel": lambda b, x: x + b.first(b.norm(x)) + b.last(b.next_norm(x)),
        "multiplied": lambda b, x: x + 0.5 * b.last(b.norm(x + 0.5 * b.first(x))),
        "no sum": lambda b, x: b.last(b.first(x)),
        "zeros": lambda b, x: torch.zeros_like(x) + b.last(b.norm(torch.zeros_like(x))),
        "too small": lambda b, x: b.next_norm(x * 1e20 + b.first(b.norm(x * 1e20)) + b.last(x)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flow", [usual, in_place, by_keyword])
def test_a_residual_is_the_input_of_a_module(
    flow: Callable[[Block, Tensor], Any], dtype: torch.dtype
) -> None:
    block, x = Block(flow).to(dtype), torch.randn(2, 5, 8, dtype=dtype)
    found = probe_block(block.linears, lambda: block(x), block).residuals
    assert found == {"first": "", "last": "next_norm"}


@pytest.mark.parametrize(("name", "flow"), sums().items())
def test_nothing_is_found_where_a_sum_is_another(
    name: str, flow: Callable[[Block, Tensor], Any]
) -> None:
    block, x = Block(flow), torch.randn(2, 5, 8)
    found = probe_block(block.linears, lambda: block(x), block).residuals
    assert found == {}, name


def test_linears_of_zeros_are_found_to_write() -> None:
    block, x = Block(usual), torch.randn(2, 5, 8)
    for linear in (block.first, block.last):
        for parameter in linear.parameters():
            parameter.zero_()
    found = probe_block(block.linears, lambda: block(x), block).residuals
    assert found == {"first": "", "last": "next_norm"}
    assert torch.equal(block(x), x)


def test_a_linear_called_twice_has_no_residual() -> None:
    block, x = Block(twice), torch.randn(2, 5, 8)
    found = probe_block(block.linears, lambda: block(x), block).residuals
    assert found == {"last": "last"}  # its own input, which no other module gets once


def test_a_stage_of_two_linears_has_no_residual() -> None:
    def shared(block: Block, x: Tensor) -> Tensor:
        y = block.norm(x)
        return block.next_norm(x + block.first(y)) + block.last(y)

    block, x = Block(shared), torch.randn(2, 5, 8)
    probe = probe_block(block.linears, lambda: block(x), block)
    assert probe.residuals == {"first": ""}
    assert [stage.residual for stage in probe.stages(["first"])] == [""]
    assert [stage.residual for stage in probe.stages(["first", "last"])] == [None]


@pytest.mark.parametrize("kept_as", ["register_buffer", "register_parameter"])
def test_blocks_that_print_alike_may_have_other_multipliers(kept_as: str) -> None:
    def multiplied(block: Block, x: Tensor) -> Tensor:
        return x + block.multiplier * block.last(block.next_norm(x + block.first(x)))

    probed: list[float] = []
    prober = Prober()

    def residuals(multiplier: float) -> dict[str, str]:
        block = Block(multiplied)
        scalar = nn.Parameter(torch.tensor([multiplier]), requires_grad=False)
        getattr(block, kept_as)("multiplier", scalar)

        def run() -> None:
            probed.append(multiplier)
            block(torch.randn(4, 8))

        return dict(prober(block, block.linears, run, residuals=True).residuals)

    both, first = {"first": "", "last": ""}, {"first": ""}
    assert [residuals(value) for value in (1, 0.5, 1, 0.25)] == [both, first, both, first]
    assert probed == [1, 0.5]


def test_looking_for_residuals_counts_no_memory() -> None:
    block, x = Block(usual), torch.randn(2, 50, 8)
    plain = probe_block(block.linears, lambda: block(x))
    found = probe_block(block.linears, lambda: block(x), block)
    assert plain.residuals == {}
    assert (found.waiting_bytes, found.forward_bytes) == (plain.waiting_bytes, plain.forward_bytes)
    modules = list(block.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


STAGES = [Stage(("first",), 1, ""), Stage(("last",), 1, "next_norm")]


def expected(block: Block, x: Tensor) -> list[Tensor]:
    """The residuals of both stages, by hand."""
    return [x, x + block.first(block.norm(x))]


@pytest.mark.parametrize("flow", [usual, in_place, by_keyword])
def test_paused_and_watched_forwards_see_the_same_residuals(
    flow: Callable[[Block, Tensor], Any],
) -> None:
    block = Block(flow)
    batches = [torch.randn(2, 5, 8), torch.randn(1, 5, 8)]
    watched: list[Seen] = []
    for x in batches:
        watch_inputs(
            STAGES,
            block.linears,
            lambda seen: watched.append(seen.clone()),
            partial(block, x),
            block,
        )
    paused = []
    with pause_forwards(STAGES, block.linears, [partial(block, x) for x in batches], block) as runs:
        for stage in STAGES:
            paused.append([seen.clone() for seen in runs.reach(stage)])
        list(runs.finish())
    for number, x in enumerate(batches):
        for place, residual in enumerate(expected(block, x)):
            seen = (watched[2 * number + place], paused[place][number])
            assert [found.stage for found in seen] == [STAGES[place]] * 2
            assert all(torch.equal(found.residual, residual) for found in seen)


def skip(block: Block, x: Tensor) -> Tensor:
    x = x + block.first(block.norm(x))
    if x.shape[0] == 1:
        return x + block.last(x)
    return x + block.last(block.next_norm(x))


def test_a_batch_that_calls_no_such_module_is_refused() -> None:
    block = Block(skip)
    runs = [partial(block, torch.randn(n, 5, 8)) for n in (2, 1)]
    with pause_forwards(STAGES, block.linears, runs, block) as batches:
        list(batches.reach(STAGES[0]))
        with pytest.raises(InputError, match="batch 1 does not call `last`") as caught:
            list(batches.reach(STAGES[1]))
    assert (caught.value.code, caught.value.exit_code) == ("E_ARCH", 3)


def test_a_watched_batch_that_calls_no_such_module_is_refused() -> None:
    block, seen = Block(skip), []
    run = partial(block, torch.randn(1, 5, 8))
    with pytest.raises(InputError, match="a calibration batch does not call `last`") as caught:
        watch_inputs(STAGES, block.linears, seen.append, run, block)
    assert (caught.value.code, caught.value.exit_code) == ("E_ARCH", 3)
    assert caught.value.hint == "keep it: --dynamic '-:last'"
    assert [found.stage for found in seen] == STAGES[:1]
