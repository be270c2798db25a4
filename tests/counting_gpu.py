"""A simulated CUDA device without numbers: it counts the work of code that really runs.

Its tensors have shapes but no memory (torch's device `meta`), so that a block of any size passes in
seconds. Each operation and each launch of a kernel becomes an `Operation`: its part of the work,
its multiplications, the bytes that it moves. What Python reads from the device is answered as in a
healthy run: no number is infinite, no factorisation fails, experts get equally many tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.simulated_gpu import (
    CPU,
    CUDA,
    MOVES,
    DeviceTensor,
    SimulatedGpu,
    place,
    simulated_gpu,
)

aten = torch.ops.aten
META = torch.device("meta")
PACKAGE = "gptq_cli."

# The parts of functions and modules, see `part`
PARTS = {
    "models": "forward",
    "models.stream._load": "copy",
    "quantization.block_loop._forward": "forward",
    "quantization.block_loop._watched": "forward",
    "solver.hessian": "hessian",
    "solver.hessian._add_shift": "shift",
    "solver.hessian._add_rows": "shift",
    "solver.hessian._add_exact_shift": "shift",
    "solver.hessian._difference": "shift",
    "solver.factor": "factor",
    "solver.factor.follow_original": "follow",
    "solver.factor.follow_together": "follow",
    "solver.grid.choose_grid": "search",
    "solver.solve": "columns",
    "solver.refine": "refine",
    "solver.quantized_linear.round_to_nearest": "errors",
    "solver.quantized_linear.output_energies": "errors",
    "solver.quantized_linear.split_panels": "errors",
    "solver.quantized_linear.energies_of_rows": "errors",
    "solver.solve._errors_from_panels": "errors",
    "solver.quantized_linear.energies_by_expert": "errors",
    "solver.quantized_linear.small_scales": "errors",
    "solver.quantized_linear.check_decoded": "errors",
    "solver.two_sided": "rows",
    "quantization.gradients": "copy",
    "quantization.layers": "put back",
    "quantization.routed_experts": "hessian",
    "quantization.run._write_layers": "pack",
    "checkpoint.writer": "copy",
    "runtime.open_model": "copy",
}
OTHER = "other"

# What Python reads there; elsewhere True, 0 or 1.0.
ANSWERS: Mapping[str, float | list[list[float]]] = {
    "models.skeleton._restore_buffers": 0,  # whether a buffer was left uncomputed
    # Of each expert: whether its Hessian is finite, and the number of its dead columns
    "solver.factor.prepare": [[1], [0]],
}
FACTORS_FROM = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # the place of the first factor
GATHERING = {"index", "index_select", "gather", "embedding"}  # read as much as they write, or all
MEMORY_ONLY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}


@dataclass(frozen=True, slots=True)
class Operation:
    """One launch on the device: an operation of torch, or a kernel of Triton.

    `products` are multiplications with an addition, of factors of type `precision`. `result` has
    the number of matrices that they make, their rows and columns, and is None if they make none.
    `moved` are bytes that are read or written, `copied` those that go to the host or come from it,
    and `pinned` tells whether they may do so while the host goes on. `sizes` are the sizes of a
    kernel by name.
    """

    part: str
    name: str
    products: float = 0.0
    precision: str = ""
    result: tuple[int, int, int] | None = None
    moved: int = 0
    copied: int = 0
    pinned: bool = False
    kernel: bool = False
    sizes: Mapping[str, float] | None = None


class CountingGpu(SimulatedGpu):
    """The device. `on_operation` and `on_wait` are called with each launch and each wait.

    A wait is told by its part; a wait of another thread than the main one and those of forwards
    does not hold the program up, and is told with "behind" before its part.
    """

    memory = META

    def __init__(self, total_bytes: int) -> None:
        super().__init__(total_bytes)
        self.on_operation: Callable[[Operation], None] = _ignore
        self.on_wait: Callable[[str], None] = _ignore
        self.held_bytes = self.most_bytes = 0
        self._answers: dict[int, Tensor] = {}

    @property
    def allocated(self) -> int:
        return self.held_bytes

    def wrap(self, host: Tensor, before: Tensor | None = None) -> Tensor:
        if before is not None:
            return before
        storage = host.untyped_storage()
        if storage not in self._storages:
            self._storages.add(storage)
            nbytes = storage.nbytes()
            self.held_bytes += nbytes
            self.most_bytes = max(self.most_bytes, self.held_bytes)
            finalize(storage, self._freed, nbytes)
        return DeviceTensor(host)

    def _freed(self, nbytes: int) -> None:
        self.held_bytes -= nbytes

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.add(tensor.untyped_storage())
        return tensor

    def wait(self, operation: str) -> None:
        super().wait(operation)
        self.on_wait(part())

    def numbers(self, tensor: Tensor) -> Tensor:
        known = self._answers.get(id(tensor))
        if known is not None:
            return known
        answer = torch.zeros(tensor.shape, dtype=tensor.dtype)
        given = ANSWERS.get(place())
        if given is not None:
            return answer.copy_(torch.tensor(given))
        if not tensor.dtype.is_floating_point and tensor.dtype != torch.bool:
            return answer
        return answer.fill_(1)

    def make(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        made = super().make(func, args, kwargs)
        if _name(func) not in MEMORY_ONLY:
            self._launched(func, (), made, {})
        return made

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.scaled_dot_product_attention.default:
            return self._attend(*args, **kwargs)
        if func is aten.equal.default:
            self.wait("equal")
            return True
        if func is aten._local_scalar_dense.default:
            self.wait("_local_scalar_dense")
            return self.numbers(args[0]).item()
        if func not in MOVES and _is_composite(func.name()):
            return func.decompose(*args, **kwargs)  # as torch does on a device
        output = super().run(func, args, kwargs)
        self._launched(func, args, output, kwargs)
        if func is aten.searchsorted.Tensor:
            self._spread(args, output)
        return output

    def compute(self, func: Any, args: Any, kwargs: Any, target: torch.device | None) -> Any:
        if target == CPU:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and args[0].device == CPU:
            return args[0]
        if func in (aten.mm.dtype, aten.bmm.dtype):
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1], dtype=args[2])
        if func not in MOVES:
            args, kwargs = _on_meta(args), _on_meta(kwargs)
        return func(*args, **kwargs)

    def launch(self, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        """Count a launch in place of a kernel of Triton."""
        del grid
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        sizes: dict[str, float] = {}
        moved = 0
        for name, value in given.items():
            if isinstance(value, Tensor):
                moved += _nbytes(value)
                sizes[name] = value.numel()
            elif isinstance(value, int | float):
                sizes[name] = value
        name = kernel.__name__
        self.on_operation(Operation(part(), name, moved=moved, kernel=True, sizes=sizes))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        """Count attention as the one kernel that torch has for it on a device."""
        del dropout_p
        batch, heads, length = query.shape[:3]
        width = value.shape[-1]
        output = torch.empty(batch, length, heads, width, device=CUDA, dtype=query.dtype)
        products = float(batch * heads * length * key.shape[-2] * (query.shape[-1] + width))
        if is_causal:
            products /= 2
        given = [tensor for tensor in (query, key, value, attn_mask) if tensor is not None]
        moved = sum(map(_nbytes, given)) + _nbytes(output)
        precision = _precision([query])
        self.on_operation(Operation(part(), "attention", products, precision, moved=moved))
        return output.transpose(1, 2)

    def _spread(self, args: Any, found: Tensor) -> None:
        """Answer a search in sorted numbers as if each had as many places."""
        places = torch.linspace(0, args[0].numel(), found.numel())
        self._answers[id(found)] = places.long().view(found.shape)
        finalize(found, self._answers.pop, id(found), None)

    def _launched(self, func: Any, args: Any, output: Any, kwargs: Any) -> None:
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _name(func) in MEMORY_ONLY or not made:
            return
        known = {id(_storage(tensor)) for tensor in given}
        if not func._schema.is_mutable and all(id(_storage(tensor)) in known for tensor in made):
            return  # a view
        changed = [tensor for tensor in made if id(_storage(tensor)) not in known]
        moved = sum(map(_nbytes, given)) + sum(map(_nbytes, changed))
        if _name(func) in GATHERING:
            moved -= max(0, _nbytes(given[0]) - _nbytes(made[0]))
        copied, pinned = 0, False
        if func in MOVES:
            on_host = [leaf for leaf in (*given, *made) if not isinstance(leaf, DeviceTensor)]
            copied = sum(map(_nbytes, on_host))
            pinned = any(_storage(tensor) in self.pinned for tensor in on_host)
        products, result = _products(func, args)
        precision = ""
        if products:
            precision = _precision(args)
        name = _name(func)
        self.on_operation(
            Operation(part(), name, products, precision, result, moved, copied, pinned)
        )


def _ignore(_: Any) -> None:
    return None


def part() -> str:
    """Return the part of the work that the running function belongs to.

    The innermost function with an entry of its own in PARTS decides, else the innermost module.
    """
    of_module = ""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(PACKAGE):
            name = module.removeprefix(PACKAGE)
            found = PARTS.get(f"{name}.{frame.f_code.co_name}")
            if found:
                return found
            of_module = of_module or PARTS.get(name) or PARTS.get(name.partition(".")[0], "")
        frame = frame.f_back
    return of_module or OTHER


@cache
def _is_composite(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _name(func: Any) -> str:
    name: str = func.name()
    return name.removeprefix("aten::").partition(".")[0]


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    if isinstance(tensor, DeviceTensor):
        tensor = tensor.host
    return tensor.untyped_storage()


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; an expanded number counts once."""
    return min(tensor.numel() * tensor.itemsize, _storage(tensor).nbytes())


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, torch.device):
        return META
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_on_meta(item) for item in value])
    return value


