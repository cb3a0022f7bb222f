"""A GPU that is not there: tensors that say ``cuda:0``, compute on the CPU, and refuse what a real one refuses.

``with simulated_gpu() as gpu:`` makes PyTorch believe in one CUDA device. A tensor on it is a ``DeviceTensor`` around
a CPU tensor with its values, so whole runs learn, evaluate and are restored with real numbers. What a GPU punishes is
an error or is counted:

- tensors of the host and of the device in one operation, or a device without its index: an error;
- memory that is not pinned copied to the device, a value asked for by the host: counted, by ``gpu.count``;
- what another stream has computed or copied, used before waiting for it or without ``record_stream``: an error;
- a pinned buffer written to while a copy from it may still be on its way: an error at the next wait for that copy;
- tensors of the host given to a process group that says it is NCCL: an error.

Not simulated: time, memory, kernels' own rounding, and the choice of kernels. Autocast is the CPU's.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

# Operations that end with a value on the host, or whose result's size is such a value.
SYNCHRONISE = {
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
    aten._linalg_eigh,
    aten._linalg_svd,
}
NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten.alias, aten.lift_fresh}
NO_KERNEL |= {aten._unsafe_view, aten._reshape_alias, aten.new_empty_strided, aten.set_, aten.is_pinned}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class DeviceError(RuntimeError):
    """What would fail on a GPU, or give wrong numbers there."""


@dataclass
class Count:
    """What was asked of the device."""

    kernels: int = 0
    synchronisations: int = 0
    pageable_copies: int = 0  # to the device, from memory that is not pinned: the host waits
    pinned_copies: int = 0  # to the device, while the host goes on
    copied_bytes: int = 0  # to the device

    def __sub__(self, other: "Count") -> "Count":
        return Count(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


class Stream:
    """An order of work on the device; ``seen`` says up to which of their ticks it has waited for other streams."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.tick, self.seen = 0, {}

    def wait_event(self, event: "Event") -> None:
        assert event.stream is not None, "an event that was never recorded"
        self.seen[event.stream] = max(event.tick, self.seen.get(event.stream, 0))

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """A moment in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.stream: Stream | None = None
        self.tick, self.timed = 0, enable_timing

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or _gpu().stream
        self.stream.tick += 1
        self.tick = self.stream.tick

    def synchronize(self) -> None:
        assert self.stream is not None, "an event that was never recorded"
        _gpu().finish_copies(self.stream, self.tick)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _gpu().stream).wait_event(self)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: "Event") -> float:
        assert self.timed and end.timed, "events that were made without enable_timing"
        if end.stream is None or end.tick > _gpu().done.get(end.stream, 0):
            raise DeviceError("an event is asked for its time before the device is known to have come there")
        return 0.0


@dataclass
class _Copy:
    """From a pinned buffer, not waited for by the host yet."""

    stream: Stream
    tick: int
    source: Tensor
    sent: Tensor


@dataclass
class Gpu:
    """The device's state: the stream in use, copies on their way, what is pinned, and what was counted."""

    count: Count = field(default_factory=Count)
    stream: Stream = field(default_factory=Stream)
    copies: list[_Copy] = field(default_factory=list)
    done: dict[Stream, int] = field(default_factory=dict)
    pinned: dict[int, Tensor] = field(default_factory=dict)
    generators: list[torch.Generator] = field(default_factory=list)
    synchronising: Callable[[str], None] = lambda what: None

    def synchronise(self, what: str) -> None:
        self.count.synchronisations += 1
        self.synchronising(what)
        self.finish_copies(self.stream, self.stream.tick)

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that its address is not given again
        return tensor

    def finish_copies(self, stream: Stream, tick: int) -> None:
        self.done[stream] = max(tick, self.done.get(stream, 0))
        done = [copy for copy in self.copies if copy.stream is stream and copy.tick <= tick]
        self.copies = [copy for copy in self.copies if all(copy is not other for other in done)]
        if not all(torch.equal(copy.source, copy.sent) for copy in done):
            raise DeviceError("a pinned buffer was written to before the copy from it was waited for")

    def to_device(self, tensor: Tensor, *, non_blocking: bool) -> Tensor:
        """The values of a host tensor, as they are when the copy is made."""
        sent = tensor.clone()
        self.count.copied_bytes += tensor.nbytes
        if self.is_pinned(tensor) and non_blocking:
            self.count.pinned_copies += 1
            self.stream.tick += 1
            self.copies.append(_Copy(self.stream, self.stream.tick, tensor, sent.clone()))
        else:
            self.count.pageable_copies += 1
            self.synchronising("a copy to the device that the host waits for")
        return sent


_current: list[Gpu] = []


def _gpu() -> Gpu:
    return _current[-1]


