"""A simulated CUDA device: its tensors obey its rules, but the CPU computes their numbers.

Mistakes of a program on an accelerator then fail on any machine: operations that mix devices, host
access to memory of the device, allocations beyond a limit. Each operation that makes the host wait
for the device is counted by the place in the package that asked for it. The device simulates no
time, no streams that race, and no kernels. `counting_gpu` has a kind without numbers.

Needs a torch without CUDA: there the device's dispatch key is free to take.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PACKAGE = "gptq_cli"

aten = torch.ops.aten
MOVES = {
    aten._to_copy.default,
    aten.copy_.default,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.to.dtype,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}  # take indices from the host
WAITING = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default,
           aten.equal.default,
    aten.nonzero.default, aten.masked_select.default, aten.repeat_interleave.Tensor,
           aten._unique2.default,
    aten.linalg_cholesky.default, aten.bincount.default,
}  # fmt: skip
RESIZING = {  # make their result by resizing it
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m,
              aten.linspace.default,
    aten.randperm.default,
}  # fmt: skip
NOT_FOR_THE_HOST = {Tensor.numpy, Tensor.__array__}
TO_PYTHON = {
    Tensor.tolist,
    Tensor.item,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
}


class DeviceTensor(Tensor):
    """A tensor that says it is on the device; `host` are its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        assert type(host) is Tensor, type(host)
        tensor: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CUDA,
        )
        tensor.host = host
        return tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> DeviceTensor:
        return self.clone()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the memory of the numbers, which views share, also inside a mode of torch."""
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NOT_FOR_THE_HOST:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first"
            )
        if func in TO_PYTHON:
            device().wait("to Python")
            return func(device().numbers(args[0]))
        if func is Tensor.new_tensor:  # asks the guard where that is
            return torch.tensor(
                args[1], **{"dtype": args[0].dtype, "device": CUDA} | (kwargs or {})
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return device().run(func, args, kwargs or {})


class SimulatedGpu:
    """What tests look at: `waits` by place and operation, and how much memory is taken.

    `memory` is the device of torch on which the numbers really are.
    """

    memory = CPU

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.waits: Counter[str] = Counter()
        self.limit_bytes: int | None = None
        self.peak_bytes = 0  # while there is a limit
        self.current = torch.device("cuda", 7)  # until somebody says which one
        self._storages: WeakSet[torch.UntypedStorage] = WeakSet()
        self._adding = threading.Lock()  # a set must not grow while another thread lists it
        self.pinned: WeakSet[torch.UntypedStorage] = WeakSet()
        self.done = 0  # operations on the usual stream
        self._written: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()

    @property
    def allocated(self) -> int:
        """Bytes of all tensors on the device that are alive."""
        with self._adding:
            alive = list(self._storages)
        return sum(storage.nbytes() for storage in alive)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run `func` on the host's numbers; its output is on the device unless sent to the host."""
        tensors: list[Tensor] = []
        target = _target(func, args, kwargs)
        memory = None
        if target == CUDA:
            memory = self.memory
        on_host = partial(_on_host, tensors=tensors, memory=memory)
        host_args, host_kwargs = on_host(args), on_host(kwargs)
        _check_devices(func, tensors)
        self._count(func, args, kwargs, tensors)
        output = self.compute(func, host_args, host_kwargs, target)
        if target == CPU:
            known = set(map(id, map(_host, tensors)))
            return _each(output, lambda tensor: tensor.clone() if id(tensor) in known else tensor)
        before = {id(_host(tensor)): tensor for tensor in tensors}
        if func._schema.is_mutable:
            _each(output, self._write)
        return _each(output, lambda tensor: self.wrap(tensor, before.get(id(tensor))))

    def compute(self, func: Any, args: Any, kwargs: Any, target: torch.device | None) -> Any:
        """Return the output of `func` for the host's numbers."""
        del target
        if func is aten.copy_.default and _beside.stream is not None:
            return _beside.stream.copy(*args)
        return SUBSTITUTES.get(func, func)(*args, **kwargs)

    def numbers(self, tensor: Tensor) -> Tensor:
        """Return the numbers of a tensor that Python reads."""
        return _host(tensor)

    def wrap(self, host: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the tensor on the device with the numbers `host`, if possible from `before`."""
        if before is not None:
            assert before.shape == host.shape, f"resized from {before.shape} to {host.shape}"
            return before
        storage = host.untyped_storage()
        if storage not in self._storages:  # not a view
            self._write(host)
        with self._adding:
            self._storages.add(storage)
        if self.limit_bytes is not None:
            if (allocated := self.allocated) > self.limit_bytes:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {host.nbytes / 2**20:.2f} MiB. "
                )
            self.peak_bytes = max(self.peak_bytes, allocated)
        return DeviceTensor(host)

    def make(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Return a new tensor on the device, which `func` makes from no other one."""
        return self.wrap(func(*args, **kwargs, device=self.memory))

    def _write(self, host: Tensor) -> None:
        """Note an operation of the usual stream that writes into a tensor."""
        self.done += 1
        self._written[host.untyped_storage()] = self.done

    def written(self, tensor: Tensor) -> int:
        """Return the number of the last operation that wrote into the memory of a tensor."""
        return self._written[tensor.untyped_storage()]

    def wait(self, operation: str) -> None:
        """Count that the host waits for the device."""
        self.waits[f"{place()}: {operation}"] += 1

    def _count(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        name = func.name().removeprefix("aten::")
        if func in WAITING or (
            func.name() == "aten::repeat_interleave" and kwargs.get("output_size") is None
        ):
            self.wait(name)
        elif func in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not _fills(
                func, args
            ):
                self.wait(f"{name} by a mask")
            elif not all(isinstance(index, DeviceTensor) for index in indices):
                self.wait(f"{name} from the host")
        elif func is aten.copy_.default and not all(
            isinstance(tensor, DeviceTensor) for tensor in tensors
        ):
            self.copied(
                args[1],
                non_blocking=(len(args) > 2 and args[2]) or kwargs.get("non_blocking", False),
            )
        elif func in MOVES and _target(func, args, kwargs) == CPU:
            self.wait("to the host")

    def copied(self, source: Tensor, *, non_blocking: bool) -> None:
        """Count a copy between host and device: only one without blocking, if pinned, is free."""
        to_device = not isinstance(source, DeviceTensor)
        free = to_device and source.untyped_storage() in self.pinned
        if _beside.stream is not None:
            free = True  # who needs the numbers waits for the stream
        if not (non_blocking and free):
            self.wait("to the device" if to_device else "to the host")

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory."""
        assert not isinstance(tensor, DeviceTensor), "cannot pin memory of the device"
        copy = tensor.clone()
        self.pinned.add(copy.untyped_storage())
        return copy


class SimulatedEvent:
    """The number of operations on the usual stream that were asked for before it."""

    done = -1

    def record(self, stream: Any) -> None:
        del stream
        self.done = device().done


class SimulatedStream:
    """A stream beside the usual one, for copies to the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waited = -1  # for so many operations of the usual stream
        self._copies: list[tuple[Tensor, Tensor]] = []

    def wait_event(self, event: SimulatedEvent) -> None:
        self._waited = max(self._waited, event.done)

    def copy(self, target: Tensor, source: Tensor, *_: Any, **__: Any) -> Tensor:
        """Copy when the host waits; until then the target holds other numbers."""
        complete = device().written(source) <= self._waited
        assert complete, "the stream copies what is not yet complete"
        self._copies.append((target, source))
        return target.fill_(0x5A)

    def synchronize(self) -> None:
        device().wait("synchronize")
        while self._copies:
            target, source = self._copies.pop(0)
            target.copy_(source)


class _Beside(threading.local):
    """The stream of this thread, if it is not the usual one."""

    stream: SimulatedStream | None = None


_beside = _Beside()


@contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    before, _beside.stream = _beside.stream, None
    if isinstance(stream, SimulatedStream):
        _beside.stream = stream
    try:
        yield
    finally:
        _beside.stream = before


_current: list[SimulatedGpu] = []
Gpu = TypeVar("Gpu", bound=SimulatedGpu)


def device() -> SimulatedGpu:
    """The simulated device; there is one at a time."""
    return _current[-1]


@contextmanager
def simulated_gpu(
    total_bytes: int = 16 * 2**30, kind: Callable[[int], Gpu] = SimulatedGpu
) -> Iterator[Gpu]:
    """A device `cuda:0` with `total_bytes` of memory while the context lasts."""
    gpu = kind(total_bytes)
    _current.append(gpu)
    everything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_made, "CUDA")
    for func in RESIZING:
        own.impl(func.name().removeprefix("aten::"), partial(_made, func), "CUDA")
    own.impl("copy_", _copy_, "CUDA")
    functions = _functions(gpu)
    try:
        with _guard_of_devices(), patch.multiple(torch.cuda, **functions), _pinning(gpu):
            yield gpu
    finally:
        everything._destroy()
        own._destroy()
        _current.pop()


def _made(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A new tensor on the device, or what torch does below the level at which it calls Python."""
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
        return device().run(func, args, kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    return device().make(func, args, kwargs)


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy to a tensor that was just made; torch calls this where it skips Python dispatch."""
    if not isinstance(source, DeviceTensor):
        device().copied(source, non_blocking=non_blocking)
    _host(target).copy_(_host(source))
    return target


def _host(tensor: Tensor) -> Tensor:
    return tensor.host if isinstance(tensor, DeviceTensor) else tensor


def _on_host(value: Any, tensors: list[Tensor], *, memory: torch.device | None) -> Any:
    """Return `value` with the numbers of its tensors, which are added to `tensors`.

    Its devices become `memory`, unless that is None.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return _host(value)
    if isinstance(value, torch.device):
        return memory or value
    if isinstance(value, dict):
        return {key: _on_host(item, tensors, memory=memory) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_on_host(item, tensors, memory=memory) for item in value])
    return value


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return (
        type(value)([_each(item, change) for item in value])
        if isinstance(value, list | tuple)
        else value
    )


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    strangers = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if func in MOVES or not strangers:
        return
    if func in INDEXING and isinstance(tensors[0], DeviceTensor):
        return
    takes_numbers = torch.Tag.pointwise in func.tags or func is aten.fill_.Tensor
    single_numbers = takes_numbers and all(tensor.dim() == 0 for tensor in strangers)
    if single_numbers and (isinstance(tensors[0], DeviceTensor) or not func._schema.is_mutable):
        return
    raise RuntimeError(
        "Expected all tensors to be on the same device, "
        "but found at least two devices, cuda:0 and cpu! "
        f"({func}, {[(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]})"
    )


def _target(func: Any, args: Any, kwargs: Any) -> torch.device | None:
    """Where `func` was told to put what it makes."""
    if func is aten.to.other:
        return args[1].device
    target = args[1] if func is aten.to.device else kwargs.get("device")
    return None if target is None else torch.device(target)


def _fills(func: Any, args: Any) -> bool:
    """Return whether a mask receives one number, for which its count is not needed."""
    return func in (aten.index_put_.default, aten.index_put.default) and args[2].numel() == 1


def place() -> str:
    """Return the innermost function of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(f"{PACKAGE}."):
            return f"{module.removeprefix(PACKAGE + '.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _mm_to_float32(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    assert left.dtype == right.dtype, (left.dtype, right.dtype)
    assert left.dtype in (torch.bfloat16, torch.float16), "out_dtype is for 16-bit inputs"
    assert out_dtype == torch.float32, out_dtype
    return left.float() @ right.float()


SUBSTITUTES: dict[Any, Callable[..., Any]] = {  # what only CUDA has
    aten.mm.dtype: _mm_to_float32,
    aten.bmm.dtype: _mm_to_float32,
}


def _functions(gpu: SimulatedGpu) -> dict[str, Any]:
    properties = SimpleNamespace(
        name="simulated", total_memory=gpu.total_bytes, major=9, minor=0, multi_processor_count=132
    )
    stream = SimpleNamespace(device=CUDA, synchronize=lambda: gpu.wait("synchronize"))

    def limit(fraction: float, _device: object = None) -> None:
        gpu.limit_bytes = int(fraction * gpu.total_bytes)

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": partial(setattr, gpu, "current"),
        "current_stream": lambda _device=None: stream,
        "stream": _on_stream,
        "Stream": SimulatedStream,
        "Event": SimulatedEvent,
        "synchronize": lambda _device=None: gpu.wait("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda _device=None: (gpu.total_bytes - gpu.allocated, gpu.total_bytes),
        "memory_allocated": lambda _device=None: gpu.allocated,
        "memory_reserved": lambda _device=None: gpu.allocated,
        "max_memory_allocated": lambda _device=None: gpu.allocated,
        "max_memory_reserved": lambda _device=None: gpu.allocated,
        "get_device_properties": lambda _device=None: properties,
        "get_device_name": lambda _device=None: properties.name,
        "get_device_capability": lambda _device=None: (9, 0),
        "set_per_process_memory_fraction": limit,
    }


@contextmanager
def _guard_of_devices() -> Iterator[None]:
    """What has torch make `cuda:0` the current device: nothing, as for the device `meta`."""
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
    guards = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    before, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


@contextmanager
def _pinning(gpu: SimulatedGpu) -> Iterator[None]:
    empty_like = torch.empty_like

    def pinned_empty_like(tensor: Tensor, *, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return gpu.pin(empty_like(tensor, **kwargs)) if pin_memory else empty_like(tensor, **kwargs)

    with (
        patch.object(Tensor, "pin_memory", lambda tensor: gpu.pin(tensor)),
        patch.object(
            Tensor, "is_pinned", lambda tensor: _host(tensor).untyped_storage() in gpu.pinned
        ),
        patch.object(torch, "empty_like", pinned_empty_like),
    ):
        yield
