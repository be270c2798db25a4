"""The processes that quantize one model together, on torch.distributed: the only module that knows of it.

Each process has a share of the calibration batches. What they work out is put together in ways that do not depend on
how many there are: sums in the order of `engine.pairwise`, everything else in the order of batches, experts or rows.
A `Ranks` is one process by itself, for which there is nothing to put together; `DistributedRanks` are several.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_cli.errors import ResourceError
from gptq_cli.planning.checks import check_shares
from gptq_cli.runtime.memory import gpu_lost, out_of_memory
from gptq_cli.solver.hessian import (
    HessianAccumulator,
    HessianOfBatches,
    Node,
    kept_apart,
    push,
    total,
)

Value = TypeVar("Value")
# Classes beside dtypes and this program's dataclasses that a process takes from another one
PLAIN = {("builtins", "range"), ("builtins", "set"), ("builtins", "frozenset"), ("collections", "OrderedDict"),
         ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("torch", "Size"), ("torch", "device")}  # fmt: skip
ELEMENTS_AT_A_TIME = (
    2**25
)  # of a Hessian, between all ranks: bounds the copies that are on their way


class Ranks:
    """One process that does everything: `rank` 0 of `size` 1."""

    rank = 0
    size = 1
    local_world_size = 1  # processes of the team on this machine, this one included
    first_here = True  # of those

    @property
    def is_leader(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def share(self, n_batches: int) -> range:
        """The numbers of the batches that this process forwards: consecutive, and as many as the others' or one more.

        ConfigError E_CFG_RANKS if there are not enough for all.
        """
        check_shares(n_batches, self.size)
        return _share(n_batches, self.rank, self.size)

    def deal(self, costs: Sequence[float]) -> list[int]:
        """Return the rank that does each unit of work, such that all ranks have about equal costs."""
        return [0] * len(costs)

    def exchange(self, mine: dict[int, Value], owners: Sequence[int]) -> Iterator[Value]:
        """Yield the result of every unit, in order, where `mine` has those of this process."""
        for unit in range(len(owners)):
            yield mine.pop(unit)

    def map_units(
        self, work: Callable[[int], Value], costs: Sequence[float]
    ) -> Iterator[tuple[Value, bool]]:
        """Yield the result of every unit of work, in order, and whether this process has done it.

        A process alone does a unit when its result is asked for. Of several, each first does all
        of its units.
        """
        for unit in range(len(costs)):
            yield work(unit), True

    def sum_hessians(self, batches: HessianOfBatches, n_batches: int) -> HessianAccumulator:
        """The sum over all batches, of which `batches` has this process's share; the same bits on every process."""
        del n_batches
        return total(batches.nodes(), HessianAccumulator.absorb)

    def all_gather(self, mine: Sequence[Value]) -> list[Value]:
        """What all processes have, in their order."""
        return list(mine)

    def gather(self, mine: Sequence[Value]) -> list[Value] | None:
        """What all processes have, in their order, with its tensors on the host; None but for the one that leads."""
        return list(mine)

    def scatter(self, values: Sequence[Value] | None, n_batches: int) -> list[Value]:
        """This process's share of `values`, one for each batch, which the leading process has."""
        del n_batches
        assert values is not None
        return list(values)

    def broadcast(self, value: Value | None = None) -> Value:
        """What the leading process says."""
        assert value is not None
        return value


SINGLE_PROCESS = Ranks()


@dataclass(frozen=True, slots=True)
class Worker:
    """Where a process stands: its team, and the device it works on."""

    team: Ranks
    device: torch.device


