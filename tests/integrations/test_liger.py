"""Liger's names give Liger's numbers, but where those are wrong."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from liger_on_cpu import Case, described, measured

from kdkernels import kd_loss
from kdkernels.backends.registry import ENVIRONMENT_VARIABLE
from kdkernels.integrations import liger
from kdkernels.integrations.liger import (
    LigerFusedLinearJSD,
    LigerFusedLinearJSDLoss,
    LigerFusedLinearKLDivLoss,
    LigerJSD,
    LigerKLDIVLoss,
)

HERE = Path(__file__).parent
V, N, H, WIDE = 37, 7, 6, 9
TEMPERATURE = 3.0
PLAIN = dict(compiled=False)
NAMES = "LigerFusedLinearJSDLoss", "LigerFusedLinearJSD", "LigerFusedLinearKLDivLoss"
NAMES += "LigerJSD", "LigerKLDIVLoss"
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape, grad=False):
    return torch.randn(shape, generator=GENERATOR).requires_grad_(grad)


def heads(*rows, dtype=torch.float32, classes=V):
    """Student's and teacher's hidden states and weights, the teacher's not frozen."""
    pairs = (*rows, H), (V, H), (*rows, WIDE), (classes, WIDE)
    tensors = [random(*shape).to(dtype) for shape in pairs]
    return tuple(x.requires_grad_(k != 2) for k, x in enumerate(tensors))


def labels_of(*rows, ignored=slice(None, None, 3)):
    labels = torch.randint(V, rows, generator=GENERATOR)
    labels.view(-1)[ignored] = -100
    return labels


