"""Born-again students: who teaches whom."""

import pytest
import torch
from torch import nn

from kdkernels import KDLoss
from kdkernels.distill import Distiller, SeveralTeachers
from kdkernels.distill.generations import born_again


def make_student(generation):
    torch.manual_seed(generation)
    return nn.Linear(6, 4)


def test_each_learns_from_the_one_before():
    lessons = []
    students = born_again(make_student, lambda *pair: lessons.append(pair), 3)
    assert [student for student, _ in lessons] == students and len(students) == 3
    assert [teacher for _, teacher in lessons] == [None, *students[:2]]


def test_the_first_one_may_have_a_teacher():
    teacher, lessons = nn.Linear(6, 4), []
    students = born_again(make_student, lambda *pair: lessons.append(pair[1]), 2, teacher)
    assert lessons == [teacher, students[0]]


def test_generations_come_closer_to_their_teachers_only():
    """With soft targets alone: the next one follows, and those that taught stay as they were."""
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    teacher = make_student(100)
    before = []

    def train(student, teacher):
        before.append((teacher, [x.clone() for x in teacher.parameters()]))
        Distiller(student, teacher, inputs, loss=KDLoss(), optimizer=adam).train(300)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.05)

    students = born_again(make_student, train, 3, teacher)
    weights = [each.weight for each in students]
    assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False))
    for each, old in before:
        assert all(torch.equal(x, y) for x, y in zip(each.parameters(), old, strict=True))
    taught = [each(inputs).softmax(-1) for each in students]
    fresh = [make_student(k)(inputs).softmax(-1) for k in range(3)]
    expected = teacher(inputs).softmax(-1)
    for student, start in zip(taught, fresh, strict=True):
        assert (student - expected).norm() < 0.05 * (start - expected).norm()


def test_all_generations_teach_one():
    """Their ensemble is a teacher like others."""
    students = born_again(make_student, lambda student, teacher: None, 3)
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    student = make_student(9)
    history = Distiller(student, SeveralTeachers(students), inputs, loss=KDLoss()).train(50)
    assert history.losses[-1] > 0


@pytest.mark.parametrize("generations", (0, -1))
def test_no_generation(generations):
    with pytest.raises(ValueError, match="generations must be at least 1"):
        born_again(make_student, None, generations)
