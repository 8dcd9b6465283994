"""Hints: losses between what goes on inside of the teacher and of the student.

A hint names a module of each by its path ("layers.3", as `named_modules` lists them); while the
models run, forward hooks keep what these modules return, and nothing of the models has to change.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks

Select: TypeAlias = int | str  # of what a module returns


class Hint(nn.Module):
    """What all hints share: two paths, a weight, and rows that add up to a loss.

    Args:
        student, teacher: paths of the modules whose outputs are compared.
        weight: of the hint in the loss, a positive number.
        select: which of a module's outputs, where it returns several: an index or a name.
    """

    def __init__(
        self, student: str, teacher: str, *, weight: float = 1.0, select: Select = 0
    ) -> None:
        super().__init__()
        checks.instance("student", student, str, "the path of a module")
        checks.instance("teacher", teacher, str, "the path of a module")
        checks.positive("weight", weight)
        self.student, self.teacher, self.weight, self.select = student, teacher, weight, select

    def prepare(self, student: Tensor, teacher: Tensor) -> None:
        """Looks at features of a first batch; makes what has to be learned."""
        self(student, teacher)

    def extra_repr(self) -> str:
        return f"{self.student!r}, {self.teacher!r}, weight={self.weight:g}"


class FeatureHint(Hint):
    """The student's features, projected where their width differs, are to be the teacher's.

    A row's loss is ½ · mean (r(s) − t)² over its features: Romero et al. 2015, "FitNets", eq. 3,
    with the mean for the sum, so that the weight does not depend on the width. The projection r is
    linear over the features, learned along with the student and not part of it.

    Args:
        dim: where the features are: −1 for (B, ..., H), 1 for the channels of (B, C, ...).
    """

    def __init__(
        self, student: str, teacher: str, *, weight: float = 1.0, select: Select = 0, dim: int = -1
    ) -> None:
        super().__init__(student, teacher, weight=weight, select=select)
        self.dim = dim
        self.projection: nn.Linear | None = None

    def prepare(self, student: Tensor, teacher: Tensor) -> None:
        width, wanted = student.shape[self.dim], teacher.shape[self.dim]
        self.projection = None  # of other models that it was used with before
        if width != wanted:
            self.projection = nn.Linear(width, wanted, device=student.device, dtype=student.dtype)
        super().prepare(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student, teacher: (B, ..., H), or with the features at `dim` -> (B, ...)."""
        student = student.movedim(self.dim, -1)
        teacher = teacher.movedim(self.dim, -1)
        if self.projection is not None:
            student = self.projection(student)
        _same_shape(self, student, teacher)
        return 0.5 * (_wide(student) - _wide(teacher)).square().mean(-1)


class AttentionTransfer(Hint):
    """Where the student looks is to be where the teacher does, whatever their widths are.

    Of an activation (B, C, ...) the map is the sum of squares over the channels. A row's loss is
    ½ ‖m_s/‖m_s‖ − m_t/‖m_t‖‖²: Zagoruyko, Komodakis 2017, "Paying More Attention to Attention",
    eq. 2, with the norm squared, as their code has it. Attention probabilities (B, heads, L, L) of
    transformers go with rows=2: a map over the keys for each query.

    Args:
        rows: leading dimensions of a map that are rows: 1 for one map an example.
    """

    def __init__(
        self, student: str, teacher: str, *, weight: float = 1.0, select: Select = 0, rows: int = 1
    ) -> None:
        super().__init__(student, teacher, weight=weight, select=select)
        checks.integer("rows", rows, low=1)
        self.rows = rows

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student (B, C, ...), teacher (B, C', ...) -> (B,), or (B, L) for rows=2."""
        student, teacher = (
            F.normalize(_wide(x).square().sum(1).flatten(self.rows), dim=-1)
            for x in (student, teacher)
        )
        _same_shape(self, student, teacher)
        return 0.5 * (student - teacher).square().sum(-1)


def _wide(x: Tensor) -> Tensor:
    """Sums of squares of halves overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check(hints: Sequence[object], teacher: object) -> None:
    """Hints go with a teacher that is a module: of predictions nothing inside is left."""
    for hint in hints:
        checks.instance("hints", hint, Hint, "FeatureHint or AttentionTransfer")
    if hints and not isinstance(teacher, nn.Module):
        raise ValueError(f"hints need a teacher that is a module, got {type(teacher).__name__}")


def _same_shape(hint: Hint, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{hint.student!r} of the student and {hint.teacher!r} of the teacher must agree in "
            f"all but the features' width, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


class Recorder:
    """Keeps what modules of a model return while it runs.

    Args:
        name: "student" or "teacher", for errors.
        model: the module whose submodules are meant.
        places: (path, select) of each, in order.

    Raises:
        ValueError: a path that the model does not have; the text lists similar ones.
    """

    def __init__(self, name: str, model: Any, places: Sequence[tuple[str, Select]]) -> None:
        self.name, self.places = name, places
        self.modules = [module_of(name, model, path) for path, _ in places]
        self.outputs: dict[int, list[Any]] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """While this is open, outputs are kept; `features` has them afterwards."""
        self.outputs = {}
        handles = [
            module.register_forward_hook(self._keep(index))
            for index, module in enumerate(self.modules)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def features(self) -> list[Tensor]:
        """The tensors that the modules returned, in order.

        Raises:
            RuntimeError: a module did not run, or more than once.
            TypeError: it returned something else.
        """
        found = []
        for index, (path, select) in enumerate(self.places):
            outputs = self.outputs.get(index, [])
            if len(outputs) != 1:
                raise RuntimeError(
                    f"{path!r} of the {self.name} must run once in a forward pass, it ran "
                    f"{len(outputs)} times"
                )
            output = outputs[0]
            if not isinstance(output, torch.Tensor):
                output = _selected(self.name, path, output, select)
            found.append(output)
        self.outputs = {}
        return found

    def _keep(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs.setdefault(index, []).append(output)

        return hook


def module_of(name: str, model: nn.Module, path: str) -> nn.Module:
    """The module at a path; name: "student" or "teacher", for the error.

    Raises:
        ValueError: there is none; the text lists similar paths.
    """
    known = dict(model.named_modules())
    if path in known:
        found: nn.Module = known[path]
        return found
    similar = difflib.get_close_matches(path, known, n=5, cutoff=0.4)
    raise ValueError(
        f"the {name} has no module {path!r}; similar ones: {', '.join(similar) or 'none'}"
    )


def _selected(name: str, path: str, output: Any, select: Select) -> Tensor:
    try:
        found = output[select]
    except (LookupError, TypeError) as error:
        raise TypeError(
            f"{path!r} of the {name} returns {type(output).__name__}, which has no {select!r}"
        ) from error
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"{path!r} of the {name} must return a tensor at {select!r}, got {type(found).__name__}"
        )
    return found
