"""TRL's losses by kd_loss: its numbers where it is right, its trainers, and the way back."""

import contextlib
import inspect
import random
import sys
import types
import warnings

import pytest
import torch
from conftest import UNAVAILABLE

from kdkernels import chunked, kd_loss
from kdkernels.integrations import trl as ours

pytest.importorskip("trl", reason="trl, of peers.txt, is not installed")
datasets = pytest.importorskip("datasets", reason="datasets, of peers.txt, is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the extra `train` is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that some of it is experimental
    import trl
    from trl.experimental.gkd import GKDConfig, GKDTrainer, gkd_trainer
    from trl.experimental.gold import GOLDTrainer
    from trl.kernels import chunked_divergence as kernels
    from trl.trainer import distillation_trainer

theirs = GKDTrainer.generalized_jsd_loss
gold = GOLDTrainer.generalized_jsd_loss
B, T, V = 3, 7, 97
BETAS = (0, 0.3, 0.5, 1)
INF = float("inf")


def pair(dtype=torch.float32, shape=(B, T, V), scale=3.0, seed=0):
    """Logits of a student and of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def some_labels(seed=0):
    """(B, T), of which a third does not count, and the last row not at all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < 0.3] = -100
    labels[-1] = -100
    return labels


def value_and_gradient(function, student, teacher, upstream=1.7, **options):
    student = student.clone().requires_grad_()
    loss = function(student, teacher, **options)
    if loss.dim():
        generator = torch.Generator().manual_seed(7)
        upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss.dtype)
    (loss * upstream).sum().backward()
    return loss.detach(), student.grad


def same_as_theirs(student, teacher, function=theirs, replacement=None, **options):
    """Value, gradient, shape and dtype, next to what TRL computes of the same in float64."""
    replacement = replacement or ours.generalized_jsd_loss
    actual = value_and_gradient(replacement, student, teacher, **options)
    expected = value_and_gradient(function, student, teacher, **options)
    exact = value_and_gradient(function, student.double(), teacher.double(), **options)
    for a, b, c in zip(actual, expected, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        # As close as the format allows, or as TRL is.
        bar = torch.finfo(a.dtype).eps * c.abs().max() + 1e-6 * (a.dtype == torch.float32)
        error, other = (a - c).abs().max(), (b - c).abs().max()
        assert error <= torch.maximum(bar, other), options


def assert_same(actual, expected, rtol=1e-5):
    """Lists of tensors, each relative to its largest element."""
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert ((a - b).abs() <= rtol * b.abs().max()).all()


# ---- generalized_jsd_loss ------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_reduction_is_trls(dtype, reduction, beta):
    for temperature in (1.0, 0.7, 3.0):
        for labels in (None, some_labels()):
            options = dict(beta=beta, temperature=temperature, reduction=reduction, labels=labels)
            same_as_theirs(*pair(dtype), **options)


@pytest.mark.parametrize("num_items", [13, 13.0, torch.tensor(13), torch.tensor(13.5)])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])  # which it overrides
def test_num_items_in_batch_divides_the_sum_whatever_the_reduction(reduction, num_items):
    for beta in BETAS:
        options = dict(beta=beta, reduction=reduction, num_items_in_batch=num_items)
        same_as_theirs(*pair(), labels=some_labels(), **options)
        same_as_theirs(*pair(), **options)


def test_shifted_views_and_logits_without_a_batch_are_taken_as_they_are():
    student, teacher = pair(shape=(B, T + 1, V))
    views = student[:, :-1], teacher[:, :-1]
    assert not views[0].is_contiguous()
    same_as_theirs(*views, labels=some_labels())
    same_as_theirs(student[0], teacher[0])  # (N, V): the mean of its rows


def test_batchmean_without_labels_is_as_many_times_larger_as_there_are_positions():
    """TRL divides by size(0): the batch size, not the number of tokens."""
    student, teacher = pair()
    labels = torch.zeros(B, T, dtype=torch.int64)
    for function in (theirs, ours.generalized_jsd_loss):
        with_labels = value_and_gradient(function, student, teacher, labels=labels)
        without = value_and_gradient(function, student, teacher)
        assert_same(without, [T * x for x in with_labels])


