"""A Lightning module whose steps have the gradient of one big batch, where Lightning's have not."""

import logging

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from kdkernels import KDLoss, LinearHead, cache, kd_loss  # noqa: E402
from kdkernels.distill import SeveralTeachers  # noqa: E402
from kdkernels.integrations.lightning import KDModule  # noqa: E402

V, WIDTH, RATE = 7, 4, 0.5
SIZES = 2, 5, 1, 3, 6  # of batches
QUIET = dict(
    accelerator="cpu",
    max_epochs=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
# Lightning's own, and what it calls of torch.
IGNORED = "ignore:.*does not have many workers", "ignore:.isinstance.treespec"
pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED]


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


class Student(KDModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=RATE)


class Naive(Student):
    """As Lightning's users write it: the mean over each batch."""

    def training_step(self, batch, batch_idx):
        return kd_loss(self.student(batch[0]), self.teacher(batch[0]).detach(), batch[1])

    def on_before_optimizer_step(self, optimizer):
        pass


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.0), nn.Linear(8, V))


def data():
    """Batches of uneven lengths, some of whose rows do not count."""
    batches = [(torch.randn(n, WIDTH), torch.randint(V, (n,))) for n in SIZES]
    batches[1][1][2:] = -100
    return batches


def loader(batches):
    return DataLoader(batches, batch_size=None)


def weights(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def trained(batches, windows, **options):
    """Weights after a step of plain PyTorch over each window's rows in one batch."""
    student, teacher = network(0), network(1).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    for window in windows:
        inputs, labels = (torch.cat(x) for x in zip(*(batches[k] for k in window), strict=True))
        optimizer.zero_grad()
        kd_loss(student(inputs), teacher(inputs).detach(), labels, **options).backward()
        if clip := options.get("clip"):
            nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.step()
    return weights(student)


def fit(module, batches, **options):
    trainer = lightning.Trainer(**{**QUIET, **options})
    trainer.fit(module, loader(batches))
    return trainer


def assert_alike(found, wanted):
    way = (wanted - weights(network(0))).norm()
    assert way > 0.01 and (found - wanted).norm() < 1e-5 * way


WINDOWS = {1: [[0], [1], [2], [3], [4]], 2: [[0, 1], [2, 3], [4]], 3: [[0, 1, 2], [3, 4]]}


@pytest.mark.parametrize("accumulate", WINDOWS)
def test_accumulated_uneven_batches_are_one_big_batch(accumulate):
    batches = data()
    module = Student(network(0), network(1), KDLoss(temperature=2.0, alpha=0.7))
    fit(module, batches, accumulate_grad_batches=accumulate)
    wanted = trained(batches, WINDOWS[accumulate], temperature=2.0, alpha=0.7)
    assert_alike(weights(module.student), wanted)


def test_lightning_alone_takes_a_mean_of_means_and_too_small_a_step_at_the_end():
    batches = data()
    naive = Naive(network(0), network(1), KDLoss())
    fit(naive, batches, accumulate_grad_batches=2)
    wanted = trained(batches, WINDOWS[2])
    way = (wanted - weights(network(0))).norm()
    assert (weights(naive.student) - wanted).norm() > 0.05 * way
    # The last batch of an epoch, alone in its window, is divided by 2 all the same.
    ends = [Student, Naive]
    steps = []
    for kind in ends:
        module = kind(network(0), network(1), KDLoss())
        fit(module, batches[-1:], accumulate_grad_batches=2)
        steps.append(weights(module.student) - weights(network(0)))
    torch.testing.assert_close(steps[1], steps[0] / 2)


def check_ranks(accumulate):
    """Each of two ranks has batches of its own, of other lengths."""
    torch.manual_seed(0)
    batches = data()
    options = dict(strategy="ddp", devices=2, accumulate_grad_batches=accumulate)
    trainer = lightning.Trainer(**{**QUIET, **options}, use_distributed_sampler=False)
    module = Student(network(0), network(1), KDLoss())
    trainer.fit(module, loader(batches[:4][trainer.global_rank :: 2]))
    windows = {1: [[0, 1], [2, 3]], 2: [[0, 1, 2, 3]]}[accumulate]
    assert_alike(weights(module.student), trained(batches, windows))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_ranks_with_uneven_batches_are_one_big_batch():
    processes.run("test_lightning.check_ranks(1); test_lightning.check_ranks(2)", 2)


def test_clipping_sees_the_gradient_of_the_whole():
    batches = data()
    module = Student(network(0), network(1), KDLoss())
    fit(module, batches[:2], accumulate_grad_batches=2, gradient_clip_val=1e-2)
    way = weights(module.student) - weights(network(0))
    torch.testing.assert_close(way.norm(), torch.tensor(RATE * 1e-2))


def test_batches_without_a_row_that_counts_change_nothing():
    batches = data()
    for empty in (0, 1):
        mixed = batches[:2]
        mixed[empty] = (mixed[empty][0], torch.full_like(mixed[empty][1], -100))
        module = Student(network(0), network(1), KDLoss())
        fit(module, mixed, accumulate_grad_batches=2)
        assert_alike(weights(module.student), trained(mixed, [[1 - empty]]))
    nothing = [(x, torch.full_like(y, -100)) for x, y in batches]
    module = Student(network(0), network(1), KDLoss())
    fit(module, nothing, accumulate_grad_batches=2)
    assert torch.equal(weights(module.student), weights(network(0)))


def test_what_is_logged_is_the_mean_over_the_batch():
    batches = data()[:1]
    module = Student(network(0), network(1), KDLoss(temperature=2.0))
    trainer = fit(module, batches, accumulate_grad_batches=4)
    inputs, labels = batches[0]
    wanted = kd_loss(network(0)(inputs), network(1)(inputs).detach(), labels, temperature=2.0)
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], wanted.detach())


