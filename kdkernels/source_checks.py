"""What `kd_loss` requires of the two predictions, whatever they come as."""

import torch
from torch import Tensor

from .checks import FLOATS, INTEGERS, REALS, kind_of, names_of, positive_int, shape_of
from .objective import Objective, check_choice, number
from .sources import Dense, Ensemble, LinearHead, Prediction, Sampled, TopK, tensors_of

DENSE = (Tensor, LinearHead)
SPARSE = (TopK, Sampled)
IDS = (*INTEGERS[:-1], torch.uint16, torch.uint32)  # no bool
COUNTS = REALS[:-1]
MAX_FACTOR = 2.0**60  # of logits: what float32 can multiply by and divide by


def check_sources(
    student: Dense, teacher: Prediction, vocab_size: int | None, sharded: bool = False
) -> int:
    """Check both predictions and return the number of real classes; `sharded`: those that are here,
    of which only their group knows how many are real."""
    if not isinstance(student, DENSE):
        raise TypeError(
            f"student must be a tensor of logits or a LinearHead, got {type(student).__name__}"
        )
    _dense("student", student)
    leading = _leading(student)
    if leading.dim() < 2:
        wanted = "logits (..., V)" if leading is student else "hidden states (..., H)"
        raise ValueError(f"student must be {wanted}, at least 2-D, got {shape_of(leading)}")
    widths = {"student": _width(student)}
    for name, x in _teachers(teacher):
        if isinstance(x, DENSE):
            _dense(name, x)
            widths[name] = _width(x)
            if (_leading(x).dtype == torch.float64) != (leading.dtype == torch.float64):
                raise TypeError(
                    "float64 logits go with float64 only, got "
                    f"student {leading.dtype} and {name} {_leading(x).dtype}"
                )
        else:
            _sparse(name, x)
        shape = _leading(x).shape
        if shape[:-1] != leading.shape[:-1]:
            raise ValueError(
                f"{name} must have the student's leading dimensions, got "
                f"{name} {tuple(shape)} and student {shape_of(leading)}"
            )
        for suffix, tensor in tensors_of(x):
            field = name + suffix
            if tensor.device != leading.device:
                raise ValueError(f"{field} is on {tensor.device}, student on {leading.device}")
            if tensor.requires_grad:
                raise ValueError(
                    f"{field} requires grad, but gets no gradient; pass {field}.detach()"
                )
    if sharded:
        positive_int("vocab_size", vocab_size)
        return widths["student"]
    return _vocab_size(widths, leading, vocab_size)


def _vocab_size(widths: dict[str, int], leading: Tensor, vocab_size: int | None) -> int:
    """The number of real classes of predictions that are this wide: name -> columns."""
    if vocab_size is None:
        student = widths["student"]
        for name, width in widths.items():
            if width != student:
                raise ValueError(
                    f"student has {student} classes and {name} {width}; "
                    "if the last columns are padding, pass vocab_size"
                )
        if not student and leading.shape[:-1].numel():
            raise ValueError(
                f"logits must have at least one class, got student {shape_of(leading)}"
            )
        return student
    positive_int("vocab_size", vocab_size)
    narrowest = min(widths.values())
    if vocab_size > narrowest:
        raise ValueError(
            f"vocab_size must be in [1, {narrowest}], the narrower of student and teacher, "
            f"got {vocab_size}"
        )
    return vocab_size


def _leading(x: Dense | TopK | Sampled) -> Tensor:
    """The tensor of a source that has its leading dimensions."""
    if isinstance(x, LinearHead):
        return x.hidden
    return x if isinstance(x, torch.Tensor) else x.ids


def _width(x: Dense) -> int:
    return x.weight.shape[0] if isinstance(x, LinearHead) else x.shape[-1]


def _teachers(teacher: Prediction) -> list[tuple[str, Dense | TopK | Sampled]]:
    """(name, source) of the teacher, or of each of an ensemble's."""
    if not isinstance(teacher, Ensemble):
        if not isinstance(teacher, (*DENSE, *SPARSE)):
            raise TypeError(
                "teacher must be a tensor of logits, LinearHead, TopK, Sampled or Ensemble, got "
                f"{type(teacher).__name__}"
            )
        return [("teacher", teacher)]
    check_choice("teacher.mean", teacher.mean, ("arithmetic", "geometric"))
    if not isinstance(teacher.teachers, (list, tuple)):
        raise TypeError(f"teacher.teachers must be a list, got {type(teacher.teachers).__name__}")
    if not teacher.teachers:
        raise ValueError("teacher.teachers must have at least one member, got none")
    members = [(f"teacher.teachers[{k}]", x) for k, x in enumerate(teacher.teachers)]
    for name, x in members:
        if isinstance(x, DENSE):
            continue
        if not isinstance(x, (*SPARSE, Ensemble)):
            raise TypeError(
                f"{name} must be a tensor of logits, LinearHead or TopK, got {type(x).__name__}"
            )
        renormalized = isinstance(x, TopK) and x.tail == "renormalize"
        if not renormalized or teacher.mean == "geometric":
            raise ValueError(
                f"{name} must be logits, LinearHead or, under the arithmetic mean, "
                f"TopK(tail='renormalize'), got {_kind_of(x)} under the {teacher.mean} mean"
            )
    teacher.shares()
    return members


