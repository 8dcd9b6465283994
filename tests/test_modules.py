"""`KDLoss`: the keywords of `kd_loss` in an `nn.Module`."""

import copy
import inspect
import pickle

import pytest
import torch
from conftest import assert_same_bits, problem

from kdkernels import Ensemble, KDLoss, LinearHead, TopK, kd_loss

OPTIONS = dict(
    divergence="jsd",
    temperature=2.0,
    alpha=0.3,
    beta=0.2,
    t_squared=False,
    label_smoothing=0.1,
    ignore_index=-1,
    vocab_size=11,
    shift=True,
    reduction="sum",
)


def test_keywords_and_defaults_are_those_of_the_function():
    function = inspect.signature(kd_loss).parameters
    init = inspect.signature(KDLoss).parameters
    forward = inspect.signature(KDLoss.forward).parameters
    assert list(forward) == ["self", "student", "teacher", "labels", "token_weights", "num_items"]
    assert {*init} == {*function} - {*forward}
    for parameters in (init, forward):
        for name in parameters.keys() - {"self"}:
            assert parameters[name] == function[name]


@pytest.mark.parametrize("name", [None, *OPTIONS])
def test_every_option_arrives(backend, name):
    """All together, and each alone: an option that is lost changes the loss."""
    options = {name: OPTIONS[name]} if name else OPTIONS
    if name == "beta":
        options["divergence"] = "jsd"
    student, teacher, labels = problem(2, 6, 12)
    labels[0, 3] = -1 if "ignore_index" in options else -100
    labels.clamp_(max=10)
    expected = kd_loss(student, teacher, labels, **options, backend=backend)
    plain = kd_loss(student, teacher, labels.clamp(min=0), backend=backend)
    if name != "t_squared":  # at T = 1 it is no change
        assert not torch.equal(expected, plain)
    assert_same_bits((KDLoss(**options, backend=backend)(student, teacher, labels), expected))


@pytest.mark.parametrize("kind", ["head", "top-k", "ensemble"])
def test_sources(backend, kind):
    student, logits, labels = problem(6, 12)
    hidden, weight = torch.randn(6, 3), torch.randn(12, 3)
    logprobs, ids = logits.log_softmax(-1).topk(4)
    teacher = {
        "head": LinearHead(hidden, weight),
        "top-k": TopK(ids, logprobs),
        "ensemble": Ensemble([logits, LinearHead(hidden, weight)]),
    }[kind]
    for prediction in (student, LinearHead(hidden, weight.flip(0))):
        expected = kd_loss(prediction, teacher, labels, alpha=0.3, backend=backend)
        criterion = KDLoss(alpha=0.3, backend=backend)
        assert_same_bits((criterion(prediction, teacher, labels), expected))


def test_forward_arguments(backend):
    student, teacher, labels = problem(6, 12)
    arguments = dict(token_weights=torch.rand(6), num_items=9)
    criterion = KDLoss(return_terms=True, backend=backend)
    terms = criterion(student, teacher, labels, **arguments)
    expected = kd_loss(student, teacher, labels, return_terms=True, backend=backend, **arguments)
    assert_same_bits(*zip(terms, expected, strict=True))
    assert_same_bits(
        (KDLoss(backend=backend)(student, teacher), kd_loss(student, teacher, backend=backend))
    )


def test_it_is_a_module_without_state():
    criterion = KDLoss(**OPTIONS)
    assert isinstance(criterion, torch.nn.Module)
    assert not criterion.state_dict() and not list(criterion.parameters())
    student, teacher, labels = problem(2, 6, 12)
    labels.clamp_(max=10)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert_same_bits((other(student, teacher, labels), criterion(student, teacher, labels)))


def test_repr_says_the_options():
    text = repr(KDLoss(temperature=4.0, divergence="tvd"))
    assert "temperature=4.0" in text and "divergence='tvd'" in text


@pytest.mark.parametrize(
    "error, options",
    [
        (ValueError, dict(backend="nope")),
        (ValueError, dict(backend=["native"])),
        (ValueError, dict(vocab_size=-1)),
        (TypeError, dict(vocab_size="x")),
        (ValueError, dict(divergence=["jsd"])),
        (ValueError, dict(ignore_index=2**63)),
    ],
)
def test_errors_are_raised_when_constructed(error, options):
    with pytest.raises(error, match=next(iter(options))):
        KDLoss(**options)
