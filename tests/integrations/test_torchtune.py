"""torchtune's losses by another name: its gradients, and the values where it says what they are."""

import ast
import importlib.machinery
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import NAN, ROOT, problem, random_like


class TorchAO:
    """In the place of torchao, whose quantisation torchtune imports and its losses do not use: the
    versions that still have what torchtune wants are too old for torch."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchao":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = made


def made(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (TorchAOName,), {})


class TorchAOName:
    """A class to test for, or what makes a decorator."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, decorated):
        return decorated


sys.meta_path.insert(0, TorchAO())
try:
    host = pytest.importorskip("torchtune.modules.loss", reason="torchtune is not installed")

    from omegaconf import OmegaConf
    from torchtune import config
    from torchtune.models.llama2 import llama2
finally:
    sys.meta_path.pop(0)
    for name in [each for each in sys.modules if each.partition(".")[0] == "torchao"]:
        del sys.modules[name]

from kdkernels.integrations import torchtune as ours  # noqa: E402

B, L, V, CHUNKS = 2, 9, 50, 4
NAMES = ("ForwardKL", "ReverseKL", "SymmetricKL")


def make(module, name, chunked=False, **options):
    """A loss of theirs or ours."""
    if name == "SymmetricKL":
        options.setdefault("sym_kd_ratio", 0.3)
    if chunked:
        return getattr(module, f"{name}WithChunkedOutputLoss")(CHUNKS, **options)
    return getattr(module, f"{name}Loss")(**options)


def data(dtype=torch.float32):
    student, teacher, labels = problem(B, L, V, dtype=dtype)
    labels[0, 1:4] = labels[1, 5] = -100
    return student, teacher, labels


def chunks(x):
    return x.chunk(CHUNKS, dim=1)


def grad(loss, student, teacher, labels, upstream, cut=lambda x: x, **options):
    student = student.detach().requires_grad_()
    value = loss(cut(student), cut(teacher), labels, **options)
    (found,) = torch.autograd.grad(value, student, upstream)
    return value.detach(), found


def entropy(teacher, labels):
    """The mean over the rows that count of the teacher's entropy."""
    rows = torch.distributions.Categorical(logits=teacher.double()).entropy()
    return rows[labels != -100].mean().float()


