"""What `kd_loss` requires of its tensors: typed errors that say what was got and what is wanted."""

import sys

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
REALS = FLOATS + INTEGERS
LABELS = (torch.int64, torch.int32)


def logits(student, teacher, vocab_size):
    """Check both logits and return the number of real classes."""
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor of logits, got {type(x).__name__}")
        if x.dtype not in FLOATS or x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor of {_names(FLOATS)}, got {_kind(x)}")
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        raise TypeError(
            "float64 logits go with float64 only, got "
            f"student {student.dtype} and teacher {teacher.dtype}"
        )
    if student.dim() < 2:
        raise ValueError(f"student must be logits (..., V), at least 2-D, got {_shape(student)}")
    if teacher.shape[:-1] != student.shape[:-1] or teacher.dim() != student.dim():
        raise ValueError(
            "teacher must have the student's leading dimensions, got "
            f"teacher {_shape(teacher)} and student {_shape(student)}"
        )
    if teacher.device != student.device:
        raise ValueError(f"teacher is on {teacher.device}, student on {student.device}")
    if teacher.requires_grad:
        raise ValueError("teacher requires grad, but gets no gradient; pass teacher.detach()")
    widths = student.shape[-1], teacher.shape[-1]
    if vocab_size is None:
        if widths[0] != widths[1]:
            raise ValueError(
                f"student has {widths[0]} classes and teacher {widths[1]}; "
                "if the last columns are padding, pass vocab_size"
            )
        if not widths[0] and student.shape[:-1].numel():
            raise ValueError(f"logits must have at least one class, got student {_shape(student)}")
        return widths[0]
    vocab_size_option(vocab_size)
    if vocab_size > min(widths):
        raise ValueError(
            f"vocab_size must be in [1, {min(widths)}], the narrower of student and teacher, "
            f"got {vocab_size}"
        )
    return vocab_size


def vocab_size_option(vocab_size):
    """What can be said of it without logits."""
    if vocab_size is None:
        return
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")


def row_tensor(name, x, student, dtypes):
    """Check a tensor that holds one value for every row, or None."""
    if x is None:
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor of {_names(dtypes)}, got {_kind(x)}")
    if x.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {tuple(student.shape[:-1])}, the student's leading "
            f"dimensions, got {_shape(x)}"
        )
    if x.device != student.device:
        raise ValueError(f"{name} is on {x.device}, student on {student.device}")
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but gets no gradient; pass {name}.detach()")


def num_items(num_items, reduction):
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items goes with reduction='mean' only, got reduction={reduction!r}")
    if isinstance(num_items, torch.Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must have one element, got shape {_shape(num_items)}")
        if num_items.dtype == torch.bool or num_items.dtype.is_complex:
            raise TypeError(f"num_items must be a real number, got {num_items.dtype}")
    elif isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(f"num_items must be a number or tensor, got {type(num_items).__name__}")
    elif not 0 <= num_items <= sys.float_info.max:
        raise ValueError(f"num_items must be finite and not negative, got {num_items}")


def overwritable(student, teacher):
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
                f"{_shape(student)} with strides {student.stride()}"
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
                f"{_shape(student)} with strides {student.stride()}"
            )
    layouts = [(x.data_ptr(), x.dtype, x.stride()) for x in (student, teacher)]
    if layouts[0] != layouts[1] and _overlap(student, teacher):
        raise ValueError(
            "inplace=True would overwrite teacher logits that are still to be read: student and "
            "teacher share memory; pass a copy of one, or inplace=False"
        )


def _row_addresses(x):
    """Where the rows of x (..., V) begin, in bytes, ascending: int64, on the CPU."""
    starts = torch.tensor(x.data_ptr(), device="cpu")
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        steps = torch.arange(size, device="cpu") * (stride * x.element_size())
        starts = starts[..., None] + steps
    return starts.flatten().sort().values


def _overlap(a, b):
    """Whether two tensors (..., V) of unit vocabulary stride have a byte in common."""
    if not a.numel() or not b.numel():
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    starts, others = _row_addresses(a), _row_addresses(b)
    ends = starts + a.shape[-1] * a.element_size()
    # Rows of `b` that begin before the end of a row of `a` and do not end before it begins.
    before_end = torch.searchsorted(others, ends)
    ended = torch.searchsorted(others + b.shape[-1] * b.element_size(), starts, right=True)
    return bool((before_end > ended).any())


def _shape(x):
    return tuple(x.shape)


def _kind(x):
    return f"{x.dtype}" if x.layout == torch.strided else f"{x.layout}"


def _names(dtypes):
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
