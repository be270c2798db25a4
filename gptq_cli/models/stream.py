"""A model as a stream of blocks: at no time are more than one block's weights in memory.

hidden = stream.embed(batches)
for index in range(stream.n_blocks):
    with stream.block(index) as block:
        hidden = [block.run(k, h) for k, h in enumerate(hidden)]
logits = stream.logits(ids, hidden)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptq_cli.errors import InputError
from gptq_cli.models.block_calls import (
    Call,
    Container,
    Extras,
    Recorder,
    State,
    check_chain,
    empty_containers,
    reuse_equal_tensors,
    with_own_containers,
)
from gptq_cli.models.experts import Experts
from gptq_cli.models.skeleton import Skeleton, is_linear, is_transposed, outside_linears, place


class _FirstBlockDone(Exception):
    """Ends a forward that was run for the first block's output only."""


@dataclass(frozen=True, slots=True)
class LoadedBlock:
    """A block with its weights, and what it was called with for each batch."""

    module: nn.Module
    linears: dict[str, nn.Module]  # by checkpoint name
    calls: list[Call]
    twin_calls: list[Call] = field(
        default_factory=list
    )  # the same, with other containers for blocks to fill
    experts: dict[str, Experts] = field(
        default_factory=dict
    )  # by what the checkpoint's names of their linears begin with

    @property
    def called(self) -> dict[str, nn.Module]:
        """What a forward calls by itself: linears that are not of experts, and experts as a whole."""
        inside = {module for experts in self.experts.values() for module in experts.modules()}
        return {
            name: linear for name, linear in self.linears.items() if linear not in inside
        } | self.experts

    def run(self, batch: int, state: State) -> State:
        """Hidden states, and what else goes on to the next block, after this block for batch number `batch`."""
        return self.calls[batch].run(self.module, state)

    def unquantized_copy(self) -> LoadedBlock:
        """A block that holds the weights of this one as they are now, whatever will be put in their place here.

        What its forward fills for later blocks it fills for their twins.
        """
        tensors = (*self.module.parameters(), *self.module.buffers())
        known: dict[int, Any] = {id(tensor): tensor for tensor in tensors}  # shared, not copied
        module = deepcopy(self.module, known)
        linears = {name: known[id(linear)] for name, linear in self.linears.items()}
        experts = {name: known[id(found)] for name, found in self.experts.items()}
        return LoadedBlock(module, linears, self.twin_calls, experts=experts)


