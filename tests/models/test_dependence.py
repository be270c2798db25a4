"""A model that is no chain of blocks is found out before anything is quantized."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.errors import InputError
from gptq_cli.models.dependence import check_chain
from gptq_cli.models.recording import Recorder, share

Forward = Callable[[list[nn.Module], Tensor], object]
NAMES = ["blocks.0", "blocks.1", "blocks.2"]


def check(forward: Forward, extras: tuple[object, ...] | None = None) -> None:
    """The check on three blocks that `forward` calls."""

    def run(outputs: list[Tensor | None], returned: tuple[object, ...] | None) -> tuple[list[Recorder], object]:
        recorders = [Recorder(nn.Identity(), returned) for _ in outputs]
        for recorder, output in zip(recorders, outputs, strict=True):
            recorder.inject = output
        return recorders, forward(list(recorders), torch.arange(24.0).reshape(2, 3, 4))

    check_chain(run, NAMES, extras)


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


@pytest.mark.parametrize(("forward", "extras"), [(plain, None), (pairs, (None,)), (inputs_of_each_layer, None)])
def test_a_chain_passes(forward: Forward, extras: tuple[object, ...] | None) -> None:
    check(forward, extras)


def changed_between(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    for block in blocks:
        x = block(x) + 1
    return (x,)


def handed_on(blocks: list[nn.Module], x: Tensor) -> tuple[Tensor]:
    seen = None
    for block in blocks:
        x, seen = block(x, seen=seen)
    return (x,)


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
        (changed_between, None, "what enters `blocks.1` is not what `blocks.0` returns"),
        (handed_on, (torch.arange(5),), "`blocks.1` is called with more results of earlier blocks"),
        (handed_on, (torch.zeros(5),), "`blocks.1` is called with more results of earlier blocks"),
        (earlier_output_as_argument, None, "`blocks.2` is called with more results of earlier blocks"),
        (earlier_output_at_the_end, None, "what follows `blocks.2` depends on outputs of the blocks before it"),
        (shared, None, "calls `blocks.1` 2 times, not once"),
        (skipped, None, "calls `blocks.2` 0 times, not once"),
    ],
)
def test_what_is_no_chain_is_refused(forward: Forward, extras: tuple[object, ...] | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check(forward, extras)
    assert caught.value.code == "E_ARCH"
    assert message in str(caught.value)


def test_a_container_that_blocks_fill_for_each_other_stays_one() -> None:
    filled: dict[str, Tensor] = {}
    assert share({"states": filled}, {"states": {}})["states"] is filled