class DistributedRanks(Ranks):
    """Several processes, of which this one is `rank`; ResourceError E_RANK_LOST as soon as one of them is gone."""

    def __init__(
        self, device: torch.device, *, local_world_size: int = 1, first_here: bool = True
    ) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_world_size, self.first_here = local_world_size, first_here
        self._device = device
        self._done = [0.0] * self.size  # of each process, what its work has cost so far

    def deal(self, costs: Sequence[float]) -> list[int]:
        return owners_of(costs, self._done)

    def exchange(self, mine: dict[int, Value], owners: Sequence[int]) -> Iterator[Value]:
        for unit, owner in enumerate(owners):
            yield self._from(owner, mine.pop(unit, None))

    def map_units(
        self, work: Callable[[int], Value], costs: Sequence[float]
    ) -> Iterator[tuple[Value, bool]]:
        owners = self.deal(costs)
        mine = {unit: work(unit) for unit, owner in enumerate(owners) if owner == self.rank}
        for owner, result in zip(owners, self.exchange(mine, owners), strict=True):
            yield result, owner == self.rank

    def sum_hessians(self, batches: HessianOfBatches, n_batches: int) -> HessianAccumulator:
        spans = [kept_apart(_share(n_batches, rank, self.size)) for rank in range(self.size)]
        mine = [node.value for node in batches.nodes()]
        for sums in zip(*(part.sums for part in mine), strict=True):
            self._add_up(sums, spans)
        whole = mine[0]
        seen = self.all_gather([(part.tokens, torch.stack(part.finite).tolist()) for part in mine])
        whole.tokens = sum(tokens for tokens, _ in seen)
        whole.finite = [torch.tensor(finite) for _, additions in seen for finite in additions]
        return whole

    def all_gather(self, mine: Sequence[Value]) -> list[Value]:
        counts = self._counts(len(mine))
        parts = [
            [mine[n] if rank == self.rank else None for n in range(count)]
            for rank, count in enumerate(counts)
        ]
        return [self._from(rank, value) for rank, part in enumerate(parts) for value in part]

    def gather(self, mine: Sequence[Value]) -> list[Value] | None:
        counts = self._counts(len(mine))
        found = [_on_host(value) for value in mine] if self.is_leader else []
        for rank in range(1, self.size):
            for number in range(counts[rank]):
                if self.is_leader:
                    found.append(_on_host(self._receive(rank)))
                elif rank == self.rank:
                    self._send(mine[number], 0)
        return found if self.is_leader else None

    def scatter(self, values: Sequence[Value] | None, n_batches: int) -> list[Value]:
        if values is None:
            return [self._receive(0) for _ in self.share(n_batches)]
        for rank in range(1, self.size):
            for number in _share(n_batches, rank, self.size):
                self._send(values[number], rank)
        return [values[number] for number in self.share(n_batches)]

    def broadcast(self, value: Value | None = None) -> Value:
        return self._from(0, value)

    def _add_up(self, mine: Sequence[Tensor], spans: Sequence[Sequence[range]]) -> None:
        """Put the sum of all processes' tensors, which stand for the `spans` of each, into the first of `mine`.

        Each process adds up one part of every slice, in the order of the tree, and gives it to the others.
        """
        flat = [tensor.view(-1) for tensor in mine]
        for start in range(0, flat[0].numel(), ELEMENTS_AT_A_TIME):
            slices = [tensor[start : start + ELEMENTS_AT_A_TIME] for tensor in flat]
            cuts = [len(_share(slices[0].numel(), rank, self.size)) for rank in range(self.size)]
            pieces = list(zip(*(piece.split(cuts) for piece in slices), strict=True))
            own = cuts[self.rank]
            received = slices[0].new_empty(sum(map(len, spans)) * own)
            sizes = [len(theirs) * own for theirs in spans]
            with _peers():
                dist.all_to_all_single(
                    received, torch.cat(list(chain(*pieces))), sizes, [len(mine) * n for n in cuts]
                )
            nodes: list[Node[Tensor]] = []
            for span, part in zip(chain(*spans), received.split(own or 1), strict=False):
                push(nodes, Node(span.start, span.stop, part), _add)
            added = total(nodes, _add) if own else received
            with _peers():
                for rank, piece in enumerate(slices[0].split(cuts)):
                    if piece.numel():
                        dist.broadcast(piece.copy_(added) if rank == self.rank else piece, rank)

    def _counts(self, mine: int) -> list[int]:
        """A number that each process has, of all."""
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = mine
        with _peers():
            dist.all_reduce(counts)
        return [int(count) for count in counts]

    def _from(self, owner: int, value: Value | None) -> Value:
        """What process `owner` has, on all of them; its tensors on each one's device."""

        def pass_on(tensor: Tensor) -> None:
            dist.broadcast(tensor, owner)

        with _peers():
            if owner != self.rank:
                found: Value = _taken(pass_on, self._device)
                return found
            assert value is not None
            _given(value, pass_on, self._device)
            return value

    def _send(self, value: object, to: int) -> None:
        with _peers():
            _given(value, lambda tensor: dist.send(tensor, to), self._device)

    def _receive(self, sender: int) -> Any:
        with _peers():
            return _taken(lambda tensor: dist.recv(tensor, sender), self._device)


