"""Types: the package is strict, and what a user writes against it is judged exactly."""

import inspect
import re
import subprocess
import sys
import typing
import warnings

import pytest
from conftest import ROOT

import kdkernels
from kdkernels import cache, distill, info, objective
from kdkernels.cache import identity

pytest.importorskip("mypy", reason="types are checked by mypy (the extra `test`)")

# What mypy has found out of torch, which takes it half a minute; pyproject.toml has the package's.
CACHE = ROOT / "build" / "mypy-consumer"
PUBLIC = (kdkernels, cache, distill)
FUNCTIONS = (identity.of_teacher, identity.of_tokenizer, info.info, objective.make_objective)

# A line is right, but for those that say what is wrong with them, in the order of the lines.
CONSUMER = """
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import assert_type

from kdkernels import Ensemble, KDLoss, KDTerms, LinearHead, Sampled, TopK, cache, kd_loss
from kdkernels.cache import CacheCorruptError, TeacherCache
from kdkernels.distill import Checkpoints, Distiller, History, Scores, validate, write_cache
from kdkernels.objective import Divergence

x, labels = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
weight = torch.zeros(8, 4, requires_grad=True)
head = LinearHead(torch.zeros(2, 4), weight, softcap=30.0)
top = TopK(labels[:, None], x[:, :1], tail="renormalize")
flag = bool(x.sum())
chosen: Divergence = "jsd" if flag else "tvd"

# ---- kd_loss
assert_type(kd_loss(x, x), Tensor)
assert_type(kd_loss(x, x, labels, reduction="none", return_terms=False), Tensor)
assert_type(kd_loss(x, x, labels, return_terms=True), KDTerms)
assert_type(kd_loss(x, x, labels, return_terms=flag), Tensor | KDTerms)
assert_type(kd_loss(x, x, labels, return_terms=True).num_items, Tensor)
assert_type(kd_loss(head, head, divergence=chosen, num_items=7), Tensor)
for teacher in (top, Sampled(labels[:, None], labels[:, None]), Ensemble([x, head], [1, 2])):
    assert_type(kd_loss(x, teacher, num_items=x.sum()), Tensor)
kd_loss(x, x, labels, divergence="forward-kl")  # error: call-overload
kd_loss(x, x, labels, reduction="maen")  # error: call-overload
kd_loss(x, x, labels, temprature=2.0)  # error: call-overload
kd_loss(x, x, labels, temperature="2")  # error: call-overload
kd_loss(x, x, labels, 2.0)  # error: call-overload
kd_loss(x)  # error: call-overload
kd_loss(top, x)  # error: call-overload
kd_loss(x, [x, x])  # error: call-overload
kd_loss(x, x, labels).distill  # error: attr-defined
kd_loss(x, x, labels, return_terms=flag).loss  # error: union-attr

# ---- Sources
assert_type(head.bias, Tensor | None)
assert_type(Ensemble([x]).shares(), list[float])
TopK(x, x, tail="buckets")  # error: arg-type
LinearHead(x)  # error: call-arg
Ensemble([Ensemble([x])])  # error: list-item
Ensemble([x], mean="harmonic")  # error: arg-type
top.tail = "bucket"  # error: misc

# ---- KDLoss
criterion = KDLoss(temperature=2.0, divergence=chosen)
assert_type(criterion, KDLoss[Tensor])
assert_type(criterion(x, head, labels, token_weights=x[:, 0]), Tensor)
assert_type(criterion.forward(x, x), Tensor)
assert_type(KDLoss(return_terms=True)(x, x), KDTerms)
assert_type(KDLoss(return_terms=flag)(x, x, labels), Tensor | KDTerms)
annotated: KDLoss = criterion
model = torch.nn.Sequential(torch.nn.Linear(4, 8), criterion)
KDLoss(divergence="forward-kl")  # error: call-overload
KDLoss(num_items=3)  # error: call-overload
KDLoss(0.5)  # error: call-overload
criterion(x)  # error: call-arg
criterion(x, x, x, x)  # error: call-arg
criterion(x, top, alpha=0.5)  # error: call-arg
annotated = KDLoss(return_terms=True)  # error: assignment

# ---- A cache
with cache.Writer(Path("c"), "topk:64", vocab_size=8, teacher="served") as writer:
    writer.add(labels, top)
    writer.add([1, 2], lambda: top)
stored = cache.open("c", tail="bucket", device="cpu")
assert_type(stored, TeacherCache)
assert_type(stored.read(labels, mask=[1, 0]), TopK | Sampled | LinearHead | Tensor)
assert_type(kd_loss(x, stored[labels], labels), Tensor)
assert_type(cache.verify("c", on_sample=print), list[CacheCorruptError])
assert_type(cache.verify("c")[0].block, int | str | None)
cache.open("c", tail="all")  # error: arg-type
cache.Writer("c", "topk:64", teacher="served")  # error: call-arg
cache.Writer("c", 64, vocab_size=8, teacher="served")  # error: arg-type
stored.read()  # error: call-arg

# ---- The loop
student, teacher_model = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)
distiller = Distiller(student, teacher_model, x, labels, loss=criterion)
assert_type(distiller.train(10, test=(x, labels), checkpoints=Checkpoints("c")), History)
assert_type(distiller.history.losses, list[float])
assert_type(validate(student, x, labels, teacher=stored), Scores)
assert_type(write_cache("c", teacher_model, labels[None], "topk:4", vocab_size=8), TeacherCache)
Distiller(student, x, x, labels, loss=criterion, optimizer=torch.optim.SGD)
Distiller(student, stored, x, loss=criterion, scheduler=lambda built: None)
Distiller(student, None, x, labels, loss=KDLoss(return_terms=True))  # error: arg-type
Distiller(student, None, x, labels)  # error: call-arg
Distiller(student, 7, x, labels, loss=criterion)  # error: arg-type
distiller.train("10")  # error: arg-type
distiller.train(10, record_evry=5)  # error: call-arg
"""