@pytest.mark.parametrize("beta", BETAS)
def test_no_t_squared_is_in_it_unlike_in_kd_loss(beta):
    student, teacher = pair()
    labels, temperature = torch.zeros(B, T, dtype=torch.int64), 3.0
    options = dict(labels=labels, beta=beta, temperature=temperature)
    trls = value_and_gradient(theirs, student, teacher, **options)
    options = dict(divergence="jsd", beta=beta, temperature=temperature)
    hintons = value_and_gradient(kd_loss, student, teacher, **options)
    assert_same(hintons, [temperature**2 * x for x in trls])


def test_the_argument_orders_are_those_of_the_two_trainers():
    student, teacher = pair()
    gkd = (student, teacher, some_labels(), 0.3, 2.0, "sum", 5)
    torch.testing.assert_close(ours.generalized_jsd_loss(*gkd), theirs(*gkd))
    golds = (student, teacher, some_labels(), 0.3, 2.0, "sum", False, 5)
    torch.testing.assert_close(ours.gold_jsd_loss(*golds), gold(*golds))


@pytest.mark.parametrize("beta", BETAS)
def test_probabilities_of_some_classes_are_not_normalised(beta):
    """What GOLD hands over for tokens that two vocabularies share."""
    student, teacher = (x.softmax(-1)[:, 10:50].contiguous() for x in pair(shape=(11, V)))
    student[0, 0] = 0.0  # counts as 1e-8
    for reduction in ("batchmean", "sum", "mean", "none"):
        options = dict(beta=beta, reduction=reduction, logits_are_probs=True, temperature=2.0)
        same_as_theirs(student, teacher, gold, ours.gold_jsd_loss, **options)
        same_as_theirs(student, teacher, gold, ours.generalized_jsd_loss, **options)


