"""Adapters of other libraries compute the loss of the case they are asked for, or say why not.

Where a library cannot run, what stands in for it has its interface and is computed by PyTorch.
"""

import importlib
import itertools
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kdkernels import kd_loss

ROOT = Path(__file__).parent.parent
# β = 0.3 and α = 0.3 tell which side they weigh.
BETAS = {
    "forward_kl": None,
    "reverse_kl": None,
    "jsd": 0.3,
    "skew_forward_kl": 0.1,
    "skew_reverse_kl": 0.1,
    "tvd": None,
}
TEMPERATURES, ALPHAS = (1.0, 2.0), (0.0, 0.3, 1.0)
GENERALIZED = ("forward_kl", "reverse_kl", "jsd")
FULL, ONE = (0.3, 1.0), (1.0,)
ANY = tuple(BETAS), TEMPERATURES, (0.0,)  # a cross-entropy alone has no divergence

# Who computes what: (adapter, suite, variant): (divergences, temperatures, alphas).
CLAIMS = {
    ("liger", "dense", "liger-kl"): (("forward_kl",), TEMPERATURES, FULL),
    ("liger", "dense", "liger-kl-float32"): (("forward_kl",), TEMPERATURES, FULL),
    ("liger", "dense", "liger-jsd"): (GENERALIZED, TEMPERATURES, FULL),
    ("liger", "dense", "liger-jsd-float32"): (GENERALIZED, TEMPERATURES, FULL),
    ("liger", "dense", "liger-tvd"): (("tvd",), TEMPERATURES, FULL),
    ("liger", "dense", "liger-ce-tvd"): (("tvd",), ONE, (0.3,)),
    ("liger", "dense", "liger-ce"): ANY,
    ("liger", "linear", "liger-jsd"): (GENERALIZED, TEMPERATURES, FULL),
    ("liger", "linear", "liger-kl"): (("forward_kl",), TEMPERATURES, FULL),
    ("liger", "linear", "liger-ce"): ANY,
    ("liger", "linear", "liger-chunked"): (GENERALIZED, TEMPERATURES, FULL),
    ("liger", "linear", "liger-chunked-compiled"): (GENERALIZED, TEMPERATURES, FULL),
    ("trl", "dense", "trl"): (GENERALIZED, TEMPERATURES, FULL),
    ("trl", "linear", "trl"): (GENERALIZED, TEMPERATURES, ONE),
    ("fla", "linear", "fla"): (("forward_kl",), TEMPERATURES, ONE),
    ("fla", "linear", "fla-own"): (("forward_kl",), TEMPERATURES, ONE),
    ("speculators", "dense", "speculators"): ((*GENERALIZED, "tvd"), TEMPERATURES, FULL),
    ("quack", "dense", "quack-ce"): ANY,
    ("quack", "linear", "quack-ce"): ANY,
}
ON_CPU = {"liger-chunked", "liger-chunked-compiled", "trl"}
MODULES = {
    "liger": ("liger_kernel.transformers", "liger_kernel.chunked_loss"),
    "trl": ("trl.experimental.gkd", "trl.kernels.chunked_divergence"),
    "fla": ("fla.modules.fused_kl_div",),
    "speculators": ("speculators.losses.fused",),
    "quack": ("quack.cross_entropy", "quack.linear_cross_entropy"),
}


# What stands in: as far as an adapter goes, each library's interface


def kl(log_p, log_q):
    """KL(p‖q), (N,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(log_q, log_p, beta):
    """Of student and teacher, which gets no gradient, (N,)."""
    log_p = log_p.detach()
    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def log_softmax(logits, temperature=1.0):
    return F.log_softmax(logits / temperature, -1)


def total_variation(p, q):
    return (p - q.detach()).abs().sum(-1) / 2


class Overwriting(torch.autograd.Function):
    """Writes the gradient over the logits where they require grad, as Liger's kernel does."""

    @staticmethod
    def forward(ctx, logits, labels):
        loss = F.cross_entropy(logits, labels)
        if logits.requires_grad:
            gradient = logits.softmax(-1)
            gradient[torch.arange(len(labels)), labels] -= 1
            logits.data.copy_(gradient / len(labels))  # autograd does not hear of it
            ctx.gradient = logits.detach()
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient * upstream, None


