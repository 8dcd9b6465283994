import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdkernels import KDLoss
from kdkernels.distill import Distiller, evaluate, predict

N, H, V = 23, 5, 7
SGD = functools.partial(torch.optim.SGD, lr=0.1)


def linear(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(H, V, dtype=dtype)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(N, H, generator=generator),
        torch.randint(V, (N,), generator=generator),
    )


def weights(module):
    return torch.cat([each.detach().flatten() for each in module.parameters()])


def trained(data, teacher, *, steps=9, loss=None, **options):
    """The weights of a student after some steps."""
    student = linear()
    loss = loss or KDLoss(temperature=3.0, alpha=0.7)
    Distiller(student, teacher, *data, loss=loss, **{"batch_size": 8, **options}).train(steps)
    return weights(student)


def test_a_step_descends_the_formula(data):
    inputs, labels = data[0].double(), data[1]
    teacher, student, by_hand = (linear(seed, torch.float64) for seed in (1, 0, 0))
    temperature, alpha = 3.0, 0.7
    loss = KDLoss(temperature=temperature, alpha=alpha, backend="eager")
    history = Distiller(student, teacher, inputs, labels, loss=loss, optimizer=SGD).train(1)

    logits = by_hand(inputs)
    soft = F.kl_div(
        F.log_softmax(logits / temperature, -1),
        F.softmax(teacher(inputs).detach() / temperature, -1),
        reduction="batchmean",
    )
    value = alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(logits, labels)
    value.backward()
    SGD(by_hand.parameters()).step()
    assert history.losses == pytest.approx([value.item()], rel=1e-12)
    torch.testing.assert_close(weights(student), weights(by_hand), rtol=1e-12, atol=0)


def test_a_student_learns_its_teacher_without_labels(data):
    inputs, _ = data
    teacher, student = linear(1), linear(0)
    Distiller(
        student, teacher, inputs, loss=KDLoss(), optimizer=functools.partial(SGD, lr=2.0)
    ).train(500)
    assert evaluate(student, inputs, predict(teacher, inputs).argmax(-1)).errors == 0


class Repeat(nn.Module):
    """A teacher whose logits have the same bits in any batch, which a matrix product's need not."""

    def forward(self, inputs):
        return torch.cat([inputs, 2 * inputs], -1)[:, :V]


def test_a_teacher_and_its_logits_give_the_same_bits(data):
    teacher = Repeat()
    assert torch.equal(trained(data, teacher), trained(data, predict(teacher, data[0])))


def test_the_seed_fixes_the_run(data):
    teacher = linear(1)
    assert torch.equal(trained(data, teacher, seed=3), trained(data, teacher, seed=3))
    assert not torch.equal(trained(data, teacher, seed=3), trained(data, teacher, seed=4))


def test_training_continues_where_it_ended(data):
    student = linear()
    distiller = Distiller(student, None, *data, loss=KDLoss(alpha=0.0), batch_size=8)
    distiller.train(4)
    history = distiller.train(5)
    assert history.steps == [4, 9]
    assert torch.equal(weights(student), trained(data, None, loss=KDLoss(alpha=0.0)))


class Unread(nn.Module):
    def forward(self, inputs):
        raise AssertionError("the teacher was evaluated")


def test_hard_labels_read_no_teacher(data):
    hard = KDLoss(alpha=0.0)
    expected = trained(data, None, loss=hard)
    for teacher in (Unread(), torch.full((N, V), float("nan"))):
        assert torch.equal(trained(data, teacher, loss=hard), expected)


def test_every_epoch_sees_every_row_once(data):
    seen, student = [], linear()
    student.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    Distiller(student, None, *data, loss=KDLoss(alpha=0.0), batch_size=8).train(6)
    assert [len(each) for each in seen] == [8, 8, 7] * 2
    epochs = torch.cat(seen[:3]), torch.cat(seen[3:])
    for epoch in epochs:
        assert torch.equal(epoch.sort(0).values, data[0].sort(0).values)
    assert not torch.equal(*epochs)