@pytest.mark.parametrize("beta", BETAS)
def test_autocast_makes_the_loss_float32_as_in_trl(beta):
    student, teacher = pair(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        same_as_theirs(student, teacher, beta=beta)
        assert ours.generalized_jsd_loss(student, teacher, beta=beta).dtype == torch.float32
    same_as_theirs(student, teacher.float(), beta=beta)


def test_where_no_token_counts_the_loss_is_zero():
    labels = torch.full((B, T), -100)
    student, teacher = pair()
    for options in (dict(), dict(reduction="sum"), dict(num_items_in_batch=5)):
        for function in (theirs, ours.generalized_jsd_loss):
            loss, grad = value_and_gradient(function, student, teacher, labels=labels, **options)
            assert loss == 0 and (grad == 0).all()
    options = dict(labels=labels, reduction="mean")
    assert value_and_gradient(theirs, student, teacher, **options)[0].isnan()
    for pair_of, probs in ((pair(), False), ([x.softmax(-1) for x in pair()], True)):
        for reduction in ("mean", "batchmean"):
            options = dict(labels=labels, reduction=reduction, logits_are_probs=probs)
            loss, grad = value_and_gradient(ours.generalized_jsd_loss, *pair_of, **options)
            assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_classes_masked_on_both_sides_make_trl_nan_and_count_for_nothing_here(beta):
    student, teacher = pair()
    kept = value_and_gradient(theirs, student[..., :-5].contiguous(), teacher[..., :-5], beta=beta)
    student[..., -5:] = teacher[..., -5:] = -INF
    loss, grad = value_and_gradient(theirs, student, teacher, beta=beta)
    assert loss.isnan() and grad.isnan().any() == (beta > 0)
    loss, grad = value_and_gradient(ours.generalized_jsd_loss, student, teacher, beta=beta)
    assert_same((loss, grad[..., :-5]), kept)
    assert (grad[..., -5:] == 0).all()


def test_a_class_that_only_the_student_rules_out_makes_trls_reverse_kl_nan():
    student, teacher = pair()
    student[..., 0] = -INF
    assert theirs(student, teacher, beta=1).isnan()
    loss, grad = value_and_gradient(ours.generalized_jsd_loss, student, teacher, beta=1)
    q, p = student.double().log_softmax(-1)[..., 1:], teacher.double().log_softmax(-1)[..., 1:]
    torch.testing.assert_close(loss.double(), (q.exp() * (q - p)).sum() / B, rtol=1e-6, atol=0)
    assert grad.isfinite().all() and (grad[..., 0] == 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_trl_computes_in_bfloat16_and_is_off_by_percents(beta):
    """A student near its teacher, as it is at the end: TRL adds up rounded logarithms."""
    _, teacher = pair(shape=(1, 64, 4096))
    student = (teacher + 0.1 * pair(shape=(1, 64, 4096), seed=1)[0] / 3).bfloat16()
    teacher = teacher.bfloat16()
    labels = torch.zeros(1, 64, dtype=torch.int64)
    exact = theirs(student.double(), teacher.double(), labels=labels, beta=beta)
    actual = ours.generalized_jsd_loss(student, teacher, labels=labels, beta=beta)
    wrong = theirs(student, teacher, labels=labels, beta=beta)
    assert (actual - exact).abs() <= 2**-8 * exact  # the rounding of the result
    assert (wrong - exact).abs() > 0.05 * exact
    if 0 < beta < 1:  # a divergence, and negative; not 0 of two that are the same
        assert wrong < 0 < actual
        options = dict(labels=labels, beta=beta)
        assert ours.generalized_jsd_loss(teacher, teacher, **options) == 0
        assert theirs(teacher, teacher, **options).abs() > 0.2 * exact


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_a_teacher_that_requires_grad_gets_trls(reduction, beta):
    student, teacher = pair()
    options = dict(labels=some_labels(), beta=beta, temperature=2.0, reduction=reduction)
    results = []
    for function in (theirs, ours.generalized_jsd_loss):
        sides = [x.clone().requires_grad_() for x in (student, teacher)]
        loss = function(*sides, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, sides, torch.tensor(-1.7))])
        with torch.no_grad():  # an evaluation
            assert function(*sides, **options) == loss
    assert_same(*reversed(results))
    assert results[1][2].any()


def test_what_cannot_be_is_an_error_that_names_it():
    student, teacher = pair()
    with pytest.raises(ValueError, match="unknown reduction 'tokenmean'; known: batchmean, sum"):
        ours.generalized_jsd_loss(student, teacher, reduction="tokenmean")
    for reduction in ("batchmean", "none"):
        with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 1.5"):
            ours.generalized_jsd_loss(student, teacher, beta=1.5, reduction=reduction)
    with pytest.raises(ValueError, match="student has 97 classes and teacher 90"):
        ours.generalized_jsd_loss(student, teacher[..., :90])


# ---- chunked divergence --------------------------------------------------------------------------

H_S, H_T = 8, 12