def _precision(args: Any) -> str:
    first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    if first.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return str(first.dtype).removeprefix("torch.")


def _products(func: Any, args: Any) -> tuple[float, tuple[int, int, int] | None]:
    """Return the multiplications of `func`, and the number and sizes of the matrices it makes."""
    name = _name(func).removesuffix("_")
    if name in FACTORS_FROM:
        left, right = args[FACTORS_FROM[name]], args[FACTORS_FROM[name] + 1]
        batch, (rows, inner), columns = left.shape[:-2].numel(), left.shape[-2:], right.shape[-1]
        return float(batch * rows * inner * columns), (batch, rows, columns)
    if name == "_grouped_mm":
        tokens, weights = args[:2]
        rows = tokens.shape[0] // len(weights)
        return float(tokens.numel() * weights.shape[-1]), (len(weights), rows, weights.shape[-1])
    if name in ("mv", "addmv", "dot"):
        return float(max(tensor.numel() for tensor in args if isinstance(tensor, Tensor))), None
    if name == "linalg_solve_triangular":
        return args[1].numel() * args[0].shape[-1] / 2, None
    if name == "linalg_cholesky_ex":
        return args[0].numel() * args[0].shape[-1] / 6, None
    return 0.0, None


@contextmanager
def counting_gpu(total_bytes: int) -> Iterator[CountingGpu]:
    """A device `cuda:0` without numbers, on which kernels of Triton are counted too."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        gpu.launch(kernel, grid, *args, **kwargs)

    with simulated_gpu(total_bytes, CountingGpu) as gpu, patch.object(JITFunction, "run", run):
        yield gpu
