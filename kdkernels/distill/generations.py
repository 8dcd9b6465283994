"""Self-distillation: the student becomes the teacher of the next one of its kind."""

from collections.abc import Callable
from typing import Any, TypeVar

from . import checks

M = TypeVar("M")


def born_again(
    make_student: Callable[[int], M],
    train: Callable[[M, Any], object],
    generations: int,
    teacher: Any = None,
) -> list[M]:
    """Trains students one after the other, each on the one before it as its teacher.

    Furlanello et al. 2018, "Born-Again Neural Networks", section 3. Students of one architecture
    tend to surpass their teacher for a few generations; all together they are an `Ensemble`.

    Args:
        make_student: called with the generation (0, 1, ...), returns a new module.
        train: called with a student and its teacher, trains the student; the teacher is `teacher`
            first, which may be None: then the first one learns from labels.
        generations: how many students, at least 1.

    Returns:
        The students, first to last.
    """
    checks.integer("generations", generations, low=1)
    students = []
    for generation in range(generations):
        student = make_student(generation)
        train(student, teacher)
        students.append(student)
        teacher = student
    return students
