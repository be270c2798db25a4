"""A model as a stream of blocks: the weights of one block at a time are in memory.

states = stream.embed(batches)
for index in range(stream.n_blocks):
    with stream.block(index) as block:
        states = [block.run(batch, state) for batch, state in enumerate(states)]
with stream.head() as logits:
    output = logits(ids, state)

`gptq_cli/quantization/block_loop.py` quantizes each block between loading and running it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptq_cli.config.layer import HEAD
from gptq_cli.errors import InputError
from gptq_cli.models.block_calls import (
    Call,
    Container,
    Extras,
    Recorder,
    State,
    added_before_blocks,
    check_chain,
    empty_containers,
    reuse_equal_tensors,
    with_own_containers,
)
from gptq_cli.models.experts import Experts
from gptq_cli.models.skeleton import Skeleton, is_linear, is_transposed, outside_linears, place


class ImageBatch(Protocol):
    """A batch with images: token ids [1, tokens], and all inputs of the model by their names."""

    @property
    def ids(self) -> Tensor:
        """The token ids."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs, token ids and pixels among them; they are made when they are asked for."""

    def __len__(self) -> int:
        """Return the number of windows."""


Batch = Tensor | ImageBatch  # a tensor holds token ids [batch, seqlen]


def token_ids(batch: Batch) -> Tensor:
    """Return the token ids of a batch."""
    if isinstance(batch, Tensor):
        return batch
    return batch.ids


class _FirstBlockDone(Exception):
    """Stop a forward that was run for the first block's output only."""


@dataclass(frozen=True, slots=True)
class LoadedBlock:
    """A block with its weights, and the arguments of its call for each batch."""

    module: nn.Module
    linears: dict[str, nn.Module]  # by checkpoint name
    calls: list[Call]
    # Equal calls for a copy of the block, with other containers for it to fill:
    calls_of_copy: list[Call] = field(default_factory=list)
    # By the common prefix of the checkpoint names of their linears:
    experts: dict[str, Experts] = field(default_factory=dict)

    @property
    def called(self) -> dict[str, nn.Module]:
        """The modules that a forward calls: linears outside experts, and experts as a whole."""
        inside: set[nn.Module] = set()
        for experts in self.experts.values():
            inside.update(experts.modules())
        found = {name: linear for name, linear in self.linears.items() if linear not in inside}
        return found | self.experts

    def run(self, batch: int, state: State) -> State:
        """Return the state of batch number `batch` after this block, given its state before it."""
        return self.calls[batch].run(self.module, state)

    def unquantized_copy(self) -> LoadedBlock:
        """Return a block that keeps the present weights when those of this block are replaced.

        Its forward fills other containers than this one, for the copies of later blocks. As its
        experts keep their weights, these may follow each other in memory.
        """
        for mixture in self.experts.values():
            mixture.lay_out()
        tensors = (*self.module.parameters(), *self.module.buffers())
        known: dict[int, Any] = {id(tensor): tensor for tensor in tensors}  # shared, not copied
        module = deepcopy(self.module, known)
        linears = {name: known[id(linear)] for name, linear in self.linears.items()}
        experts = {name: known[id(found)] for name, found in self.experts.items()}
        return LoadedBlock(module, linears, self.calls_of_copy, experts=experts)