@pytest.mark.parametrize(
    ("chunked", "options"), [(True, {}), (False, {}), (False, dict(normalize=False))], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_theirs_and_values_lack_the_teachers_entropy(name, chunked, options):
    student, teacher, labels = data()
    cut = chunks if chunked else torch.clone
    inputs = student, teacher, labels, random_like(student.sum())
    theirs, wanted = grad(make(host, name, chunked), *inputs, cut, **options)
    value, found = grad(make(ours, name, chunked), *inputs, cut, **options)
    assert (found - wanted).abs().amax() < 1e-5 * wanted.abs().amax()
    rows = (labels != -100).sum() if options else 1
    share = {"ForwardKL": 1.0, "ReverseKL": 0.0, "SymmetricKL": 0.3}[name]
    missing = share * entropy(teacher, labels) * rows
    torch.testing.assert_close(theirs, value + missing)
    assert name == "ReverseKL" or missing > 0.1 * rows  # so that the line above says something


@pytest.mark.parametrize("name", NAMES)
def test_labels_may_have_another_shape_as_the_host_documents(name):
    """Logits (B · L, V) and labels (B, L); they are a mask, which may hold anything."""
    student, teacher, labels = data()
    upstream = random_like(student.sum())
    _, wanted = grad(
        make(host, name), student.flatten(0, 1), teacher.flatten(0, 1), labels, upstream
    )
    for found in (labels, torch.where(labels == -100, -100, V)):
        inputs = student.flatten(0, 1), teacher.flatten(0, 1), found, upstream
        _, found = grad(make(ours, name), *inputs)
        assert (found - wanted).abs().amax() < 1e-5 * wanted.abs().amax()
    with pytest.raises(ValueError, match="labels must have shape"):
        make(ours, name)(student, teacher, labels[:, 1:])


def test_equal_models_have_no_loss_here_and_the_teachers_entropy_there():
    _, teacher, labels = data()
    for name in NAMES:
        assert make(ours, name)(teacher, teacher, labels).abs() < 1e-6
    for name, share in (("ForwardKL", 1.0), ("SymmetricKL", 0.3)):
        value = make(host, name)(teacher, teacher, labels)
        torch.testing.assert_close(value, share * entropy(teacher, labels))


def test_both_ends_of_the_ratio_are_the_two_divergences():
    student, teacher, labels = data()
    for ratio, name in ((1.0, "ForwardKL"), (0.0, "ReverseKL")):
        value = make(ours, "SymmetricKL", sym_kd_ratio=ratio)(student, teacher, labels)
        assert value == make(ours, name)(student, teacher, labels)
    for module in (host, ours):
        with pytest.raises(ValueError, match="sym_kd_ratio must be in"):
            make(module, "SymmetricKL", sym_kd_ratio=1.5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_chunks_have_the_gradient_but_for_rounding(name):
    student, teacher, labels = data(torch.bfloat16)  # what a model's chunked output is
    upstream = random_like(student.float().sum())
    _, exact = grad(make(ours, name), student.double(), teacher.double(), labels, upstream.double())
    for module in (host, ours):
        _, found = grad(make(module, name, True), student, teacher, labels, upstream, chunks)
        assert found.dtype == torch.bfloat16
        assert (found - exact).abs().amax() < 2**-7 * exact.abs().amax()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_without_labels_that_count_the_loss_is_0_and_has_a_gradient(name, chunked):
    student, teacher, labels = data()
    labels = torch.full_like(labels, 7)
    cut = chunks if chunked else torch.clone
    inputs = student, teacher, labels, random_like(student.sum())
    value, found = grad(make(ours, name, chunked, ignore_index=7), *inputs, cut)
    assert value == 0 and not found.any()
    student = student.requires_grad_()
    theirs = make(host, name, chunked, ignore_index=7)(cut(student), cut(teacher), labels)
    if chunked and name != "ForwardKL":
        assert theirs.isnan()
    else:
        assert theirs == 0 and not theirs.requires_grad  # backward() of it is an error


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_chunks_leaves_nothing_out(name):
    student, teacher, labels = data()
    whole = make(ours, name)(student, teacher, labels)
    cut = [x.chunk(2, dim=1) for x in (student, teacher)]  # the models were told 2, the loss 4
    torch.testing.assert_close(make(ours, name, True)(*cut, labels), whole)
    cut = [x.chunk(CHUNKS, dim=1) for x in (student, teacher)]
    theirs = make(host, name, True)(*cut, labels)
    with pytest.raises(RuntimeError):  # theirs: labels of other rows
        make(host, name, True)(*(x.chunk(2, dim=1) for x in (student, teacher)), labels)
    rows = [x.chunk(CHUNKS, dim=1)[:2] for x in (student, teacher)]
    assert make(host, name, True)(*rows, labels) < theirs  # and no word of those that are not there
    with pytest.raises(ValueError, match=r"chunks of 9 positions, as labels have, got \[3, 3\]"):
        make(ours, name, True)(*rows, labels)


def test_chunks_that_do_not_go_together_are_refused():
    student, teacher, labels = data()
    loss = make(ours, "ForwardKL", True)
    with pytest.raises(TypeError, match=r"student_logits must be a list of chunks, got a tensor"):
        loss(student, teacher, labels)
    with pytest.raises(ValueError, match=r"got \[3, 3, 3\] and \[5, 4\]"):
        loss(chunks(student), teacher.chunk(2, dim=1), labels)


def test_a_class_that_the_student_rules_out_counts_here():
    student, teacher, labels = data()
    student[0, 0, 3] = -torch.inf
    assert make(ours, "ForwardKL")(student, teacher, labels).isinf()
    assert make(host, "ForwardKL")(student, teacher, labels).isfinite()
    teacher[0, 0, 3] = -torch.inf  # by both: no class at all
    value = make(ours, "ForwardKL")(student, teacher, labels)
    theirs = make(host, "ForwardKL")(student, teacher, labels)
    torch.testing.assert_close(theirs, value + entropy(teacher, labels))
    teacher[0, 1] = student[0, 1] = NAN  # an ignored row is not read here
    assert make(ours, "ForwardKL")(student, teacher, labels) == value
    assert make(host, "ForwardKL")(student, teacher, labels).isnan()


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_loss_is_the_same(name):
    student, teacher, labels = data()
    loss = torch.compile(make(ours, name, True), backend="eager", fullgraph=True)  # as the recipe
    inputs = student, teacher, labels, random_like(student.sum())
    value, found = grad(loss, *inputs, chunks)
    wanted_value, wanted = grad(make(ours, name, True), *inputs, chunks)
    assert torch.equal(value, wanted_value) and torch.equal(found, wanted)
    assert loss.num_output_chunks == CHUNKS  # recipes read it


def recipes_step():
    """`_loss_step` as the recipe has it, which is installed as a file of no package."""
    folder = importlib.util.find_spec("recipes").submodule_search_locations[0]
    path = Path(folder) / "knowledge_distillation_single_device.py"
    found = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.FunctionDef)]
    (step,) = (x for x in found if x.name == "_loss_step")
    names = dict(torch=torch, Dict=dict)
    exec(compile(ast.Module([step], []), path, "exec"), names)
    return names["_loss_step"]