class ModelStream:
    """Runs a model block by block, reading each block's tensors when its turn comes and dropping them after."""

    def __init__(
        self,
        skeleton: Skeleton,
        source: Source,
        device: torch.device,
        dequantized: Collection[str] = (),
    ) -> None:
        """`dequantized`: names of weights that `source` gives as [O, I] whatever way round the module holds them."""
        self._model, self._derived, self.device = skeleton.model, skeleton.sources, device
        self.unused = skeleton.unused  # tensors of the checkpoint that the model does not ask for
        self._sources, self._read = skeleton.sources.names, skeleton.sources.reader(source.read)
        self._source = source
        self._dequantized = dequantized
        self._path, self._list = skeleton.blocks_name, skeleton.blocks
        self._blocks = list(skeleton.blocks)
        self._calls: list[list[Call]] = [[] for _ in self._blocks]
        self._twin_calls = self._calls
        self._extras: Extras | None = None
        self._at_hand: dict[str, nn.Module] = {}  # linears of the block that is loaded
        self.carried: list[
            list[Container]
        ] = []  # of each batch: what blocks fill for later ones, known after `embed`

    @property
    def n_blocks(self) -> int:
        return len(self._blocks)

    @property
    def vocabulary_rows(self) -> int:
        """Number of token ids that the embedding knows."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the forward passes."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def hidden_size(self) -> int:
        """Features of a hidden state, as the model's config says; 0 if it does not."""
        return int(getattr(self._model.config.get_text_config(), "hidden_size", 0))

    def block_name(self, index: int) -> str:
        return f"{self._path}.{index}"

    def linears(self, index: int) -> dict[str, nn.Module]:
        """The linear modules of one block by the name of their weight in the checkpoint, without ".weight"."""
        found = {}
        for name, module in self._blocks[index].named_modules():
            if is_linear(module):
                found[
                    self._sources[f"{self.block_name(index)}.{name}.weight"].removesuffix(".weight")
                ] = module
        return found

    def _experts(self, index: int) -> dict[str, Experts]:
        found = {}
        for name, module in self._blocks[index].named_modules():
            if isinstance(module, Experts):
                first = self._sources[f"{self.block_name(index)}.{name}.0.up_proj.weight"]
                found[first.rpartition(".0.")[0]] = module
        return found

    def all_linears(self) -> dict[str, bool]:
        """Checkpoint names of every linear of the blocks and the head, and whether it is stored [I, O]."""
        found = {"lm_head": False}
        for index in range(self.n_blocks):
            found |= {name: is_transposed(module) for name, module in self.linears(index).items()}
        return found

    def shared_linears(self) -> set[str]:
        """Those that several blocks share, each of which would calibrate them for itself."""
        names = Counter(name for index in range(self.n_blocks) for name in self.linears(index))
        return {name for name, blocks in names.items() if blocks > 1}

    def biased_experts(self) -> list[str]:
        """Of experts with biases, what the names of their linears begin with, for each layer."""
        experts = {
            name: found
            for index in range(self.n_blocks)
            for name, found in self._experts(index).items()
        }
        return [name for name, found in experts.items() if found.biased]

    def outside_linears(self) -> str | None:
        """What `outside_linears` says of the blocks."""
        return outside_linears(self._path, self._list)

    def stacked_linears(self) -> dict[str, tuple[str, int, int]]:
        """Of linears that are a part of one tensor of the checkpoint: that tensor, and their rows and columns."""
        slices = self._derived.slices
        modules = {
            name: linear
            for index in range(self.n_blocks)
            for name, linear in self.linears(index).items()
        }
        return {
            name: (slices[f"{name}.weight"].stack, *modules[name].get_parameter("weight").shape)
            for name in modules
            if f"{name}.weight" in slices
        }

    def linear_weight(self, name: str, *, transposed: bool) -> Tensor:
        """The weight [O, I] of a linear on the device, as stored; `transposed`: the model, if not its file, holds it
        [I, O]. Of the block at hand it is not read again if it is held as it is stored: replace it afterwards."""
        key = f"{name}.weight"
        source = self._sources.get(key, key)
        stored = self._read(source)
        if (
            name in self._at_hand
            and (held := self._at_hand[name].get_parameter("weight")).dtype == stored.dtype
        ):
            return held.T if transposed else held
        weight = stored.to(self.device)
        return weight.T if transposed and source not in self._dequantized else weight

    def embed(self, batches: Sequence[Tensor]) -> list[State]:
        """Hidden states [batch, seqlen, features] that enter block 0, for token ids [batch, seqlen] each.

        In a tuple if blocks hand on more than hidden states. Notes on the way what every block will be called with.
        """
        base = self._model.base_model
        self._calls, self._twin_calls, self.carried = [[] for _ in self._blocks], [], []
        with self._outside(base):
            self._extras = self._learn_output(batches[0][:1])
            names = [self.block_name(index) for index in range(self.n_blocks)]
            handed_on = check_chain(
                lambda outputs: self._run_recorders(base, batches[0][:1], outputs),
                names,
                self._extras,
            )
            states: list[State] = []
            for ids in batches:
                recorders, _ = self._run_recorders(base, ids, [None] * self.n_blocks)
                hidden = recorders[0].seen[0][0]
                states.append((hidden,) if handed_on else hidden)
                for calls, recorder in zip(self._calls, recorders, strict=True):
                    calls.append(
                        reuse_equal_tensors(recorder.seen[0][1], calls[0] if calls else None)
                    )
        self._twin_calls = with_own_containers(self._calls, {})
        calls_of_batches = zip(
            zip(*self._calls, strict=True), zip(*self._twin_calls, strict=True), strict=True
        )
        self.carried = [
            empty_containers(calls) + empty_containers(twins) for calls, twins in calls_of_batches
        ]
        return states

    @contextmanager
    def block(self, index: int) -> Iterator[LoadedBlock]:
        """Block `index` with its weights on the device; they are dropped on leaving."""
        module = self._blocks[index]
        with self._filled(module, f"{self.block_name(index)}."):
            self._source.prefetch(dict.fromkeys(self._stored(index + 1)))
            calls, twin_calls, self._at_hand = (
                self._calls[index],
                self._twin_calls[index],
                self.linears(index),
            )
            try:
                yield LoadedBlock(module, self._at_hand, calls, twin_calls, self._experts(index))
            except BaseException:
                self._source.prefetch(())
                raise
            finally:
                self._at_hand = {}

    def _stored(self, index: int) -> Iterator[str]:
        """The tensors of the checkpoint that fill block `index`; none behind the last one."""
        for block in self._blocks[index : index + 1]:
            for name in block.state_dict():
                yield from self._derived.stored(self._sources[f"{self.block_name(index)}.{name}"])

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor, State], Tensor]]:
        """A function (token ids, what the last block gave) -> logits [batch, seqlen, vocabulary].

        Runs the model's own forward with the hidden states put in at the end of the blocks, so that final norms,
        scaling and capping of logits are the model's own.
        """

        def logits(ids: Tensor, state: State) -> Tensor:
            outputs = [*[None] * (self.n_blocks - 1), state]
            _, output = self._run_recorders(self._model, ids, outputs)
            found: Tensor = output.logits
            return found

        with self._outside(self._model):
            yield logits

    @property
    def output_linear(self) -> nn.Module:
        """The module that turns hidden states into logits."""
        module: nn.Module = self._model.get_output_embeddings()
        return module

    def _learn_output(self, ids: Tensor) -> Extras | None:
        """What a block returns beside hidden states, None if nothing: seen by running the first block once."""
        outputs: list[object] = []

        def stop(_module: nn.Module, _args: object, output: object) -> None:
            outputs.append(output)
            raise _FirstBlockDone

        first = self._blocks[0]
        handle = first.register_forward_hook(stop)
        try:
            with self._filled(first, f"{self.block_name(0)}."), suppress(_FirstBlockDone):
                self._model.base_model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            handle.remove()
        if not outputs:
            raise InputError("E_ARCH", f"the model's forward never calls `{self.block_name(0)}`")
        return tuple(outputs[0][1:]) if isinstance(outputs[0], tuple | list) else None

    def _run_recorders(
        self, model: nn.Module, ids: Tensor, outputs: Sequence[State | None]
    ) -> tuple[list[Recorder], Any]:
        """`model` run on `ids` with recorders in place of its blocks, which return `outputs` (None: their input)."""
        recorders: list[Recorder] = []
        for block, output in zip(self._blocks, outputs, strict=True):
            recorders.append(Recorder(block, self._extras, recorders[-1] if recorders else None))
            recorders[-1].inject = output
        for index, recorder in enumerate(recorders):
            self._list[index] = recorder
        try:
            result = model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for index, block in enumerate(self._blocks):
                self._list[index] = block
        return recorders, result

    @contextmanager
    def _outside(self, module: nn.Module) -> Iterator[None]:
        """Everything of `module` but the blocks, filled."""
        prefix = next(
            f"{name}." if name else ""
            for name, found in self._model.named_modules()
            if found is module
        )
        with self._filled(module, prefix, without=f"{self._path}."):
            yield

    @contextmanager
    def _filled(self, module: nn.Module, prefix: str, without: str | None = None) -> Iterator[None]:
        names = [
            name
            for name in module.state_dict()
            if without is None or not f"{prefix}{name}".startswith(without)
        ]
        empty = {name: tensor for name, tensor in module.state_dict().items() if name in set(names)}
        try:
            loaded: dict[str, Tensor] = {}
            for name in names:
                source = self._sources[f"{prefix}{name}"]
                if source not in loaded:
                    turned = source in self._dequantized and is_transposed(
                        module.get_submodule(name.rpartition(".")[0])
                    )
                    loaded[source] = self._load(source, empty[name], turned=turned)
                place(module, name, loaded[source])
            yield
            self._source.check_unchanged()  # weights may be a file's own pages until now
        finally:
            for name, tensor in empty.items():
                place(module, name, tensor)
            self._source.release()

    def _load(self, source: str, like: Tensor, *, turned: bool) -> Tensor:
        tensor = self._read(source).T if turned else self._read(source)
        if tensor.shape != like.shape:
            raise InputError(
                "E_CKPT_SHAPE",
                f"`{source}` is {list(tensor.shape)} in the checkpoint, {list(like.shape)} in config.json",
            )
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype, non_blocking=tensor.is_pinned())


