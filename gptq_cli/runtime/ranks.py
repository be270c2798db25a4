"""The processes that quantize one model together, on torch.distributed.

Each process has a share of the calibration batches. Results are combined in an order that does not
depend on the number of processes: sums in the order of `solver.hessian`, everything else in the
order of batches, experts or rows. `Ranks` is one process alone; `DistributedRanks` are several.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
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
# Classes that a process accepts from another one, beside dtypes and dataclasses of this program
PLAIN = {
    ("builtins", "range"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
}
# Elements of a Hessian that all ranks exchange at once; this bounds the memory of the copies
ELEMENTS_AT_A_TIME = 2**25


class Ranks:
    """One process that does everything: `rank` 0 of `size` 1."""

    rank = 0
    size = 1
    local_world_size = 1  # processes on this machine, this one included
    first_here = True  # whether this process is the first one on its machine

    @property
    def is_leader(self) -> bool:
        """Whether this process writes the output and reports to the user."""
        return self.rank == 0

    def share(self, n_batches: int) -> range:
        """Return the consecutive numbers of the batches that this process forwards.

        The shares of the processes differ by one batch at most. Raises ConfigError E_CFG_RANKS if
        there are fewer batches than processes.
        """
        check_shares(n_batches, self.size)
        return self.part(n_batches)

    def part(self, n_batches: int) -> range:
        """Return what `share` does, or an empty range for some of more processes than batches."""
        return _share(n_batches, self.rank, self.size)

    def deal(self, costs: Sequence[float]) -> list[int]:
        """Return the rank that does each unit of work; the costs of all ranks are about equal."""
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
        """Return the sum over the `n_batches` of all processes, the same bits on every process.

        `batches` holds this process's share, which may be empty.
        """
        del n_batches
        return total(batches.nodes(), HessianAccumulator.absorb)

    def all_gather(self, mine: Sequence[Value]) -> list[Value]:
        """Return the values of all processes, in the order of ranks."""
        return list(mine)

    def gather(self, mine: Sequence[Value]) -> list[Value] | None:
        """Return the values of all processes on the leader, tensors on the host; None elsewhere."""
        return list(mine)

    def scatter(self, values: Sequence[Value] | None, n_batches: int) -> list[Value]:
        """Return this process's share of the leader's `values`, one for each of `n_batches`."""
        del n_batches
        assert values is not None
        return list(values)

    def broadcast(self, value: Value | None = None) -> Value:
        """Return the leader's `value`."""
        assert value is not None
        return value


SINGLE_PROCESS = Ranks()