class ModelStream:
    """A model that is run block by block: tensors are read before their block and freed after."""

    def __init__(
        self,
        skeleton: Skeleton,
        source: Source,
        device: torch.device,
        dequantized: Collection[str] = (),
    ) -> None:
        """Set up the stream; nothing is read yet.

        `dequantized` are the names of weights that `source` reads as [O, I] even if their module
        holds them [I, O].
        """
        self._model, self._derived, self.device = skeleton.model, skeleton.sources, device
        self.unused = skeleton.unused  # tensors of the checkpoint that the model does not ask for
        self._sources, self._read = skeleton.sources.names, skeleton.sources.reader(source.read)
        self._source = source
        self._dequantized = dequantized
        self._path, self._list = skeleton.blocks_name, skeleton.blocks
        self._blocks = list(skeleton.blocks)
        self._calls: list[list[Call]] = [[] for _ in self._blocks]
        self._calls_of_copies = self._calls
        self._extras: Extras | None = None
        self._loaded: dict[str, nn.Module] = {}  # linears of the block that is loaded
        # The containers of each batch that blocks fill for later blocks, known after `embed`:
        self.carried: list[list[Container]] = []

    @property
    def n_blocks(self) -> int:
        return len(self._blocks)

    @property
    def vocabulary_rows(self) -> int:
        """The number of rows of the embedding: token ids are below it."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the forward passes."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def hidden_size(self) -> int:
        """Features of a hidden state according to the model's config; 0 if it does not tell."""
        return int(getattr(self._model.config.get_text_config(), "hidden_size", 0))

    @property
    def takes_images(self) -> bool:
        """Whether the model has a vision part."""
        return "pixel_values" in signature(self._model.base_model.forward).parameters

    def block_name(self, index: int) -> str:
        return f"{self._path}.{index}"

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Return the linears of one block by checkpoint name, without ".weight"."""
        found = {}
        for name, module in self._blocks[index].named_modules():
            if is_linear(module):
                source = self._sources[f"{self.block_name(index)}.{name}.weight"]
                found[source.removesuffix(".weight")] = module
        return found

    def _experts(self, index: int) -> dict[str, Experts]:
        """Return the experts of one block by the common prefix of their checkpoint names."""
        found = {}
        for name, module in self._blocks[index].named_modules():
            if isinstance(module, Experts):
                first = self._sources[f"{self.block_name(index)}.{name}.0.up_proj.weight"]
                found[first.rpartition(".0.")[0]] = module
        return found

    def all_linears(self) -> dict[str, bool]:
        """Return the checkpoint names of all linears of the blocks and the head.

        The value tells whether the linear is stored [I, O].
        """
        found = {HEAD: False}
        for index in range(self.n_blocks):
            for name, module in self.linears(index).items():
                found[name] = is_transposed(module)
        return found

    def shared_linears(self) -> set[str]:
        """Return the linears that several blocks share; each block would calibrate them again."""
        n_blocks: Counter[str] = Counter()
        for index in range(self.n_blocks):
            n_blocks.update(self.linears(index).keys())
        return {name for name, count in n_blocks.items() if count > 1}

    def biased_experts(self) -> list[str]:
        """Return for each layer of experts with biases the prefix of the names of their linears."""
        found = []
        for index in range(self.n_blocks):
            for name, experts in self._experts(index).items():
                if experts.biased:
                    found.append(name)
        return found

    def outside_linears(self) -> str | None:
        """Return `skeleton.outside_linears` of the blocks."""
        return outside_linears(self._path, self._list)

    def stacked_linears(self) -> dict[str, tuple[str, int, int]]:
        """Return the linears that are slices of one tensor of the checkpoint.

        The value is the name of that tensor, and the rows and columns of the linear.
        """
        slices = self._derived.slices
        found = {}
        for index in range(self.n_blocks):
            for name, module in self.linears(index).items():
                piece = slices.get(f"{name}.weight")
                if piece is not None:
                    found[name] = (piece.stack, *module.get_parameter("weight").shape)
        return found

    def linear_weight(self, name: str, *, transposed: bool) -> Tensor:
        """Return the weight [O, I] of a linear on the device, in its stored dtype.

        `transposed` tells that the model, but not necessarily the file, holds it [I, O]. If the
        block is loaded and holds the stored numbers, the result is a view of its memory, which is
        not read again: do not write into it.
        """
        key = f"{name}.weight"
        source = self._sources.get(key, key)
        stored = self._read(source)
        if name in self._loaded:
            held = self._loaded[name].get_parameter("weight")
            if held.dtype == stored.dtype:
                return held.T if transposed else held
        weight = stored.to(self.device)
        if transposed and source not in self._dequantized:
            weight = weight.T
        return weight

    def embed(self, batches: Sequence[Batch]) -> list[State]:
        """Return the states that enter block 0, for token ids [batch, seqlen] or images each.

        A state is hidden states [batch, seqlen, features], in a tuple if blocks hand on more. The
        arguments of all blocks are recorded on the way. Raise InputError E_ARCH if the blocks are
        not a chain. Everything outside the blocks is in memory, the vision part included.
        """
        base = self._model.base_model
        example = self._inputs(_example(batches))
        self._calls, self._calls_of_copies, self.carried = [[] for _ in self._blocks], [], []
        with self._outside(base):
            self._extras = self._learn_output(example)
            handed_on = check_chain(
                lambda outputs: self._run_recorders(base, example, outputs),
                [self.block_name(index) for index in range(self.n_blocks)],
                self._extras,
                self._recorded(example)[1],
            )
            states: list[State] = []
            for batch in batches:
                recorders, added = self._recorded(self._inputs(batch))
                hidden = recorders[0].first_hidden
                states.append((hidden,) if handed_on else hidden)
                self._keep_calls(recorders, added)
        self._calls_of_copies = with_own_containers(self._calls, {})
        for number in range(len(batches)):
            own = empty_containers([calls[number] for calls in self._calls])
            of_copies = empty_containers([calls[number] for calls in self._calls_of_copies])
            self.carried.append(own + of_copies)
        return states

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the inputs of the model for a batch, on the device.

        A processor may make more than the model takes. Pixels get the dtype of the forward passes.
        """
        if isinstance(batch, Tensor):
            return {"input_ids": batch.to(self.device)}
        taken = signature(self._model.base_model.forward).parameters
        inputs = {}
        for name, value in batch.inputs.items():
            if name not in taken:
                continue
            if value.is_floating_point():
                value = value.to(self.dtype)
            inputs[name] = value.to(self.device)
        return inputs

    def _keep_calls(self, recorders: Sequence[Recorder], added: Sequence[Tensor | None]) -> None:
        """Append the call of each block for one batch; share the tensors that equal the first's."""
        for calls, recorder, features in zip(self._calls, recorders, added, strict=True):
            first = calls[0] if calls else None
            call = replace(recorder.first_call, added=features)
            calls.append(reuse_equal_tensors(call, first))

    def _recorded(self, inputs: dict[str, Tensor]) -> tuple[list[Recorder], list[Tensor | None]]:
        """Return what recorders have seen of one batch.

        Return beside it what the model adds to the hidden states before each block, which shows if
        the recorders return zeros. It adds nothing to text.
        """
        base, nothing = self._model.base_model, [None] * self.n_blocks
        has_images = inputs.keys() != {"input_ids"}
        recorders, _ = self._run_recorders(base, inputs, nothing, zero=has_images)
        if has_images:
            return recorders, added_before_blocks(recorders)
        return recorders, [None] * self.n_blocks

    @contextmanager
    def block(self, index: int, following: int | None = None) -> Iterator[LoadedBlock]:
        """Load block `index` on the device; free its weights at the end.

        Block `following` is read ahead, which is the next one if it is None.
        """
        module = self._blocks[index]
        if following is None:
            following = index + 1
        with self._filled(module, f"{self.block_name(index)}."):
            self._source.prefetch(dict.fromkeys(self._stored(following)))
            self._loaded = self.linears(index)
            try:
                yield LoadedBlock(
                    module,
                    self._loaded,
                    self._calls[index],
                    self._calls_of_copies[index],
                    self._experts(index),
                )
            except BaseException:
                self._source.prefetch(())
                raise
            finally:
                self._loaded = {}

    def _stored(self, index: int) -> Iterator[str]:
        """Yield the tensors of the checkpoint for block `index`; none beyond the blocks."""
        if index < 0:
            return
        for block in self._blocks[index : index + 1]:
            for name in block.state_dict():
                yield from self._derived.stored(self._sources[f"{self.block_name(index)}.{name}"])

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor, State], Tensor]]:
        """Yield a function (token ids, state after the last block) -> logits.

        Logits are [batch, seqlen, vocabulary]. The function runs the model's own forward with the
        state as the output of the last block, so that final norms, scaling and capping of logits
        are the model's own.
        """

        def logits(ids: Tensor, state: State) -> Tensor:
            outputs = [*[None] * (self.n_blocks - 1), state]
            inputs = {"input_ids": ids.to(self.device)}
            _, output = self._run_recorders(self._model, inputs, outputs)
            found: Tensor = output.logits
            return found

        with self._outside(self._model, vision=False):  # its work went into the states
            yield logits

    def block_bytes(self, index: int) -> int:
        """Return the bytes of the weights of a block on the device."""
        return self._bytes(self._blocks[index], f"{self.block_name(index)}.")

    def outside_bytes(self) -> int:
        """Return the bytes of the weights outside the blocks: embeddings, norms, the head."""
        return self._bytes(self._model, "", without=(f"{self._path}.",))

    def _bytes(self, module: nn.Module, prefix: str, without: tuple[str, ...] = ()) -> int:
        sizes = {}  # by source: tied parameters share one tensor
        for name, tensor in _parameters(module, prefix, without).items():
            sizes[self._sources[f"{prefix}{name}"]] = tensor.nbytes
        return sum(sizes.values())

    @contextmanager
    def whole(self, n_kept: int) -> Iterator[Any]:
        """Yield the model of transformers, which runs its blocks itself.

        The weights of the first `n_kept` blocks stay on the device. Each of the others is read when
        it is called, and its weights are freed after the call.
        """
        with ExitStack() as stack:
            stack.enter_context(self._outside(self._model))
            for index in range(n_kept):
                stack.enter_context(self._filled(self._blocks[index], f"{self.block_name(index)}."))
            for index in range(n_kept, self.n_blocks):
                stack.enter_context(self._filled_when_called(index))
            yield self._model

    @contextmanager
    def _filled_when_called(self, index: int) -> Iterator[None]:
        block, filled = self._blocks[index], ExitStack()

        def fill(*_: object) -> None:
            filled.enter_context(self._filled(block, f"{self.block_name(index)}."))
            self._source.prefetch(dict.fromkeys(self._stored(index + 1)))

        def free(*_: object) -> None:
            filled.close()

        before = block.register_forward_pre_hook(fill)
        after = block.register_forward_hook(free, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            filled.close()

    @property
    def output_linear(self) -> nn.Module:
        """The module that turns hidden states into logits."""
        module: nn.Module = self._model.get_output_embeddings()
        return module

    def _learn_output(self, inputs: dict[str, Tensor]) -> Extras | None:
        """Run the first block; return its outputs beside hidden states, None if there are none."""
        outputs: list[object] = []

        def stop(_module: nn.Module, _args: object, output: object) -> None:
            outputs.append(output)
            raise _FirstBlockDone

        first = self._blocks[0]
        handle = first.register_forward_hook(stop)
        try:
            with self._filled(first, f"{self.block_name(0)}."), suppress(_FirstBlockDone):
                self._model.base_model(**inputs, use_cache=False)
        finally:
            handle.remove()
        if not outputs:
            raise InputError("E_ARCH", f"the model's forward never calls `{self.block_name(0)}`")
        output = outputs[0]
        if isinstance(output, tuple | list):
            return tuple(output[1:])
        return None

    def _run_recorders(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        outputs: Sequence[State | None],
        *,
        zero: bool = False,
    ) -> tuple[list[Recorder], Any]:
        """Run `model` on `inputs` with recorders in place of its blocks.

        The recorders return `outputs` (None: their input), or zeros with `zero`. Return them and
        the model's output.
        """
        recorders: list[Recorder] = []
        before = None
        for block, output in zip(self._blocks, outputs, strict=True):
            recorder = Recorder(block, self._extras, before)
            recorder.inject = output
            recorder.zero = zero
            recorders.append(recorder)
            before = recorder
        for index, recorder in enumerate(recorders):
            self._list[index] = recorder
        try:
            result = model(**inputs, use_cache=False)
        finally:
            for index, block in enumerate(self._blocks):
                self._list[index] = block
        return recorders, result

    @contextmanager
    def _outside(self, module: nn.Module, *, vision: bool = True) -> Iterator[None]:
        """Fill everything of `module` but the blocks, with the vision part or without it."""
        without = [f"{self._path}."]
        if not vision and self.takes_images:
            without.append(f"{self._name_of(self._model.get_encoder(modality='image'))}.")
        name = self._name_of(module)
        prefix = f"{name}." if name else ""
        with self._filled(module, prefix, without=tuple(without)):
            yield

    def _name_of(self, module: nn.Module) -> str:
        name: str
        (name,) = [name for name, found in self._model.named_modules() if found is module]
        return name

    @contextmanager
    def _filled(
        self, module: nn.Module, prefix: str, without: tuple[str, ...] = ()
    ) -> Iterator[None]:
        """Fill `module`, whose names begin with `prefix`; make it empty again at the end.

        Parameters whose full names begin with one of `without` are not filled.
        """
        empty = _parameters(module, prefix, without)
        try:
            self._fill(module, prefix, empty)
            yield
            self._source.check_unchanged()  # weights may be a file's own pages until now
        finally:
            for name, tensor in empty.items():
                place(module, name, tensor)
            self._source.release()

    def _fill(self, module: nn.Module, prefix: str, empty: Mapping[str, Tensor]) -> None:
        """Fill `module`, whose `empty` parameters are given by name.

        Nothing else holds the weights then: whoever replaces one frees its memory.
        """
        loaded: dict[str, Tensor] = {}  # by source: tied parameters share one tensor
        for name, tensor in empty.items():
            source = self._sources[f"{prefix}{name}"]
            if source not in loaded:
                owner = module.get_submodule(name.rpartition(".")[0])
                loaded[source] = self._load(source, owner, tensor)
            place(module, name, loaded[source])

    def _load(self, source: str, owner: nn.Module, like: Tensor) -> Tensor:
        """Return tensor `source` on the device, for a parameter `like` of the module `owner`.

        Raise InputError E_CKPT_SHAPE if its shape is not that of `like`.
        """
        tensor = self._read(source)
        if source in self._dequantized and is_transposed(owner):
            tensor = tensor.T
        if tensor.shape != like.shape:
            raise InputError(
                "E_CKPT_SHAPE",
                f"`{source}` is {list(tensor.shape)} in the checkpoint, "
                f"{list(like.shape)} in config.json",
            )
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype, non_blocking=tensor.is_pinned())


