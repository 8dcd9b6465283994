import math

import pytest
import torch

from kdkernels import KDLoss
from kdkernels.distill import Distiller, predict
from kdkernels.distill.presets import digits


@pytest.fixture(autouse=True, scope="module")
def quick():
    with digits.one_thread():
        yield


@pytest.fixture(scope="module")
def splits():
    return digits.load()


def test_the_embedded_digits(splits):
    train, test = splits
    assert train.images.shape == (1000, 64) and train.labels.shape == (1000,)
    assert test.images.shape == (797, 64) and test.labels.shape == (797,)
    images, labels = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels])
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
    # The counts that UCI states for its test set.
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # No test image is a training image.
    assert len(images.unique(dim=0)) == len(images)


def test_a_stack_is_its_members():
    stack = digits.MLPStack([5, 6], (64, 20, 10))
    inputs = torch.randn(7, 2, 64, generator=torch.Generator().manual_seed(0))
    logits = stack(inputs)
    assert logits.shape == (7, 2, 10)
    for member in range(2):
        hidden = inputs[:, member] @ stack.weights[0][member] + stack.biases[0][member]
        expected = hidden.relu() @ stack.weights[1][member] + stack.biases[1][member]
        torch.testing.assert_close(logits[:, member], expected)
        alone = digits.MLPStack([5 + member], (64, 20, 10))
        torch.testing.assert_close(logits[:, [member]], alone(inputs[:, [member]]))


def test_members_train_independently(splits):
    """A student of a stack takes the steps that it would take alone."""
    train, _ = splits

    def train_stack(seeds):
        stack = digits.MLPStack(seeds, (64, 20, 10))
        rows = digits.for_members(train.images[:100], len(seeds))
        labels = digits.for_members(train.labels[:100], len(seeds))
        loss = KDLoss(alpha=0.0)
        Distiller(stack, None, rows, labels, loss=loss, optimizer=digits.ADAM).train(20)
        return stack

    together, alone = train_stack([5, 6, 7]), train_stack([6])
    start = digits.MLPStack([6], (64, 20, 10))
    for stacked, single, first in zip(
        together.parameters(), alone.parameters(), start.parameters(), strict=True
    ):
        moved = (single - first).norm()
        assert moved > 0
        assert (stacked[1:2] - single).norm() < 1e-3 * moved


def test_the_ensemble_averages_probabilities(splits):
    stack = digits.MLPStack(range(3), (64, 20, 10))
    images = splits[0].images[:9]
    members = stack(digits.for_members(images, 3)).softmax(-1)  # (9, 3, 10)
    logits = digits.MeanProbability(stack, 3)(images)
    torch.testing.assert_close(logits.softmax(-1), members.mean(1))


def test_the_standard_error_is_that_of_the_mean():
    run = digits.Run(50, None, [3, 5, 10], None, [], [])
    assert run.mean_errors == 6
    assert run.standard_error == pytest.approx(math.sqrt((9 + 1 + 16) / 2 / 3))
    assert digits.Run(50, None, [3], None, [], []).standard_error is None


def test_soft_targets_beat_hard_labels(splits):
    """The demo's claim at a fifth of its steps; measured: 93.8 against 60.6 errors."""
    train, test = splits
    model = digits.train_teacher(train, steps=120)
    teacher = digits.Teacher(predict(model, train.images), predict(model, test.images))

    def students(temperature):
        return digits.train_students(train, test, teacher, 100, temperature, seeds=5, steps=120)

    hard, soft = students(None), students(8.0)
    assert [len(run.errors) for run in (hard, soft)] == [5, 5]
    assert soft.mean_errors + 20 < hard.mean_errors < 150
    assert sum(soft.agreement) > sum(hard.agreement)
    assert hard.curve[-1] == hard.mean_errors and hard.steps[-1] == 120
    # The same seeds once more: the same students.
    assert students(8.0).errors == soft.errors