class Source(Protocol):
    """Where the weights come from."""

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint; its memory may be the file's own pages."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Be told what will be read next, instead of what was said before, while what was read is at work."""

    def check_unchanged(self) -> None:
        """InputError if a file is no longer the one that was read."""

    def release(self) -> None:
        """Hold on to no file any more."""


class ReadAhead:
    """`source` with what is expected of it in pinned memory, up to `most_bytes`; the rest is read when its turn comes.

    A copy from there to a device goes on beside the host's work, and the thread's reading beside both.
    """

    def __init__(self, source: Source, most_bytes: int) -> None:
        self._source, self._most_bytes = source, most_bytes
        self._thread = ThreadPoolExecutor(1, "reader")
        self._ahead: dict[str, Future[Tensor | None]] = {}

    def read(self, name: str) -> Tensor:
        """The tensor, in pinned memory if it was expected and fits."""
        ahead = self._ahead[name].result() if name in self._ahead else None
        return self._source.read(name) if ahead is None else ahead

    def prefetch(self, names: Iterable[str]) -> None:
        """Let go of what was expected before, and begin to read `names`."""
        names = list(names)
        for future in self._ahead.values():
            future.cancel()
        self._source.prefetch(names)
        budget = _Budget(self._most_bytes)
        self._ahead = {name: self._thread.submit(self._fetch, name, budget) for name in names}

    def check_unchanged(self) -> None:
        """As the source does."""
        self._source.check_unchanged()

    def release(self) -> None:
        """As the source does."""
        self._source.release()

    def _fetch(self, name: str, budget: _Budget) -> Tensor | None:
        tensor = self._source.read(name)
        if not budget.take(tensor.nbytes):
            return None
        try:
            return tensor.pin_memory()
        except RuntimeError:  # the system pins no more; the tensor can be copied from where it is
            return None


class _Budget:
    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes

    def take(self, n_bytes: int) -> bool:
        """Whether so many bytes are left; they are no more."""
        if n_bytes > self._left:
            return False
        self._left -= n_bytes
        return True
