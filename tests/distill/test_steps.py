"""What a step is made of: parts of a batch, several teachers, data sets, wrong gradients."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_trained_alike
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import kdkernels as kdk
from kdkernels import KDLoss
from kdkernels.distill import Distiller, FeatureHint, SeveralTeachers, predict
from kdkernels.distill.batches import rows_from, steps_per_epoch
from kdkernels.distill.engine import OneProcess

N, L, H, V = 22, 5, 6, 7
SGD = functools.partial(torch.optim.SGD, lr=0.5)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Linear(H, V, dtype=dtype)


INPUTS = draw(N, L, H).double()
LABELS = torch.randint(V, (N, L), generator=torch.Generator().manual_seed(1))
LABELS[torch.rand(N, L, generator=torch.Generator().manual_seed(2)) < 0.4] = -100
LABELS[3] = -100


def trained(teacher, *, steps=6, labels=LABELS, shift=False, alpha=0.6, **options):
    student = linear()
    loss = KDLoss(temperature=2.0, alpha=alpha, shift=shift, backend="eager")
    options = {"optimizer": SGD, "batch_size": 8, **options}
    distiller = Distiller(student, teacher, INPUTS, labels, loss=loss, **options)
    distiller.train(steps, record_every=1)
    return torch.cat([x.detach().flatten() for x in student.parameters()]), distiller.history


@pytest.mark.parametrize(
    ("labels", "shift"),
    [(LABELS, False), (LABELS, True), (None, False)],
    ids=("labelled", "shifted", "unlabelled"),
)
@pytest.mark.parametrize("parts", (2, 3, 8, 50))
def test_a_batch_in_parts_is_one_batch(parts, labels, shift):
    """Whatever rows count in which part, the gradient is that of the whole."""
    options = dict(labels=labels, shift=shift)
    hinted = dict(hints=[FeatureHint("", "", weight=0.3)])
    for more in ({}, hinted):
        whole, history = trained(linear(1), **options, **more)
        part, of_parts = trained(linear(1), **options, **more, accumulate=parts)
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=0)
        assert of_parts.losses == pytest.approx(history.losses, rel=1e-12)
        for mine, theirs in zip(of_parts.terms, history.terms, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)  # KDTerms are float32


def test_rows_of_every_process():
    """Together the processes see what one sees; a rest that does not suffice is left out."""
    one = rows_from(0, N, 8, seed=5)
    steps = steps_per_epoch(N, 8)
    assert steps == 3
    each = [rows_from(0, N, 8, 5, 3, rank) for rank in range(3)]
    for _ in range(2 * steps):
        parts = [next(rows) for rows in each]
        assert all(map(len, parts)) and torch.equal(torch.cat(parts), next(one))
    assert steps_per_epoch(17, 8, 2) == 2
    again = rows_from(2, 17, 8, 5, 2, 0)
    third = next(itertools.islice(rows_from(0, 17, 8, 5, 2, 0), 2, None))
    assert torch.equal(next(again), third)


@pytest.mark.parametrize("step", (0, 1, 3, 4, 10))
def test_rows_from_a_step_on(step):
    whole, part = rows_from(0, N, 8, seed=1), rows_from(step, N, 8, seed=1)
    for _ in range(step):
        next(whole)
    for _ in range(7):
        assert torch.equal(next(part), next(whole))


def test_several_teachers():
    teachers = [linear(1), linear(2)]
    student, _ = trained(SeveralTeachers([teachers[0], predict(teachers[1], INPUTS)], [3, 1]))

    class Mean(nn.Module):
        def forward(self, inputs):
            return kdk.Ensemble([teacher(inputs) for teacher in teachers], [0.75, 0.25])

    by_hand, _ = trained(Mean())
    assert torch.equal(student, by_hand)


class Numbered(Dataset):
    """Examples in the form that `form` says."""

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, row):
        if self.form == "tuple":
            return INPUTS[row], LABELS[row]
        if self.form == "dict":
            return {"input": INPUTS[row], "labels": LABELS[row]}
        return INPUTS[row]


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("form", ("tuple", "dict", "input"))
def test_a_data_set_is_its_tensors(form, workers):
    student, by_hand = linear(), linear()
    loss, options = KDLoss(backend="eager"), dict(optimizer=SGD, batch_size=8)
    Distiller(student, linear(1), Numbered(form), loss=loss, workers=workers, **options).train(4)
    labels = None if form == "input" else LABELS
    Distiller(by_hand, linear(1), INPUTS, labels, loss=loss, **options).train(4)
    assert torch.equal(student.weight, by_hand.weight)


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle(INPUTS)


class Crowd(OneProcess):
    num_processes = 4


@pytest.mark.parametrize(
    ("error", "message", "inputs", "options"),
    [
        (ValueError, "teacher must be given for examples without", Numbered("input"), {}),
        (ValueError, r"must be \(input, label\), .* got 1 parts", TensorDataset(INPUTS), {}),
        (TypeError, "inputs must be a map-style Dataset, got an Iter", Endless(), {}),
        (
            ValueError,
            "each of the 4 processes, got 3 and 22",
            Numbered("tuple"),
            dict(batch_size=3),
        ),
    ],
)
def test_bad_data(error, message, inputs, options):
    accelerator = Crowd(torch.device("cpu")) if options else None
    options = dict(loss=KDLoss(alpha=0.0), accelerator=accelerator, **options)
    with pytest.raises(error, match=message):
        Distiller(linear(), None, inputs, **options).train(1)


def test_alpha_grows():
    by_hand = linear()
    student, _ = trained(linear(1), steps=4, alpha_warmup=3, alpha=0.9, batch_size=None)
    optimizer = SGD(by_hand.parameters())
    order = rows_from(0, N, N, 0)
    for alpha in (0.3, 0.6, 0.9, 0.9):
        rows = next(order)
        target = linear(1)(INPUTS[rows]).detach()
        options = dict(temperature=2.0, alpha=alpha, backend="eager")
        optimizer.zero_grad()
        kdk.kd_loss(by_hand(INPUTS[rows]), target, LABELS[rows], **options).backward()
        optimizer.step()
    wanted = torch.cat([x.detach().flatten() for x in by_hand.parameters()])
    torch.testing.assert_close(student, wanted, rtol=1e-12, atol=0)


def test_a_gradient_is_clipped():
    student, teacher = linear(), linear(1)
    before = torch.cat([x.detach().flatten() for x in student.parameters()])
    options = dict(loss=KDLoss(), optimizer=functools.partial(SGD, lr=1.0), clip_norm=0.01)
    Distiller(student, teacher, INPUTS, LABELS, **options).train(1)
    after = torch.cat([x.detach().flatten() for x in student.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("accumulate", (1, 3))
def test_a_step_that_is_not_finite_is_not_taken(accumulate):
    inputs = INPUTS.clone()
    inputs[13, 2] = float("inf")
    student = linear()
    distiller = Distiller(
        student, linear(1), inputs, LABELS.clamp_min(0), loss=KDLoss(backend="eager"),
        optimizer=SGD, batch_size=8, accumulate=accumulate,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"not finite, .* examples 13 at 2$") as seen:
        distiller.train(6)
    assert len(seen) == 2 and all(rows == [(13, 2)] for _, rows in distiller.history.skipped)
    assert student.weight.isfinite().all() and distiller.steps_taken == 6
    steps = [step for step, _ in distiller.history.skipped]
    order = list(zip(range(6), rows_from(0, N, 8, 0), strict=False))
    assert steps == [step for step, rows in order if 13 in rows]


def test_what_is_not_finite_leaves_no_trace():
    """Neither in what batch normalisation remembers nor in the history."""
    inputs = INPUTS[:, 0].clone()
    inputs[13] = float("nan")
    student = nn.Sequential(nn.BatchNorm1d(H, dtype=torch.float64), linear())
    options = dict(loss=KDLoss(backend="eager"), optimizer=SGD, batch_size=2)
    distiller = Distiller(student, linear(1), inputs, LABELS.clamp_min(0)[:, 0], **options)
    with pytest.warns(UserWarning, match="not finite"):
        history = distiller.train(11, record_every=1)
    ((step, rows),) = history.skipped
    assert (13,) in rows
    assert all(x.isfinite().all() for x in student.state_dict().values())
    wrong = [loss != loss for loss in history.losses]
    assert wrong == [number == step + 1 for number in history.steps]
    assert student[0].num_batches_tracked == 10


@pytest.mark.parametrize("accumulate", (1, 3))
def test_a_batch_where_no_row_counts(accumulate):
    student, labels = linear(), torch.full_like(LABELS, -100)
    options = dict(loss=KDLoss(), optimizer=SGD, accumulate=accumulate)
    history = Distiller(student, linear(1), INPUTS, labels, **options).train(2)
    assert history.losses == [0.0] and torch.equal(student.weight, linear().weight)
    assert history.terms[0]["distill"] == history.terms[0]["hard"] == 0


def test_a_loss_of_hidden_states():
    """A student that returns a head, and one that returns its logits, learn the same."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = linear(2), nn.Linear(V, V, bias=False, dtype=torch.float64)
            self.head.weight = nn.Parameter(draw(V, V, seed=4).double())

        def forward(self, inputs):
            return kdk.LinearHead(self.body(inputs).tanh(), self.head.weight)

    class Logits(Head):
        def forward(self, inputs):
            return F.linear(self.body(inputs).tanh(), self.head.weight)

    found = []
    for model in (Head(), Logits()):
        for alpha in (0.5, 0.0):
            loss = KDLoss(alpha=alpha, backend="eager")
            options = dict(loss=loss, optimizer=SGD, batch_size=8)
            Distiller(model, linear(1), INPUTS, LABELS, **options).train(3)
        found.append(torch.cat([x.detach().flatten() for x in model.parameters()]))
    before = torch.cat([x.detach().flatten() for x in Head().parameters()])
    assert_trained_alike(*found, before, 1e-10)