def heads(dtype=torch.float32, seed=0, bias=True):
    """Hidden states, weights and biases of a student and of a teacher, all requiring grad."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, width in (("student", H_S), ("teacher", H_T)):
        tensors[f"{name}_hidden_states"] = torch.randn(B, T, width, generator=generator)
        tensors[f"{name}_lm_head_weight"] = torch.randn(V, width, generator=generator)
        if bias:
            tensors[f"{name}_lm_head_bias"] = torch.randn(V, generator=generator)
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


def outputs_and_gradients(function, tensors, upstream=1.7, **options):
    tensors = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outputs = function(**tensors, **options)
    assert not any(x.requires_grad for x in outputs[1:])
    (outputs[0] * upstream).sum().backward()
    assert all(x.grad is None for name, x in tensors.items() if name.startswith("teacher"))
    return [x.detach() for x in outputs], [
        x.grad for name, x in tensors.items() if name.startswith("student")
    ]


PROCESSED = dict(
    student_logit_scale=0.5,
    teacher_logit_scale=2.0,
    student_final_logit_softcapping=4.0,
    teacher_final_logit_softcapping=7.0,
    temperature=0.7,
)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [dict(), PROCESSED, dict(temperature=2.0)])
def test_the_chunked_loss_is_trls_in_loss_entropy_count_and_gradients(options, beta):
    mask = (some_labels() != -100).long()
    for bias in (True, False):
        for num_items in (None, 11, torch.tensor(11.5)):
            call = dict(completion_mask=mask, beta=beta, num_items_in_batch=num_items, **options)
            tensors = heads(bias=bias)
            actual = outputs_and_gradients(ours.chunked_divergence_loss, tensors, **call)
            function = distillation_trainer._chunked_divergence_loss
            expected = outputs_and_gradients(function, tensors, **call)
            assert_same(actual[0], expected[0])
            assert_same(actual[1], expected[1])


def test_the_chunked_loss_of_bfloat16_heads_is_that_of_the_logits_they_make():
    """Of a head in bfloat16 TRL makes float32 logits; here they may be rounded, as the model's own
    are."""
    options = dict(completion_mask=torch.ones(B, T), beta=0.3)
    tensors = heads(torch.bfloat16)
    actual = outputs_and_gradients(ours.chunked_divergence_loss, tensors, **options)
    function = distillation_trainer._chunked_divergence_loss
    expected = outputs_and_gradients(function, tensors, **options)
    assert_same(actual[0], expected[0], rtol=1e-2)
    assert_same(actual[1], expected[1], rtol=2e-2)


def test_under_autocast_the_products_are_in_its_dtype_and_gradients_in_the_weights():
    options = dict(completion_mask=torch.ones(B, T), beta=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        actual = outputs_and_gradients(ours.chunked_divergence_loss, heads(), **options)
        function = distillation_trainer._chunked_divergence_loss
        expected = outputs_and_gradients(function, heads(), **options)
    assert_same(actual[0], expected[0], rtol=1e-2)
    assert_same(actual[1], expected[1], rtol=2e-2)
    assert {x.dtype for x in actual[1]} == {torch.float32}
    halves = outputs_and_gradients(ours.chunked_divergence_loss, heads(torch.bfloat16), **options)
    assert_same(actual[0], halves[0], rtol=0)
    assert_same(actual[1], [x.float() for x in halves[1]], rtol=0)


def test_where_the_mask_is_zero_the_chunked_loss_is_zero_and_so_is_all_else():
    options = dict(completion_mask=torch.zeros(B, T), beta=0.5)
    for function in (
        ours.chunked_divergence_loss,
        distillation_trainer._chunked_divergence_loss,
    ):
        outputs, gradients = outputs_and_gradients(function, heads(), **options)
        assert outputs == [0, 0, 0] and not any(x.any() for x in gradients)


def test_masked_positions_may_hold_anything():
    mask = (some_labels() != -100).long()
    options = dict(completion_mask=mask, beta=0.5)
    expected = outputs_and_gradients(ours.chunked_divergence_loss, heads(), **options)
    tensors = heads()
    with torch.no_grad():
        tensors["student_hidden_states"][mask == 0] = float("nan")
        tensors["teacher_hidden_states"][mask == 0] = INF
    actual = outputs_and_gradients(ours.chunked_divergence_loss, tensors, **options)
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1])


@pytest.mark.parametrize("beta", BETAS)
def test_every_tokens_divergence_and_entropy_are_trls(beta):
    names = "hidden_states", "lm_head_weight", "lm_head_bias"
    upstream = torch.randn(B * T, generator=torch.Generator().manual_seed(3))
    results = []
    for function in (ours.ChunkedDivergenceFunction, kernels.ChunkedDivergenceFunction):

        def apply(function=function, **tensors):
            call = [tensors[f"{side}_{x}"] for side in ("student", "teacher") for x in names]
            call[0], call[3] = call[0].flatten(0, 1), call[3].flatten(0, 1)
            return function.apply(*call, beta, 0.7, 0.5, 4.0, 2.0, 7.0)

        results.append(outputs_and_gradients(apply, heads(), upstream))
    (actual, grads), (expected, expected_grads) = results
    assert_same(actual, expected)
    assert_same(grads, expected_grads)


@pytest.mark.skipif(bool(UNAVAILABLE["native"]), reason="on eager logits exist in full")
def test_no_tensor_is_as_large_as_the_logits(monkeypatch):
    tokens, columns = 1024, 8192
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 2**20)
    monkeypatch.setitem(chunked.STEP_BYTES, "cpu", 2**20)
    hidden = torch.randn(1, tokens, 4, requires_grad=True)
    weight = torch.randn(columns, 4, requires_grad=True)
    teacher, teacher_weight = torch.randn(1, tokens, 4), torch.randn(columns, 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            outputs = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(outputs):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return outputs

    with Watch():
        mask = torch.ones(1, tokens)
        call = hidden, teacher, weight, teacher_weight, mask, 0.5
        ours.chunked_divergence_loss(*call)[0].backward()
    assert weight.grad is not None
    assert 0 < largest <= tokens * columns * 4 // 4


def test_weights_that_zero_3_sharded_are_gathered_for_the_forward_pass(monkeypatch):
    """DeepSpeed is not there: a stand-in that fills a weight while TRL's own context is open."""
    tensors = heads()
    options = dict(completion_mask=torch.ones(B, T), beta=0.5)
    expected = outputs_and_gradients(ours.chunked_divergence_loss, tensors, **options)
    whole = tensors["student_lm_head_weight"].detach()
    sharded = torch.full_like(whole, float("nan"))
    sharded.ds_status = "NOT_AVAILABLE"

    @contextlib.contextmanager
    def gather(*parameters):
        assert len(parameters) == 1 and parameters[0] is sharded
        sharded.copy_(whole)
        yield
        sharded.fill_(float("nan"))

    monkeypatch.setattr("trl.trainer.utils.maybe_gather_lm_head_ctx", gather)
    hidden = tensors["student_hidden_states"].detach().requires_grad_()
    call = {**tensors, "student_hidden_states": hidden, "student_lm_head_weight": sharded}
    outputs = ours.chunked_divergence_loss(**call, **options)
    (outputs[0] * 1.7).backward()
    assert_same([x.detach() for x in outputs], expected[0])
    assert_same([hidden.grad], expected[1][:1])
    with pytest.raises(RuntimeError, match="ZeRO-3 has sharded them again"):
        ours.ChunkedDivergenceFunction.apply(hidden, sharded, None, hidden, whole, None, 0.5)