def _tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor of {names_of(dtypes)}, got {kind_of(x)}")


def _dense(name: str, x: Dense) -> None:
    """Check logits, or a hidden state and its head."""
    if isinstance(x, torch.Tensor):
        _tensor(name, x, FLOATS)
        return
    _tensor(f"{name}.hidden", x.hidden, FLOATS)
    for field in ("weight", "bias"):
        tensor = getattr(x, field)
        if tensor is None and field == "bias":
            continue
        _tensor(f"{name}.{field}", tensor, FLOATS)
        if tensor.dtype != x.hidden.dtype:
            raise TypeError(
                f"{name}.{field} must have the dtype of {name}.hidden, {x.hidden.dtype}, "
                f"got {tensor.dtype}; under autocast, pass {field}.to(hidden.dtype)"
            )
        if tensor.device != x.hidden.device:
            raise ValueError(
                f"{name}.{field} is on {tensor.device}, {name}.hidden on {x.hidden.device}"
            )
    if not x.hidden.dim():
        raise ValueError(f"{name}.hidden must be (..., H), got ()")
    if x.weight.dim() != 2 or x.weight.shape[1] != x.hidden.shape[-1]:
        raise ValueError(
            f"{name}.weight must be (V, H) with H = {x.hidden.shape[-1]}, as hidden "
            f"{shape_of(x.hidden)} has it, got {shape_of(x.weight)}"
        )
    if x.bias is not None and x.bias.shape != x.weight.shape[:1]:
        raise ValueError(
            f"{name}.bias must be (V,) = ({x.weight.shape[0]},), got {shape_of(x.bias)}"
        )
    number(f"{name}.logit_scale", x.logit_scale, -MAX_FACTOR, MAX_FACTOR)
    if x.softcap is not None:
        number(f"{name}.softcap", x.softcap, 1 / MAX_FACTOR, MAX_FACTOR)
    positive_int(f"{name}.chunk_rows", x.chunk_rows)
    sums = [torch.promote_types(x.weight.dtype, torch.float32)]
    if x.weight.dtype == torch.bfloat16:  # float16 has no room for sums
        sums.append(torch.bfloat16)
    if x.grad_dtype not in (None, *sums):
        raise TypeError(
            f"{name}.grad_dtype must be None or, with a weight of {x.weight.dtype}, "
            f"{' or '.join(map(str, sums))}, got {x.grad_dtype}"
        )


def _sparse(name: str, x: TopK | Sampled) -> None:
    """Check TopK or Sampled, but for what its ids and values are: see sparse.py."""
    values, dtypes = ("logprobs", FLOATS) if isinstance(x, TopK) else ("counts", COUNTS)
    _tensor(f"{name}.ids", x.ids, IDS)
    _tensor(f"{name}.{values}", getattr(x, values), dtypes)
    if x.ids.shape != getattr(x, values).shape:
        raise ValueError(
            f"{name}.{values} must have the shape of {name}.ids, {shape_of(x.ids)}, "
            f"got {shape_of(getattr(x, values))}"
        )
    if isinstance(x, TopK):
        check_choice(f"{name}.tail", x.tail, ("bucket", "renormalize"))


def check_sparse_objective(teacher: Prediction, objective: Objective, divergence: str) -> None:
    """Check what a teacher that knows some classes can be asked for; `divergence`: as it was."""
    members = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    if not all(isinstance(x, SPARSE) for x in members):
        return
    first = members[0]
    kind = _kind_of(first)
    renormalized = isinstance(first, TopK) and first.tail == "renormalize"
    if objective.temperature != 1 and not renormalized:
        raise ValueError(
            f"temperature must be 1 with {kind}, which does not know its other classes at another "
            f"one, got {objective.temperature}"
        )
    asked = f"divergence {divergence!r}"
    if divergence != objective.divergence:
        asked += f" is {objective.divergence!r} at this beta and"
    if renormalized and objective.divergence == "reverse_kl":
        raise ValueError(
            f"{asked} is infinite with {kind}, which gives most classes no probability; "
            "use tail='bucket' or another divergence"
        )
    if isinstance(teacher, Sampled) and objective.divergence != "forward_kl":
        raise ValueError(
            "divergence must be 'forward_kl' with Sampled, of which the others are biased, got "
            f"{divergence!r}"
        )


def _kind_of(source: Prediction) -> str:
    return f"TopK(tail={source.tail!r})" if isinstance(source, TopK) else type(source).__name__
