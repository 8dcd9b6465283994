"""ModelOpt's criterion by another import: its numbers, but for a mean that divides by V."""

import warnings

import pytest
import torch
from conftest import problem, random_like
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of versions that it was not tested with
    mtd = pytest.importorskip("modelopt.torch.distill", reason="nvidia-modelopt is not installed")

from kdkernels.integrations.modelopt import LogitsDistillationLoss  # noqa: E402

B, L, V = 3, 4, 50


def step(loss, student, *inputs, upstream=None):
    student = student.detach().requires_grad_()
    value = loss(student, *inputs)
    upstream = random_like(value) if upstream is None else upstream
    (grad,) = torch.autograd.grad(value, student, upstream)
    return value.detach(), grad, upstream


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_values_and_gradients_are_theirs(reduction, temperature):
    student, teacher, _ = problem(B, L, V)
    options = dict(temperature=temperature, reduction=reduction)
    value, grad, upstream = step(LogitsDistillationLoss(**options), student, teacher)
    theirs = mtd.LogitsDistillationLoss(**options)
    wanted, wanted_grad, _ = step(theirs, student, teacher, upstream=upstream)
    torch.testing.assert_close(value, wanted)
    assert (grad - wanted_grad).abs().amax() < 1e-5 * wanted_grad.abs().amax()


@pytest.mark.parametrize("classes", [10, 1000])
def test_their_mean_divides_by_the_number_of_classes_and_ours_does_not(classes):
    student, teacher, _ = problem(B, L, classes)
    value, grad, upstream = step(LogitsDistillationLoss(temperature=2.0), student, teacher)
    theirs = mtd.LogitsDistillationLoss(temperature=2.0)
    with pytest.warns(UserWarning, match="divides the total loss by both the batch size and"):
        wanted, wanted_grad, _ = step(theirs, student, teacher, upstream=upstream)
    torch.testing.assert_close(value, classes * wanted)
    error = grad - classes * wanted_grad
    assert error.abs().amax() < 1e-5 * grad.abs().amax()
    rows = mtd.LogitsDistillationLoss(temperature=2.0, reduction="none")(student, teacher)
    torch.testing.assert_close(value, rows.mean())


def test_arguments_are_checked_when_it_is_made():
    with pytest.raises(ValueError, match="reduction must be one of .*batchmean.*, got 'average'"):
        LogitsDistillationLoss(reduction="average")
    with pytest.raises(ValueError, match="temperature"):
        LogitsDistillationLoss(temperature=0.0)


class Model(nn.Module):
    """Tokens (B, L) -> logits (B, L, V)."""

    def __init__(self, width=8, classes=V):
        super().__init__()
        self.body, self.head = nn.Embedding(V, width), nn.Linear(width, classes)

    def forward(self, tokens):
        return self.head(self.body(tokens))


def convert(student, teacher, criterion, **options):
    config = dict(teacher_model=teacher, criterion=criterion, **options)
    return mtd.convert(student, mode=[("kd_loss", config)])


@pytest.mark.parametrize(
    "criterion", [LogitsDistillationLoss(), {("", ""): LogitsDistillationLoss()}]
)
def test_a_converted_model_trains_on_it(criterion):
    torch.manual_seed(0)
    teacher = Model(16)
    model = convert(Model(), teacher, criterion)
    tokens = torch.randint(V, (B, L))
    logits = model(tokens)
    loss = model.compute_kd_loss()
    assert torch.equal(loss, LogitsDistillationLoss()(logits, teacher(tokens)))
    loss.backward()
    assert model.head.weight.grad.any() and teacher.head.weight.grad is None
    assert not any("teacher" in name or "loss" in name for name in model.state_dict())
    student = mtd.export(model)
    assert type(student) is Model


def test_labels_say_which_rows_count():
    student, teacher, labels = problem(B, L, V)
    labels[0] = labels[1, 2] = -100
    rows = LogitsDistillationLoss(reduction="none")(student, teacher)
    loss = LogitsDistillationLoss()(student, teacher, labels)
    torch.testing.assert_close(loss, rows[labels != -100].mean())
    model = convert(Model(), Model(), LogitsDistillationLoss())
    tokens = torch.randint(V, (B, L))
    model(tokens)
    loss = model.compute_kd_loss(labels=torch.full((B, L), -100))
    assert loss == 0 and loss.requires_grad


def test_a_balancer_weighs_it_against_the_students_own_loss():
    with pytest.warns(UserWarning, match="do not sum to 1"):  # so that the student's has the rest
        balancer = mtd.StaticLossBalancer(kd_loss_weight=0.25)
    model = convert(Model(), Model(), LogitsDistillationLoss(), loss_balancer=balancer)
    tokens = torch.randint(V, (B, L))
    model(tokens)
    losses = model.compute_kd_loss(torch.tensor(2.0), skip_balancer=True)
    assert list(losses) == ["student_loss", "LogitsDistillationLoss_0"]  # as theirs is called
    model(tokens)
    total = model.compute_kd_loss(torch.tensor(2.0))
    torch.testing.assert_close(total, 0.75 * 2.0 + 0.25 * losses["LogitsDistillationLoss_0"])


def test_vocabularies_of_different_sizes_are_refused():
    model = convert(Model(), Model(classes=V + 2), LogitsDistillationLoss())
    model(torch.randint(V, (B, L)))
    with pytest.raises(ValueError, match="vocab_size"):
        model.compute_kd_loss()
