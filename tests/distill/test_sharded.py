"""Students that FSDP2 shards and that DDP copies: the weights of one process, from anywhere on."""

import functools

import pytest
import torch
from conftest import assert_trained_alike
from processes import accelerator, run
from torch import nn

from kdkernels import KDLoss, LinearHead
from kdkernels.distill import Checkpoints, Distiller, Evaluation, FeatureHint
from kdkernels.distill.checkpoints import load
from kdkernels.distill.engine import whole

pytest.importorskip("accelerate", reason="the extra `train` is not installed")

N, H, V = 37, 8, 5
STEPS, EARLIER = 9, 4  # 3 are an epoch, whose last batch has fewer examples, and a recording
FORMS = "logits", "head", "head apart"
KINDS = "ddp", "fsdp"


class Model(nn.Module):
    def __init__(self, seed, has_logits):
        super().__init__()
        self.first, self.tanh, self.last = nn.Linear(6, H), nn.Tanh(), nn.Linear(H, V)
        self.has_logits = has_logits
        generator = torch.Generator().manual_seed(seed)
        for x in self.parameters():
            x.data = torch.randn(x.shape, generator=generator)

    def forward(self, x):
        hidden = self.tanh(self.first(x))
        if self.has_logits:
            return self.last(hidden)
        return LinearHead(hidden, self.last.weight, self.last.bias)


def distiller(form="logits", engine=None, teacher=None, **options):
    """Rows that count differ from process to process, and so do their parts of a batch."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(N, 6, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::3] = -100
    labels[20:] = -100
    student = Model(0, form == "logits")
    if form == "head apart" and engine is not None and engine.is_fsdp2:
        from torch.distributed.fsdp import fully_shard

        fully_shard(student.last)  # whose forward is never called
    return Distiller(
        student,
        Model(1, has_logits=True) if teacher is None else teacher,
        inputs,
        labels,
        loss=KDLoss(temperature=2.0, alpha=0.6),
        optimizer=functools.partial(torch.optim.Adam, lr=0.05, eps=1e-2),
        scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3),
        batch_size=15,
        clip_norm=0.1,  # of which the gradients are several times as large
        accelerator=engine,
        **{"accumulate": 2, "hints": [FeatureHint("first", "first")], **options},
    )


def weights(distiller):
    modules = distiller.student, distiller.hints
    return torch.cat([whole(x.detach()).flatten() for m in modules for x in m.parameters()])


def trained(found, folder):
    """To the end, with checkpoints -> the weights there, and the losses of the recordings."""
    checkpoints = Checkpoints(folder, keep=STEPS)
    found.train(STEPS, record_every=3, checkpoints=checkpoints, checkpoint_every=EARLIER)
    return weights(found), torch.tensor(found.history.losses)


def going_on(folder, form, engine=None):
    """From the earlier checkpoint to the end."""
    torch.manual_seed(77)
    found = distiller(form, engine)
    found.restore(*load(f"{folder}/step-{EARLIER:08d}"))
    history = found.train(STEPS - EARLIER, record_every=3)
    return weights(found), torch.tensor(history.losses)


def whole_runs(folder):
    """In 2 processes: from the beginning, and from the middle of the others' runs."""
    results = {}
    for kind in KINDS:
        engine = accelerator(kind)
        for form in FORMS:
            found = distiller(form, engine)
            results[kind, form] = trained(found, f"{folder}/{kind}/{form}")
            again = going_on(f"{folder}/{kind}/{form}", form, engine)
            assert torch.equal(again[0], results[kind, form][0])  # as many processes, the same bits
            assert torch.equal(again[1], results[kind, form][1])
        results[kind, "from one"] = going_on(f"{folder}/one/logits", "logits", engine)
        results[kind, "parts"] = of_parts(engine)
        for apart in (False, True):
            results[kind, "teacher", apart] = of_sharded_teacher(engine, apart)
    for kind, other in (KINDS, KINDS[::-1]):
        engine = accelerator(kind)
        results[f"{other} to {kind}", "head"] = going_on(f"{folder}/{other}/head", "head", engine)
    best_weights()
    assert hooks_of_a_weight() == 0
    if engine.is_main_process:
        torch.save(results, f"{folder}/results.pt")
    engine.end_training()