def test_a_teacher_may_return_a_head_of_its_own():
    """Its weight is a parameter: frozen all the same, alone and among several."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear(1)

        def forward(self, inputs):
            return kdk.LinearHead(inputs, self.layer.weight, self.layer.bias)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Head()

        def forward(self, inputs):
            return kdk.Ensemble([self.head(inputs), self.head(inputs)])

    wanted, _ = trained(linear(1))
    for teacher in (Head(), SeveralTeachers([Head(), Head()]), Both()):
        found, _ = trained(teacher)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


class Masked(nn.Module):
    """Has no probability for class 2, wherever its first input is positive."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, inputs):
        masked = (torch.arange(V) == 2) & (inputs[..., :1] > 0)
        return self.layer(inputs).masked_fill(masked, -float("inf"))


class Scaled(OneProcess):
    """One process with a scaler, as `accelerate` has it for float16 on a GPU."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)

    def prepare(self, student, optimizer):
        self.optimizer, step = optimizer, optimizer.step

        def scaled_step():
            optimizer.step = step
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.step = scaled_step

        optimizer.step = scaled_step
        return student, optimizer

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def clip_grad_norm_(self, parameters, max_norm):
        self.scaler.unscale_(self.optimizer)
        return super().clip_grad_norm_(parameters, max_norm)


@pytest.mark.parametrize("accelerator", (lambda: None, Scaled), ids=("plain", "scaled"))
def test_an_infinite_loss_with_a_finite_gradient_is_not_descended(accelerator):
    """The gradient of a row is q − p, whatever the probability that the student lacks."""
    student, inputs = Masked(), INPUTS[:, 0]
    inputs = inputs * inputs[:, :1].sign().neg()  # nothing is masked
    inputs[13] *= -1
    distiller = Distiller(
        student, linear(1), inputs, loss=KDLoss(backend="eager"), optimizer=SGD, batch_size=11,
        accelerator=accelerator(),
    )  # fmt: skip
    weights = [student.layer.weight.detach().clone()]
    keep = lambda: weights.append(student.layer.weight.detach().clone())  # noqa: E731
    with pytest.warns(UserWarning, match="loss or gradient is not finite, .* examples 13$"):
        history = distiller.train(4, record_every=1, on_step=keep)
    skipped = [step for step, _ in history.skipped]
    order = list(zip(range(4), rows_from(0, N, 11, 0), strict=False))
    assert skipped == [step for step, rows in order if 13 in rows] and len(skipped) == 2
    same = [torch.equal(*pair) for pair in itertools.pairwise(weights)]
    assert same == [step in skipped for step in range(4)]