def test_a_step_of_ones_own_gives_a_sum_and_a_count():
    class Own(Student):
        def training_step(self, batch, batch_idx):
            inputs, labels = batch
            loss = nn.functional.cross_entropy(self.student(inputs), labels, reduction="sum")
            return self.share(loss, (labels != -100).sum())

    batches = data()
    module = Own(network(0), network(1), KDLoss())
    fit(module, batches, accumulate_grad_batches=2)
    assert_alike(weights(module.student), trained(batches, WINDOWS[2], alpha=0.0))


def test_a_run_that_was_interrupted_leaves_no_counts_behind():
    class Failing(Student):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if failing:
                raise KeyError("something")

    batches, failing = data(), True
    module = Failing(network(0), network(1), KDLoss())
    with pytest.raises(KeyError):
        fit(module, batches, accumulate_grad_batches=2)
    module.zero_grad()
    failing = False
    fit(module, batches, accumulate_grad_batches=2)
    assert_alike(weights(module.student), trained(batches, WINDOWS[2]))


def test_the_teacher_is_no_part_of_the_module(tmp_path):
    teacher = network(1).train()
    teacher[1].p = 0.9  # would show
    module = Student(network(0), teacher, KDLoss())
    before = weights(teacher)
    batches = data()
    trainer = fit(module, batches)
    assert_alike(weights(module.student), trained(batches, WINDOWS[1]))
    assert torch.equal(weights(teacher), before) and all(
        p.grad is None for p in teacher.parameters()
    )
    assert teacher.training and teacher[1].training  # as they were
    assert len(list(module.parameters())) == len(list(teacher.parameters()))  # the student's
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert set(saved) == {f"student.{name}" for name in network(0).state_dict()}
    module.eval()
    assert teacher.training


def test_the_teacher_goes_where_the_student_is():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.devices = network(1), []

        def to(self, device):
            self.devices.append(torch.device(device))
            return super().to(device)

        def forward(self, x):
            return self.layer(x)

    teacher = Elsewhere()
    fit(Student(network(0), teacher, KDLoss()), data()[:1])
    assert teacher.devices == [torch.device("cpu")]


class Headed(nn.Module):
    """Token ids (B, L) -> `LinearHead`."""

    def __init__(self, seed, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Embedding(V, width), nn.Linear(width, V, bias=False)

    def forward(self, input_ids, attention_mask=None):
        return LinearHead(self.body(input_ids), self.head.weight)


def tokens(sizes=(2, 3)):
    return [dict(input_ids=torch.randint(V, (n, 5))) for n in sizes]


def of_tokens(batches):
    return [dict(x, labels=x["input_ids"]) for x in batches]


def test_language_models_train_without_logits_on_dicts():
    batches = of_tokens(tokens())
    student, wanted = Headed(0), Headed(0)
    teacher = Headed(1, width=9)
    fit(Student(student, teacher, KDLoss(shift=True)), batches, accumulate_grad_batches=2)
    ids = torch.cat([x["input_ids"] for x in batches])
    logits, target = (x.body(ids) @ x.head.weight.T for x in (wanted, teacher))
    kd_loss(logits, target.detach(), ids, shift=True).backward()
    moved = weights(wanted) - RATE * torch.cat([p.grad.flatten() for p in wanted.parameters()])
    torch.testing.assert_close(weights(student), moved)


def test_a_cache_and_several_teachers_are_teachers(tmp_path):
    batches = of_tokens(tokens())
    teacher = Headed(1, width=9)
    ids = torch.cat([x["input_ids"] for x in batches])
    with torch.no_grad():
        logits = teacher.body(ids) @ teacher.head.weight.T
    options = dict(vocab_size=V, teacher="Headed")
    with cache.Writer(tmp_path / "cache", "dense:bf16", **options) as writer:
        for sample, prediction in zip(ids, logits, strict=True):
            writer.add(sample, lambda prediction=prediction: prediction)
    found = []
    for each in (cache.open(tmp_path / "cache"), teacher, SeveralTeachers([teacher, teacher])):
        student = Headed(0)
        fit(Student(student, each, KDLoss(shift=True)), batches, accumulate_grad_batches=2)
        found.append(weights(student))
    torch.testing.assert_close(found[2], found[1])
    way = (found[1] - weights(Headed(0))).norm()
    assert 0 < (found[0] - found[1]).norm() < 2**-6 * way  # bfloat16


def test_what_cannot_be_weighted_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="teacher must be a torch.nn.Module, a TeacherCache or"):
        Student(network(0), torch.zeros(3, V), KDLoss())
    with pytest.raises(TypeError, match="loss must be a KDLoss, got CrossEntropyLoss"):
        Student(network(0), network(1), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="loss must have reduction='mean', got 'sum'"):
        Student(network(0), network(1), KDLoss(reduction="sum"))
    strategy = lightning.strategies.SingleDeviceStrategy
    monkeypatch.setattr(strategy, "handles_gradient_accumulation", True)
    with pytest.raises(RuntimeError, match="SingleDeviceStrategy accumulates gradients by itself"):
        fit(Student(network(0), network(1), KDLoss()), data())
    monkeypatch.undo()

    class Two(Student):
        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(x.parameters(), lr=RATE) for x in self.student[::2]]

    with pytest.raises(RuntimeError, match="KDModule needs one optimizer, got 2"):
        fit(Two(network(0), network(1), KDLoss()), data())
