"""What `kd_loss` requires of its tensors: typed errors that say what was got and what is wanted."""

import sys

import torch
from torch import Tensor

from .sources import Prediction, tensors_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
REALS = FLOATS + INTEGERS
LABELS = (torch.int64, torch.int32)


def positive_int(name: str, value: object) -> None:
    """What can be said of an optional count without tensors."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def row_tensor(
    name: str,
    x: Tensor | None,
    shape: torch.Size,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Check a tensor that holds one value for every row, or None."""
    if x is None:
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor of {names_of(dtypes)}, got {kind_of(x)}")
    if x.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, the student's leading "
            f"dimensions, got {shape_of(x)}"
        )
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, student on {device}")
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but gets no gradient; pass {name}.detach()")


def num_items(num_items: float | Tensor | None, reduction: str) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items goes with reduction='mean' only, got reduction={reduction!r}")
    if isinstance(num_items, torch.Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must have one element, got shape {shape_of(num_items)}")
        if num_items.dtype == torch.bool or num_items.dtype.is_complex:
            raise TypeError(f"num_items must be a real number, got {num_items.dtype}")
    elif isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(f"num_items must be a number or tensor, got {type(num_items).__name__}")
    elif not 0 <= num_items <= sys.float_info.max:
        raise ValueError(f"num_items must be finite and not negative, got {num_items}")


def overwritable(student: Tensor, teacher: Prediction) -> None:
    """In place means in the caller's own memory: logits that would be copied first are refused.

    So are rows that share memory with each other, or with another row of the teacher's.
    """
    if student.stride(-1) != 1 and student.shape[-1] > 1:
        raise ValueError(
            f"inplace=True needs unit stride along the vocabulary, got strides {student.stride()}"
        )
    if student.dim() > 3:
        try:
            student.detach().view(-1, *student.shape[-2:])
        except RuntimeError:
            raise ValueError(
                f"inplace=True needs leading dimensions that flatten to two, got shape "
                f"{shape_of(student)} with strides {student.stride()}"
            ) from None

    if torch.compiler.is_compiling():  # nothing is overwritten then
        if student.is_leaf:  # PyTorch's own error, which comes with the overwriting
            raise RuntimeError(
                "inplace=True: a leaf Variable that requires grad is being used in an in-place "
                "operation"
            )
        return
    if not student.is_contiguous():
        rows = _row_addresses(student)
        if (rows[1:] - rows[:-1] < student.shape[-1] * student.element_size()).any():
            raise ValueError(
                "inplace=True cannot write rows that share memory, got student logits of shape "
                f"{shape_of(student)} with strides {student.stride()}"
            )
    if any(_overwritten(x, student) for _, x in tensors_of(teacher)):
        raise ValueError(
            "inplace=True would overwrite what is still to be read of the teacher: student and "
            "teacher share memory; pass a copy of one, or inplace=False"
        )


def _overwritten(x: Tensor, student: Tensor) -> bool:
    """Whether a tensor of the teacher changes before it is read."""
    if x.shape[:-1] != student.shape[:-1] or x.dim() < 2 or not x.is_floating_point():
        return bool(x.numel()) and _same_storage(x, student)
    layouts = [(y.data_ptr(), y.dtype, y.stride()) for y in (student, x)]
    return layouts[0] != layouts[1] and _overlap(student, x)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    address = a.untyped_storage().data_ptr()  # 0: no memory, as of meta tensors
    return address != 0 and address == b.untyped_storage().data_ptr()


def _row_addresses(x: Tensor) -> Tensor:
    """Where the rows of x (..., V) begin, in bytes, ascending: int64, on the CPU."""
    starts = torch.tensor(x.data_ptr(), device="cpu")
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        steps = torch.arange(size, device="cpu") * (stride * x.element_size())
        starts = starts[..., None] + steps
    return starts.flatten().sort().values


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors (..., V) of unit vocabulary stride have a byte in common."""
    if not a.numel() or not b.numel():
        return False
    if not _same_storage(a, b):
        return False
    starts, others = _row_addresses(a), _row_addresses(b)
    ends = starts + a.shape[-1] * a.element_size()
    # Rows of `b` that begin before the end of a row of `a` and do not end before it begins.
    before_end = torch.searchsorted(others, ends)
    ended = torch.searchsorted(others + b.shape[-1] * b.element_size(), starts, right=True)
    return bool((before_end > ended).any())


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def kind_of(x: Tensor) -> str:
    return f"{x.dtype}" if x.layout == torch.strided else f"{x.layout}"


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
