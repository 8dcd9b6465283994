"""Every block of Python in the documents and docstrings runs, and does what it is there for.

A block has the names that its document cannot show: those of `PUBLIC`, in a docstring those of its
module, and the fixtures below, each made when the block first asks for it.
"""

import ast
import functools
import importlib
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset

pytest.importorskip("markdown_it", reason="the extra `docs` is not installed")

from documents import DOCUMENTS, blocks_of, examples  # noqa: E402

import kdkernels as kdk  # noqa: E402
from kdkernels import KDLoss, TopK, cache, distill  # noqa: E402
from kdkernels.distill import Distiller, validation  # noqa: E402
from kdkernels.objective import make_objective  # noqa: E402

os.environ.setdefault("KERAS_BACKEND", "torch")  # before anything imports it
ALL = [block for path in DOCUMENTS for block in blocks_of(path)]
BLOCKS = [block for block in ALL if block.language == "python"]
RECIPES = [block for block in ALL if block.language == "yaml"]
PUBLIC = {
    "kdk": kdk,
    "torch": torch,
    "nn": nn,
    "F": F,
    "dist": dist,
    **{name: getattr(kdk, name) for name in kdk.__all__},
    **{name: getattr(distill, name) for name in distill.__all__},
}
# What a block finds in the working directory, unless it writes it: by the fixture that makes it.
FILES = {"teacher.cache": "teacher_cache", "models/": "checkpoints"}
WRITES = 'Writer("teacher.cache"', 'write_cache("teacher.cache"'
B, L, V, H, K = 2, 6, 151_936, 8, 64  # of token ids, logits, hidden states, the most probable
TOKENS = 128  # of language models
STEPS = 20  # at most