def liger_kl_div(eps=1e-10, *, reduction, log_target):
    assert reduction == "batchmean" and log_target
    return lambda y_pred, y_true: kl(y_true.detach(), y_pred).mean()


def liger_fused_linear_jsd(jsd_beta=0.5, ignore_index=-100, temperature=1.0):
    def loss(student_input, student_weight, teacher_input, teacher_weight, shift_labels):
        assert shift_labels is None
        log_q = log_softmax(student_input @ student_weight.T, temperature)
        log_p = log_softmax(teacher_input @ teacher_weight.T, temperature)
        return jsd(log_q, log_p, jsd_beta).mean()

    return loss


def liger_fused_linear_kl(reduction="batchmean", ignore_index=-100, temperature=1.0):
    def loss(student_input, student_weight, target):
        assert not target.requires_grad
        log_q = log_softmax(student_input @ student_weight.T, temperature)
        return kl(target.log(), log_q).mean()

    return loss


def liger_chunked(
    weight_hard_loss=0.5,
    weight_soft_loss=0.5,
    beta=0.5,
    ignore_index=-100,
    temperature=1.0,
    compiled=True,
):
    def loss(student_input, student_weight, teacher_input, teacher_weight, true_labels):
        heads = student_input, student_weight, teacher_input, teacher_weight
        soft = liger_fused_linear_jsd(beta, temperature=temperature)(*heads, None)
        hard = F.cross_entropy(student_input @ student_weight.T, true_labels)
        return weight_hard_loss * hard + weight_soft_loss * soft

    liger_chunked.compiled = compiled
    return loss


def gkd(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0):
    assert labels is None  # they would only mask rows
    both = (log_softmax(logits, temperature) for logits in (student_logits, teacher_logits))
    return jsd(*both, beta).mean()


def chunked_divergence(hidden, weight, bias, t_hidden, t_weight, t_bias, beta, temperature=1.0):
    assert bias is None and t_bias is None
    log_q = log_softmax(hidden @ weight.T, temperature)
    divergence = jsd(log_q, log_softmax(t_hidden @ t_weight.T, temperature), beta)
    return divergence, torch.zeros(len(hidden))


def fla_kl_div(reduction="batchmean", accumulate_grad_in_fp32=True):
    def loss(x, target_x, weight, target_weight):
        assert not target_x.requires_grad and not target_weight.requires_grad
        return kl(log_softmax(target_x @ target_weight.T), log_softmax(x @ weight.T)).mean()

    fla_kl_div.accumulate_grad_in_fp32 = accumulate_grad_in_fp32
    return loss


def a_token(divergence):
    """One of speculators' losses: (1, N, V) each -> (1, N)."""

    def loss(logits, targets):
        assert logits.ndim == targets.ndim == 3
        return divergence(log_softmax(logits), log_softmax(targets).detach())

    return loss