def mypy(*arguments, cwd=ROOT, **environment):
    """-> what mypy says, a line each."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context"]
    found = subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={"PATH": "", **environment},
    )
    assert not found.stderr, found.stderr
    return found.stdout.splitlines()


def test_the_package_is_strict():
    assert mypy() == []


def test_a_consumers_mistakes_are_found_and_nothing_else(tmp_path):
    path = tmp_path / "consumer.py"
    path.write_text(CONSUMER)
    # From another folder, so that the package comes from where packages are: as py.typed allows.
    arguments = "--strict", "--config-file=", "--cache-dir", str(CACHE), path.name
    said = mypy(*arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    pattern = re.compile(r"consumer\.py:(\d+): error: .*\[([a-z-]+)\]$")
    matches = [(line, pattern.match(line)) for line in said if ": note: " not in line]
    assert not [line for line, match in matches if not match]
    found = {int(match[1]): match[2] for _, match in matches}
    lines = enumerate(CONSUMER.splitlines(), 1)
    wanted = {k: line.partition("# error: ")[2] for k, line in lines if "# error: " in line}
    assert found == wanted, "\n".join(said)


def functions_of(name, thing):
    """(name, function) of a public thing: itself, or what people call of a class."""
    if not inspect.isclass(thing):
        return [(name, thing)]
    found = []
    for key, each in vars(thing).items():
        each = each.fget if isinstance(each, property) else getattr(each, "__func__", each)
        ours = getattr(each, "__module__", "").startswith("kdkernels")
        if inspect.isfunction(each) and ours and (key[0] != "_" or key == "__init__"):
            found.append((f"{name}.{key}", each))
    return found


THINGS = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in PUBLIC
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
} | {f"{each.__module__}.{each.__name__}": each for each in FUNCTIONS}


@pytest.mark.parametrize("name", THINGS)
def test_what_is_public_is_described_and_annotated(name):
    thing = THINGS[name]
    assert inspect.getdoc(thing)
    for called, function in functions_of(name, thing):
        signature = inspect.signature(function)
        unknown = [
            key
            for key, each in signature.parameters.items()
            if each.annotation is each.empty and key not in ("self", "cls")
        ]
        assert not unknown, called
        assert signature.return_annotation is not signature.empty, called
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hints = typing.get_type_hints(function)  # which has every name that they use
        assert hints.keys() >= {key for key in signature.parameters if key not in ("self", "cls")}