class DistributedRanks(Ranks):
    """Several processes, of which this one is `rank`.

    Every method raises ResourceError E_RANK_LOST if another process is gone.
    """

    def __init__(
        self, device: torch.device, *, local_world_size: int = 1, first_here: bool = True
    ) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_world_size, self.first_here = local_world_size, first_here
        self._device = device
        self._done = [0.0] * self.size  # the costs of each process's work so far

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
        spans = [kept_apart(share) for share in self._shares(n_batches)]
        mine = [node.value for node in batches.nodes()]
        whole, *_ = mine or [batches.nothing()]
        for number, target in enumerate(whole.sums):
            self._add_up(target, [part.sums[number] for part in mine], spans)
        seen = self.all_gather([(part.tokens, torch.stack(part.peaks).tolist()) for part in mine])
        whole.tokens = sum(tokens for tokens, _ in seen)
        whole.peaks = [torch.tensor(peak) for _, additions in seen for peak in additions]
        return whole

    def all_gather(self, mine: Sequence[Value]) -> list[Value]:
        counts = self._counts(len(mine))
        found = []
        for rank, count in enumerate(counts):
            values: list[Value | None] = [None] * count
            if rank == self.rank:
                values = list(mine)
            for value in values:
                found.append(self._from(rank, value))
        return found

    def gather(self, mine: Sequence[Value]) -> list[Value] | None:
        counts = self._counts(len(mine))
        if not self.is_leader:
            for value in mine:
                self._send(value, 0)
            return None
        found = [_on_host(value) for value in mine]
        for rank in range(1, self.size):
            for _ in range(counts[rank]):
                found.append(_on_host(self._receive(rank)))
        return found

    def scatter(self, values: Sequence[Value] | None, n_batches: int) -> list[Value]:
        if values is None:
            return [self._receive(0) for _ in self.part(n_batches)]
        for rank, share in enumerate(self._shares(n_batches)):
            if rank != self.rank:
                for number in share:
                    self._send(values[number], rank)
        return [values[number] for number in self.part(n_batches)]

    def broadcast(self, value: Value | None = None) -> Value:
        return self._from(0, value)

    def _add_up(
        self, target: Tensor, mine: Sequence[Tensor], spans: Sequence[Sequence[range]]
    ) -> None:
        """Put the sum of the tensors of all processes into `target`, the first of `mine` if any.

        The tensors of each process stand for its `spans` of batches. Each process adds up one part
        of every slice, in the order of the tree, and broadcasts it.
        """
        flat, whole = [tensor.view(-1) for tensor in mine], target.view(-1)
        for start in range(0, whole.numel(), ELEMENTS_AT_A_TIME):
            result = whole[start : start + ELEMENTS_AT_A_TIME]
            slices = [tensor[start : start + ELEMENTS_AT_A_TIME] for tensor in flat]
            cuts = [len(share) for share in self._shares(result.numel())]
            pieces = list(zip(*(piece.split(cuts) for piece in slices), strict=True))
            own = cuts[self.rank]
            received = result.new_empty(sum(map(len, spans)) * own)
            sizes = [len(theirs) * own for theirs in spans]
            sent = torch.cat([result.new_empty(0), *chain(*pieces)])
            sent_sizes = [len(mine) * n for n in cuts]
            with _peers():
                dist.all_to_all_single(received, sent, sizes, sent_sizes)
            nodes: list[Node[Tensor]] = []
            for span, part in zip(chain(*spans), received.split(own or 1), strict=False):
                push(nodes, Node(span.start, span.stop, part), _add)
            pieces_of_sum = result.split(cuts)
            if own:
                pieces_of_sum[self.rank].copy_(total(nodes, _add))
            with _peers():
                for rank, piece in enumerate(pieces_of_sum):
                    if piece.numel():
                        dist.broadcast(piece, rank)

    def _shares(self, n: int) -> list[range]:
        return [_share(n, rank, self.size) for rank in range(self.size)]

    def _counts(self, mine: int) -> list[int]:
        """Return the number `mine` of every process."""
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = mine
        with _peers():
            dist.all_reduce(counts)
        return [int(count) for count in counts]

    def _from(self, owner: int, value: Value | None) -> Value:
        """Return the value of process `owner` on all processes, tensors on the device of each."""

        def pass_on(tensor: Tensor) -> None:
            dist.broadcast(tensor, owner)

        with _peers():
            if owner != self.rank:
                found: Value = _take(pass_on, self._device)
                return found
            assert value is not None
            _give(value, pass_on, self._device)
            return value

    def _send(self, value: object, to: int) -> None:
        with _peers():
            _give(value, lambda tensor: dist.send(tensor, to), self._device)

    def _receive(self, sender: int) -> Any:
        with _peers():
            return _take(lambda tensor: dist.recv(tensor, sender), self._device)


def owners_of(costs: Sequence[float], done: list[float]) -> list[int]:
    """Return the rank that does each unit of work.

    Units are dealt by falling cost, each to the rank with the least to do so far; of several such
    ranks, to the one that has `done` the least before. The new work is added to `done`.
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
    """Replaces tensors with their shapes and dtypes, and collects them."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._tensors = tensors

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return None
        self._tensors.append(item)
        return tuple(item.shape), item.dtype


class _Unpickler(pickle.Unpickler):
    """Loads only plain values, and dataclasses and named tuples of this program.

    So nobody who reaches the port of a process can make it run code.
    """

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
            f"another process of this run has sent `{module}.{name}`, which is not a plain value"
        )


def _give(value: object, send: Callable[[Tensor], object], device: torch.device) -> None:
    """Send `value`: the number of its bytes without tensors, these bytes, and its tensors."""
    file, tensors = io.BytesIO(), list[Tensor]()
    _Pickler(file, tensors).dump(value)
    pickled = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    send(torch.tensor(pickled.numel()))
    send(pickled)
    for tensor in tensors:
        send(tensor.to(device).contiguous())


def _take(receive: Callable[[Tensor], object], device: torch.device) -> Any:
    """Return the value that `_give` sends, tensors on `device`; `receive` fills a tensor."""

    def load(like: Any) -> Tensor:
        shape, dtype = like
        tensor = torch.empty(shape, dtype=dtype, device=device)
        receive(tensor)
        return tensor

    n_bytes = torch.tensor(0)
    receive(n_bytes)
    pickled = torch.empty(int(n_bytes), dtype=torch.uint8)
    receive(pickled)
    return _Unpickler(io.BytesIO(pickled.numpy().tobytes()), load).load()


def _on_host(value: Any) -> Any:
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), value)


@contextmanager
def _peers() -> Iterator[None]:
    """Raise ResourceError E_RANK_LOST if the connection to another process breaks in the body."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error) or gpu_lost(error):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise ResourceError(
            "E_RANK_LOST",
            f"another process of this run exited, so this one cannot continue: {reason}",
            hint="see the error message of that process; the same command resumes "
            "after the last finished block",
        ) from error