STAND_INS = {
    "liger_kernel.transformers": dict(
        LigerCrossEntropyLoss=lambda: Overwriting.apply,
        LigerKLDIVLoss=liger_kl_div,
        LigerJSD=lambda beta=0.5: lambda log_q, log_p: jsd(log_q, log_p, beta).mean(),
        LigerTVDLoss=lambda: lambda p, q: total_variation(p, q).mean(),
        LigerFusedCETVDLoss=lambda: (
            lambda student, teacher, target: (
                F.cross_entropy(student, target, reduction="none"),
                total_variation(student.softmax(-1), teacher.softmax(-1)),
            )
        ),
        LigerFusedLinearJSD=liger_fused_linear_jsd,
        LigerFusedLinearKLDivLoss=liger_fused_linear_kl,
        LigerFusedLinearCrossEntropyLoss=lambda: (
            lambda lin_weight, _input, target: F.cross_entropy(_input @ lin_weight.T, target)
        ),
    ),
    "liger_kernel.chunked_loss": dict(LigerFusedLinearJSDLoss=liger_chunked),
    "trl.experimental.gkd": dict(GKDTrainer=SimpleNamespace(generalized_jsd_loss=gkd)),
    "trl.kernels.chunked_divergence": dict(
        ChunkedDivergenceFunction=SimpleNamespace(apply=chunked_divergence)
    ),
    "fla.modules.fused_kl_div": dict(FusedKLDivLoss=fla_kl_div),
    "speculators.losses.fused": dict(
        fused_kl_div_loss=a_token(lambda log_q, log_p: kl(log_p, log_q)),
        fused_reverse_kl_div_loss=a_token(kl),
        fused_js_div_loss=a_token(lambda log_q, log_p: jsd(log_q, log_p, 0.5)),
        fused_tv_loss=a_token(lambda log_q, log_p: total_variation(log_q.exp(), log_p.exp())),
    ),
    "quack.cross_entropy": dict(cross_entropy=F.cross_entropy),
    "quack.linear_cross_entropy": dict(
        chunked_linear_cross_entropy=lambda x, weight, target: F.cross_entropy(x @ weight.T, target)
    ),
}


