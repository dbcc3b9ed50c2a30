"""Tensors of a pickle of torch's, as views of storages that were read from checked places of the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scrl_fast.weights.pickled_arrays import ARRAYS, checked_shape
from scrl_fast.weights.pickles import Constructor, Named, PickleError, PickleReader

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
MAX_SHARING = 16
"""All tensors together, were none to share its storage with another, over the size of the file."""

CONSTANTS: dict[str, Any] = {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


def storage_dtype(kind: Any) -> torch.dtype:
    """The dtype of a storage class such as ``torch.FloatStorage``. Raises PickleError for an unknown class."""
    name = kind.name.rpartition(".")[2] if type(kind) is Named and kind.name.startswith("torch.") else "?"
    if name not in STORAGE_DTYPES:
        raise PickleError(f"a storage of an unknown class, {kind.name if type(kind) is Named else kind!r}")
    return STORAGE_DTYPES[name]


def _view(reader: PickleReader, storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    """The tensor at ``offset`` of a flat tensor ``storage``. Raises PickleError for one that leaves it.

    An expanded tensor, which has more elements than its storage, comes back with memory of its own.
    """
    if type(storage) is not Tensor or type(dtype) is not torch.dtype or type(offset) is not int or offset < 0:
        raise PickleError("a tensor without a storage, or before its start")
    sizes = checked_shape(tuple(shape) if type(shape) is torch.Size else shape)
    steps = checked_shape(strides)
    if len(steps) != len(sizes):
        raise PickleError(f"a tensor of shape {list(sizes)} with {len(steps)} strides")
    flat = storage.view(dtype)
    count = 1
    for size in sizes:
        count *= size
    last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) if count else 0
    if last >= max(flat.numel(), 1) or (count and not flat.numel()):
        raise PickleError(
            f"a tensor of shape {list(sizes)}, strides {list(steps)} and offset {offset} in a storage of {flat.numel()}"
        )
    expanded = count > flat.numel()
    reader.spend(64 + count * dtype.itemsize * (MAX_SHARING if expanded else 4) // MAX_SHARING)
    if not count:
        return torch.zeros(sizes, dtype=dtype)
    view = torch.empty(0, dtype=dtype).set_(flat.untyped_storage(), flat.storage_offset() + offset, sizes, steps)
    if not expanded:
        return view
    own = view.clone(memory_format=torch.contiguous_format)
    reader.copies.append((own.detach(), view))
    return own


def _tensor(reader: PickleReader, arguments: tuple[Any, ...]) -> Tensor:
    """``(storage, offset, shape, strides, requires_grad, hooks[, metadata])``."""
    storage, offset, shape, strides, requires_grad = (*arguments, False)[:5] if len(arguments) == 4 else arguments[:5]
    if len(arguments) > 6 and arguments[6]:
        raise PickleError("a conjugated or negated view")
    found = _view(reader, storage, getattr(storage, "dtype", None), offset, shape, strides)
    return found.requires_grad_(requires_grad is True)


def _tensor_of_dtype(reader: PickleReader, arguments: tuple[Any, ...]) -> Tensor:
    """``(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])``."""
    storage, offset, shape, strides, requires_grad, _, dtype = arguments[:7]
    if type(dtype) is not torch.dtype or any(arguments[7:]):
        raise PickleError("a tensor of an unknown dtype")
    return _view(reader, storage, dtype, offset, shape, strides).requires_grad_(requires_grad is True)


def _parameter(reader: PickleReader, arguments: tuple[Any, ...]) -> nn.Parameter:
    data, requires_grad = arguments[:2]
    if not isinstance(data, Tensor):
        raise PickleError("a parameter without data")
    return nn.Parameter(data.detach(), requires_grad is True)


def _with_attributes(reader: PickleReader, arguments: tuple[Any, ...]) -> Any:
    """``(function, class, arguments, attributes)``; attributes are dropped, other classes refused."""
    function, cls, inner, _ = arguments
    if type(cls) is not Named or cls.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        raise PickleError(f"a tensor of the class {getattr(cls, 'name', cls)}")
    if type(function) is not Named or function.name not in TENSORS:
        raise PickleError("a tensor that is made in an unknown way")
    return reader.call(function, inner)


def _size(reader: PickleReader, arguments: tuple[Any, ...]) -> torch.Size:
    return torch.Size(checked_shape(arguments[0]) if arguments else ())


def _device(reader: PickleReader, arguments: tuple[Any, ...]) -> torch.device:
    if not arguments or type(arguments[0]) is not str or any(type(index) is not int for index in arguments[1:]):
        raise PickleError("a device without name")
    return torch.device(*arguments[:2])


TENSORS: dict[str, Constructor] = {
    **ARRAYS,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Size": _size,
    "torch.device": _device,
}
"""Constructors of tensors and of what stands beside them, for `scrl_fast.weights.pickles.PickleReader`."""


def tensor_reader(data: bytes, size: int, persistent: Callable[[Any], Any]) -> PickleReader:
    """A reader of torch's pickles. size: bytes of the whole file; persistent: the storage of a persistent id."""
    reader = PickleReader(data, TENSORS, CONSTANTS, persistent)
    reader.budget = 4 * size + (1 << 20)
    return reader