def test_the_teacher_is_frozen_and_left_as_it_was(data):
    teacher = nn.Sequential(linear(1), nn.BatchNorm1d(V), nn.Dropout(0.5))
    teacher[1].eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    runs = [trained(data, teacher) for _ in range(2)]
    assert torch.equal(*runs)  # no dropout
    assert [each.training for each in teacher] == [True, False, True]
    assert all(each.grad is None for each in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_student_trains_in_training_and_is_judged_in_evaluation_mode(data):
    modes = []
    student = nn.Sequential(linear(), nn.Dropout(0.5))
    student.eval()
    student.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    Distiller(student, None, *data, loss=KDLoss(alpha=0.0)).train(2, test=data, record_every=1)
    assert modes == [True, False, True, False]


def test_history(data):
    calls = []
    distiller = Distiller(linear(), linear(1), *data, loss=KDLoss())
    history = distiller.train(12, test=data, record_every=5, on_step=lambda: calls.append(1))
    assert history.steps == [5, 10, 12] and len(calls) == 12
    assert len(history.losses) == len(history.evaluations) == 3
    assert history.losses[0] > history.losses[-1]


@pytest.mark.parametrize("shape", [(N,), (N, 3)], ids=["one answer", "three answers"])
def test_evaluate_is_at_temperature_one(shape):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(*shape, H, generator=generator)
    labels = torch.randint(V, shape, generator=generator)
    model = linear()
    result = evaluate(model, inputs, labels)
    logits = model(inputs).detach()
    rows = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    assert torch.equal(result.errors, (logits.argmax(-1) != labels).sum(0))
    torch.testing.assert_close(result.cross_entropy, rows.mean(0))


def test_predict_in_batches(data):
    model = linear()
    torch.testing.assert_close(predict(model, data[0], batch_size=4), model(data[0]).detach())


def test_predictions_are_where_the_model_is():
    assert predict(nn.Linear(H, V, device="meta"), torch.zeros(N, H)).device.type == "meta"


X, Y, Z = torch.zeros(N, H), torch.zeros(N, dtype=torch.int64), torch.zeros(N, V)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "student must be .*, got str", dict(student="resnet")),
        (TypeError, "loss must be .*, got function", dict(loss=F.cross_entropy)),
        (ValueError, "single number", dict(loss=KDLoss(reduction="none"))),
        (ValueError, "single number", dict(loss=KDLoss(return_terms=True))),
        (TypeError, "inputs must be .*, got list", dict(inputs=[1])),
        (ValueError, r"inputs must be .* shape \(0, 5\)", dict(inputs=X[:0], labels=Y[:0])),
        (ValueError, r"inputs must be .* shape \(\)", dict(inputs=torch.tensor(1.0))),
        (TypeError, "labels must be .*, got list", dict(labels=[0] * N)),
        (ValueError, r"labels must have .* 23 inputs, got shape \(22,\)", dict(labels=Y[1:])),
        (ValueError, r"labels must have .* shape \(\)", dict(labels=torch.tensor(1))),
        (TypeError, "teacher must be .*, got str", dict(teacher="bert")),
        (TypeError, "teacher must be .*, got torch.int64", dict(teacher=Z.long())),
        (ValueError, r"teacher must have .* 23 inputs, got shape \(22, 7\)", dict(teacher=Z[1:])),
        (ValueError, "teacher must be .*, got None", dict(teacher=None)),
        (
            ValueError,
            "teacher must be .*, got None",
            dict(teacher=None, labels=None, loss=KDLoss(alpha=0.0)),
        ),
        (
            TypeError,
            r"optimizer\(...\) must be .*, got NoneType",
            dict(optimizer=lambda parameters: None),
        ),
        (ValueError, "batch_size must be at least 1, got 0", dict(batch_size=0)),
        (TypeError, "batch_size must be an int, got float", dict(batch_size=8.0)),
        (TypeError, "seed must be an int, got str", dict(seed="0")),
    ],
)
def test_bad_arguments(error, message, change):
    arguments = dict(student=linear(), teacher=Z, inputs=X, labels=Y, loss=KDLoss()) | change
    with pytest.raises(error, match=message):
        Distiller(**arguments)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "steps must be at least 1, got 0", dict(steps=0)),
        (TypeError, "steps must be an int, got bool", dict(steps=True)),
        (ValueError, "record_every must be at least 1, got -1", dict(steps=1, record_every=-1)),
    ],
)
def test_bad_training_arguments(error, message, options):
    with pytest.raises(error, match=message):
        Distiller(linear(), Z, X, Y, loss=KDLoss()).train(**options)