@pytest.mark.parametrize("block", [*BLOCKS, *examples()], ids=str)
def test_block(block, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, known = {"__name__": "block"}, dict(PUBLIC)
    if block.path.endswith(".py"):
        module = block.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        known.update(vars(pytest.importorskip(module)))
    for file, fixture in FILES.items():
        if file in block.text and not any(call in block.text for call in WRITES):
            request.getfixturevalue(fixture)
    tree = ast.increment_lineno(ast.parse(block.text), block.line - 1)
    for statement in tree.body:
        for name in loaded_by(statement) - names.keys():
            if name in FIXTURES:
                names[name] = request.getfixturevalue(name)
            elif name in known:
                names[name] = known[name]
        loss = names.get("loss")
        code = compile(ast.Module([statement], []), block.path, "exec")
        exec(code, names)
        if names.get("loss") is not loss:
            check_reaches_the_student(names["loss"], names)
    if isinstance(names.get("distiller"), Distiller):
        names["distiller"].train(STEPS)


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_what_a_recipe_names_can_be_made(block):
    yaml = pytest.importorskip("yaml", reason="the extra `train` is not installed")
    for options in yaml.safe_load(block.text).values():
        (name,) = options.keys() & {"_component_", "_target_"}
        module, _, kind = options.pop(name).rpartition(".")
        made = getattr(importlib.import_module(module), kind)(**options)
        assert isinstance(made, nn.Module)


def loaded_by(statement):
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def check_reaches_the_student(loss, names):
    """A loss is finite, and has a gradient that is finite and not 0."""
    if isinstance(loss, nn.Module):
        return
    leaves = [x for x in names.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    leaves += [p for x in names.values() if isinstance(x, nn.Module) for p in x.parameters()]
    leaves = [x for x in leaves if x.is_leaf and x.requires_grad]
    grads = torch.autograd.grad(loss.sum(), leaves, retain_graph=True, allow_unused=True)
    grads = [x for x in grads if x is not None]
    assert loss.isfinite().all() and grads
    assert all(x.isfinite().all() and x.any() for x in grads)


@pytest.fixture(autouse=True)
def training(monkeypatch):
    """A training is short, and what it minimises gets smaller."""

    def train(self, steps, **options):
        history = whole(self, min(steps, STEPS), **{**options, "record_every": 1})
        assert sum(history.losses[-5:]) < sum(history.losses[:5])
        return history

    whole = Distiller.train
    monkeypatch.setattr(Distiller, "train", train)
    monkeypatch.setattr(validation, "SECONDS", 0.0)  # of measuring a latency


# Logits and hidden states of tokens


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


@pytest.fixture
def student_logits():
    return leaf(B, L, V)


@pytest.fixture
def teacher_logits():
    return torch.randn(B, L, V)


logits_1 = logits_2 = local_teacher_logits = teacher_logits
local_logits = student_logits


@pytest.fixture
def student_hidden():
    return leaf(B, L, H)


@pytest.fixture
def student_weight():
    return leaf(V, H)


hidden, local_weight = student_hidden, student_weight


@pytest.fixture
def teacher_hidden():
    return torch.randn(B, L, H)


@pytest.fixture
def teacher_weight():
    return torch.randn(V, H)


@pytest.fixture
def input_ids():
    return torch.randint(V, (B, L))


@pytest.fixture
def ids():
    return torch.randn(B, L, V).topk(K).indices


@pytest.fixture
def logprobs():
    return torch.randn(B, L, K + 1).log_softmax(-1)[..., :K].sort(-1, descending=True).values


@pytest.fixture
def counts():
    return torch.randint(1, 5, (B, L, K))


@pytest.fixture
def labels(request):
    """Of images where there are any, else of tokens."""
    if "images" in request.getfixturevalue("block").text:
        return request.getfixturevalue("all_labels")[0]
    labels = torch.randint(V, (B, L))
    labels[0, 0] = -100
    return labels


@pytest.fixture
def objective():
    options = dict(divergence="forward_kl", beta=None, temperature=1.0, alpha=0.5, t_squared=True)
    options.update(label_smoothing=0.0, ignore_index=-100, vocab_size=V, reduction="mean")
    return make_objective(**options, has_labels=True)


@pytest.fixture
def tokens_in_batch(labels):
    return (labels[:, 1:] != -100).sum()


# Caches


@pytest.fixture
def samples(input_ids):
    return list(input_ids)


@pytest.fixture
def predictions_for():
    def predict(ids):
        logprobs, classes = torch.randn(len(ids), V).log_softmax(-1).topk(K)
        return TopK(classes, logprobs)

    return predict


ask = predictions_for


@pytest.fixture
def teacher_cache(samples, predictions_for):
    with cache.Writer("teacher.cache", "topk:64", vocab_size=V, teacher="served") as writer:
        for sample in samples:
            writer.add(sample, predictions_for(sample))


# Processes


@pytest.fixture
def tensor_group():
    """This process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def data_group(tensor_group):
    return tensor_group


# Models: of images where the block has any, else language models


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def language_model(seed):
    transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=TOKENS, **sizes))


def made_for(request):
    """seed -> a model of the kind that the block needs."""
    text = request.getfixturevalue("block").text
    return network if "images" in text else keras_model if "keras" in text else language_model


def keras_model(seed):
    keras = pytest.importorskip("keras", reason="keras is not installed")
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])


@pytest.fixture
def student(request):
    return made_for(request)(0)


@pytest.fixture
def teacher(request):
    return made_for(request)(1)


model = teacher


@pytest.fixture
def HiddenStates():
    pytest.importorskip("transformers", reason="the extra `train` is not installed")
    return importlib.import_module("kdkernels.integrations.transformers").HiddenStates


@pytest.fixture
def loss():
    """For a training, in blocks that do not say which."""
    return KDLoss(temperature=2.0)


@pytest.fixture
def images():
    return torch.randn(100, 64)


test_images = images


@pytest.fixture
def all_labels():
    return torch.randint(10, (2, 100))


@pytest.fixture
def test_labels(all_labels):
    return all_labels[1]


@pytest.fixture
def blocks():
    tokens = torch.randint(TOKENS, (32, L))
    return StackDataset(input_ids=tokens, labels=tokens)


@pytest.fixture
def checkpoints(tmp_path):
    """The directories of `save_pretrained` and of texts."""
    pytest.importorskip("transformers", reason="the extra `train` is not installed")
    pytest.importorskip("accelerate", reason="the extra `train` is not installed")
    made = importlib.import_module("distill.jobs.checkpoints_made")
    (tmp_path / "models").mkdir()
    for name, width in (("small", 16), ("large", 32)):
        folder = tmp_path / "models" / name
        made.language_model(folder, hidden_size=width, max_position_embeddings=512)
    made.texts(tmp_path / "texts", lines=200)


# What blocks of kdkernels/integrations have of its hosts


@pytest.fixture
def args(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")
    options = dict(max_steps=2, report_to="none", save_strategy="no", use_cpu=True, bf16=False)
    return transformers.TrainingArguments(str(tmp_path), disable_tqdm=True, **options)


@pytest.fixture
def data(blocks):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    lists = [{name: row.tolist() for name, row in each.items()} for each in blocks]
    return datasets.Dataset.from_list(lists)


@pytest.fixture
def SFTTrainer():
    """TRL's, which would look for a tokenizer where the model came from."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    tokenizer = importlib.import_module("distill.jobs.checkpoints_made").tokenizer()

    class WithTokenizer(trl.SFTTrainer):
        __init__ = functools.partialmethod(trl.SFTTrainer.__init__, processing_class=tokenizer)

    return WithTokenizer


@pytest.fixture
def trainer():
    """Any of TRL's, as far as its loss goes."""
    trl = pytest.importorskip("trl.trainer.distillation_trainer", reason="trl is not installed")

    def train():
        assert trl._chunked_divergence_loss.__module__ == "kdkernels.integrations.trl.chunked"

    return SimpleNamespace(train=train)


@pytest.fixture
def Trainer():
    """Lightning's, which writes nothing."""
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    quiet.update(enable_model_summary=False, max_epochs=1, accelerator="cpu")
    return functools.partial(lightning.Trainer, **quiet)


@pytest.fixture
def batches(blocks):
    return DataLoader(TensorDataset(*blocks.datasets.values()), batch_size=8)


FIXTURES = {name for name, x in globals().items() if type(x) is type(checkpoints)}
