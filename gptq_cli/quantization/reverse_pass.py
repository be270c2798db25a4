"""The unquantized model forward and in reverse, with one block in memory at a time.

`ReversePass` runs some pieces of text through the model, block by block, and keeps the hidden
states before every block on the disk. At the end each token gets a label, which is drawn from the
model's own prediction. The gradient of the log-likelihood of all labels is taken at the last hidden
states. Then the blocks run again in reverse, each from its hidden states, and pass the gradient
back. What is done with the gradients at the outputs of linears is up to its subclasses: they are
summed for loss-aware layers (`gradients.py`), or give the harms of widths (`allocation/harms.py`).

With labels of the model itself, the gradients g of a token give the Fisher information g gᵀ
(Martens 2014, arXiv 1412.1193), and no error of the model is in it.

A step is a block forward, the output head, or a block in reverse. Each step is durable when it
ends, so that a pass which was interrupted resumes at the next one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gptq_cli.config.layer import expert_part, keeping
from gptq_cli.events import PhaseStarted, Report, StepsDone, Warned
from gptq_cli.files import is_file
from gptq_cli.models.block_calls import Call, State
from gptq_cli.models.skeleton import place
from gptq_cli.models.stream import Batch, LoadedBlock, token_ids
from gptq_cli.planning.estimate import GRADIENT_TOKENS, LOGITS_AT_ONCE, TOKENS_OF_A_PIECE
from gptq_cli.quantization.resume import save_tensors
from gptq_cli.quantization.run_state import Run
from gptq_cli.runtime.memory import gpu_lost, out_of_memory
from gptq_cli.storage.durable import make_directory, remove, write_json
from gptq_cli.storage.manifest import Entry, Journal, file_hash, read_sealed, sealed
from gptq_cli.storage.work_directory import JOURNAL

SEED = "seed.json"  # the file with the seed of a pass
Item = TypeVar("Item")
Logits = Callable[[Tensor, State], Tensor]
Note = Callable[[str, Tensor, Tensor], None]  # name, inputs, gradient


class NoGradientError(Exception):
    """The gradient of the model cannot be computed block by block; `hint` says what helps."""

    def __init__(self, why: str, hint: str | None = None) -> None:
        super().__init__(why)
        self.hint = hint


class PassStore:
    """The files of a pass in `directory`, and the journal of its finished steps.

    A line of the journal has the hashes of the files that a step has written, the names of those
    that are not needed after it, and what the step has found. They are removed after the next step:
    if the line is damaged, the pass resumes at the step before it. `seed` is the hash of what all
    files depend on: those of another pass are discarded. If a file that is needed is not as it was
    written, the pass starts over. Damage is reported as W_RESUME_DAMAGED.
    """

    def __init__(self, directory: Path, seed: str, report: Report) -> None:
        self.directory, self._report = directory, report
        self._hashes: dict[str, str] = {}  # of the files that are needed
        self._needless: list[str] = []  # files that the last step needed
        self._journal = Journal(directory / JOURNAL, seed)
        for entry in self._journal.entries:
            self._note(entry)
        usable = self._is_of(seed) and self._is_intact()
        if not usable or not self.n_steps:
            self._begin(seed)
        elif self._journal.damaged_bytes:
            self._journal.cut(self.n_steps)  # so that no later call reports them again

    def _is_of(self, seed: str) -> bool:
        """Return whether the files are those of this pass; report those of another one."""
        path = self.directory / SEED
        if not is_file(path) and not self._has_lines():
            return False
        found = read_sealed(path)
        if found is None or "seed" not in found:
            self._warn(f"`{SEED}` is not as it was written: the run repeats the pass")
            return False
        if found["seed"] == seed:
            return True
        text = f"discarding the unfinished pass for gradients in `{self.directory}`"
        why = "the settings, the model or the text are not those of that pass"
        self._report(Warned("W_RESUME_DROPPED", f"{text}: {why}"))
        return False

    def _has_lines(self) -> bool:
        return bool(self._journal.entries or self._journal.damaged_bytes)

    def _is_intact(self) -> bool:
        """Return whether the pass can go on after the finished steps; report damage, once."""
        n_damaged, wrong = self._journal.damaged_bytes, self._wrong_file()
        if n_damaged:
            repeated = "what they stand for"
            if wrong is not None:
                repeated = "the pass"
            damaged = f"the last {n_damaged} bytes of its journal are not valid"
            self._warn(f"{damaged}: the run repeats {repeated}")
        elif wrong is not None:
            self._warn(f"`{wrong}` is not as it was written: the run repeats the pass")
        return wrong is None

    def _wrong_file(self) -> str | None:
        """Return the name of a file that is missing or not as it was written; None if none is."""
        if not is_file(self.directory / JOURNAL):
            return JOURNAL
        for name, known in self._hashes.items():
            path = self.directory / name
            if not is_file(path) or file_hash(path) != known:
                return name
        return None

    def _warn(self, text: str) -> None:
        self._report(Warned("W_RESUME_DAMAGED", f"gradients in `{self.directory}`: {text}"))

    def _begin(self, seed: str) -> None:
        """Discard what an earlier call has left; the journal goes first."""
        remove(self.directory / JOURNAL)
        remove(self.directory)
        make_directory(self.directory, 0o700)
        self._journal = Journal(self.directory / JOURNAL, seed)
        self._journal.begin()
        write_json(self.directory / SEED, sealed({"seed": seed}))
        self._hashes, self._needless = {}, []

    def _note(self, entry: Entry) -> None:
        self._hashes |= entry["files"]
        self._needless = entry["needless"]
        for name in self._needless:
            self._hashes.pop(name, None)

    @property
    def n_steps(self) -> int:
        """How many steps are finished."""
        return len(self._journal.entries)

    @property
    def found(self) -> list[Any]:
        """What the finished steps have found."""
        return [entry["found"] for entry in self._journal.entries]

    def read(self, name: str) -> Any:
        """Return the tensors of a file, on the host; those that are not used are not read."""
        return torch.load(self.directory / name, map_location="cpu", weights_only=True, mmap=True)

    def finish(self, files: Mapping[str, Any], needless: Sequence[str], found: Any) -> None:
        """Make a step durable: its `files` of tensors, and what it has `found`, plain values.

        The files that are `needless` from now on are removed after the next step.
        """
        before, hashes = self._needless, {}
        for name, content in files.items():
            hashes[name] = save_tensors(self.directory / name, content)
        entry = {"files": hashes, "needless": list(needless), "found": found}
        self._journal.append(entry)
        self._note(entry)
        for name in before:
            remove(self.directory / name)

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()


class ReversePass(ABC):
    """A pass over this process's share of `pieces`, which has no pieces if there are few.

    `ahead` are batches of this process that subclasses run through each block before its pieces.
    `store` is None on processes that write nothing. `found` has what each finished step has found.
    """

    def __init__(
        self,
        run: Run,
        pieces: Sequence[Batch],
        store: PassStore | None,
        ahead: Sequence[Batch] = (),
        report: Report | None = None,
    ) -> None:
        self.run, self.stream, self.ranks, self.store = run, run.stream, run.ranks, store
        self._report = report or run.report
        self.n_pieces, self.n_blocks = len(pieces), run.stream.n_blocks
        self.share = run.ranks.part(self.n_pieces)
        self.pieces, self.ahead = pieces[self.share.start : self.share.stop], ahead
        self.tokens = sum(token_ids(piece).numel() for piece in pieces)
        earlier = pieces[: self.share.start]
        self._first_token = sum(token_ids(piece).numel() for piece in earlier)
        self.n_steps = 2 * self.n_blocks + 1  # the output head is one
        self._before = 0  # the steps that were done when the present phase began
        self.found: list[Any] = []
        self.states: list[Tensor] = []  # of the pieces, before the next block
        self._gradients: list[Tensor] = []  # at the states after the next block in reverse

    # ------------------------------------------------------------ what subclasses do

    def embedded(self, states: Sequence[State]) -> None:
        """Take the states of the batches `ahead` before the first block."""
        del states

    def resumed(self, n_steps: int) -> None:
        """Take up what was written by the first `n_steps` steps."""
        del n_steps

    def forward_block(self, index: int, block: LoadedBlock) -> tuple[dict[str, Any], list[str]]:
        """Work on a block before the pieces pass it forward.

        Return the files of it, and the names of those that are not needed after it.
        """
        del index, block
        return {}, []

    def at_the_head(self) -> tuple[Any, list[str]]:
        """Work on the output head before the gradients are taken there.

        Return what was found, and the names of the files that are not needed after it.
        """
        return None, []

    @abstractmethod
    def reverse_block(self, index: int) -> Sequence[str]:
        """Prepare for a block in reverse; return the linears whose outputs need gradients."""

    @abstractmethod
    def note(self, piece: int, name: str, inputs: Tensor, gradient: Tensor) -> None:
        """Take the inputs [..., I] of a call of a linear, and the gradient [..., O] at its outputs.

        `piece` is counted in this process.
        """

    @abstractmethod
    def end_block(self, index: int) -> tuple[dict[str, Any], list[str], Any]:
        """Return the files of a block in reverse, those not needed after it, and what was found."""

    # ------------------------------------------------------------ the pass

    def carry_out(self) -> None:
        """Do the steps that are not finished.

        Raises NoGradientError on all processes if the gradient cannot be computed. Tensors must not
        be made in inference mode: a backward pass cannot use them.
        """
        self._embed()
        done, n_blocks = self._resume(), self.n_blocks
        if done < n_blocks:
            self._tell("forward", done)
        for index in range(done, n_blocks):
            self._timed(partial(self._forward, index))
        if done < self.n_steps:
            self._tell("backward, from the output head on", max(done, n_blocks))
        if done <= n_blocks:
            self._timed(self._at_the_end)
        for index in reversed(range(min(n_blocks, self.n_steps - done))):
            self._timed(partial(self._backward, index))

    def _tell(self, what: str, done: int) -> None:
        """Report a phase, before which `done` steps are done."""
        self._before = done
        self._report(PhaseStarted("gradients", f"{self.tokens:,} tokens {what}"))

    def _timed(self, step: Callable[[], None]) -> None:
        """Do a step, unless the limits of time or memory end the run before it."""
        self.run.limits.check_time_together(self.ranks, "step")
        self.run.budget.memory.check_host()
        started = time.perf_counter()
        step()
        self.run.limits.add_block(time.perf_counter() - started)

    def _embed(self) -> None:
        """Take the hidden states before the first block."""
        states: list[State] = []
        batches = [*self.ahead, *self.pieces]
        if batches:
            with torch.inference_mode():  # some models change their weights in place (rwkv)
                states = self.stream.embed(batches)
        why = None
        if any(isinstance(state, tuple) for state in states) or any(self.stream.carried):
            why = "its blocks hand on more than hidden states"
        self._agree(why)
        self.embedded(states[: len(self.ahead)])
        self.states = [_hidden(state) for state in states[len(self.ahead) :]]

    def _resume(self) -> int:
        """Take up what an earlier call has written; return how many steps are finished."""
        found = None
        if self.store is not None:
            found = self.store.found
        self.found = self.ranks.broadcast(found)
        done = len(self.found)
        if not 0 < done < self.n_steps:
            return done
        finished = f"{done} of {self.n_steps} steps of the pass for gradients are finished"
        self._report(PhaseStarted("resume", finished))
        if done <= self.n_blocks:
            self.states = self._read(_states(done))
        else:
            self._gradients = self._read(_gradients(self.n_steps - done))
        self.resumed(done)
        return done

    def _read(self, name: str) -> list[Tensor]:
        """Return the tensors of this process's pieces, on the host."""
        saved = None
        if self.store is not None:
            saved = self.store.read(name)
        return self.ranks.scatter(saved, self.n_pieces)

    def _finish(
        self,
        of_pieces: Mapping[str, Sequence[Tensor]],
        files: Mapping[str, Any],
        needless: Sequence[str],
        found: Any,
    ) -> None:
        """Make a step durable: tensors of the pieces of all processes, and other files."""
        self.found.append(found)
        gathered = {name: self.ranks.gather(tensors) for name, tensors in of_pieces.items()}
        if self.store is not None:
            self.store.finish({**files, **gathered}, needless, found)

    def _forward(self, index: int) -> None:
        """Run the pieces through a block, and keep their states."""
        states = {}
        if index == 0:
            states[_states(0)] = [*self.states]
        with self._block(index, index + 1) as block:
            files, needless = self.forward_block(index, block)
            for number, state in self._counted(self.states, index):
                on_device = state.to(self.stream.device)
                self.states[number] = _hidden(block.run(len(self.ahead) + number, on_device))
        states[_states(index + 1)] = self.states
        self._finish(states, files, needless, None)

    def _counted(self, items: Sequence[Item], done: int) -> Iterator[tuple[int, Item]]:
        """Yield the items of a step with their numbers, and report each that was worked on.

        `done` steps were finished before this one.
        """
        for number, item in enumerate(items):
            yield number, item
            part = (number + 1) / len(items)
            self._report(StepsDone(done + part, self.n_steps, self._before))
        if not items:  # other processes have them
            self._report(StepsDone(done + 1, self.n_steps, self._before))

    def _at_the_end(self) -> None:
        """Take the gradient at the hidden states after the last block, for labels drawn there."""
        found, needless = self.at_the_head()
        with self.stream.head() as logits:
            self.together(partial(self._differentiate_head, logits))
        self.states = []
        gradients = {_gradients(self.n_blocks): self._gradients}
        self._finish(gradients, {}, [_states(self.n_blocks), *needless], found)

    def _differentiate_head(self, logits: Logits) -> None:
        # The same numbers on every type of device and for every number of processes
        random = torch.Generator().manual_seed(self.run.config.seed)
        drawn = torch.rand(self.tokens, generator=random)[self._first_token :]
        self._gradients = []
        with differentiating("the output head"):
            for _, state in self._counted(self.states, self.n_blocks):
                parts = self.parts_for_logits(state)
                found = []
                for few in parts:
                    uniform, drawn = drawn.split([len(few), len(drawn) - len(few)])
                    found.append(gradient_of_labels(logits, few, uniform))
                self._gradients.append(torch.cat(found).view(state.shape))

    def parts_for_logits(self, state: Tensor) -> Sequence[Tensor]:
        """Split the states of a piece into [n, features], on the device, with few logits each.

        No part is longer than a window, which may be as long as the model takes.
        """
        most = min(state.shape[1], LOGITS_AT_ONCE // self.stream.vocabulary_rows)
        parts: Sequence[Tensor] = state.to(self.stream.device).flatten(0, 1).split(max(1, most))
        return parts

    def _backward(self, index: int) -> None:
        """Run the pieces through a block again, and pass their gradients back."""
        states = self._read(_states(index))
        with self._block(index, index - 1) as block:
            names = self.reverse_block(index)
            self.together(partial(self._reverse, index, block, states, names))
        files, needless, found = self.end_block(index)
        needless = [_states(index), _gradients(index + 1), *needless]
        self._finish({_gradients(index): self._gradients}, files, needless, found)

    def _reverse(
        self, index: int, block: LoadedBlock, states: Sequence[Tensor], names: Sequence[str]
    ) -> None:
        done = 2 * self.n_blocks - index
        for number, state in self._counted(states, done):
            on_device = state.to(self.stream.device)
            gradient = self._gradients[number].to(self.stream.device)
            call, note = block.calls[len(self.ahead) + number], partial(self.note, number)
            with differentiating(f"`{self.stream.block_name(index)}`"):
                before = differentiate(block, call, on_device, gradient, names, note)
            self._gradients[number] = before

    def together(self, work: Callable[[], None]) -> None:
        """Do `work`; raise NoGradientError on all processes if one of them does."""
        why, hint = None, None
        try:
            work()
        except NoGradientError as error:
            why, hint = str(error), error.hint
        self._agree(why, hint)

    def _agree(self, why: str | None, hint: str | None = None) -> None:
        """Raise NoGradientError on all processes if one of them has a reason."""
        for its_reason, its_hint in self.ranks.all_gather([(why, hint)]):
            if its_reason is not None:
                raise NoGradientError(its_reason, its_hint)

    @contextmanager
    def _block(self, index: int, following: int) -> Iterator[LoadedBlock]:
        """Load a block, whose tensors a backward pass can use; `following` is the next one."""
        with ExitStack() as stack:
            if not self.pieces and not self.ahead:  # nothing to run here: only the sums of others
                yield LoadedBlock(nn.Module(), {}, [])
                return
            block = stack.enter_context(self.stream.block(index, following))
            for name, buffer in list(block.module.named_buffers()):
                if buffer.is_inference():
                    place(block.module, name, buffer.clone())
            yield block


def _states(index: int) -> str:
    """Return the name of the file with the hidden states before block `index`."""
    return f"states-{index}"


def _gradients(index: int) -> str:
    """Return the name of the file with the gradients at the hidden states before block `index`."""
    return f"gradients-{index}"


def pieces_of(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first windows of the text, up to GRADIENT_TOKENS, in pieces of few tokens.

    There is at least one window. The windows of a piece have equal lengths; a window with images is
    a piece of its own.
    """
    pieces: list[Batch] = []
    left = GRADIENT_TOKENS
    for batch in batches:
        if left <= 0:
            break
        if not isinstance(batch, Tensor):
            pieces.append(batch)
            left -= batch.ids.numel()
            continue
        length = batch.shape[1]
        n_windows = max(1, left // length)
        for piece in batch[:n_windows].split(max(1, TOKENS_OF_A_PIECE // length)):
            pieces.append(piece)
            left -= piece.numel()
        if n_windows < len(batch):
            break  # later batches would leave a gap
    return pieces


def gradient_of_labels(logits: Logits, states: Tensor, uniform: Tensor) -> Tensor:
    """Return the gradient [n, features] of the log-likelihood of a label for each of n states.

    `logits` are those of `ModelStream.head`. The label of a state is the first one whose cumulated
    probability is more than its number in `uniform` [n].
    """
    with torch.enable_grad():
        hidden = states[None].clone().requires_grad_()
        # Of the token ids the head needs the number only.
        ids = torch.zeros(1, len(states), dtype=torch.long)
        likelihoods = logits(ids, hidden)[0].float().log_softmax(-1)
        labels = drawn_labels(likelihoods.detach(), uniform.to(likelihoods.device))
        chosen = likelihoods.gather(-1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, hidden)
    return gradient[0]


def drawn_labels(likelihoods: Tensor, uniform: Tensor) -> Tensor:
    """Return int64 [n], for each row the first label that cumulates more than `uniform` [n].

    `likelihoods` [n, vocabulary] are logarithms of probabilities.
    """
    cumulated = likelihoods.exp().cumsum(-1)
    wanted = uniform[:, None] * cumulated[:, -1:]
    labels = torch.searchsorted(cumulated, wanted, right=True)[:, 0]
    return labels.clamp(max=likelihoods.shape[-1] - 1)


def differentiate(
    block: LoadedBlock,
    call: Call,
    state: Tensor,
    gradient: Tensor,
    names: Sequence[str],
    note: Note,
) -> Tensor:
    """Return the gradient at the input `state` of a block, given the one at its output.

    `note` gets the inputs and the gradient at the outputs of each call of the linears `names`.
    Raises NoGradientError if one of them has no part in the output, except experts, which may get
    no token.
    """
    reached: set[str] = set()

    def watch(name: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach()

        def take(received: Tensor) -> None:
            reached.add(name)
            note(name, inputs, received)

        # A hook of the tensor sees the gradient of the output itself, even if it is changed later.
        if output.requires_grad:
            output.register_hook(take)

    handles = []
    for name in names:
        handles.append(block.linears[name].register_forward_hook(partial(watch, name)))
    try:
        with torch.enable_grad():
            hidden = state.clone().requires_grad_()
            output = _hidden(differentiable(call).run(block.module, hidden))
            (before,) = torch.autograd.grad(output, hidden, gradient)
    finally:
        for handle in handles:
            handle.remove()
    without = [name for name in names if name not in reached and expert_part(name) is None]
    if without:
        kept = keeping(sorted(without), in_all_blocks=True)
        why = f"no gradient reaches the outputs of `{'`, `'.join(sorted(without))}`"
        raise NoGradientError(why, f"keep such layers ({kept.option})")
    found: Tensor = before
    return found


def differentiable(call: Call) -> Call:
    """Return the call with copies of its tensors that were made in inference mode."""

    def usable(tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            return tensor.clone()
        return tensor

    args = tree_map_only(Tensor, usable, call.args)
    kwargs = tree_map_only(Tensor, usable, call.kwargs)
    return Call(args, kwargs, call.positional, call.added)


def not_finite(name: str, dtype: torch.dtype) -> NoGradientError:
    """Return the error for a linear whose gradients hold NaN or infinity in `dtype`."""
    why = f"the gradient at the outputs of `{name}` is not finite"
    if dtype == torch.float32:
        return NoGradientError(why)
    return NoGradientError(why, "run the model in float32: --dtype float32")


def _hidden(state: Any) -> Tensor:
    found: Tensor = tree_leaves(state)[0]
    return found


@contextmanager
def differentiating(what: str) -> Iterator[None]:
    """Turn an error of the model's own code, or of torch about it, into NoGradientError."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error) or gpu_lost(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise NoGradientError(f"{what} cannot be differentiated: {reason}") from error