# ---- patch ---------------------------------------------------------------------------------------

NAMES = (
    "trl.experimental.gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss",
    "trl.experimental.gold.gold_trainer.GOLDTrainer.generalized_jsd_loss",
    "trl.trainer.distillation_trainer._chunked_divergence_loss",
    "trl.trainer.distillation_trainer.ChunkedDivergenceFunction",
    "trl.kernels.chunked_divergence.ChunkedDivergenceFunction",
)


def state():
    """What TRL holds at the names that are replaced."""
    return (
        vars(GKDTrainer)["generalized_jsd_loss"],
        vars(GOLDTrainer)["generalized_jsd_loss"],
        distillation_trainer._chunked_divergence_loss,
        distillation_trainer.ChunkedDivergenceFunction,
        kernels.ChunkedDivergenceFunction,
    )


@pytest.fixture(autouse=True)
def original():
    before = state()
    yield before
    assert state() == before  # no test leaves TRL changed


@pytest.fixture
def edit(original):
    """A monkeypatch that is over before `original` looks."""
    with pytest.MonkeyPatch.context() as changes:
        yield changes


def test_patch_reports_what_it_replaced_and_undoes_it(original):
    patched = ours.patch()
    try:
        assert tuple(x.name for x in patched.replaced) == NAMES and not patched.skipped
        assert tuple(x.old for x in patched.replaced) == original
        assert tuple(x.new for x in patched.replaced) == state()
        assert patched.version == trl.__version__
        assert repr(patched).splitlines() == [
            f"Patch of trl {trl.__version__}: 5 replaced",
            f"  {NAMES[0]} -> kdkernels.integrations.trl.generalized_jsd_loss",
            f"  {NAMES[1]} -> kdkernels.integrations.trl.gold_jsd_loss",
            f"  {NAMES[2]} -> kdkernels.integrations.trl.chunked_divergence_loss",
            f"  {NAMES[3]} -> kdkernels.integrations.trl.ChunkedDivergenceFunction",
            f"  {NAMES[4]} -> kdkernels.integrations.trl.ChunkedDivergenceFunction",
        ]
        assert GKDTrainer.generalized_jsd_loss is ours.generalized_jsd_loss
        assert GOLDTrainer.generalized_jsd_loss is ours.gold_jsd_loss
    finally:
        assert patched.undo() == []
    assert state() == original and patched.replaced == []


