"""Scores against formulas in float64 that share nothing with the code, and what models cost."""

import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from kdkernels import LinearHead, Sampled, TopK, source_rows
from kdkernels.distill import Scores, SeveralTeachers, validate, validation
from kdkernels.distill.validation import calibration_error, compare, row, size_of

N, L, H, V = 23, 5, 6, 9


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_labels(*shape, seed=3):
    labels = torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))
    return labels.masked_fill(draw(*shape, seed=4) > 1, -100)


class Logits(nn.Module):
    """Predicts logits it holds: inputs are numbers of examples."""

    def __init__(self, logits, wrap=lambda x: x):
        super().__init__()
        self.logits, self.wrap = nn.Parameter(logits), wrap

    def forward(self, rows):
        return self.wrap(self.logits[rows])


class Head(nn.Module):
    def __init__(self, hidden, weight, **options):
        super().__init__()
        self.hidden, self.weight = nn.Parameter(hidden), nn.Parameter(weight)
        self.options = options

    def forward(self, rows):
        return LinearHead(self.hidden[rows], self.weight, **self.options)


class Examples(Dataset):
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"rows": torch.tensor(row), "labels": self.labels[row]}


def wanted(logits, labels, teacher=None, bins=15):
    """Scores in NumPy and float64: logits (R, V), labels (R,), teacher (R,) answers."""
    counts = labels.numpy() != -100
    x, y = logits.detach().double().numpy()[counts], labels.numpy()[counts]
    e = np.exp(x - x.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    answers, confidence = p.argmax(1), p.max(1)
    right = answers == y
    return Scores(
        rows=len(y),
        accuracy=right.mean(),
        cross_entropy=-np.log(p[np.arange(len(y)), y]).mean(),
        calibration_error=ece(confidence, right, bins),
        agreement=None if teacher is None else (answers == teacher.numpy()[counts]).mean(),
    )


def ece(confidence, right, bins=15):
    """Guo et al. 2017, eq. 3, bin by bin."""
    total = 0.0
    for k in range(bins):
        low, high = k / bins, (k + 1) / bins
        here = (confidence > low if k else confidence >= 0) & (confidence <= high)
        if here.any():
            total += here.mean() * abs(right[here].mean() - confidence[here].mean())
    return total


def assert_same(found, expected, rel=1e-6):
    for name, value in vars(expected).items():
        if value is not None:
            value = pytest.approx(value, rel=rel)
        assert getattr(found, name) == value, name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("shift", (False, True))
def test_logits_of_every_dtype(dtype, shift):
    logits, labels = 3 * draw(N, L, V), draw_labels(N, L)
    model = Logits(logits.to(dtype), lambda x: types.SimpleNamespace(logits=x))
    teacher = Logits(logits.to(dtype) + 2 * draw(N, L, V, seed=1).to(dtype))
    found = validate(model, torch.arange(N), labels, teacher=teacher, shift=shift, batch_size=7)
    x, y, answers = model.logits.detach(), labels, teacher.logits.argmax(-1)
    if shift:
        x, y, answers = x[:, :-1], y[:, 1:], answers[:, :-1]
    expected = wanted(x.reshape(-1, V), y.flatten(), answers.flatten())
    assert 0.2 < expected.agreement < 0.95 and 0 < expected.accuracy < 1
    assert_same(found, expected)
    assert found.perplexity == pytest.approx(np.exp(expected.cross_entropy), rel=1e-6)
    assert found.errors == found.rows - round(expected.accuracy * found.rows)


@pytest.mark.parametrize("logits_at_a_time", (1, 4 * V, 2**24))
def test_a_head_is_its_logits(logits_at_a_time, monkeypatch):
    """With scale and soft cap, a few rows at a time."""
    monkeypatch.setattr(source_rows, "LOGITS", logits_at_a_time)
    hidden, weight, bias = draw(N, L, H), draw(V + 2, H, seed=1), 5 * draw(V + 2, seed=2)
    model = Head(hidden, weight, bias=bias, logit_scale=-0.7, softcap=4.0)
    teacher = Head(draw(N, L, H, seed=5), weight)
    labels = draw_labels(N, L)
    options = dict(shift=True, vocab_size=V, batch_size=10)
    found = validate(model, torch.arange(N), labels, teacher=teacher, **options)
    x = -0.7 * (hidden.double() @ weight.double().T + bias.double())
    x = (4 * (x / 4).tanh())[:, :-1, :V].reshape(-1, V)
    t = (teacher.hidden.double() @ weight.double().T)[:, :-1, :V].reshape(-1, V)
    assert_same(found, wanted(x, labels[:, 1:].flatten(), t.argmax(-1)), rel=1e-5)


def test_a_head_of_halves_is_the_logits_it_makes():
    hidden, weight = draw(N, H, dtype=torch.bfloat16), draw(V, H, seed=1, dtype=torch.bfloat16)
    labels = draw_labels(N)
    found = validate(Head(hidden, weight), torch.arange(N), labels, teacher=Head(hidden, weight))
    assert_same(found, wanted(hidden @ weight.T, labels, (hidden @ weight.T).float().argmax(-1)))


def test_logits_of_a_head_never_exist_together(monkeypatch):
    rows, seen = 512, []
    monkeypatch.setattr(source_rows, "LOGITS", 16 * V)
    original = validation.eager.logits
    monkeypatch.setattr(
        validation.eager, "logits", lambda *x: seen.append(original(*x)) or seen[-1]
    )
    labels = torch.randint(V, (rows,))
    validate(Head(draw(rows, H), draw(V, H, seed=1)), torch.arange(rows), labels)
    assert len(seen) == rows // 16 and {len(x) for x in seen} == {16}


def test_a_data_set_with_labels():
    logits, labels = draw(N, L, V), draw_labels(N, L)
    model = Logits(logits)
    found = validate(model, Examples(labels), teacher=logits, batch_size=4)
    expected = wanted(logits.reshape(-1, V), labels.flatten(), logits.argmax(-1).flatten())
    assert expected.agreement == 1
    assert_same(found, expected)


def topk(logits, tail="bucket"):
    logprobs, ids = logits.log_softmax(-1).topk(3)
    ids = torch.cat([ids, torch.full_like(ids[..., :1], -1)], -1)
    logprobs = torch.nn.functional.pad(logprobs, (0, 1))  # of a class that is none
    return ids.flip(-1), logprobs.flip(-1), tail


class Rows:
    """Stored predictions of any kind."""

    def __init__(self, kind, *tensors):
        self.kind, self.tensors = kind, tensors

    def __len__(self):
        return N

    def __getitem__(self, rows):
        return self.kind(*(x[rows] if isinstance(x, torch.Tensor) else x for x in self.tensors))


TEACHERS = {
    "logits": lambda x: x,
    "array": lambda x: x.numpy(),
    "top-k": lambda x: Rows(TopK, *topk(x)),
    "renormalized": lambda x: Rows(TopK, *topk(x, "renormalize")),
    # The answer is drawn in two parts, each fewer than another class's.
    "sampled": lambda x: Rows(
        Sampled,
        torch.stack([x.argmax(-1), x.argmin(-1), x.argmax(-1)], -1),
        torch.tensor([2, 3, 2]).expand(N, L, 3),
    ),
    "several": lambda x: SeveralTeachers(
        [10 * x, Rows(TopK, *topk(10 * x, "renormalize")), Logits(draw(N, L, V, seed=9))],
        weights=[5, 5, 1],
    ),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_any_teacher_can_be_agreed_with(kind):
    logits, labels = draw(N, L, V), draw_labels(N, L)
    other = logits + draw(N, L, V, seed=1)
    found = validate(
        Logits(logits), torch.arange(N), labels, teacher=TEACHERS[kind](other), batch_size=9
    )
    same = (logits.argmax(-1) == other.argmax(-1))[labels != -100]
    assert 0.2 < found.agreement < 0.9
    assert found.agreement == pytest.approx(same.double().mean().item())


def test_padding_is_nobodys_answer():
    logits, labels = draw(N, V), torch.randint(V, (N,))
    padded = torch.cat([logits, torch.full((N, 3), 9.0)], 1)
    teacher = torch.cat([logits, torch.full((N, 7), 9.0)], 1)
    found = validate(Logits(padded), torch.arange(N), labels, teacher=teacher, vocab_size=V)
    assert_same(found, wanted(logits, labels, logits.argmax(-1)))


def test_of_equal_logits_the_first_answers():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    teacher = TopK(torch.tensor([[2, 1], [0, 2]]), torch.tensor([[-0.7, -0.7], [-1.0, -1.0]]))

    class Stored:
        def __len__(self):
            return 2

        def __getitem__(self, rows):
            return teacher

    found = validate(Logits(logits), torch.arange(2), torch.tensor([1, 0]), teacher=Stored())
    assert found.accuracy == 1 and found.agreement == 1


def test_the_model_is_as_it_was():
    model = nn.Sequential(nn.Linear(4, 20), nn.Dropout(0.5), nn.Linear(20, V))
    model[1].eval(), model[2].eval()
    x, labels = draw(N, 4), torch.randint(V, (N,))
    first, second = validate(model, x, labels), validate(model, x, labels, batch_size=5)
    assert_same(second, first)
    assert model.training and not model[1].training and model[0].weight.grad is None


def test_what_is_not_finite_shows():
    logits, labels = draw(N, V), torch.randint(V, (N,))
    logits[3, labels[3]] = -float("inf")
    found = validate(Logits(logits), torch.arange(N), labels)
    assert found.cross_entropy == found.perplexity == float("inf")
    assert 0 <= found.calibration_error <= 1
    logits[3] = float("nan")
    found = validate(Logits(logits), torch.arange(N), labels)
    assert np.isnan(found.cross_entropy) and np.isnan(found.calibration_error)


@pytest.mark.parametrize("bins", (1, 2, 10, 15))
def test_the_calibration_error_is_that_of_numpy(bins):
    generator = np.random.default_rng(bins)
    confidence = np.concatenate([generator.random(500) ** 0.3, np.arange(bins + 1) / bins])
    right = generator.random(len(confidence)) < confidence**2
    found = calibration_error(torch.from_numpy(confidence), torch.from_numpy(right), bins)
    assert found == pytest.approx(ece(confidence, right, bins), rel=1e-12)


def test_an_edge_belongs_to_the_bin_below():
    """0.2 is in (0.1, 0.2] with 0.15, not with 0.25: Guo et al. 2017, section 2."""
    confidence = torch.tensor([0.15, 0.2, 0.25], dtype=torch.float64)
    right = torch.tensor([False, True, False])
    found = calibration_error(confidence, right, 10)
    assert found == pytest.approx((abs(1 - 0.35) + 0.25) / 3, rel=1e-12)
    for edge in (0.0, 1.0):
        found = calibration_error(torch.tensor([edge] * 4), torch.tensor([True] * 4))
        assert found == 1 - edge


def test_perfect_calibration():
    """Rows of confidence k/15 that are right k times in 15; and always right at 1."""
    confidence = (torch.arange(1, 16, dtype=torch.float64) / 15).repeat_interleave(15)
    right = torch.cat([torch.arange(15) < k for k in range(1, 16)])
    assert calibration_error(confidence, right) == pytest.approx(0, abs=1e-12)
    assert calibration_error(confidence, torch.ones(225, dtype=torch.bool)) == pytest.approx(
        1 - 8 / 15, rel=1e-12
    )


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "model must be a torch.nn.Module, got str", dict(model="gpt")),
        (ValueError, "labels must be given, got none", dict(labels=None)),
        (ValueError, "labels must count .* got -100", dict(labels=torch.full((N,), -100))),
        (ValueError, "labels must have shape", dict(labels=torch.zeros(N, 2, dtype=int))),
        (ValueError, "labels must have a row for each", dict(labels=torch.zeros(3, dtype=int))),
        (IndexError, "labels must be in", dict(labels=torch.full((N,), V))),
        (ValueError, "pass vocab_size", dict(teacher=torch.zeros(N, V + 1))),
        (ValueError, "vocab_size must be in", dict(vocab_size=V + 1)),
        (ValueError, "leading dimensions", dict(teacher=torch.zeros(N, 2, V))),
        (ValueError, "teacher must have a row", dict(teacher=torch.zeros(N + 1, V))),
        (ValueError, "batch_size must be at least 1", dict(batch_size=0)),
    ],
)
def test_bad_arguments(error, message, options):
    labels = torch.zeros(N, dtype=torch.int64)
    arguments = dict(model=Logits(draw(N, V)), inputs=torch.arange(N), labels=labels)
    with pytest.raises(error, match=message):
        validate(**{**arguments, **options})