@pytest.mark.parametrize("chunked", [False, True])
def test_the_recipes_step_takes_it_by_its_component(chunked):
    layers = dict(vocab_size=V, num_layers=1, num_heads=2, num_kv_heads=2, max_seq_len=L)
    suffix = "WithChunkedOutput" * chunked
    names = {host: "torchtune.modules.loss", ours: "kdkernels.integrations.torchtune"}
    steps = {}
    for module, path in names.items():
        torch.manual_seed(0)
        model, teacher = (llama2(embed_dim=width, **layers) for width in (8, 16))
        loss = config.instantiate(
            OmegaConf.create({"_component_": f"{path}.ForwardKL{suffix}Loss"})
        )
        assert type(loss) is getattr(module, f"ForwardKL{suffix}Loss")
        if chunked:
            for each in (model, teacher):
                each.set_num_output_chunks(loss.num_output_chunks)
        hard = host.CEWithChunkedOutputLoss() if chunked else torch.nn.CrossEntropyLoss()
        stub = types.SimpleNamespace(
            _model=model,
            _teacher_model=teacher,
            _kd_loss_fn=loss,
            _loss_fn=hard,
            ignore_labels_cache=torch.full((B, 1), -100),
        )
        tokens = torch.randint(V, (B, L))
        batch = dict(tokens=tokens, labels=tokens.masked_fill(tokens < 5, -100))
        class_loss, kd_loss = recipes_step()(stub, batch)
        (0.5 * class_loss + 0.5 * kd_loss).backward()
        steps[module] = class_loss, kd_loss, [p.grad for p in model.parameters()]
    assert steps[ours][0] == steps[host][0] and steps[ours][1] < steps[host][1] - 1
    scale = max(g.abs().amax() for g in steps[host][2])
    for found, wanted in zip(steps[ours][2], steps[host][2], strict=True):
        assert (found - wanted).abs().amax() < 1e-5 * scale


def test_it_needs_no_torchtune():
    modules = "torchtune", "nemo", "modelopt"  # theirs are not needed either
    program = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module("kdkernels.integrations." + name)
assert not {{"torchtune", "nemo_automodel", "modelopt"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