def test_every_name_of_trls_losses_is_among_them():
    """No module of TRL's that is imported holds another reference to what is replaced."""
    old = set(map(id, state()[2:]))
    found = {
        f"{name}.{attribute}"
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "trl" and isinstance(module, types.ModuleType)
        for attribute, x in list(vars(module).items())
        if id(x) in old
    }
    assert found == set(NAMES[2:])


def test_undo_twice_and_the_end_of_a_with_are_the_same_once(original):
    with ours.patch() as patched:
        assert state() != original
        patched.undo()
        assert state() == original
        patched.undo()
    assert state() == original


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_second_patch_replaces_nothing_and_undoes_nothing(order, original):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patches = ours.patch(), ours.patch()
    assert not patches[1].replaced
    assert patches[1].skipped == dict.fromkeys(NAMES, "replaced already")
    patches[1].undo()
    assert state() != original
    for k in order:
        patches[k].undo()
    assert state() == original


def test_what_somebody_else_put_there_since_stays(original, edit):
    patched = ours.patch()
    edit.setattr(distillation_trainer, "_chunked_divergence_loss", None)
    assert patched.undo() == [NAMES[2]]
    assert distillation_trainer._chunked_divergence_loss is None
    edit.undo()  # to what was there before it, which is ours
    distillation_trainer._chunked_divergence_loss = original[2]


def other_order(teacher_logits, student_logits, labels=None, beta=0.5):
    """As TRL might have it one day."""


