"""A step of fixed shape as one CUDA graph or compiled, and the memory it works in; knows no model.

A graph replays kernels on the addresses they had when it was captured. So the tensors that a step reads and changes are
placed once ([`StepMemory`]), and stay with the graph from one generation to the next of the same kind ([`KeptSteps`]).
"""

import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StepMemory:
    """The tensors that a step knows by their addresses, by name, and the graph captured of it, if any."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}
        self.graph = None

    def place(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A copy of `value` where the tensor of that name lies."""
        if name not in self.tensors:
            self.tensors[name] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        return self.tensors[name].copy_(value)

    def zeros(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Zeros where the tensor of that name lies: what an earlier generation left may be NaN."""
        if name not in self.tensors:
            self.tensors[name] = like.new_empty(shape)
        return self.tensors[name].zero_()

    def replace(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Another tensor by that name. The graph, which knows the former one, goes."""
        self.tensors[name], self.graph = value, None
        return value


class KeptSteps:
    """
    Of every owner the memory of its latest step, for as long as the owner lives.

    Who draws takes it out, so that two threads never share one, and puts it back when done.
    """

    def __init__(self):
        self._kept = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def take(self, owner, key: Hashable = None) -> StepMemory | None:
        """What is kept under that key (`None`: nothing is); whatever was kept of the owner, it is no longer."""
        with self._lock:
            kept_key, memory = self._kept.pop(owner, (None, None))
        return memory if key is not None and kept_key == key else None

    def put(self, owner, key: Hashable, memory: StepMemory) -> None:
        with self._lock:
            self._kept[owner] = (key, memory)


# Where modules come from that compute nothing but what their weights and configs say: PEFT's, for one, can be switched.
_PLAIN_PACKAGES = {"torch", "transformers", __name__.partition(".")[0]}


def weights_key(parts: Iterable[torch.nn.Module]) -> tuple | None:
    """
    What a graph takes for constant of these modules and of torch's settings; `None` where that cannot be told.

    Weights count by their addresses, which a graph reads them from: changed in place they may be, moved or replaced not.
    """
    weights = []
    for module in (module for part in parts for module in part.modules()):
        is_plain = type(module).__module__.partition(".")[0] in _PLAIN_PACKAGES and "forward" not in vars(module)
        if not is_plain or module._forward_hooks or module._forward_pre_hooks:
            return None
        own = [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]
        if any(torch.is_autocast_enabled(x.device.type) for x in own):
            # A graph would hold the addresses of the weights' casts, which autocast frees when it ends.
            return None
        weights.append((type(module), module.training, *((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in own)))
    settings = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    return (*settings, torch.is_inference_mode_enabled(), *weights)


_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class HostWait(RuntimeError):
    """An operation would have made the host wait for the device."""


class RefuseHostWaits(TorchDispatchMode):
    """
    Within it an operation that makes the host wait for a device, or copies between them, raises [`HostWait`]: in this
    thread only, unlike `torch.cuda.set_sync_debug_mode`, under which every other thread's copies would fail.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        is_here = any(tensor.device.type == self.device.type for tensor in tensors)
        if is_here and self._waits(func, name, args, kwargs or {}):
            raise HostWait(f"`{name}` makes the host wait for {self.device.type}")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and {self.device.type} < {x.device.type for x in (*tensors, result)}:
            raise HostWait(f"`{name}` copies between {self.device.type} and another device")
        return result

    @staticmethod
    def _waits(func, name: str, args: tuple, kwargs: dict) -> bool:
        if name in _INDEXING:
            # With a mask as an index the elements are counted first.
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name == "repeat_interleave" and kwargs.get("output_size") is not None:
            return False
        return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


# A capture's stream is the process's: each stream keeps a workspace of cuBLAS, 8 to 32 MiB, for good.
_streams: dict[torch.device, "torch.cuda.Stream"] = {}
_capture_lock = threading.Lock()


def capture(step: Callable[[], None], changed: list[torch.Tensor], device: torch.device):
    """
    One call of `step` as a graph of a CUDA device, one capture at a time in a process.

    The step works in tensors that stay where they are; the `changed` ones are as before when this returns.

    Raises:
        HostWait: if something in the step makes the host wait. A capture that fails would leave torch's streams and
            generators in disorder, so it is found out before.
    """
    with _capture_lock, torch.cuda.device(device):
        if device not in _streams:
            _streams[device] = torch.cuda.Stream()
        stream = _streams[device]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                warm_up(step, changed, device)
                graph = torch.cuda.CUDAGraph()
                # Other threads, which load data or answer other requests, may allocate meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    step()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        return graph


def warm_up(step: Callable[[], None], changed: list[torch.Tensor], device: torch.device) -> None:
    """
    Run the step twice and put back what it has changed.

    The first time libraries choose their kernels and workspaces; the second time the host must not wait.
    """
    before = [buffer.clone() for buffer in changed]

    def restore():
        for buffer, value in zip(changed, before):
            buffer.copy_(value)

    try:
        step()
        restore()
        # Uncompiled, since below a dispatch mode torch compiles nothing, and would remember to leave these frames alone.
        with RefuseHostWaits(device), torch.compiler.set_stance("force_eager"):
            step()
    finally:
        restore()


# The latest compiled steps, by options and sizes.
_compiled = OrderedDict()
_compiled_lock = threading.Lock()
_MAX_COMPILED = 16
# `torch.compile` makes graphs of its own in these modes, which do not take buffers that a step changes.
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compiled_step(step: types.FunctionType, options: dict, constants: tuple) -> Callable:
    """
    The compiled step, the same function for the same `options` of a `CompileConfig` and the same `constants`.

    Of other constants it is another function: torch gives up on one that it has compiled eight times.
    """
    key = (repr(sorted(options.items())), constants)
    with _compiled_lock:
        if key not in _compiled:
            copy = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
            _compiled[key] = torch.compile(copy, **_compiler_arguments(options))
            if len(_compiled) > _MAX_COMPILED:
                _compiled.popitem(last=False)
        _compiled.move_to_end(key)
        return _compiled[key]


def _compiler_arguments(options: dict) -> dict:
    """Arguments of `torch.compile` from those of a `CompileConfig`."""
    # Every size has kernels of its own, as it has buffers of its own.
    arguments = {"dynamic": False} | {name: value for name, value in options.items() if value is not None}
    if "options" in arguments:
        arguments.pop("mode", None)
    elif arguments.get("mode") in _WITHOUT_GRAPHS:
        arguments["mode"] = _WITHOUT_GRAPHS[arguments["mode"]]
    return arguments
