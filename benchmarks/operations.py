"""Counts the operations that do work, and the waits for the device: what a GPU's driver thread has to launch."""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# They make a tensor without writing to it, or another view of one, though torch does not call them views.
_NO_WORK = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::lift",
    "aten::set_",
    "aten::resize_",
    "aten::_assert_async",
}
# The size of their result depends on values: the host waits for it.
_SIZED_BY_VALUES = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
# Methods that bring values to the host in one go, of which no operation need be seen on a CPU.
_READS = ("tolist", "cpu", "numpy")
# One kernel on a GPU, though a CPU may make several operations of them.
_ONE_KERNEL = ("rms_norm", "scaled_dot_product_attention")


def _has_mask(arguments) -> bool:
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in arguments[1] or ())


class _Calls(TorchFunctionMode):
    """Sees reads of a tensor that lies on the host already, and what is one kernel elsewhere."""

    def __init__(self, operations: Counter, synchronisations: Counter):
        super().__init__()
        self.operations, self.synchronisations = operations, synchronisations
        self.within_kernel = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _READS and args and isinstance(args[0], torch.Tensor):
            self.synchronisations[name] += 1
        if name not in _ONE_KERNEL:
            return func(*args, **kwargs)
        self.operations[name] += 1
        self.within_kernel = True
        try:
            return func(*args, **kwargs)
        finally:
            self.within_kernel = False


class OperationCounter(TorchDispatchMode):
    """
    Counts what PyTorch is asked to do within `with OperationCounter() as counter:`.

    The rule. An operation is one call that reaches a backend: composite ones are counted as what they are made of, and
    what runs within a backend's own code is one (a sort, a `topk`, a draw of `multinomial`). `F.rms_norm` and
    `F.scaled_dot_product_attention` are one, as on a GPU. Not counted is what only looks at memory in another way or
    sets it aside: views (`view`, `expand`, `transpose`, `select`, slices, `split`, `unbind`, `unsqueeze`, `detach`,
    ...), a `reshape` that need not copy, `empty` and its kin, and what returns no tensor. A copy, a fill, a change of
    dtype and a write into a slice each count. A tensor made from Python numbers counts only if it is copied to a
    device.

    Synchronisations are counted apart: reads of a value by the host (`item`, `bool`, `int` or `float` of a tensor:
    all `_local_scalar_dense`), `tolist`, `cpu` and `numpy`, and operations whose result's size depends on values
    (`nonzero`, indexing by a mask, `repeat_interleave` by a tensor). On a CPU they cost nothing, but on a GPU each
    lets the host wait until all before it is done. The last group counts as an operation as well.

    Attributes:
        operations (`Counter`): how often each operation ran, by name.
        synchronisations (`Counter`): the same of synchronisations.
        count, num_synchronisations (`int`): their sums.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.synchronisations = Counter(), Counter()
        self._calls = _Calls(self.operations, self.synchronisations)

    @property
    def count(self) -> int:
        return sum(self.operations.values())

    @property
    def num_synchronisations(self) -> int:
        return sum(self.synchronisations.values())

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._calls.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            self.synchronisations["item"] += 1
        elif not self._calls.within_kernel and self._does_work(func, name, result):
            name = name.removeprefix("aten::")
            self.operations[name] += 1
            masked = name in ("index", "index_put", "index_put_") and _has_mask(args)
            by_tensor = name == "repeat_interleave" and kwargs.get("output_size") is None
            if masked or by_tensor or name in _SIZED_BY_VALUES:
                self.synchronisations[name] += 1
        return result

    @staticmethod
    def _does_work(func, name: str, result) -> bool:
        if func.is_view or name in _NO_WORK:
            return False
        return func._schema.is_mutable or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result))


def count_operations(function) -> OperationCounter:
    """What `function()` does, without gradients, once it has run before (the first call may prepare something)."""
    with torch.no_grad():
        function()
        with OperationCounter() as counter:
            function()
    return counter