def put(monkeypatch, name, module):
    """A module, and parents without anything, in place of what there is."""
    for parent in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def adapters(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    base = importlib.import_module("benchmarks.peers.base")
    modules = {name: importlib.import_module(f"benchmarks.peers.{name}") for name in MODULES}
    return SimpleNamespace(base=base, **modules)


@pytest.fixture
def stand_ins(monkeypatch):
    for name, contents in STAND_INS.items():
        put(monkeypatch, name, SimpleNamespace(**contents))


@pytest.fixture
def nobody(monkeypatch):
    for name in itertools.chain(*MODULES.values()):
        put(monkeypatch, name, None)


# Cases and what is right


def case_of(claim, divergence="forward_kl", temperature=1.0, alpha=1.0, **more):
    adapter, suite, name = claim
    beta = 0.5 if adapter == "speculators" and divergence == "jsd" else BETAS[divergence]
    fields = dict(
        device="cpu" if name in ON_CPU else "cuda",
        dtype="bfloat16" if (adapter, suite) == ("quack", "linear") else "float32",
        backward=True,
        **dict(rows=8, vocab=304, hidden=16),
    )
    fields.update(divergence=divergence, beta=beta, temperature=temperature, alpha=alpha)
    return SimpleNamespace(**{**fields, **more})


def claimed(claim):
    """A case of those it claims."""
    divergences, temperatures, alphas = CLAIMS[claim]
    return case_of(claim, divergences[0], temperatures[0], alphas[-1])


def all_cases(claim):
    for asked in itertools.product(BETAS, TEMPERATURES, ALPHAS):
        yield all(map(tuple.__contains__, CLAIMS[claim], asked)), case_of(claim, *asked)


def variant_of(adapters, claim):
    adapter, suite, name = claim
    return getattr(adapters, adapter).VARIANTS[suite][name]


def inputs(suite, device="cpu", dtype=torch.float32, n=8, v=304, h=16):
    """A teacher's hidden states are wider than a student's."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(device, dtype)

    labels = torch.randint(v, (n,), generator=g).to(device)
    if suite == "dense":
        teacher = 2 * normal(n, v)
        student = (teacher + normal(n, v)).requires_grad_()
        return SimpleNamespace(student=student, teacher=teacher, labels=labels), [student]
    hidden, weight = normal(n, h).requires_grad_(), (normal(v, h) / 2).requires_grad_()
    teacher = dict(teacher_hidden=normal(n, 24), teacher_weight=normal(v, 24) / 2)
    x = SimpleNamespace(hidden=hidden, weight=weight, labels=labels, **teacher)
    return x, [hidden, weight]


def right(case, suite, x, leaves):
    """Loss and gradients in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    if suite == "dense":
        logits = leaves[0], x.teacher.double()
    else:
        logits = leaves[0] @ leaves[1].T, x.teacher_hidden.double() @ x.teacher_weight.double().T
    options = dict(divergence=case.divergence, temperature=case.temperature, alpha=case.alpha)
    loss = kd_loss(*logits, x.labels, beta=case.beta, backend="eager", **options)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def assert_right(variant, case, suite, device="cpu", dtype=torch.float32, tolerance=1e-4):
    """The loss relative to itself, gradients to the largest entry of each row."""
    x, leaves = inputs(suite, device, dtype)
    loss, grads = right(case, suite, x, leaves)
    if variant.overwrites:
        x.student = x.student * 1
    value = variant.make(case)(x)
    assert value.shape == ()
    assert abs(value.double() - loss) <= tolerance * loss, case
    value.backward()
    for leaf, grad in zip(leaves, grads, strict=True):
        error = (leaf.grad.double() - grad).abs()
        assert (error <= tolerance * grad.abs().amax(-1, keepdim=True)).all(), case


# The tests


def test_every_variant_is_tested(adapters):
    variants = {
        (adapter, suite, name)
        for adapter in MODULES
        for suite, found in getattr(adapters, adapter).VARIANTS.items()
        for name in found
    }
    assert variants == set(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS, ids="-".join)
def test_formula_with_a_stand_in(adapters, stand_ins, claim):
    variant = variant_of(adapters, claim)
    for there, case in all_cases(claim):
        if there:
            assert_right(variant, case, claim[1])


REAL = [claim for claim in CLAIMS if claim[2] != "liger-chunked-compiled"]  # which takes a minute


@pytest.mark.parametrize("claim", REAL, ids="-".join)
@pytest.mark.filterwarnings("ignore")
def test_formula_with_the_library(adapters, monkeypatch, claim):
    gpu = torch.cuda.is_available()
    if not gpu and claim[2] not in ON_CPU:
        pytest.skip("torch sees no CUDA device")
    monkeypatch.undo()
    variant = variant_of(adapters, claim)
    device = "cuda" if gpu else "cpu"
    for there, case in all_cases(claim):
        if not there:
            continue
        case.device = device
        try:
            variant.make(case)
        except adapters.base.Missing as missing:
            pytest.skip(str(missing))
        half = case.dtype == "bfloat16"
        options = dict(dtype=torch.bfloat16, tolerance=0.05) if half else {}
        assert_right(variant, case, claim[1], device, **options)


@pytest.mark.parametrize("claim", CLAIMS, ids="-".join)
def test_what_it_lacks_is_said_before_anything_is_imported(adapters, nobody, claim):
    variant = variant_of(adapters, claim)
    for there, case in all_cases(claim):
        case.device = "cpu"
        if not there:
            with pytest.raises(adapters.base.Lacks):
                variant.make(case)


def test_what_it_lacks_in_words(adapters):
    def lacks(claim, *asked, **more):
        with pytest.raises(adapters.base.Lacks) as found:
            variant_of(adapters, claim).make(case_of(claim, *asked, **more))
        return str(found.value)

    fla, tvd = ("fla", "linear", "fla"), ("liger", "dense", "liger-ce-tvd")
    assert lacks(fla, "reverse_kl") == "reverse KL" and lacks(fla, "tvd") == "TVD"
    assert lacks(fla, alpha=0.5) == "cross-entropy"
    assert lacks(fla, alpha=0.0) == "cross-entropy alone"
    assert lacks(tvd, "tvd") == "TVD alone" and lacks(tvd, "tvd", 2.0, 0.5) == "a temperature"
    own = ("speculators", "dense", "speculators")
    assert lacks(own, "jsd", beta=0.3) == "the JSD of β = 0.3"
    quack = ("quack", "linear", "quack-ce")
    assert lacks(quack, "skew_forward_kl") == "skew forward KL"
    assert lacks(quack, alpha=0.0, dtype="float32") == "float32"
    for size in ("rows", "hidden", "vocab"):
        assert lacks(quack, alpha=0.0, **{size: 12}) == "sizes that are no multiple of 8"


@pytest.mark.parametrize("claim", CLAIMS, ids="-".join)
def test_why_it_is_missing(adapters, nobody, claim):
    adapter, _, name = claim
    case = claimed(claim)
    with pytest.raises(adapters.base.Missing) as found:
        variant_of(adapters, claim).make(case)
    assert str(found.value).startswith(tuple(f"{name}: Mod" for name in MODULES[adapter]))
    if name not in ON_CPU:
        case.device = "cpu"
        with pytest.raises(adapters.base.Missing, match="^needs a CUDA device$") as found:
            variant_of(adapters, claim).make(case)
    assert found.type is adapters.base.Missing


def test_quack_needs_a_hopper(adapters, stand_ins, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    for claim in (("quack", "dense", "quack-ce"), ("quack", "linear", "quack-ce")):
        with pytest.raises(adapters.base.Missing, match="needs compute capability 9.0"):
            variant_of(adapters, claim).make(claimed(claim))


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim[1] == "dense"], ids="-".join)
def test_loss_alone_leaves_the_logits_as_they_are(adapters, stand_ins, claim):
    x, _ = inputs("dense")
    before = x.student.detach().clone()
    case = claimed(claim)
    case.backward, case.alpha = False, min(case.alpha, 0.5)
    with torch.no_grad():
        variant_of(adapters, claim).make(case)(x)
    assert torch.equal(x.student, before)