def owners_of(costs: Sequence[float], done: list[float]) -> list[int]:
    """Who does what: units of work by falling cost, each for the process that has the least to do so far.

    Of those with as little the one that has `done` the least before, to which its share is added.
    """
    owners, loads = [0] * len(costs), [0.0] * len(done)
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        owner = min(range(len(done)), key=lambda rank: (loads[rank], done[rank]))
        owners[unit] = owner
        loads[owner] += costs[unit]
        done[owner] += costs[unit]
    return owners


def _share(n: int, rank: int, size: int) -> range:
    return range(rank * n // size, (rank + 1) * n // size)


def _add(left: Tensor, right: Tensor) -> None:
    left += right


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and notes them and what they are like."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._tensors = tensors

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return None
        self._tensors.append(item)
        return tuple(item.shape), item.dtype


class _Unpickler(pickle.Unpickler):
    """Makes plain values, dataclasses and named tuples of this program alone: who reaches a port can run no code."""

    def __init__(self, file: io.BytesIO, load: Callable[[Any], Tensor]) -> None:
        super().__init__(file)
        self.persistent_load = load  # type: ignore[method-assign]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in PLAIN:
            return super().find_class(module, name)
        if module.startswith("gptq_cli."):
            found = getattr(sys.modules.get(module), name, None)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, tuple)):
                return found
        raise pickle.UnpicklingError(
            f"another process of this run has sent `{module}.{name}`, which is no value"
        )


def _given(value: object, send: Callable[[Tensor], object], device: torch.device) -> None:
    """Send `value`: how many bytes it takes without its tensors, these bytes, the tensors by way of `device`."""
    file, tensors = io.BytesIO(), list[Tensor]()
    _Pickler(file, tensors).dump(value)
    said = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    send(torch.tensor(said.numel()))
    send(said)
    for tensor in tensors:
        send(tensor.to(device).contiguous())


def _taken(receive: Callable[[Tensor], object], device: torch.device) -> Any:
    """What `_given` sends; its tensors on `device`. `receive` fills a tensor."""

    def load(like: Any) -> Tensor:
        shape, dtype = like
        tensor = torch.empty(shape, dtype=dtype, device=device)
        receive(tensor)
        return tensor

    n_bytes = torch.tensor(0)
    receive(n_bytes)
    said = torch.empty(int(n_bytes), dtype=torch.uint8)
    receive(said)
    return _Unpickler(io.BytesIO(said.numpy().tobytes()), load).load()


def _on_host(value: Any) -> Any:
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), value)


@contextmanager
def _peers() -> Iterator[None]:
    """Turn a connection that another process has left behind into ResourceError E_RANK_LOST."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error) or gpu_lost(error):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise ResourceError(
            "E_RANK_LOST", f"another process of this run has ended, and left this one alone: {reason}",
            hint="look at what it said; the same command goes on after the last finished block",
        ) from error  # fmt: skip
