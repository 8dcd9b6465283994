"""Teachers on devices of their own: here "meta", which no student can be on by accident."""

import pytest
import torch
from test_resume import make, weights
from torch import nn

from kdkernels.distill import SeveralTeachers
from kdkernels.distill.predictions import as_teacher

ANSWER = torch.randn(5, generator=torch.Generator().manual_seed(4))


class Elsewhere(nn.Module):
    """Says the same of everything, and brings that to the CPU, which meta tensors cannot be."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))
        self.calls = 0

    def forward(self, inputs):
        assert inputs.device.type == "meta"
        self.calls += 1
        return ANSWER.expand(len(inputs), -1)


@pytest.mark.parametrize("several", (False, True))
def test_a_teacher_stays_where_it_is(several):
    teacher = Elsewhere()
    found = make(SeveralTeachers([teacher, teacher]) if several else teacher)
    found.train(4)
    wanted = make(ANSWER.expand(37, -1).contiguous())
    wanted.train(4)
    assert teacher.calls == 4 * (1 + several)
    torch.testing.assert_close(weights(found), weights(wanted), rtol=1e-6, atol=0.0)


def test_an_accelerator_moves_a_teacher_from_the_cpu_only():
    class Accelerator:
        device = torch.device("meta")

    assert as_teacher(nn.Linear(2, 3), Accelerator).model.weight.device.type == "meta"
    Accelerator.device = torch.device("cpu")
    assert as_teacher(Elsewhere(), Accelerator).model.weight.device.type == "meta"


def test_processes_that_train_alone_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="2 processes were started, the Distiller knows of 1"):
        make(ANSWER.expand(37, -1))