def test_tensors_that_share_memory_count_once():
    model = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, V))
    model.register_buffer("counts", torch.zeros(10, dtype=torch.float64))
    free = size_of(model, torch.arange(3))
    assert free.parameters == 2 * V * H + V and free.bytes == 4 * free.parameters + 80
    model[1].weight = nn.Parameter(model[0].weight.data)  # tied, in another Parameter
    tied = size_of(model, torch.arange(3))
    assert tied.parameters == V * H + V and tied.bytes == 4 * tied.parameters + 80
    model.to(torch.bfloat16)  # makes two of it again
    assert size_of(model, torch.arange(3)).bytes == 2 * free.parameters + 20
    assert tied.latency_ms > 0


def test_the_latency_of_a_head_has_its_logits(monkeypatch):
    seen = []
    original = validation.eager.logits
    monkeypatch.setattr(
        validation.eager, "logits", lambda *x: seen.append(original(*x)) or seen[-1]
    )
    size_of(Head(draw(N, H), draw(V, H)), torch.arange(4))
    assert {x.shape for x in seen} == {(4, V)} and len(seen) >= 6


def test_a_slow_model_is_called_a_few_times(monkeypatch):
    monkeypatch.setattr(validation, "SECONDS", 0.0)
    calls = []
    model = Logits(draw(N, V), lambda x: calls.append(None) or x)
    assert size_of(model, torch.arange(4)).latency_ms > 0
    assert len(calls) == validation.WARM_UP + 1


