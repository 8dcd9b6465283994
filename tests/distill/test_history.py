"""What training records: curves, logs, early stopping; and that all of it survives a resumption."""

import functools

import pytest
import torch
from test_steps import INPUTS, LABELS, linear

import kdkernels as kdk
from kdkernels import KDLoss
from kdkernels.distill import Checkpoints, Distiller, FeatureHint, evaluate, validate

pytest.importorskip("safetensors", reason="the extra `train` is not installed")

SGD = functools.partial(torch.optim.SGD, lr=0.5)
EXAMPLES, ANSWERS = INPUTS[:, 0], LABELS.clamp_min(0)[:, 0]


class Log:
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def write(self, step, values):
        self.lines.append((step, values))


def make(alpha=0.6, labels=ANSWERS, **options):
    loss = KDLoss(temperature=2.0, alpha=alpha, backend="eager")
    options = {"optimizer": SGD, "batch_size": 8, **options}
    return Distiller(linear(), linear(1), EXAMPLES, labels, loss=loss, **options)


def test_the_terms_of_the_loss():
    distiller, log = make(batch_size=None, hints=[FeatureHint("", "", weight=0.3)]), Log()
    student = linear()
    history = distiller.train(1, logs=[log])
    logits, target = student(EXAMPLES).detach(), linear(1)(EXAMPLES).detach()
    terms = kdk.kd_loss(logits, target, ANSWERS, temperature=2.0, return_terms=True)
    hints = 0.3 * 0.5 * (logits - target).square().mean()
    ((step, values),) = log.lines
    assert step == 1 and history.terms[0].keys() == {"distill", "hard", "hints", "learning_rate"}
    assert values["distill"] == pytest.approx(terms.distill.item(), rel=1e-6)
    assert values["hard"] == pytest.approx(terms.hard.item(), rel=1e-6)
    assert values["hints"] == pytest.approx(hints.item(), rel=1e-12)
    loss = 0.6 * values["distill"] + 0.4 * values["hard"] + values["hints"]
    assert values["loss"] == history.losses[0] == pytest.approx(loss, rel=1e-6)
    assert values["rows_per_second"] > 0 and values["learning_rate"] == 0.5


@pytest.mark.parametrize(("alpha", "labels"), [(0.0, ANSWERS), (1.0, ANSWERS), (0.6, None)])
def test_a_loss_of_one_term_has_no_parts(alpha, labels):
    history = make(alpha, labels).train(2)
    assert history.terms[0].keys() == {"learning_rate"}


def test_rows_are_those_that_count():
    """Of the labels, as the loss sees them."""
    loss = KDLoss(shift=True, backend="eager")
    distiller = Distiller(linear(), linear(1), INPUTS, LABELS, loss=loss)
    distiller.train(1, record_every=2)
    terms, rows = distiller._step(next(distiller._batches()))
    assert rows == (LABELS[:, 1:] != -100).sum()


def test_a_test_is_a_function_too():
    log = Log()
    test = functools.partial(validate, inputs=EXAMPLES, labels=ANSWERS)
    history = make().train(4, test=test, record_every=2, logs=[log])
    wanted = evaluate(make().student, EXAMPLES, ANSWERS).cross_entropy.item()
    assert [each.rows for each in history.evaluations] == [22, 22]
    for (_, values), found in zip(log.lines, history.evaluations, strict=True):
        assert values["test_cross_entropy"] == found.cross_entropy != wanted
        assert values["test_accuracy"] == found.accuracy


class Script:
    """A test whose cross-entropies are given."""

    def __init__(self, *values):
        self.values, self.weights = list(values), []

    def __call__(self, student):
        self.weights.append(student.weight.detach().clone())
        return kdk.distill.Evaluation(torch.tensor(0), torch.tensor(self.values.pop(0)))


def test_early_stopping_keeps_the_best():
    test, nan = Script(3.0, 1.0, 2.0, float("nan"), 1.0, 0.5), float("nan")
    distiller = make()
    history = distiller.train(12, test=test, record_every=2, patience=3)
    assert history.steps == [2, 4, 6, 8, 10] and history.stopped_early
    assert torch.equal(distiller.student.weight, test.weights[1])
    # NaN is never the best, and what is never better leaves the weights as they are.
    test, distiller = Script(nan, nan), make()
    assert distiller.train(9, test=test, record_every=2, patience=2).steps == [2, 4]
    assert torch.equal(distiller.student.weight, test.weights[-1])


def test_training_may_go_on_after_it_was_stopped():
    test, distiller = Script(3.0, 4.0, 5.0, 4.0, 3.5, 2.0, 9.0), make()
    assert distiller.train(9, test=test, record_every=1, patience=2).steps == [1, 2, 3]
    history = distiller.train(3, test=test, record_every=1, patience=2)
    assert history.steps == [1, 2, 3, 4, 5] and history.stopped_early


def test_patience_counts_recordings_in_a_row():
    test, distiller = Script(3.0, 4.0, 2.0, 2.5, 1.0, 5.0), make()
    history = distiller.train(6, test=test, record_every=1, patience=2)
    assert len(history.steps) == 6 and not history.stopped_early
    assert torch.equal(distiller.student.weight, test.weights[4])


def test_early_stopping_survives_a_resumption(tmp_path):
    values = 3.0, 1.0, 2.0, 4.0, 1.5, 0.1
    whole, test = make(), Script(*values)
    whole.train(20, test=test, record_every=3, patience=3)
    first = make()
    options = dict(record_every=3, checkpoints=Checkpoints(tmp_path), checkpoint_every=8)
    with pytest.raises(IndexError):  # it dies at its third recording, after the checkpoint of 8
        first.train(20, test=Script(*values[:2]), patience=3, **options)
    second = make()
    assert second.resume(Checkpoints(tmp_path)) == 8
    history = second.train(12, test=Script(*values[2:]), record_every=3, patience=3)
    assert history.steps == whole.history.steps and history.losses == whole.history.losses
    assert history.terms == whole.history.terms and history.stopped_early
    assert torch.equal(second.student.weight, whole.student.weight)
    assert torch.equal(second.student.weight, test.weights[1])


def test_there_may_be_nothing_to_resume(tmp_path):
    distiller = make()
    assert distiller.resume(Checkpoints(tmp_path / "none")) == 0


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "test must be given for patience=2, got None", dict(patience=2)),
        (ValueError, "patience must be at least 1, got 0", dict(patience=0, test=Script(1.0))),
        (TypeError, "checkpoint_every must be an int, got float", dict(checkpoint_every=1.5)),
    ],
)
def test_bad_arguments(error, message, options):
    with pytest.raises(error, match=message):
        make().train(3, **options)