def test_only_what_overwrites_the_logits_says_so(adapters, stand_ins):
    for claim in CLAIMS:
        if claim[1] == "dense":
            x, _ = inputs("dense")
            x.student = x.student * 1
            before = x.student.detach().clone()
            case = claimed(claim)
            case.alpha = min(case.alpha, 0.5)
            variant = variant_of(adapters, claim)
            variant.make(case)(x)
            assert torch.equal(x.student, before) != variant.overwrites


def test_options_of_a_variant(adapters, stand_ins):
    for name, compiled in (("liger-chunked", False), ("liger-chunked-compiled", True)):
        claim = ("liger", "linear", name)
        assert variant_of(adapters, claim).compiled == compiled
        variant_of(adapters, claim).make(claimed(claim))
        assert liger_chunked.compiled == compiled
    for name, in_float32 in (("fla", True), ("fla-own", False)):
        claim = ("fla", "linear", name)
        variant_of(adapters, claim).make(claimed(claim))
        assert fla_kl_div.accumulate_grad_in_fp32 == in_float32


def test_log_softmax_in_float32(adapters, stand_ins, monkeypatch):
    """Of bfloat16 logits, for those that say so."""
    seen = []
    liger = sys.modules["liger_kernel.transformers"]

    def own(log_q, log_p):
        seen.append((log_q.dtype, log_p.dtype))
        return kl(log_p, log_q).mean()

    monkeypatch.setattr(liger, "LigerKLDIVLoss", lambda **_: own)
    monkeypatch.setattr(liger, "LigerJSD", lambda **_: own)
    for name in ("liger-kl", "liger-jsd", "liger-kl-float32", "liger-jsd-float32"):
        claim = ("liger", "dense", name)
        variant_of(adapters, claim).make(case_of(claim))(inputs("dense", dtype=torch.bfloat16)[0])
        assert set(seen.pop()) == {torch.float32 if "float32" in name else torch.bfloat16}


def test_speculators_without_its_package(adapters, monkeypatch, tmp_path):
    """What its losses are in is loaded, and not what would load draft models."""
    for package in ("", "utils", "losses"):
        folder = tmp_path / "speculators" / package
        folder.mkdir()
        source = "" if package == "losses" else "raise ImportError('draft models')"
        (folder / "__init__.py").write_text(source)
    (tmp_path / "speculators" / "utils" / "util.py").write_text("WEIGHT = 3.0\n")
    (tmp_path / "speculators" / "losses" / "fused.py").write_text(
        "from speculators.utils.util import WEIGHT\n\n\n"
        "def fused_kl_div_loss(logits, targets):\n    return WEIGHT * logits.sum(-1)\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "speculators"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    claim = ("speculators", "dense", "speculators")
    x, _ = inputs("dense")
    try:
        value = variant_of(adapters, claim).make(case_of(claim))(x)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "speculators"]:
            del sys.modules[name]
    torch.testing.assert_close(value, 3 * x.student.sum(-1).mean())
