"""With `accelerate`: mixed precision, and several processes that train as one does."""

import functools
import textwrap

import processes
import pytest
import torch
from conftest import assert_trained_alike
from test_resume import make, weights

from kdkernels import kd_loss
from kdkernels.distill import Checkpoints

pytest.importorskip("accelerate", reason="the extra `train` is not installed")


@pytest.fixture(autouse=True)
def fresh():
    """One accelerator's precision is not the next one's."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process_has_the_same_bits():
    from accelerate import Accelerator

    plain = make()
    plain.train(6, record_every=2)
    accelerated = make(accelerator=Accelerator(cpu=True))
    accelerated.train(6, record_every=2)
    assert torch.equal(weights(plain), weights(accelerated))
    assert plain.history.losses == accelerated.history.losses


PROGRAM = """
    import signal
    import torch
    torch.set_num_threads(1)
    from accelerate import Accelerator
    from test_accelerate import distiller, make, weights
    from kdkernels.distill import Evaluation
    from kdkernels.distill.checkpoints import Checkpoints, load

    accelerator, found = Accelerator(cpu=True), []
    for parts in (1, 2):
        torch.manual_seed(accelerator.process_index)
        folder = f"{folder}/{{parts}}"
        trained = distiller(accelerator, accumulate=parts)
        trained.train(7, record_every=3, checkpoints=Checkpoints(folder), checkpoint_every=4)
        again = distiller(accelerator, accumulate=parts)
        mine = torch.get_rng_state()
        torch.manual_seed(9)
        again.restore(*load(folder + "/step-00000004"))
        assert torch.equal(torch.get_rng_state(), mine)
        again.train(3, record_every=3)
        assert torch.equal(weights(again), weights(trained))
        assert again.history.losses == trained.history.losses
        found.append((weights(trained), trained.history.losses, trained.history.terms))
    assert accelerator.num_processes == 2

    stopped = distiller(accelerator)
    def interrupt_the_other():
        if stopped.steps_taken == 2 and not accelerator.is_main_process:
            signal.raise_signal(signal.SIGINT)
    try:
        stopped.train(9, on_step=interrupt_the_other, checkpoints=Checkpoints({folder!r} + "/3"))
    except KeyboardInterrupt:
        assert stopped.steps_taken == 2
    else:
        raise AssertionError("it was not interrupted")
    assert load({folder!r} + "/3/step-00000002")[0] == 2

    wrong = distiller(accelerator)
    wrong.data.inputs[5] = torch.nan  # in the half of one process, a row that counts
    ((_, rows),) = wrong.train(3).skipped  # an epoch
    assert rows == [(5,)], rows

    values = [3.0, 2.0 + 2 * accelerator.process_index, 2.5, 2.4]
    def test(model):
        return Evaluation(torch.tensor(0), torch.tensor(values.pop(0)))
    early = distiller(accelerator)
    assert early.train(4, test=test, record_every=1, patience=2).stopped_early
    assert early.best["cross_entropy"] == 2.0 and early.steps_taken == 4
    try:
        make(accelerator=accelerator, batch_size=1)
    except ValueError as error:
        assert "an example for each of the 2 processes, got 1" in str(error)
    else:
        raise AssertionError("a process without examples")
    if accelerator.is_main_process:
        torch.save(found, {folder!r} + "/found.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()
"""


def distiller(accelerator, **options):
    """Rows that count differ from process to process; without dropout, whose draws do too."""
    student = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    generator = torch.Generator().manual_seed(0)
    for x in student.parameters():
        x.data = torch.randn(x.shape, generator=generator)
    made = make(accelerator=accelerator, **options)
    labels = made.data.labels.clone()
    labels[::3] = -100
    labels[20:] = -100
    return type(made)(
        student,
        made.teacher.model,
        made.data.inputs,
        labels,
        loss=made.loss,
        optimizer=functools.partial(torch.optim.SGD, lr=0.3),
        batch_size=16,
        hints=[type(made.hints[0])("0", "0")],
        accelerator=accelerator,
        **options,
    )


def run(folder):
    """The program in two processes."""
    program = textwrap.dedent(PROGRAM).format(folder=str(folder))
    processes.run(["-c", program], 2)
    return torch.load(folder / "found.pt")


def test_two_processes_are_one(tmp_path):
    """The same steps, with the loss and the learned projection of the hint among them, whatever
    rows count in which process, and in parts; and they are resumed with their bits. An interruption
    of one stops both, and none is left without examples."""
    from accelerate import Accelerator

    one = distiller(Accelerator(cpu=True))
    before = weights(one).clone()
    history = one.train(7, record_every=3)
    for found, losses, terms in run(tmp_path):
        assert_trained_alike(found, weights(one), before, 1e-5)
        assert losses == pytest.approx(history.losses, rel=1e-5)
        for mine, theirs in zip(terms, history.terms, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)


def test_mixed_precision_leaves_logits_as_they_are(monkeypatch):
    """No float32 copy of them: the loss reads bfloat16."""
    from accelerate import Accelerator

    from kdkernels.distill import distiller as module

    seen = []

    def spy(student, teacher, *args, **options):
        seen.append((student.dtype, teacher.dtype))
        return kd_loss(student, teacher, *args, **options)

    monkeypatch.setattr(module, "kd_loss", spy)
    trained = make(accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
    history = trained.train(20, record_every=5)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert history.losses[-1] < history.losses[0] and not history.skipped
    assert {x.dtype for x in trained.student.parameters()} == {torch.float32}


def test_shards_are_no_checkpoint(tmp_path):
    """The main process would save its own shard and call it the model."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True)
    sharded = make(accelerator=accelerator)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match="checkpoints must be None with FSDP 1"):
        sharded.train(2, checkpoints=Checkpoints(tmp_path))
    assert sharded.steps_taken == 0


def test_an_accelerator_that_divides_the_loss_is_refused():
    """Its backward would make every gradient a quarter of what it is."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1, got 4"):
        make(accelerator=accelerator)


def test_an_accelerator_whose_processes_share_examples_is_refused():
    """Each would train on a part of the batch of its own."""
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig

    accelerator = Accelerator(cpu=True)
    accelerator.state.parallelism_config = ParallelismConfig(tp_size=2)
    with pytest.raises(ValueError, match="got 2 processes for the same ones"):
        make(accelerator=accelerator)
