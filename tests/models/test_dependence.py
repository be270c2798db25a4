"""A model that is no chain of blocks is found out before anything is quantized."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.errors import InputError
from gptq_cli.models.block_calls import (
    Call,
    FromPreviousBlock,
    Recorder,
    State,
    check_chain,
    reuse_equal_tensors,
)

Forward = Callable[[list[nn.Module], Tensor], object]
NAMES = ["blocks.0", "blocks.1", "blocks.2"]


def check(forward: Forward, extras: tuple[object, ...] | None = None) -> bool:
    """The check on three blocks that `forward` calls."""

    def run(outputs: list[State | None]) -> tuple[list[Recorder], object]:
        recorders: list[Recorder] = []
        for output in outputs:
            recorders.append(Recorder(nn.Identity(), extras, recorders[-1] if recorders else None))
            recorders[-1].inject = output
        return recorders, forward(list(recorders), torch.arange(24.0).reshape(2, 3, 4))

    return check_chain(run, NAMES, extras)


def plain(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    for block in blocks:
        x = block(x, mask=torch.ones(3, 3))
    return (x * 2,)


def pairs(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    for block in blocks:
        x, _ = block(x)
    return (x,)


def inputs_of_each_layer(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    start = x
    for index, block in enumerate(blocks):
        x = block(x, own=start * index)
    return (x,)


def handed_on(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    seen = None
    for block in blocks:
        x, seen = block(x, seen=seen)
    return (x,)


def handed_on_to_the_end(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    seen = None
    for block in blocks:
        x, seen = block(x, seen)
    return (x * seen.sum(),)


@pytest.mark.parametrize(
    ("forward", "extras"), [(plain, None), (pairs, (None,)), (inputs_of_each_layer, None)]
)
def test_chain_of_blocks_passes_the_check(
    forward: Forward, extras: tuple[object, ...] | None
) -> None:
    assert not check(forward, extras)


@pytest.mark.parametrize("extra", [torch.arange(5), torch.ones(2)], ids=["integers", "floats"])
@pytest.mark.parametrize("forward", [handed_on, handed_on_to_the_end])
def test_block_may_pass_extra_tensors_to_the_next_block(forward: Forward, extra: Tensor) -> None:
    assert check(forward, (extra,))
    assert not check(pairs, (extra,))


def test_call_puts_passed_tensors_at_their_argument_positions() -> None:
    class Block(nn.Module):
        def forward(
            self, hidden: Tensor, mask: int, seen: Tensor, *, scale: Tensor
        ) -> tuple[Tensor, ...]:
            return hidden + mask, seen * 2, scale * 3

    first, second = torch.ones(1), torch.ones(1)
    call = Call((10, second), {"scale": first}, True).handed((first, second))
    assert call == Call((10, FromPreviousBlock(1)), {"scale": FromPreviousBlock(0)}, True)
    given = tuple(torch.tensor(float(number)) for number in (1, 5, 7))
    assert call.run(Block(), given) == (11, 14, 15)
    assert Call((10, second), {"scale": first}, True).run(Block(), given[0]) == 11


def changed_between(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    for block in blocks:
        x = block(x) + 1
    return (x,)


def handed_on_otherwise(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    seen = None
    for block in blocks:
        x, seen = block(x, seen)
        seen = seen.clone()
    return (x,)


def handed_to_the_next_but_one(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    x, seen = blocks[0](x)
    x, _ = blocks[1](x)
    return blocks[2](x, seen)


def extra_at_the_end(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    for block in blocks:
        x, seen = block(x)
    return (x * seen.sum(),)


def earlier_output_as_argument(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    first = blocks[0](x)
    return (blocks[2](blocks[1](first), {"first": [first]}),)


def earlier_output_at_the_end(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    first = blocks[0](x)
    return (blocks[2](blocks[1](first)) + first,)


def shared(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    return (blocks[2](blocks[1](blocks[1](blocks[0](x)))),)


def skipped(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    return (blocks[1](blocks[0](x)),)


@pytest.mark.parametrize(
    ("forward", "extras", "message"),
    [
        (changed_between, None, "the input of `blocks.1` is not the output of `blocks.0`"),
        (
            handed_on_otherwise,
            (torch.arange(5),),
            "`blocks.1` is called with results of blocks that are not handed on",
        ),
        (
            handed_on_otherwise,
            (torch.zeros(5),),
            "`blocks.1` is called with results of blocks that are not handed on",
        ),
        (
            handed_to_the_next_but_one,
            (torch.zeros(5),),
            "`blocks.2` is called with results of blocks that are not",
        ),
        (
            extra_at_the_end,
            (torch.ones(5),),
            "the model behind `blocks.2` depends on outputs of the blocks before it",
        ),
        (
            earlier_output_as_argument,
            None,
            "`blocks.2` is called with results of blocks that are not handed on",
        ),
        (
            earlier_output_at_the_end,
            None,
            "the model behind `blocks.2` depends on outputs of the blocks before it",
        ),
        (shared, None, "calls `blocks.1` 2 times, not once"),
        (skipped, None, "calls `blocks.2` 0 times, not once"),
    ],
)
def test_model_that_is_no_chain_is_refused(
    forward: Forward, extras: tuple[object, ...] | None, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        check(forward, extras)
    assert caught.value.code == "E_ARCH"
    assert message in str(caught.value)


def test_container_shared_by_blocks_stays_one_object() -> None:
    filled: dict[str, Tensor] = {}
    assert reuse_equal_tensors({"states": filled}, {"states": {}})["states"] is filled