class DeviceTensor(Tensor):
    """A tensor of the device: ``host`` has its values."""

    host: Tensor
    made_on: Stream
    tick: int
    recorded: set[Stream]

    @staticmethod
    def __new__(cls, host: Tensor) -> "DeviceTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
        )
        made.host = host
        stream = _gpu().stream
        stream.tick += 1
        made.made_on, made.tick, made.recorded = stream, stream.tick, set()
        return made

    def __init__(self, host: Tensor) -> None:
        pass

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def record_stream(self, stream: Stream) -> None:
        self.recorded.add(stream)

    def __repr__(self) -> str:
        return f"DeviceTensor({self.host})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return _to(func, args[0], *args[1:], **kwargs)
        if name in ("tolist", "numpy", "__array__") and isinstance(args[0], DeviceTensor):
            if name != "tolist":
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            _gpu().synchronise(name)
            return args[0].host.tolist()
        if name in ("pin_memory",):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _to(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``tensor.to(...)``, ``.cpu()`` and ``.cuda()`` where the device is another one than C++ knows of."""
    if func.__name__ != "to":
        target: Any = torch.device(func.__name__) if func.__name__ == "cpu" else DEVICE
        return _moved(tensor, target, tensor.dtype, non_blocking=bool(kwargs.get("non_blocking", args[:1] == (True,))))
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(
        *(a for a in args if not isinstance(a, Tensor)),
        **{k: v for k, v in kwargs.items() if k not in ("copy", "other")},
    )
    for other in (*args, kwargs.get("other")):
        if isinstance(other, Tensor):
            device, dtype = other.device, other.dtype
    return _moved(tensor, device or tensor.device, dtype or tensor.dtype, non_blocking=bool(non_blocking))


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype, *, non_blocking: bool) -> Tensor:
    if tensor.device != _with_index(device):
        return _Move.apply(tensor, device, non_blocking).to(dtype)
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.to(dtype)


class _Move(torch.autograd.Function):
    """A copy between host and device, with its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        ctx.source = tensor.device
        if device.type == "cuda":
            _with_index(device)
            return DeviceTensor(_gpu().to_device(tensor.detach(), non_blocking=non_blocking))
        assert isinstance(tensor, DeviceTensor)
        _usable(tensor)
        _gpu().synchronise("a copy to the host")
        return tensor.host.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.source), None, None


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        raise DeviceError("a device without its index: tensors on it say cuda:0, which is not equal to cuda")
    return device


def _usable(tensor: DeviceTensor) -> None:
    """What this stream uses must be done by then, and its memory must not be given away before."""
    stream = _gpu().stream
    if tensor.made_on is stream:
        return
    if stream.seen.get(tensor.made_on, 0) < tensor.tick:
        raise DeviceError("a tensor of another stream is used without waiting for it")
    if stream not in tensor.recorded:
        raise DeviceError("a tensor of another stream is used without record_stream: its memory may be given away")


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Arguments and results are tensors, numbers, and lists of these: PyTorch's own trees are slow."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors_in(value)
    return found


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(_each(change, v) for v in value) if type(value) in (list, tuple) else change(value)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the device if one of its tensors is there or it makes one there."""
    gpu, packet = _gpu(), func.overloadpacket
    tensors = _tensors_in((*args, *kwargs.values()))
    ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    target = kwargs.get("device")
    makes = target is not None and torch.device(target).type == "cuda"
    if packet in (aten.is_pinned, aten._pin_memory, aten.pin_memory):
        if packet is aten.is_pinned:
            return gpu.is_pinned(tensors[0])
        return gpu.pin(tensors[0].clone())
    if kwargs.pop("pin_memory", None):
        return gpu.pin(func(*args, **kwargs))
    if not ours and not makes:
        return func(*args, **kwargs)
    if makes:
        _with_index(torch.device(target))
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if packet is aten._to_copy and not ours:
        moved = gpu.to_device(tensors[0], non_blocking=bool(kwargs.get("non_blocking")))
        return DeviceTensor(moved.to(kwargs.get("dtype") or moved.dtype))
    if packet is aten.copy_ and isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor):
        return _copied(args[0], args[1], *args[2:], **kwargs)
    _check(func, packet, args, kwargs, tensors, makes)
    if not (func.is_view or packet in NO_KERNEL):
        gpu.count.kernels += 1
    if packet in SYNCHRONISE and not (packet is aten.repeat_interleave and kwargs.get("output_size") is not None):
        gpu.synchronise(str(func))

    def bare(value: Any) -> Any:
        return value.host if isinstance(value, DeviceTensor) else value

    out = func(*_each(bare, args), **{name: _each(bare, value) for name, value in kwargs.items()})
    wrapped = _each(lambda x: DeviceTensor(x) if isinstance(x, Tensor) else x, out)
    if func.is_view:
        source = ours[0]
        for view in _tensors_in([wrapped]):
            view.made_on, view.tick, view.recorded = source.made_on, source.tick, source.recorded
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``target.copy_(source)`` between host and device."""
    if isinstance(target, DeviceTensor):
        target.host.copy_(_gpu().to_device(source, non_blocking=non_blocking))
    else:
        assert isinstance(source, DeviceTensor)
        _usable(source)
        _gpu().synchronise("a copy to the host")
        target.copy_(source.host)
    return target