def other_default(student_logits, teacher_logits, labels=None, beta=1.0):
    """The same."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (staticmethod(other_order), "takes (teacher_logits, student_logits, labels=None, beta"),
        (staticmethod(other_default), "expected (student_logits, teacher_logits, labels=None, be"),
        (lambda self, student_logits: None, "not a static method"),
        (None, "not there"),
    ],
)
def test_another_version_of_trl_is_skipped_by_name_with_a_warning(change, reason, edit):
    edit.setattr(GKDTrainer, "generalized_jsd_loss", change)
    with pytest.warns(UserWarning, match=r"keeps its own trl.experimental.gkd.*_loss \("):
        patched = ours.patch()
    with patched:
        assert set(patched.skipped) == {NAMES[0]} and reason in patched.skipped[NAMES[0]]
        assert f"{NAMES[0]} skipped: " in repr(patched)
        assert vars(GKDTrainer)["generalized_jsd_loss"] is change
        assert len(patched.replaced) == 4


def test_an_earlier_version_with_fewer_arguments_is_replaced(edit):
    def earlier(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0):
        """Without a reduction."""

    edit.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(earlier))
    with ours.patch() as patched:
        assert len(patched.replaced) == 5
    assert GKDTrainer.generalized_jsd_loss is earlier


def test_modules_and_classes_that_are_not_there_are_skipped(edit):
    edit.delattr(gkd_trainer, "GKDTrainer")
    edit.setitem(sys.modules, "trl.kernels.chunked_divergence", None)
    with pytest.warns(UserWarning, match="keeps its own"), ours.patch() as patched:
        assert patched.skipped[NAMES[0]] == "not there"
        assert patched.skipped[NAMES[4]].startswith("ModuleNotFoundError: ")
        assert len(patched.replaced) == 3


def test_the_signatures_are_those_of_the_installed_trl():
    def plain(function):
        return [(x.name, x.default) for x in inspect.signature(function).parameters.values()]

    assert plain(ours.generalized_jsd_loss)[:-1] == plain(theirs)
    assert plain(ours.gold_jsd_loss) == plain(gold)
    assert plain(ours.chunked_divergence_loss) == plain(
        distillation_trainer._chunked_divergence_loss
    )
    forward = plain(kernels.ChunkedDivergenceFunction.forward)
    assert plain(ours.ChunkedDivergenceFunction.apply) == forward[1:]


# ---- Trainers ------------------------------------------------------------------------------------

VOCAB = 96


def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{k}" for k in range(VOCAB - 4))]
    model = tokenizers.models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    made.chat_template = (
        "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}<s> {% endif %}"
    )
    return made


def model(width, seed):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def words(count, seed):
    ids = torch.randint(VOCAB - 4, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{k}" for k in ids.tolist())


def chats(count=16):
    """Prompts of different lengths, and answers."""
    return datasets.Dataset.from_list(
        [
            dict(
                messages=[
                    dict(role="user", content=words(3 + k % 4, k)),
                    dict(role="assistant", content=words(5 + k % 3, 100 + k)),
                ]
            )
            for k in range(count)
        ]
    )


COMMON = dict(
    max_steps=3,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=0.1,
    optim="sgd",  # whose steps are the gradients
    lr_scheduler_type="constant",
    beta=0.3,
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
)


def trained(kind, output_dir):
    """The metrics of every step and the student, after a few steps on its own and given texts."""
    random.seed(0)  # by which GKD chooses between the two
    student, teacher = model(16, seed=0), model(24, seed=1)
    if kind == "gkd":
        args = GKDConfig(output_dir, lmbda=0.5, max_new_tokens=6, max_length=32, **COMMON)
        trainer = GKDTrainer(
            student, teacher, args, train_dataset=chats(), processing_class=tokenizer()
        )
    else:
        args = trl.DistillationConfig(
            output_dir, max_completion_length=6, temperature=0.8, **COMMON
        )
        prompts = datasets.Dataset.from_list([dict(prompt=words(4, k)) for k in range(16)])
        trainer = trl.DistillationTrainer(
            student, teacher, args, train_dataset=prompts, processing_class=tokenizer()
        )
    trainer.train()
    return [x for x in trainer.state.log_history if "loss" in x], student


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what TRL asks of transformers
@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_a_trainer_learns_the_same_with_and_without(kind, tmp_path, monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return kd_loss(*args, **options)

    for module in ("jsd", "chunked"):
        monkeypatch.setattr(f"{ours.__name__}.{module}.kd_loss", counted)
    start = model(16, seed=0)
    expected, reference = trained(kind, str(tmp_path / "theirs"))
    assert not calls
    with ours.patch():
        actual, student = trained(kind, str(tmp_path / "ours"))
    assert len(calls) == 3 * 2 * (1 if kind == "gkd" else 2)  # 2 micro-batches; 2: the entropy
    names = ("loss", "grad_norm", *(["entropy"] if kind == "distillation" else []))
    for a, b in zip(actual, expected, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-5)
    triples = zip(student.parameters(), reference.parameters(), start.parameters(), strict=True)
    for a, b, c in triples:
        moved = (b - c).abs().max()
        assert moved > 0 and ((a - b).abs() <= 1e-4 * moved).all()
