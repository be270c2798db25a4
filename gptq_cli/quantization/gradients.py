"""The gradients of the model's loss at the outputs of linears, which loss-aware rounding needs.

`sum_gradients` runs before the block loop, with one block in memory at a time:

1. The unquantized model runs over the first windows of the text. The hidden states before every
   block are kept on the disk.
2. At the end each token gets a label, which is drawn from the model's own prediction. The gradient
   of the log-likelihood of all labels is taken at the last hidden states.
3. The blocks run again in reverse, each from its hidden states, and pass the gradient back. For
   each loss-aware linear the energy ‖g‖² of the gradient g of each token is written, and for most
   of them G = Σ g gᵀ [O, O].

With labels of the model itself, G is a factor of the Fisher information (Martens 2014, arXiv
1412.1193), and no error of the model is in it. The sums are Hessians of gradients: tokens are
limited, and batches are added in an order that does not depend on the number of processes. A run
that resumes uses them if they are complete and of the same run; otherwise they are summed anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gptq_cli.config.layer import keeping
from gptq_cli.errors import InputError
from gptq_cli.events import BlocksDone, PhaseStarted, Report, Warned
from gptq_cli.files import is_file
from gptq_cli.models.block_calls import Call
from gptq_cli.models.skeleton import place
from gptq_cli.models.stream import Batch, LoadedBlock, token_ids
from gptq_cli.planning.estimate import GRADIENT_TOKENS, LOGITS_AT_ONCE, TOKENS_OF_A_PIECE
from gptq_cli.planning.run_plan import LayerPlan
from gptq_cli.quantization.resume import Identity, save_tensors
from gptq_cli.quantization.run_state import OutputGradients, Run
from gptq_cli.runtime.memory import gpu_lost, out_of_memory
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.hessian import HessianAccumulator, HessianOfBatches, factors_of_tokens
from gptq_cli.storage.durable import make_directory, remove, write_json
from gptq_cli.storage.manifest import digest, file_hash, read_sealed, sealed
from gptq_cli.storage.work_directory import SEAL, WorkDirectory

Item = TypeVar("Item")
WITHOUT = "leave out loss_aware (--no-loss-aware)"


def sum_gradients(run: Run, work: WorkDirectory | None, identity: Identity) -> None:
    """Give `run` the gradients of its loss-aware layers, summed now or by an earlier call.

    `work` is None on processes that write nothing. Raises InputError E_GRADIENT if the gradient of
    the model cannot be computed block by block, or is not finite.
    """
    store = None
    if work is not None:
        store = GradientStore(work.gradients, digest(identity))
    known = None
    if store is not None:
        known = store.tokens(run.report)
    pieces = pieces_of(run.batches)
    tokens = run.ranks.broadcast(known or 0)
    if tokens:
        run.report(PhaseStarted("resume", "using the gradients of an earlier call"))
    else:
        tokens = sum(token_ids(piece).numel() for piece in pieces)
        # Tensors that are made in inference mode cannot be used by a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            _Pass(run, pieces, store).carry_out(tokens)
    sizes = [token_ids(batch).numel() for batch in run.batches]
    run.gradients = SummedGradients(run.ranks, run.stream.device, store, tokens, sizes)


@dataclass(frozen=True, slots=True)
class SummedGradients:
    """The gradients of all loss-aware layers over `tokens`, which the leader has in its `store`.

    `sizes` are the numbers of tokens of all batches, which may be more.
    """

    ranks: Ranks
    device: torch.device
    store: GradientStore | None
    tokens: int
    sizes: Sequence[int]

    def of(self, layer: LayerPlan) -> OutputGradients:
        """Return the gradients of a layer, on the device of every process; all of them must ask."""
        found = None
        if self.store is not None:
            found = self.store.read(layer)
        sums = self.ranks.broadcast(found).to(self.device)
        return OutputGradients(sums, self.tokens)

    def factors(self, layers: Sequence[LayerPlan]) -> Sequence[Tensor]:
        """Return the factors of tokens [n] for each batch, for layers with the same inputs.

        There are none if some layer is not loss-aware, or does not see each token once. Tokens
        behind those of the pass count as the median token. All processes must ask for it.
        """
        if not all(layer.is_loss_aware for layer in layers):
            return ()
        found = None
        if self.store is not None:
            found = self.store.energies(layers)
        energies = self.ranks.broadcast(found)
        if not len(energies):
            return ()
        of_all = torch.ones(sum(self.sizes), device=self.device)
        of_all[: self.tokens] = factors_of_tokens(energies.to(self.device))
        factors: Sequence[Tensor] = of_all.split(self.sizes)
        return factors


class GradientStore:
    """The files of the pass in `directory`: sums of each block, and hidden states meanwhile.

    `seed` is the hash of what the sums depend on.
    """

    def __init__(self, directory: Path, seed: str) -> None:
        self._directory, self._seed = directory, seed
        self._seal = directory / SEAL
        self._hashes: dict[str, str] = {}

    def tokens(self, report: Report) -> int | None:
        """Return the number of tokens in the sums of an earlier call; None if there are none.

        If complete sums are not as they were written, they count as none, and W_RESUME_DAMAGED is
        reported.
        """
        if not is_file(self._seal):
            return None
        found = read_sealed(self._seal)
        if found is not None and found.get("seed") != self._seed:
            return None
        if found is None or not self._are_intact(found["files"]):
            text = f"the gradients in `{self._directory}` are not as they were written"
            report(Warned("W_RESUME_DAMAGED", f"{text}: the run repeats the pass for them"))
            return None
        return int(found["tokens"])

    def _are_intact(self, hashes: Mapping[str, str]) -> bool:
        """Return True if each file is here with the hash that is known."""
        for name, known in hashes.items():
            path = self._directory / name
            if not is_file(path) or file_hash(path) != known:
                return False
        return True

    def begin(self) -> None:
        """Discard what an earlier call has left."""
        remove(self._seal)
        remove(self._directory)
        make_directory(self._directory, 0o700)

    def save_states(self, block: int, states: Sequence[Tensor] | None) -> None:
        """Write the hidden states of all pieces before a block."""
        assert states is not None
        save_tensors(self._states(block), list(states))

    def take_states(self, block: int) -> list[Tensor]:
        """Return the hidden states before a block, on the host, and remove their file."""
        states: list[Tensor] = torch.load(self._states(block), weights_only=True)
        remove(self._states(block))
        return states

    def save(self, block: int, sums: Mapping[str, Tensor], energies: Mapping[str, Tensor]) -> None:
        """Write the sums and the energies of the linears of a block, by name."""
        path = self._sums(block)
        self._hashes[path.name] = save_tensors(path, (dict(sums), dict(energies)))

    def finish(self, tokens: int) -> None:
        """Record that the sums are complete."""
        content = {"seed": self._seed, "files": self._hashes, "tokens": tokens}
        write_json(self._seal, sealed(content))

    def read(self, layer: LayerPlan) -> Tensor:
        """Return the sum of a layer, on the host."""
        sums, _ = self._load(layer.block)
        return sums[layer.name].clone()

    def energies(self, layers: Sequence[LayerPlan]) -> Tensor:
        """Return the energies [tokens], summed over layers of a block; [0] if one has none."""
        _, energies = self._load(layers[0].block)
        found = []
        for layer in layers:
            if layer.name not in energies:
                return torch.zeros(0)
            found.append(energies[layer.name])
        return torch.stack(found).sum(0)

    def _load(self, block: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found: tuple[dict[str, Tensor], dict[str, Tensor]]
        found = torch.load(self._sums(block), weights_only=True, mmap=True)
        return found

    def _states(self, block: int) -> Path:
        return self._directory / f"states-{block}"

    def _sums(self, block: int) -> Path:
        return self._directory / f"sums-{block}"


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


class _Pass:
    """One pass over this process's share of `pieces`, which has no pieces if there are few."""

    def __init__(self, run: Run, pieces: Sequence[Batch], store: GradientStore | None) -> None:
        self.run, self.stream, self.ranks = run, run.stream, run.ranks
        self.store, self.n_pieces = store, len(pieces)
        self.share = run.ranks.part(self.n_pieces)
        self.pieces = pieces[self.share.start : self.share.stop]
        earlier = pieces[: self.share.start]
        self.first_token = sum(token_ids(piece).numel() for piece in earlier)
        self.n_backward = self.stream.n_blocks + 1  # the output head counts as a block

    def carry_out(self, tokens: int) -> None:
        """Sum the gradients of `tokens` tokens in all processes and write the sums."""
        if self.store is not None:
            self.store.begin()
        words = f"{tokens:,} tokens"
        self.run.report(PhaseStarted("gradients", f"{words} forward"))
        states = self._forward(self._embedded())
        self.run.report(PhaseStarted("gradients", f"{words} backward, from the output head on"))
        gradients = self._at_the_end(states, tokens)
        del states
        for index in reversed(range(self.stream.n_blocks)):
            self._check_limits()
            gradients = self._backward(index, gradients)
        if self.store is not None:
            self.store.finish(tokens)

    def _embedded(self) -> list[Tensor]:
        """Return the hidden states before the first block."""
        if not self.pieces:
            return []
        with torch.inference_mode():  # some models change their weights in place (rwkv)
            states = self.stream.embed(self.pieces)
        if any(isinstance(state, tuple) for state in states) or any(self.stream.carried):
            raise _no_gradient("its blocks hand on more than hidden states")
        return [state for state in states if isinstance(state, Tensor)]

    def _forward(self, states: list[Tensor]) -> list[Tensor]:
        """Return the hidden states after the last block; those before each block are kept."""
        for index in range(self.stream.n_blocks):
            self._check_limits()
            gathered = self.ranks.gather(states)
            if self.store is not None:
                self.store.save_states(index, gathered)
            with self._block(index, index + 1) as block:
                for number, state in self._counted(states, index, self.stream.n_blocks):
                    states[number] = _hidden(block.run(number, state))
        return states

    def _counted(
        self, items: Sequence[Item], done: int, n_blocks: int
    ) -> Iterator[tuple[int, Item]]:
        """Yield the items of a block with their numbers, and report each that was worked on.

        `done` of `n_blocks` blocks were passed before this one.
        """
        for number, item in enumerate(items):
            yield number, item
            self.run.report(BlocksDone(done + (number + 1) / len(items), n_blocks))
        if not items:  # other processes have them
            self.run.report(BlocksDone(done + 1, n_blocks))

    def _at_the_end(self, states: Sequence[Tensor], tokens: int) -> list[Tensor]:
        """Return the gradient at the hidden states after the last block, for labels drawn there."""
        # The same numbers on every type of device and for every number of processes
        random = torch.Generator().manual_seed(self.run.config.seed)
        drawn = torch.rand(tokens, generator=random)[self.first_token :]
        gradients: list[Tensor] = []
        if not states:
            return gradients
        n_tokens = max(1, LOGITS_AT_ONCE // self.stream.vocabulary_rows)
        with self.stream.head() as logits, _differentiating("the output head"):
            for _, state in self._counted(states, 0, self.n_backward):
                rows = state.flatten(0, 1)
                own, drawn = drawn.split([len(rows), len(drawn) - len(rows)])
                found = []
                for few, uniform in zip(rows.split(n_tokens), own.split(n_tokens), strict=True):
                    found.append(gradient_of_labels(logits, few, uniform))
                gradients.append(torch.cat(found).view(state.shape))
        return gradients

    def _backward(self, index: int, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients at the hidden states before a block, from those after it."""
        saved = None
        if self.store is not None:
            saved = self.store.take_states(index)
        states = self.ranks.scatter(saved, self.n_pieces)
        layers = [layer for layer in self.run.plan.loss_aware if layer.block == index]
        names, sums = [layer.name for layer in layers], self._nothing_summed(layers)
        before, energies = [], []
        done, pairs = self.stream.n_blocks - index, list(zip(states, gradients, strict=True))
        with self._block(index, index - 1) as block:
            for number, (state, gradient) in self._counted(pairs, done, self.n_backward):
                state = state.to(self.stream.device)
                with _differentiating(f"`{self.stream.block_name(index)}`"):
                    found, own = differentiate(block, number, state, gradient, names)
                before.append(own)
                energies.append(energies_of(found, token_ids(self.pieces[number]).numel()))
                for name, of_outputs in found:
                    if name in sums:
                        sums[name].add(self.share.start + number, of_outputs)
        written = {name: self._whole(name, seen).cpu() for name, seen in sums.items()}
        of_tokens = self._joined(energies)
        if self.store is not None:
            self.store.save(index, written, of_tokens)
        return before

    def _nothing_summed(self, layers: Sequence[LayerPlan]) -> dict[str, HessianOfBatches]:
        """Return a sum without gradients for each of `layers` that is rounded with one."""
        sums = {}
        for layer in layers:
            if layer.sums_gradients:
                rows, device = layer.out_features, self.stream.device
                sums[layer.name] = HessianOfBatches(rows, device, limited=True)
        return sums

    def _joined(self, mine: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the energies of the tokens of all pieces; a linear must have those of each."""
        pieces = self.ranks.all_gather(mine)
        joined = {}
        for name in pieces[0]:
            if not all(name in piece for piece in pieces):
                continue
            joined[name] = torch.cat([piece[name] for piece in pieces]).cpu()
            if not joined[name].isfinite().all():
                raise _not_finite(name)
        return joined

    def _whole(self, name: str, seen: HessianOfBatches) -> Tensor:
        """Return the sum [O, O] over all processes."""
        whole: HessianAccumulator = self.ranks.sum_hessians(seen, self.n_pieces)
        if whole.first_not_finite() is not None:
            raise _not_finite(name)
        return whole.hessian

    @contextmanager
    def _block(self, index: int, following: int) -> Iterator[LoadedBlock]:
        """Load a block, whose tensors a backward pass can use; `following` is the next one."""
        with ExitStack() as stack:
            if not self.pieces:  # nothing to run here: only the sums of others
                yield LoadedBlock(nn.Module(), {}, [])
                return
            block = stack.enter_context(self.stream.block(index, following))
            for name, buffer in list(block.module.named_buffers()):
                if buffer.is_inference():
                    place(block.module, name, buffer.clone())
            yield block

    def _check_limits(self) -> None:
        self.run.limits.check_time("the pass for gradients")
        self.run.budget.memory.check_host()


def gradient_of_labels(
    logits: Callable[[Tensor, Tensor], Tensor], states: Tensor, uniform: Tensor
) -> Tensor:
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
    block: LoadedBlock, number: int, state: Tensor, gradient: Tensor, names: Sequence[str]
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Return the gradients at the outputs of the linears `names`, and at the input of the block.

    `gradient` is the one at the block's output for `state`; `number` is that of the batch.
    Raises InputError E_GRADIENT if a linear has no part in the output.
    """
    found: list[tuple[str, Tensor]] = []

    def watch(name: str, _module: nn.Module, _args: object, output: Tensor) -> None:
        # A hook of the tensor sees the gradient of the output itself, even if it is changed later.
        if output.requires_grad:
            output.register_hook(lambda received: found.append((name, received)))

    handles = []
    for name in names:
        handles.append(block.linears[name].register_forward_hook(partial(watch, name)))
    try:
        with torch.enable_grad():
            hidden = state.clone().requires_grad_()
            call = differentiable(block.calls[number])
            output = _hidden(call.run(block.module, hidden))
            (before,) = torch.autograd.grad(output, hidden, gradient)
    finally:
        for handle in handles:
            handle.remove()
    without = sorted(set(names) - dict(found).keys())
    if without:
        kept = keeping(without, in_all_blocks=True)
        hint = f"keep such layers ({kept.option}), or {WITHOUT}"
        raise _no_gradient(f"no gradient reaches the outputs of `{'`, `'.join(without)}`", hint)
    return found, before


def energies_of(found: Sequence[tuple[str, Tensor]], tokens: int) -> dict[str, Tensor]:
    """Return ‖g‖² of each token, [tokens], for each linear that sees every token once.

    `found` are the gradients g at the outputs of linears, [..., O], of each of their calls.
    """
    calls = Counter(name for name, _ in found)
    energies = {}
    for name, of_outputs in found:
        if calls[name] == 1 and of_outputs.shape[:-1].numel() == tokens:
            energies[name] = of_outputs.float().square().sum(-1).flatten()
    return energies


def differentiable(call: Call) -> Call:
    """Return the call with copies of its tensors that were made in inference mode."""

    def usable(tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            return tensor.clone()
        return tensor

    args = tree_map_only(Tensor, usable, call.args)
    kwargs = tree_map_only(Tensor, usable, call.kwargs)
    return Call(args, kwargs, call.positional, call.added)


def _hidden(state: Any) -> Tensor:
    found: Tensor = tree_leaves(state)[0]
    return found


@contextmanager
def _differentiating(what: str) -> Iterator[None]:
    """Turn an error of the model's own code, or of torch about it, into E_GRADIENT."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error) or gpu_lost(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise _no_gradient(f"{what} cannot be differentiated: {reason}") from error


def _not_finite(name: str) -> InputError:
    return _no_gradient(
        f"the gradient at the outputs of `{name}` is not finite",
        f"run the model in float32: --dtype float32, or {WITHOUT}",
    )


def _no_gradient(why: str, hint: str = WITHOUT) -> InputError:
    return InputError("E_GRADIENT", f"loss_aware needs the model's gradient, but {why}", hint=hint)
