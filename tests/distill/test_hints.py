"""Hints: the formulas in float64, the hooks, and what a student learns from them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_trained_alike
from torch import nn

from kdkernels import KDLoss
from kdkernels.distill import AttentionTransfer, Distiller, FeatureHint
from kdkernels.distill.hints import Recorder

B, V = 12, 5
SGD = functools.partial(torch.optim.SGD, lr=0.5)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, V))


class Pair(nn.Module):
    """Returns what attention layers of transformers do: values and probabilities."""

    def forward(self, x):
        return x, x.softmax(-1)


def test_features_of_one_width():
    hint = FeatureHint("a", "b")
    student, teacher = draw(B, 3, 8), draw(B, 3, 8, seed=1)
    hint.prepare(student, teacher)
    assert hint.projection is None
    wanted = 0.5 * F.mse_loss(student.double(), teacher.double(), reduction="none").mean(-1)
    torch.testing.assert_close(hint(student, teacher).double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", (-1, 1))
def test_features_of_another_width_are_projected(dim):
    hint = FeatureHint("a", "b", dim=dim)
    student, teacher = draw(B, 8, 8), draw(B, 8, 8, seed=1)
    student = student.narrow(dim, 0, 3)
    hint.prepare(student, teacher)
    weight, bias = (x.detach().double() for x in hint.projection.parameters())
    assert weight.shape == (8, 3)
    projected = student.movedim(dim, -1).double() @ weight.T + bias
    wanted = 0.5 * (projected - teacher.movedim(dim, -1).double()).square().mean(-1)
    torch.testing.assert_close(hint(student, teacher).double(), wanted, rtol=1e-5, atol=0)


def test_a_hint_is_made_anew_for_other_models():
    hint = FeatureHint("a", "b")
    hint.prepare(draw(B, 3), draw(B, 8))
    hint.prepare(draw(B, 8), draw(B, 8))
    assert hint.projection is None


def test_a_hint_of_two_distillers_is_two():
    hint, options = FeatureHint("0", "0"), dict(loss=KDLoss(), optimizer=SGD)
    first, second = (
        Distiller(model(4, 0), model(8, 1), draw(B, 6), hints=[hint], **options) for _ in range(2)
    )
    before = first.hints[0].projection.weight.detach().clone()
    first.train(2)
    assert not torch.equal(first.hints[0].projection.weight, before)
    assert torch.equal(second.hints[0].projection.weight, before)


def test_attention_of_channels():
    student, teacher = draw(B, 4, 5, 6), draw(B, 9, 5, 6, seed=1)
    maps = [x.double().square().sum(1).flatten(1) for x in (student, teacher)]
    a, b = (x / x.norm(dim=1, keepdim=True) for x in maps)
    found = AttentionTransfer("a", "b")(student, teacher)
    torch.testing.assert_close(found.double(), 0.5 * (a - b).square().sum(1), rtol=1e-5, atol=0)
    assert AttentionTransfer("a", "b")(3 * student, student).max() < 1e-12  # whatever the scale


def test_attention_of_heads():
    student, teacher = draw(B, 2, 5, 7).softmax(-1), draw(B, 4, 5, 7, seed=1).softmax(-1)
    found = AttentionTransfer("a", "b", rows=2)(student, teacher)
    assert found.shape == (B, 5)
    one = AttentionTransfer("a", "b")(student[3:4, :, 2], teacher[3:4, :, 2])
    torch.testing.assert_close(found[3, 2], one[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("hint", (FeatureHint("1", "1"), AttentionTransfer("a", "b")))
def test_shapes_that_do_not_match(hint):
    with pytest.raises(ValueError, match=r"must agree .* \(12, 4.*\) and \(12, 5.*\)"):
        hint.prepare(draw(B, 4, 7), draw(B, 5, 7)) if hint.student == "1" else hint(
            draw(B, 2, 4), draw(B, 2, 5)
        )


def test_recorder():
    network = nn.Sequential(nn.Linear(6, 6), Pair())
    recorder = Recorder("student", network, [("1", 1), ("0", 0)])
    x = draw(B, 6)
    with recorder():
        values, probabilities = network(x)
    found = recorder.features()
    assert torch.equal(found[0], probabilities) and torch.equal(found[1], values)
    network(x)
    with pytest.raises(RuntimeError, match="'1' of the student must run once .* it ran 0 times"):
        recorder.features()
    with recorder():
        network(x), network(x)
    with pytest.raises(RuntimeError, match="it ran 2 times"):
        recorder.features()


def test_modules_that_are_not_there():
    network = nn.Sequential(nn.Linear(6, 6), Pair())
    with pytest.raises(ValueError, match="the teacher has no module '10'; similar ones: 1"):
        Recorder("teacher", network, [("10", 0)])
    recorder = Recorder("teacher", network, [("1", 2)])
    with recorder():
        network(draw(B, 6))
    with pytest.raises(TypeError, match="'1' of the teacher returns tuple, which has no 2"):
        recorder.features()


def test_a_student_learns_features():
    """alpha = 0 and labels without weight would teach nothing: what is learned is the hint."""
    inputs, teacher, student = draw(64, 6), model(16, 1), model(8, 0)
    hint = FeatureHint("1", "1", weight=10.0)
    loss = KDLoss(alpha=1.0)
    with torch.no_grad():
        teacher[2].weight.zero_()
        teacher[2].bias.zero_()
        student[2].weight.zero_()
        student[2].bias.zero_()
    head = student[2].weight.clone()
    distiller = Distiller(student, teacher, inputs, loss=loss, optimizer=SGD, hints=[hint])
    (hint,) = distiller.hints
    before = hint(student[:2](inputs), teacher[:2](inputs)).mean().item()
    distiller.train(300)
    after = hint(student[:2](inputs), teacher[:2](inputs)).mean().item()
    assert after < 0.2 * before
    torch.testing.assert_close(student[2].weight, head)  # the predictions agreed all the time


def test_the_gradient_is_that_of_the_sum():
    inputs, labels = draw(B, 6), torch.randint(V, (B,))
    teacher, student, by_hand = model(8, 1), model(8, 0), model(8, 0)
    hint = FeatureHint("1", "1", weight=3.0)
    Distiller(
        student, teacher, inputs, labels, loss=KDLoss(alpha=0.0), optimizer=SGD, hints=[hint]
    ).train(1)
    hard = F.cross_entropy(by_hand(inputs), labels)
    guided = 0.5 * F.mse_loss(by_hand[:2](inputs), teacher[:2](inputs).detach())
    (hard + 3.0 * guided).backward()
    SGD(by_hand.parameters()).step()
    models = student, by_hand, model(8, 0)
    for each in zip(*(x.parameters() for x in models), strict=True):
        assert_trained_alike(*(x.detach() for x in each), 1e-5)


@pytest.mark.parametrize(
    ("error", "message", "teacher", "hints"),
    [
        (ValueError, "teacher that is a module, got Tensor", draw(B, V), [FeatureHint("1", "1")]),
        (TypeError, "hints must be FeatureHint .*, got str", model(8, 1), ["1"]),
        (ValueError, "the student has no module '7'", model(8, 1), [FeatureHint("7", "1")]),
    ],
)
def test_bad_hints(error, message, teacher, hints):
    with pytest.raises(error, match=message):
        Distiller(model(8, 0), teacher, draw(B, 6), loss=KDLoss(), hints=hints)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "student must be the path", lambda: FeatureHint(1, "1")),
        (ValueError, "weight must be positive", lambda: FeatureHint("1", "1", weight=0.0)),
        (TypeError, "weight must be a number", lambda: FeatureHint("1", "1", weight="1")),
        (ValueError, "rows must be at least 1", lambda: AttentionTransfer("1", "1", rows=0)),
    ],
)
def test_bad_arguments(error, message, make):
    with pytest.raises(error, match=message):
        make()