def test_students_beside_their_teacher():
    labels = torch.randint(V, (N,))
    teacher = Logits(2.0 * nn.functional.one_hot(labels, V))
    students = {"same": Logits(teacher.logits.detach().clone()), "other": Logits(draw(N, V))}
    found = compare(students, teacher, torch.arange(N), labels, batch_size=8)
    assert [line["name"] for line in found] == ["teacher", "same", "other"]
    first, same, other = found
    assert first["agreement"] is None and first["speed_up"] is None
    assert first["errors"] == 0 and same["agreement"] == 1 and same["accuracy"] == 1
    scores = validate(students["other"], torch.arange(N), labels, teacher=teacher)
    for name in ("accuracy", "cross_entropy", "perplexity", "agreement", "calibration_error"):
        assert other[name] == pytest.approx(getattr(scores, name), rel=1e-12)
    for line in (same, other):
        assert line["speed_up"] == first["latency_ms"] / line["latency_ms"]
        assert line["parameters"] == N * V and line["bytes"] == 4 * N * V


def test_stored_predictions_have_no_line_and_no_speed():
    labels, teacher = draw_labels(N), draw(N, V)
    found = compare({"a": Logits(draw(N, V))}, teacher, Examples(labels))
    assert [line["name"] for line in found] == ["a"]
    assert found[0]["speed_up"] is None and found[0]["agreement"] is not None


def test_a_line_without_a_size():
    line = row("a", Scores(4, 0.75, 1.0, 0.1, None))
    assert line["errors"] == 1 and line["perplexity"] == pytest.approx(np.e)
    assert "parameters" not in line and "speed_up" not in line