LOG_Q = random(N, V).mul(2).log_softmax(-1).requires_grad_()
LOG_P = random(N, V).mul(2).log_softmax(-1)
LABELS, IGNORED = labels_of(N), torch.full((N,), -100)
HOLES = LOG_P.exp()  # a row of zeros, and one that does not sum to 1
HOLES[1] = 0
HOLES[2, : V // 2] = 0
HEADS, BIASES = heads(N), (random(V, grad=True), random(V))
CUBE, CUBE_LABELS = heads(4, 16), labels_of(4, 16)
UPSTREAM = torch.tensor(-1.7)


def agreeing():
    """Cases whose numbers are Liger's."""
    for beta in (0.0, 0.3, 1.0):
        for name, labels in (("all", None), ("some", LABELS), ("no", IGNORED)):
            args = LOG_Q, LOG_P, labels
            yield f"JSD {beta}, {name} rows", Case("LigerJSD", dict(beta=beta), args, UPSTREAM)
        options = dict(jsd_beta=beta, temperature=TEMPERATURE)
        for name, labels in (("all", None), ("some", LABELS), ("no", IGNORED)):
            case = Case("LigerFusedLinearJSD", options, (*HEADS, labels), UPSTREAM)
            yield f"fused JSD {beta}, {name} rows", case
        for hard, soft in ((0.5, 0.5), (2.0, 0.3), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
            options = dict(weight_hard_loss=hard, weight_soft_loss=soft, beta=beta, chunk_size=2)
            options = dict(options, temperature=TEMPERATURE, return_soft_hard_loss=True, **PLAIN)
            case = Case("LigerFusedLinearJSDLoss", options, (*HEADS, LABELS), UPSTREAM)
            yield f"chunked JSD {beta}, weights {hard} {soft}", case
    for reduction in ("batchmean", "mean", "sum", "none"):
        upstream = random(N, V) if reduction == "none" else UPSTREAM
        for log_target, target in ((True, LOG_P), (False, LOG_P.exp())):
            options = dict(reduction=reduction, log_target=log_target)
            case = Case("LigerKLDIVLoss", options, (LOG_Q, target), upstream)
            yield f"KL {reduction}, log_target {log_target}", case
    for reduction in ("batchmean", "mean", "sum"):
        for name, labels in (("all", None), ("some", LABELS), ("no", IGNORED)):
            options = dict(reduction=reduction, temperature=TEMPERATURE)
            args = *HEADS[:2], HOLES, labels
            case = Case("LigerFusedLinearKLDivLoss", options, args, UPSTREAM)
            yield f"fused KL {reduction}, {name} rows", case
    case = Case("LigerKLDIVLoss", dict(reduction="sum"), (LOG_Q, HOLES), UPSTREAM)
    yield "KL, targets that do not sum to 1", case
    fused = "LigerFusedLinearJSDLoss"
    yield "chunked JSD, biases", Case(fused, PLAIN, (*HEADS, LABELS, *BIASES), UPSTREAM)
    mixed = tuple(x.bfloat16().detach().requires_grad_() for x in HEADS)
    yield "chunked JSD, float32 biases", Case(fused, PLAIN, (*mixed, LABELS, *BIASES), UPSTREAM)
    yield "chunked JSD, one sum", Case(fused, PLAIN, (*HEADS, LABELS), UPSTREAM)
    yield "chunked JSD, no rows", Case(fused, PLAIN, (*HEADS, IGNORED), UPSTREAM)
    yield (
        "chunked JSD, index",
        Case(fused, dict(ignore_index=3, **PLAIN), (*HEADS, LABELS.abs() % V)),
    )
    yield "chunked JSD, 3-D", Case(fused, dict(chunk_size=8, **PLAIN), (*CUBE, CUBE_LABELS))


AGREEING = dict(agreeing())


def near(dtype):
    """A student that is almost its teacher, with labels."""
    student = random(64, H)
    inputs = student, random(512, H), student + 0.02 * random(64, H)
    hidden, weight, other = (x.to(dtype) for x in inputs)
    labels = torch.randint(512, (64,), generator=GENERATOR)
    return hidden.requires_grad_(), weight.requires_grad_(), other, weight.detach(), labels


NEAR = near(torch.bfloat16)
SOFT = dict(weight_hard_loss=0.0, weight_soft_loss=1.0)
PADDED = (*HEADS[:3], torch.cat([HEADS[3].detach(), torch.zeros(3, WIDE)]))
# No softmax sees the student's, and trained models have something like the teacher's.
OFFSETS = torch.full((V,), -5.0), torch.where(torch.arange(V + 3) < V, 0.0, -30.0)
HOT = tuple((x * 1.5).detach().requires_grad_() for x in HEADS)
PART = labels_of(N, ignored=slice(5))
BROKEN = torch.where((LABELS == -100)[:, None], torch.nan, HEADS[0].detach()).requires_grad_()

DIFFERING = {
    "bfloat16": Case("LigerFusedLinearJSDLoss", dict(SOFT, **PLAIN), NEAR),
    "padded": Case("LigerFusedLinearJSDLoss", dict(SOFT, **PLAIN), (*PADDED, LABELS, *OFFSETS)),
    "capped": Case("LigerFusedLinearJSDLoss", dict(SOFT, **PLAIN), (*HOT, LABELS)),
    "part": Case("LigerFusedLinearJSDLoss", PLAIN, (*HEADS, PART)),
    "NaN": Case("LigerFusedLinearJSDLoss", PLAIN, (BROKEN, *HEADS[1:], LABELS)),
    "soft": Case(
        "LigerFusedLinearJSDLoss",
        dict(return_soft_hard_loss=True, **PLAIN),
        (*HEADS, LABELS),
        output=1,
    ),
    "logits": Case("LigerJSD", {}, (random(N, V, grad=True), LOG_P)),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What Liger itself gives for every case and class."""
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton, which liger-kernel needs, is not installed")
    folder = tmp_path_factory.mktemp("liger")
    cases = {**AGREEING, **DIFFERING, **{name: Case(name, {}, ()) for name in NAMES}}
    torch.save(cases, folder / "cases")
    command = [sys.executable, HERE / "liger_on_cpu.py", folder / "cases", folder / "results"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "results", weights_only=False)


def ours(case, **options):
    return measured(getattr(liger, case.name)(**{**case.options, **options}), case)


def distance(a, b):
    """|a − b| / |b|"""
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item() if b.any() else a.norm().item()


def assert_same_numbers(found, wanted, bound=3e-6):
    for a, b in zip(found[0], wanted[0], strict=True):
        assert distance(a, b) < bound
    for a, b in zip(found[1], wanted[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or distance(a, b) < bound


# ---- The same ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", AGREEING)
def test_values_and_gradients_are_ligers(host, key):
    """Those by log-probabilities too, which are not those by logits."""
    case = AGREEING[key]
    found = ours(case)
    assert_same_numbers(found, host[key], 0.01 if "float32 biases" in key else 3e-6)
    moving = "no rows" not in key and "0.0 0.0" not in key
    assert any(x is not None and x.any() for x in found[1]) == moving


@pytest.mark.parametrize(
    "key",
    [
        "chunked JSD, biases",
        "fused JSD 1.0, some rows",
        "fused KL mean, some rows",
        "JSD 0.3, some rows",
        "KL, targets that do not sum to 1",
    ],
)
def test_every_backend_has_them(backend, key, monkeypatch):
    wanted = ours(AGREEING[key])
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    assert_same_numbers(ours(AGREEING[key]), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_attributes_are_ligers(host, name):
    signatures, attributes, text = described(getattr(liger, name)())
    wanted_signatures, wanted_attributes, wanted_text = host[name]
    assert signatures == wanted_signatures and text == wanted_text
    assert wanted_attributes.items() <= attributes.items()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_behind_a_log_softmax_the_gradient_is_that_of_kd_loss(beta):
    logits, teacher = random(N, V, grad=True), random(N, V)
    wanted = kd_loss(logits, teacher, LABELS, divergence="jsd", beta=beta, alpha=1.0)
    found = LigerJSD(beta)(logits.log_softmax(-1), teacher.log_softmax(-1), LABELS)
    pairs = [torch.autograd.grad(loss, logits, UPSTREAM)[0] for loss in (found, wanted)]
    assert distance(found.detach(), wanted.detach()) < 3e-6 and distance(*pairs) < 3e-6
    if beta == 0:
        target = teacher.softmax(-1)
        found = LigerKLDIVLoss(reduction="batchmean")(logits.log_softmax(-1), target)
        wanted = kd_loss(logits, teacher)
        pairs = [torch.autograd.grad(loss, logits, UPSTREAM)[0] for loss in (found, wanted)]
        assert distance(found.detach(), wanted.detach()) < 3e-6 and distance(*pairs) < 3e-6


def test_the_default_of_kl_div_divides_by_the_classes_too(host):
    (mean,), (batchmean,) = (
        host[f"KL {name}, log_target True"][0] for name in ("mean", "batchmean")
    )
    assert distance(mean * V, batchmean) < 1e-6
    assert LigerKLDIVLoss().reduction == "mean"


def test_attributes_that_are_set_later_count():
    case = AGREEING["chunked JSD, biases"]
    loss = LigerFusedLinearJSDLoss()
    loss.temperature, loss.beta, loss.weight_hard_loss = 2.0, 0.1, 0.2
    wanted = ours(case, temperature=2.0, beta=0.1, weight_hard_loss=0.2)
    assert_same_numbers(measured(loss, case), wanted, 1e-12)


# ---- Different ---------------------------------------------------------------------------------


def test_hidden_states_in_three_dimensions_come_in_chunks_of_rows(host, compiled, monkeypatch):
    """Liger cuts the batch, 4 // 8 times: the logits of all 4 · 16 rows exist."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, compiled)
    case = AGREEING["chunked JSD, 3-D"]
    found, wanted = ours(case), host["chunked JSD, 3-D"]
    assert wanted[2] >= 4 * 16 * V
    assert found[2] == 4 * 16 * WIDE > 8 * V  # the teacher's hidden states
    flat = [x.detach().flatten(0, -2).requires_grad_(x.requires_grad) for x in CUBE]
    flat = ours(case._replace(args=(*flat, CUBE_LABELS.flatten())))
    assert_same_numbers(found, wanted)
    assert distance(flat[0][0], found[0][0]) == 0
    assert all(
        distance(a.flatten(), b.flatten()) < 1e-6
        for a, b in zip(flat[1], found[1], strict=True)
        if a is not None
    )


def test_labels_may_be_flat():
    case = AGREEING["chunked JSD, 3-D"]
    flat = case._replace(args=(*CUBE, CUBE_LABELS.flatten()))
    assert_same_numbers(ours(flat), ours(case), 1e-12)


@pytest.mark.parametrize(
    "key",
    [
        "chunked JSD 0.3, weights 0.0 1.0",
        "fused JSD 0.3, some rows",
        "fused KL batchmean, some rows",
    ],
)
def test_the_divergence_gets_its_t_squared_where_asked(host, key):
    found, wanted = ours(AGREEING[key], t_squared=True), host[key]
    factor = TEMPERATURE**2
    assert distance(found[0][0], wanted[0][0] * factor) < 3e-6
    for a, b in zip(found[1], wanted[1], strict=True):
        assert a is None or distance(a, b * factor) < 3e-6


def test_soft_caps_and_logit_scales_are_taken(host):
    """Liger optimises the divergence of logits that the models do not have."""
    case, scales = DIFFERING["capped"], dict(student_logit_scale=0.7, teacher_logit_scale=1.4)
    logits, others = (a @ b.T for a, b in (HOT[:2], HOT[2:]))
    student = 3 * (0.7 * logits / 3).tanh()
    teacher = 4 * (1.4 * others / 4).tanh()
    wanted = kd_loss(student, teacher.detach(), LABELS, divergence="jsd", alpha=1.0)
    wanted = [wanted.detach()], torch.autograd.grad(wanted, HOT[:2], retain_graph=True)
    found = ours(case, student_softcap=3.0, teacher_softcap=4.0, **scales)
    assert_same_numbers((found[0], found[1][:2]), wanted, 1e-5)
    assert_same_numbers(ours(case), host["capped"], 1e-4)
    assert distance(host["capped"][0][0], wanted[0][0]) > 0.2
    alone = Case("LigerFusedLinearKLDivLoss", {}, (*HOT[:2], teacher.detach().softmax(-1), LABELS))
    wanted = kd_loss(student, teacher.detach(), LABELS, alpha=1.0)
    wanted = [wanted.detach()], torch.autograd.grad(wanted, HOT[:2])
    assert_same_numbers(ours(alone, student_softcap=3.0, student_logit_scale=0.7), wanted, 1e-5)
    fused = LigerFusedLinearJSD(student_softcap=3.0, teacher_softcap=4.0, **scales)
    assert_same_numbers(measured(fused, case), found, 1e-6)


def test_a_teacher_of_more_classes_is_refused_or_cut(host):
    """Liger gives the student logits of 0 for them, however far below 0 its own are."""
    case = DIFFERING["padded"]
    logits, others = (a @ b.T for a, b in (PADDED[:2], PADDED[2:]))
    logits, others = logits + OFFSETS[0], others + OFFSETS[1]
    wanted = kd_loss(F.pad(logits, (0, 3)), others.detach(), LABELS, divergence="jsd", alpha=1.0)
    grads = torch.autograd.grad(wanted, PADDED[:2])
    assert_same_numbers((host["padded"][0], host["padded"][1]), ([wanted.detach()], grads), 1e-5)
    with pytest.raises(ValueError, match="student has 37 classes and teacher 40"):
        ours(case)
    found = ours(case, vocab_size=V)
    logits, others = (a @ b.T for a, b in (HEADS[:2], HEADS[2:]))
    right = kd_loss(logits, others.detach(), LABELS, divergence="jsd", alpha=1.0)
    grads = torch.autograd.grad(right, PADDED[:2])
    assert_same_numbers(found, ([right.detach()], grads), 1e-5)
    assert wanted > 1.2 * right


def test_bfloat16_is_added_up_in_float32(host):
    """Liger's soft loss comes of log-probabilities that are rounded to 8 bits."""
    hidden, weight, other, _, labels = NEAR
    logits, others = ((x @ weight.T).detach().double() for x in (hidden, other))
    logits.requires_grad_()
    exact = kd_loss(logits, others, labels, divergence="jsd", alpha=1.0)
    (grad,) = torch.autograd.grad(exact, logits)
    exact, grad = exact.item(), grad @ weight.detach().double()
    found, wanted = ours(DIFFERING["bfloat16"]), host["bfloat16"]
    assert abs(found[0][0].item() - exact) < 0.2 * exact
    assert wanted[0][0] < -exact  # a divergence, and negative
    errors = [((x[1][0].double() - grad).norm() / grad.norm()).item() for x in (found, wanted)]
    assert errors[0] < 0.01 and errors[1] > 0.05


def test_ignored_rows_may_hold_anything(host):
    found = ours(DIFFERING["NaN"])
    clean = ours(DIFFERING["NaN"]._replace(args=(*HEADS, LABELS)))
    assert_same_numbers(found, clean, 1e-6)
    assert host["NaN"][1][1].isnan().all()
    log_q = torch.where((LABELS == -100)[:, None], torch.nan, LOG_Q.detach()).requires_grad_()
    for beta in (0.0, 0.3, 1.0):
        case = AGREEING[f"JSD {beta}, some rows"]
        assert_same_numbers(ours(case._replace(args=(log_q, LOG_P, LABELS))), ours(case), 1e-12)


def test_soft_and_hard_losses_are_detached(host):
    """In Liger a backward pass through either is a gradient of 0, without a word."""
    assert not any(x.any() for x in host["soft"][1] if x is not None)
    loss = LigerFusedLinearJSDLoss(return_soft_hard_loss=True)
    total, soft, hard = loss(*HEADS, LABELS)
    assert total.requires_grad and not soft.requires_grad and not hard.requires_grad


def test_parts_of_a_batch_add_up_to_the_whole(host):
    """Liger's mean of each part's mean is another loss where the parts differ in labels."""
    labels = torch.cat([LABELS, PART])
    whole = [torch.cat([x, x]) for x in (HEADS[0], HEADS[2])]
    loss, count = LigerFusedLinearJSDLoss(), (labels != -100).sum()
    args = whole[0], HEADS[1], whole[1], HEADS[3]
    wanted = loss(*args, labels)
    parts = [loss(*HEADS, x, num_items=count) for x in (LABELS, PART)]
    assert distance(sum(parts).detach(), wanted.detach()) < 3e-6
    grads = [torch.autograd.grad(x, HEADS[1])[0] for x in (sum(parts), wanted)]
    assert distance(*grads) < 3e-6
    means = host["chunked JSD, one sum"], host["part"]
    halves = sum(x[0][0] for x in means) / 2
    assert distance(halves, wanted.detach()) > 0.01


@pytest.mark.parametrize("name", ["LigerJSD", "LigerKLDIVLoss"])
def test_logits_are_no_log_probabilities(host, name, monkeypatch):
    """Liger's number for them is no divergence."""
    logits = DIFFERING["logits"].args[0]
    assert distance(host["logits"][0][0], LigerJSD()(logits.log_softmax(-1), LOG_P).detach()) > 1
    loss = getattr(liger, name)()
    with pytest.raises(ValueError, match="must be log-probabilities, .* sum to [0-9.]+; logits go"):
        loss(logits, LOG_P.exp() if name == "LigerKLDIVLoss" else LOG_P)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # and on a GPU
    assert loss(logits, LOG_P).isnan()


def test_targets_of_a_jsd_are_log_probabilities_too():
    with pytest.raises(ValueError, match="log_p must be log-probabilities"):
        LigerJSD()(LOG_Q, LOG_P.exp())
    rows = torch.where((LABELS == -100)[:, None], 0.0, LOG_P)  # but where they do not count
    assert LigerJSD()(LOG_Q, rows, LABELS) == LigerJSD()(LOG_Q, LOG_P, LABELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_log_probabilities(dtype):
    log_q, log_p = ((4 * random(4, 4096)).log_softmax(-1).to(dtype) for _ in range(2))
    log_q.requires_grad_()
    target = log_p.float().exp()
    for loss in (LigerJSD()(log_q, log_p), LigerKLDIVLoss(reduction="batchmean")(log_q, target)):
        assert loss.dtype == torch.float32
        (grad,) = torch.autograd.grad(loss, log_q)
        assert grad.dtype == dtype
    assert (
        distance(loss.detach(), F.kl_div(log_q.detach().float(), target, reduction="batchmean"))
        < 0.01
    )
    assert distance(grad.float(), -target / 4) < 0.01


def test_autocast_multiplies_in_its_dtype():
    wanted = ours(AGREEING["chunked JSD, biases"])
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(AGREEING["chunked JSD, biases"])
    assert 1e-5 < distance(found[1][1], wanted[1][1]) < 0.02  # of the parameters' own dtype
    assert found[0][0].dtype == torch.float32


def test_a_gradient_may_be_added_up_in_bfloat16():
    args = (*heads(64, dtype=torch.bfloat16), labels_of(64))
    case = Case("LigerFusedLinearJSD", {}, args)
    found, wanted = ours(case, accum_dtype=torch.bfloat16), ours(case)
    assert distance(found[1][1], wanted[1][1]) < 0.02
    with pytest.raises(TypeError, match="student.grad_dtype must be None or"):
        ours(case, accum_dtype=torch.float16)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LigerFusedLinearJSDLoss(reduction="sum"), TypeError, "reduction"),
        (lambda: LigerFusedLinearJSDLoss(temperature=0), ValueError, "temperature must be in"),
        (lambda: LigerFusedLinearJSDLoss(weight_hard_loss=-1), ValueError, "weight_hard_loss must"),
        (lambda: LigerFusedLinearJSDLoss(beta=1.5), ValueError, "beta must be in"),
        (lambda: LigerFusedLinearJSD(temperature=0), ValueError, "temperature must be in"),
        (lambda: LigerJSD(ignore_index=0.5), TypeError, "ignore_index must be an int"),
        (
            lambda: LigerFusedLinearJSDLoss()(*HEADS, None),
            TypeError,
            "true_labels must be a tensor",
        ),
        (lambda: LigerFusedLinearJSDLoss()(*HEADS, LABELS[1:]), ValueError, "labels must have"),
        (lambda: LigerFusedLinearJSDLoss()(*HEADS, LABELS.abs() + V), IndexError, "labels"),
        (lambda: LigerFusedLinearJSDLoss(chunk_size=0)(*HEADS, LABELS), ValueError, "chunk_rows"),
        (lambda: LigerKLDIVLoss()(LOG_Q[None], LOG_P[None]), ValueError, r"have shape \(N, V\)"),
        (lambda: LigerKLDIVLoss(reduction="max")(LOG_Q, LOG_P), ValueError, "unknown reduction"),
        (lambda: LigerFusedLinearKLDivLoss("none")(*HEADS[:2], HOLES), ValueError, "unknown reduc"),
    ],
)
def test_what_cannot_be_done_is_an_error(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_it_compiles_to_one_graph():
    case = AGREEING["JSD 0.3, some rows"]
    pairs = []
    for loss in (torch.compile(LigerJSD(0.3), backend="aot_eager", fullgraph=True), LigerJSD(0.3)):
        value = loss(*case.args)
        pairs.append(([value.detach()], torch.autograd.grad(value, LOG_Q, UPSTREAM)))
    assert_same_numbers(*pairs, 1e-6)


def test_liger_need_not_be_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # an import of it is an error
    spec = importlib.util.find_spec(liger.__name__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.LigerJSD()(LOG_Q, LOG_P) == LigerJSD()(LOG_Q, LOG_P)
