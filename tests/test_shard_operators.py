"""The operators for shards, phase by phase, against eager's and the oracle.

A row is cut into shards. Statistics are compared shard by shard; the other phases are given those
of the whole row, as eager finds them in float64, so that each phase is tested alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import DIVERGENCES, INF, NAMES, NAN, assert_plus_zero, assert_same_bits, problem
from oracle import assert_gradient_close, reference, relative_error
from oracle_sparse import probabilities, sparse_reference
from rows import moved, on_grid

from kdkernels import Sampled, TopK, ops
from kdkernels.kept import Kept, keep
from kdkernels.objective import Objective, make_objective

IGNORE, ELSEWHERE, OUT_OF_RANGE = -100, -1, -2
WIDTHS = (1, 64, 530)  # of shards
V = sum(WIDTHS)
EXACT = ("max_s", "max_t", "label", "others", "highest", "apart")
DISTILL = ("z_s", "max_t", "z_t", "log_ratio", "kl", "z", "kept_z", "share", "cross")
HARD = ("z_rest", "label", "z_hard", "kept_z_hard", "offset")
SPARSE = ("bucket", "renormalize", "sampled")


def objective_of(divergence="forward_kl", beta=None, temperature=1.0, alpha=0.5, **options):
    common = dict(t_squared=True, label_smoothing=0.0, ignore_index=IGNORE, vocab_size=V)
    common |= dict(reduction="sum", has_labels=True) | options
    return make_objective(
        divergence=divergence, beta=beta, temperature=temperature, alpha=alpha, **common
    )


@dataclass
class Cut:
    """Rows in shards: student (N, V), teacher (N, V) or `Kept`, labels and weights (N) or None."""

    student: torch.Tensor
    teacher: Any
    labels: torch.Tensor | None
    objective: Objective
    weights: torch.Tensor | None = None
    num_items: torch.Tensor | None = None
    want_terms: bool = False
    widths: tuple = WIDTHS

    def whole(self):
        """The only shard of (inputs, objective) that has all columns."""
        inputs = self.student, ops.as_list(self.teacher, None), self.labels, self.weights
        return inputs, self.objective

    def shards(self):
        """(inputs, objective) of each: logits are views into more, the last columns NaN."""
        first = 0
        for width in self.widths:
            student = inside(self.student[:, first : first + width])
            if isinstance(self.teacher, Kept):
                teacher = localised(self.teacher, first, width)
            else:
                teacher = inside(self.teacher[:, first : first + width])
            labels = self.labels
            if labels is not None:
                here = (labels >= first) & (labels < first + width)
                labels = torch.where(here, labels - first, labels.clamp(max=ELSEWHERE))
            inputs = student, ops.as_list(teacher, None), labels, self.weights
            yield inputs, replace(self.objective, vocab_size=width)
            first += width


def inside(x):
    """x (N, n) as a view of n + 2 columns, NaN around it."""
    big = x.new_full((len(x), x.shape[1] + 5), NAN)
    big[:, 3:-2] = x
    return big[:, 3:]


def localised(kept, first, width):
    here = (kept.ids >= first) & (kept.ids < first + width)
    ids, order = torch.where(here, kept.ids - first, width).sort(dim=-1, stable=True)
    return Kept(ids, kept.log_p.masked_fill(~here, -INF).gather(-1, order), kept.log_rest)


def statistics(backend, cut, shard):
    """(F, N)"""
    inputs, objective = shard
    return ops.get("shard_statistics", backend)(*inputs, cut.want_terms, *objective.options())


def terms(backend, cut, merged):
    """(R, 3, N)"""
    operator = ops.get("shard_terms", backend)
    return torch.stack(
        [
            operator(*inputs, merged, cut.want_terms, rank == 0, *objective.options())
            for rank, (inputs, objective) in enumerate(cut.shards())
        ]
    )


def merged_of(cut, backend):
    """Statistics of the whole row, and the mean slope that the backend finds."""
    merged = statistics("eager", cut, cut.whole())
    merged = torch.cat([merged, torch.zeros_like(merged[:1])])
    if cut.objective.divergence != "forward_kl" and cut.objective.distill_weight:
        value, mass, slope = terms(backend, cut, merged).sum(0)
        merged[-1] = torch.where(value.isinf(), NAN, slope / mass)
    return merged


def gradient(backend, cut, merged, inplace=False):
    """(N, V) in float64: all that lies beyond the columns has become +0."""
    operator, parts = ops.get("shard_gradient_", backend), []
    for (student, *inputs), objective in cut.shards():
        grad = student if inplace else torch.full_like(student, NAN)
        options = cut.num_items, merged, grad, sum(cut.widths), *objective.options()
        unscale = operator(student, *inputs, *options)
        assert_plus_zero(grad[:, objective.vocab_size :])
        columns = grad[:, : objective.vocab_size].double()
        parts.append(columns * unscale.double().reshape(-1, 1))
    return torch.cat(parts, 1)


def expected(cut, source=None):
    """A `Reference` of the loss; `source` is what `keep` made the sparse teacher of."""
    o = cut.objective
    options = dict(divergence=o.divergence, beta=o.beta or None, temperature=o.temperature)
    options |= dict(alpha=1 - o.hard_weight, label_smoothing=o.label_smoothing)
    options |= dict(token_weights=cut.weights, num_items=cut.num_items)
    options["reduction"] = "sum" if cut.num_items is None else "mean"
    if source is None:
        return reference(cut.student, cut.teacher, cut.labels, **options)
    sampled = isinstance(source, Sampled)
    values, kind = (source.counts, "counts") if sampled else (source.logprobs, source.tail)
    p = probabilities(source.ids, values, kind, V, o.temperature)
    return sparse_reference(cut.student, source.ids, p, cut.labels, **options)


def sparse(kind, teacher, temperature=1.0):
    """The 12 most probable classes of teacher (N, V), or counts, with a row that has few."""
    if kind == "sampled":
        ids = torch.randint(V, (len(teacher), 40))
        ids[1, 7:], ids[2] = -1, -1
        return Sampled(ids, torch.randint(6, ids.shape))
    log_p = teacher.double() / (temperature if kind == "bucket" else 1)
    logprobs, ids = log_p.log_softmax(-1).topk(12, -1)
    return TopK(ids, logprobs, tail=kind)


def assert_statistics(backend, cut):
    """Every field that is wanted, of every shard."""
    o = cut.objective
    unwanted = () if o.distill_weight or cut.want_terms else DISTILL
    if cut.labels is None or not (o.hard_weight or cut.want_terms):
        unwanted += HARD
    for shard in cut.shards():
        names = ops.shard_fields(shard[0][1])
        found, exact = (statistics(name, cut, shard) for name in (backend, "eager"))
        assert found.dtype == torch.float64 and found.shape == exact.shape
        for name, x, y in zip(names, found, exact, strict=True):
            if name in unwanted or name == "offset" and not o.label_smoothing:
                continue
            if name in EXACT:
                assert torch.equal(x, y), name
            elif name == "log_ratio":
                assert (x - y).abs().max() <= 2e-6
            else:
                bar = 1e-5 if name == "kl" else 2e-6
                # A KL of one class is the rounding of a 0.
                off = torch.where((x - y).abs() <= 1e-14, 0.0, relative_error(x, y))
                assert off.max() <= bar, name


def assert_gradient(backend, cut, ref, **options):
    grad = gradient(backend, cut, merged_of(cut, backend))
    assert_gradient_close(grad.to(cut.student.dtype), ref, **options)


# ---- Values --------------------------------------------------------------------------------------

# Temperatures whose e^s is a power of e^{s/T}, and not; with and without a term of weight 0.
CASES = (
    dict(temperature=1.0),
    dict(temperature=2.0, alpha=0.3, label_smoothing=0.1),
    dict(temperature=1.7, alpha=1.0),
    dict(temperature=0.7, alpha=0.0),
    dict(temperature=1.7, alpha=0.0, want_terms=True),
    dict(temperature=2.0, alpha=1.0, label_smoothing=0.2, want_terms=True),
    dict(temperature=1.0, has_labels=False),
)


def cut_of(dtype, kind="dense", want_terms=False, seed=0, count=5, **options):
    """A cut of so many rows: one ignored, one of weight 0, one whose label leads. Also the source.

    Of "sparse" kinds the seed chooses one.
    """
    torch.default_generator.manual_seed(seed)
    objective = objective_of(**options)
    student, teacher, labels = problem(count, V, dtype=dtype)
    labels[0] = student[0].argmax()
    labels[3] = IGNORE
    labels = labels if options.get("has_labels", True) else None
    source = None
    if kind != "dense":
        kind = SPARSE[seed % 3] if kind == "sparse" else kind
        source = sparse(kind, teacher, objective.temperature)
        teacher = keep(source, labels, objective)
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, *(count - 5) * [0.25]])
    num_items = torch.tensor(3.0, dtype=torch.float64)
    rest = dict(weights=weights, num_items=num_items, want_terms=want_terms)
    return Cut(student, teacher, labels, objective, **rest), source


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_statistics(compiled, dtype, kind, case):
    assert_statistics(compiled, cut_of(dtype, kind, seed=case, **CASES[case])[0])


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
@pytest.mark.parametrize("kind", ["dense", "bucket"])
def test_terms_add_up(compiled, kind, divergence, beta):
    cut, _ = cut_of(torch.float32, kind, divergence=divergence, beta=beta, temperature=1.7)
    if cut.objective.divergence == "forward_kl":
        return  # never asked for
    merged = merged_of(cut, "eager")
    found, exact = (terms(name, cut, merged) for name in (compiled, "eager"))
    assert relative_error(found.sum(0)[0], exact.sum(0)[0]).max() <= 2e-5
    assert relative_error(found[:, 1], exact[:, 1]).max() <= 2e-6


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_gradient(compiled, dtype, divergence, beta):
    case = (0, 1, 6)[DIVERGENCES.index((divergence, beta)) % 3]
    options = dict(CASES[case], divergence=divergence, beta=beta)
    cut, source = cut_of(dtype, seed=case + 1, **options)
    assert_gradient(compiled, cut, expected(cut, source), check_blind=True)


@pytest.mark.parametrize("divergence, beta", DIVERGENCES)
def test_gradient_of_a_sparse_teacher(compiled, divergence, beta):
    case = (0, 1, 6)[DIVERGENCES.index((divergence, beta)) % 3]
    options = dict(CASES[case], divergence=divergence, beta=beta)
    cut, source = cut_of(torch.float32, "bucket", seed=case + 1, **options)
    assert_gradient(compiled, cut, expected(cut, source), check_blind=False)


@pytest.mark.parametrize("case", range(2, 6))
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradient_of_one_term(compiled, dtype, kind, case):
    name = "jsd" if case in (2, 4) else "forward_kl"
    cut, source = cut_of(dtype, kind, divergence=name, seed=case, **CASES[case])
    assert_gradient(compiled, cut, expected(cut, source), check_blind=False)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("kind", ["dense", "bucket"])
def test_the_gradient_may_replace_the_student(compiled, dtype, name, kind):
    cut, _ = cut_of(dtype, kind, divergence=name, label_smoothing=0.1)
    merged = merged_of(cut, compiled)
    separate = gradient(compiled, cut, merged)
    assert_same_bits((gradient(compiled, cut, merged, inplace=True), separate))


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("kind", ["dense", "bucket"])
def test_projections(compiled, dtype, name, kind):
    cut, _ = cut_of(dtype, kind, divergence=name, temperature=2.0, label_smoothing=0.1)
    capped = dict(student_scale=-0.7, student_cap=9.0, teacher_scale=1.5, teacher_cap=6.0)
    cut.objective = replace(cut.objective, **capped)
    for shard in cut.shards():
        found, exact = (statistics(x, cut, shard) for x in (compiled, "eager"))
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    found, exact = (gradient(x, cut, merged_of(cut, x)) for x in (compiled, "eager"))
    error, largest = (x.abs().amax(-1) for x in (found - exact, exact))
    unit = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert (error <= unit * largest).all() and (largest > 0).any()


# ---- Near and equal rows -------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_near_rows_keep_their_digits(compiled, kl, temperature):
    torch.default_generator.manual_seed(1)
    teacher = torch.randn(4, 1000) * 3
    student = moved(teacher, kl, temperature)
    objective = objective_of(temperature=temperature, has_labels=False, vocab_size=1000)
    cut = Cut(student, teacher, None, objective, widths=(300, 700))
    for shard in cut.shards():
        found, exact = (
            dict(zip(ops.SHARD_FIELDS, statistics(name, cut, shard), strict=True))
            for name in (compiled, "eager")
        )
        assert relative_error(found["kl"], exact["kl"]).max() <= 1e-5
        ratio = exact["log_ratio"]
        assert (found["log_ratio"] - ratio).abs().max() <= 1e-5 * ratio.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_equal_rows_have_nothing(compiled, name):
    cut, _ = cut_of(torch.float32, divergence=name, has_labels=False)
    cut.teacher = cut.student.clone()
    for shard in cut.shards():
        found = dict(zip(ops.SHARD_FIELDS, statistics(compiled, cut, shard), strict=True))
        assert (found["log_ratio"] == 0).all() and (found["kl"] == 0).all()
    merged = statistics("eager", cut, cut.whole())
    merged = torch.cat([merged, torch.zeros_like(merged[:1])])
    if name != "forward_kl":
        value, _, slope = terms(compiled, cut, merged).unbind(1)
        assert (value == 0).all() and (slope == 0).all()
    assert (gradient(compiled, cut, merged) == 0).all()


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_a_common_shift_changes_maxima_alone(compiled, name):
    cut, _ = cut_of(torch.float32, divergence=name, label_smoothing=0.1)
    cut.student, cut.teacher = (on_grid(x, 2.0**-6) for x in (cut.student, cut.teacher))
    shifted = replace(cut, student=cut.student + 4096, teacher=cut.teacher - 1024)
    for one, other in zip(cut.shards(), shifted.shards(), strict=True):
        pairs = zip(statistics(compiled, cut, one), statistics(compiled, cut, other), strict=True)
        for field, (x, y) in zip(ops.SHARD_FIELDS, pairs, strict=True):
            if field not in EXACT:
                assert_same_bits((x, y))
    before, after = (gradient(compiled, x, merged_of(x, compiled)) for x in (cut, shifted))
    assert_same_bits((before, after))


# ---- What rows may hold --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_shard_of_nothing_but_minus_infinity(compiled, name, side):
    cut, _ = cut_of(torch.float32, divergence=name)
    cut.labels[:3] = V - 1
    ruled_out = slice(1, 1 + 64)
    for x in (cut.student, cut.teacher) if side == "both" else (getattr(cut, side),):
        x[:, ruled_out] = -INF
    for shard in cut.shards():
        assert not statistics(compiled, cut, shard).isnan().any()
    ref = expected(cut)
    merged = merged_of(cut, compiled)
    grad = gradient(compiled, cut, merged).float()
    assert torch.equal(grad.isnan(), ref.grad.isnan())
    if not ref.grad.isnan().any():
        assert_gradient_close(grad, ref, check_blind=False)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_a_sparse_teacher_knows_classes_that_are_ruled_out(compiled, name):
    cut, _ = cut_of(torch.float32, "bucket", divergence=name)
    cut.labels[:3] = V - 1
    cut.student[:, 1 : 1 + 64] = -INF
    for shard in cut.shards():
        assert not statistics(compiled, cut, shard).isnan().any()
    found, exact = (gradient(x, cut, merged_of(cut, x))[:3] for x in (compiled, "eager"))
    assert ((found - exact).abs() <= 4e-6 * exact.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("kind", ["dense", "bucket"])
def test_a_bad_logit_makes_its_row_nan_on_every_shard(compiled, name, kind):
    cut, _ = cut_of(torch.float32, kind, divergence=name, count=8)
    cut.labels[5:7] = V - 1
    bad = {1: (0, NAN), 2: (30, INF), 5: (V - 1, NAN), 6: (V - 1, INF), 7: (V - 1, NAN)}
    for row, (column, value) in bad.items():
        cut.student[row, column] = value
    found = torch.cat([statistics(compiled, cut, shard) for shard in cut.shards()])
    # A label apart is in no sum, which its own infinity shows.
    assert (found.isnan() | (found == INF)).any(0).nonzero().flatten().tolist() == list(bad)
    grad = gradient(compiled, cut, merged_of(cut, compiled))
    assert grad.isnan().all(-1).nonzero().flatten().tolist() == list(bad)
    assert grad.isnan().any(-1).nonzero().flatten().tolist() == list(bad)


@pytest.mark.parametrize("kind", ["dense", "bucket"])
def test_rows_that_do_not_count_are_not_read(compiled, kind):
    cut, _ = cut_of(torch.float32, kind, divergence="reverse_kl")
    cut.student[3:] = NAN  # ignored, and of weight 0
    merged = merged_of(cut, compiled)
    for shard in cut.shards():
        assert_plus_zero(statistics(compiled, cut, shard)[:, 3:])
    assert_plus_zero(terms(compiled, cut, merged)[..., 3:])
    assert_plus_zero(gradient(compiled, cut, merged)[3:])


@pytest.mark.parametrize("kind", ["dense", "bucket"])
def test_a_label_out_of_range_is_nan(compiled, kind):
    cut, _ = cut_of(torch.float32, kind)
    shard = next(cut.shards())
    shard[0][2][1] = OUT_OF_RANGE
    found = statistics(compiled, cut, shard)
    assert found[:, 1].isnan().all() and not found[:, 0].isnan().any()
    merged = merged_of(cut, compiled)
    merged[:, 1] = NAN
    grad = gradient(compiled, cut, merged)
    assert grad[1].isnan().all() and not grad[0].isnan().any()


@pytest.mark.parametrize("kind", ["dense", "bucket"])
def test_neighbours_change_no_bit(compiled, kind):
    cut, _ = cut_of(torch.float32, kind, divergence="jsd")
    index = slice(2, 3)
    teacher = cut.teacher.at(index) if kind != "dense" else cut.teacher[index]
    alone = replace(
        cut,
        student=cut.student[index],
        teacher=teacher,
        labels=cut.labels[index],
        weights=cut.weights[index],
    )
    merged = merged_of(cut, compiled)
    for one, other in zip(cut.shards(), alone.shards(), strict=True):
        found = statistics(compiled, cut, one)[:, index], statistics(compiled, alone, other)
        assert_same_bits(found)
    part = merged[:, index].contiguous()
    assert_same_bits(
        (terms(compiled, cut, merged)[..., index], terms(compiled, alone, part)),
        (gradient(compiled, cut, merged)[index], gradient(compiled, alone, part)),
    )