def _example(batches: Sequence[Batch]) -> Batch:
    """Return a batch of one window: one with images if there is any."""
    for batch in batches:
        if not isinstance(batch, Tensor):
            return batch
    first = batches[0]
    assert isinstance(first, Tensor)
    return first[:1]


def _parameters(module: nn.Module, prefix: str, without: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the stored tensors of `module` whose full names begin with none of `without`."""
    found = {}
    for name, tensor in module.state_dict().items():
        if not f"{prefix}{name}".startswith(without):
            found[name] = tensor
    return found


class Source(Protocol):
    """Reader of the weights."""

    def read(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint; its memory may be the file's own pages."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Expect reads of `names`, in place of the names of the call before."""

    def check_unchanged(self) -> None:
        """Raise InputError if a file has changed since it was first read."""

    def release(self) -> None:
        """Close all files."""


class ReadAhead:
    """A source that reads expected tensors ahead into pinned memory, up to `most_bytes`.

    The others are read on demand. A copy from pinned memory to a device runs in parallel with the
    host's work, and the thread that reads runs in parallel with both.
    """

    def __init__(self, source: Source, most_bytes: int) -> None:
        self._source, self._most_bytes = source, most_bytes
        self._thread = ThreadPoolExecutor(1, "reader")
        self._ahead: dict[str, Future[Tensor | None]] = {}

    def read(self, name: str) -> Tensor:
        """Return the tensor, in pinned memory if it was expected and fits."""
        if name in self._ahead:
            pinned = self._ahead[name].result()
            if pinned is not None:
                return pinned
        return self._source.read(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Drop the tensors that were expected before, and start to read `names`."""
        names = list(names)
        for future in self._ahead.values():
            future.cancel()
        self._source.prefetch(names)
        budget = _Budget(self._most_bytes)
        self._ahead = {name: self._thread.submit(self._fetch, name, budget) for name in names}

    def check_unchanged(self) -> None:
        """Check the files of the source."""
        self._source.check_unchanged()

    def release(self) -> None:
        """Close the files of the source."""
        self._source.release()

    def _fetch(self, name: str, budget: _Budget) -> Tensor | None:
        """Return the tensor in pinned memory, None if it does not fit."""
        tensor = self._source.read(name)
        if not budget.reserve(tensor.nbytes):
            return None
        try:
            return tensor.pin_memory()
        except RuntimeError:  # the system pins no more memory: the tensor is copied unpinned
            return None


class _Budget:
    """A number of bytes that can be reserved."""

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes

    def reserve(self, n_bytes: int) -> bool:
        """Reserve `n_bytes`; return whether they were available."""
        if n_bytes > self._left:
            return False
        self._left -= n_bytes
        return True