def _check(func: Any, packet: Any, args: Any, kwargs: Any, tensors: list[Tensor], makes: bool) -> None:
    gpu = _gpu()
    for tensor in tensors:
        if isinstance(tensor, DeviceTensor):
            _usable(tensor)
    foreign = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if packet in INDEXING and isinstance(args[0], DeviceTensor):
        indices = [index for index in args[1] if index is not None]
        for index in indices:
            if not isinstance(index, DeviceTensor):
                gpu.to_device(index, non_blocking=False)
            if index.dtype in (torch.bool, torch.uint8):
                gpu.synchronise("an index of truth values")
        foreign = [tensor for tensor in foreign if all(tensor is not index for index in indices)]
    # Before 2.11 (2.9 and 2.10 were tried) topk's gradient begins with zeros made in C++, which knows no DeviceTensor.
    if packet is aten.scatter and torch.__version__ < (2, 11):
        foreign = [tensor for tensor in foreign if tensor is not args[0]]
    # As CUDA does: a single number may come from the host, but is no place to write to.
    written = [args[place] for place, argument in enumerate(func._schema.arguments[: len(args)]) if argument.is_write]
    if any(t.ndim or any(t is w for w in written) for t in foreign):
        raise DeviceError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
    generator = kwargs.get("generator")
    if generator is not None and all(generator._cdata != known._cdata for known in gpu.generators):
        raise DeviceError(f"{func}: expected a generator of the device cuda, found one of the cpu")


class _Functions(TorchFunctionMode):
    """Sees every call before C++ does, which would look for a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        for value in () if func is torch.device else (*args, kwargs.get("device")):
            if isinstance(value, torch.device | str) and str(value) in ("cuda", "cuda:0"):
                _with_index(torch.device(value))
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Sees operations without any tensor of the device: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


@contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    gpu = _gpu()
    before, gpu.stream = gpu.stream, stream or gpu.stream
    try:
        yield
    finally:
        gpu.stream = before


def _generator(device: Any = "cpu") -> torch.Generator:
    made = _real_generator()
    if torch.device(device).type == "cuda":
        _with_index(torch.device(device))
        _gpu().generators.append(made)
    return made


_real_generator = torch.Generator


@contextmanager
def simulated_gpu(memory_bytes: int = 80 * 2**30) -> Iterator[Gpu]:
    """One CUDA device with so much memory, nearly all used by others; while the context is open, in this thread."""
    gpu = Gpu()
    _current.append(gpu)
    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: DEVICE.index,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "a simulated GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (1024, memory_bytes),
        "synchronize": lambda device=None: gpu.synchronise("torch.cuda.synchronize"),
        "current_stream": lambda device=None: gpu.stream,
        "stream": _on_stream,
        "Stream": Stream,
        "Event": Event,
    }
    real_autocast = torch.autocast
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", _generator)
        patch.setattr(torch, "autocast", lambda kind, *args, **options: real_autocast("cpu", *args, **options))
        for name in ("get_autocast_dtype", "is_autocast_enabled"):
            patch.setattr(torch, name, functools.partial(_of_the_cpu, getattr(torch, name)))
        # The second is its name in PyTorch 2.9.
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            patch.setattr(torch.optim.Optimizer, name, lambda optimizer: None, raising=False)
        patch.setattr(
            sys.modules["torch.optim.optimizer"], "_foreach_supported_types", [Tensor, torch.nn.Parameter, DeviceTensor]
        )
        # A module's parameters are replaced when it moves: what they are on the host is another class.
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        try:
            with _Functions(), _Operations():
                yield gpu
            for stream in {copy.stream for copy in gpu.copies}:
                gpu.finish_copies(stream, stream.tick)
        finally:
            _current.pop()


def _of_the_cpu(ask: Callable[[str], Any], kind: str = "cpu") -> Any:
    return ask("cpu")


@contextmanager
def nccl() -> Iterator[None]:
    """Gloo's process group under NCCL's name: it takes tensors of the device, and no others."""
    real_reduce, real_broadcast = dist.all_reduce, dist.broadcast

    def on_device(real: Callable[..., Any]) -> Callable[..., Any]:
        def collective(tensor: Tensor, *args: Any, **options: Any) -> Any:
            if not isinstance(tensor, DeviceTensor):
                raise DeviceError("NCCL knows tensors on GPUs only, and was given one of the host")
            _usable(tensor)
            return real(tensor.host, *args, **options)

        return collective

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", on_device(real_reduce))
        patch.setattr(dist, "broadcast", on_device(real_broadcast))
        patch.setattr(dist, "get_backend", lambda group=None: "nccl")
        yield