def of_parts(engine=None):
    """More parts than a process has examples of the last batch of an epoch: all have as many."""
    found = distiller("logits", engine, accumulate=6)
    found.train(4, record_every=4)
    return weights(found), torch.tensor(found.history.losses)


def of_sharded_teacher(engine, apart):
    """Its features, and its head: gathered with the model, or apart, where nobody calls it."""
    from torch.distributed.fsdp import fully_shard

    teacher = Model(1, has_logits=False)
    for module in (teacher.first, *[teacher.last] * apart, teacher):
        fully_shard(module)
    found = distiller("head", engine, teacher, accumulate=6)
    found.train(STEPS, record_every=3)
    assert all(len(x.to_local()) < len(x) for x in teacher.first.parameters())
    freed = fully_shard(Model(1, has_logits=False), reshard_after_forward=True)
    with pytest.raises(
        ValueError, match=r"must be one of fully_shard\(..., reshard_after_forward=F"
    ):
        distiller("head", engine, freed, hints=()).train(1)
    return weights(found), torch.tensor(found.history.losses)


def hooks_of_a_weight():
    """How many a head's weight has after some steps of FSDP2, whose hooks on it would stay."""
    found, seen = distiller("head", accelerator("fsdp")), []
    found.student.register_forward_hook(lambda model, *others: seen.append(model.last.weight))
    found.train(3)
    assert not hasattr(seen[-1], "full_tensor")  # the one that is gathered, for all steps
    return len(seen[-1]._backward_hooks or ())


def best_weights():
    """Early stopping, and what a checkpoint holds of it."""
    values = [3.0, 1.0, 2.0, 4.0]
    seen = []

    def test(model):
        seen.append(torch.cat([whole(x).flatten() for x in model.state_dict().values()]))
        return Evaluation(torch.tensor(0), torch.tensor(values[len(seen) - 1]))

    found = distiller("head", accelerator("fsdp"), hints=())
    found.train(4, test=test, record_every=1, patience=2)
    assert found.steps_taken == 4 and torch.equal(weights(found), seen[1])
    state = found.state()
    if found.engine.is_main_process:
        best = state["best"]["student"].values()
        assert torch.equal(torch.cat([x.flatten() for x in best]), seen[1])


def resumed_by_four(folder):
    results = {}
    for kind in KINDS:
        engine = accelerator(kind)
        assert engine.num_processes == 4
        for other in KINDS:
            results[kind, other] = going_on(f"{folder}/{other}/head", "head", engine)
    if engine.is_main_process:
        torch.save(results, f"{folder}/results.pt")
    engine.end_training()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with checkpoints; {form: (weights at first, in the end, losses) of one process};
    what two processes have in the end."""
    folder, ones = tmp_path_factory.mktemp("runs"), {}
    for form in FORMS[:2]:
        one = distiller(form)
        before = weights(one).clone()
        ones[form] = before, *trained(one, folder / "one" / form)
    run(f"test_sharded.whole_runs({str(folder)!r})", 2)
    return folder, ones, torch.load(folder / "results.pt")


def alike(found, one):
    before, end, losses = one
    assert_trained_alike(found[0], end, before, 1e-5)
    torch.testing.assert_close(found[1], losses, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_weights_of_one(runs, kind, form):
    """With the norm that is clipped, the parts of a batch and the labels that count those of all;
    resumed, they have the same bits, and so do sharded weights that stopped early."""
    _, ones, results = runs
    alike(results[kind, form], ones[form.split()[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_has_as_many_parts(runs, kind):
    before, _, _ = runs[1]["logits"]
    alike(runs[2][kind, "parts"], (before, *of_parts()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_may_be_sharded(runs, kind):
    for apart in (False, True):
        alike(runs[2][kind, "teacher", apart], runs[1]["head"])


def test_checkpoints_are_resumed_by_more_processes_and_by_fewer(runs):
    folder, ones, results = runs
    for kind in KINDS:
        alike(results[kind, "from one"], ones["logits"])
        for form in FORMS:
            alike(going_on(folder / kind / form, form), ones[form.split()[0]])
    for kind in ("ddp to fsdp", "fsdp to ddp"):
        alike(results[kind, "head"], ones["head"])


def test_four_processes_go_on_where_two_were(runs):
    folder, ones, _ = runs
    run(f"test_sharded.resumed_by_four({str(folder)!r})", 4)
    for found in torch.load(folder / "results.pt").values():
        alike(found, ones["head"])
