"""A run that is interrupted anywhere ends with the bits of one that is not."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_steps import Scaled
from torch import nn

from kdkernels import KDLoss
from kdkernels.distill import Checkpoints, Distiller, FeatureHint

pytest.importorskip("safetensors", reason="the extra `train` is not installed")

N, V = 37, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(teacher=None, **options):
    """teacher: None: one whose features a hint compares."""
    torch.manual_seed(3)
    student = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, V))
    if teacher is None:
        teacher = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, V))
        options = {"hints": [FeatureHint("0", "0")], **options}
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    scheduler = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=4)
    return Distiller(
        student,
        teacher,
        draw(N, 6),
        labels,
        loss=KDLoss(temperature=2.0),
        **{
            **dict(batch_size=8, scheduler=scheduler, alpha_warmup=7),
            **options,
        },
    )


def weights(distiller):
    modules = distiller.student, distiller.hints
    return torch.cat([x.detach().flatten() for m in modules for x in m.parameters()])


@pytest.mark.parametrize("stop", (1, 5, 11))  # within an epoch of 5 steps, at its end, in another
def test_a_resumed_run_has_the_same_bits(tmp_path, stop):
    whole = make()
    history = whole.train(13, record_every=1)
    first = make()
    first.train(stop, record_every=1, checkpoints=Checkpoints(tmp_path))
    torch.manual_seed(99)
    second = make()
    second.restore(*Checkpoints(tmp_path).load())
    again = second.train(13 - stop, record_every=1)
    assert torch.equal(weights(whole), weights(second))
    assert again.steps == history.steps == list(range(1, 14))
    assert again.losses == history.losses


def test_a_scaler_goes_on_with_its_scale(tmp_path):
    """That of float16: it grows with the steps, and a new one would begin at the first scale."""
    whole = make(accelerator=Scaled(), scheduler=None)
    whole.train(7)
    first, second = (
        make(accelerator=Scaled(), scheduler=None),
        make(accelerator=Scaled(), scheduler=None),
    )
    first.train(4, checkpoints=Checkpoints(tmp_path))
    second.resume(Checkpoints(tmp_path))
    second.train(3)
    assert second.engine.scaler.state_dict() == whole.engine.scaler.state_dict()
    assert whole.engine.scaler.get_scale() == 16.0
    assert torch.equal(weights(whole), weights(second))


def test_a_scheduler_more_or_less_is_refused(tmp_path):
    make().train(2, checkpoints=Checkpoints(tmp_path / "with"))
    make(scheduler=None).train(2, checkpoints=Checkpoints(tmp_path / "without"))
    with pytest.raises(ValueError, match="scheduler must be .*, when there was one, got none"):
        make(scheduler=None).resume(Checkpoints(tmp_path / "with"))
    with pytest.raises(ValueError, match="scheduler must be .*, when there was none, got one"):
        make().resume(Checkpoints(tmp_path / "without"))


def test_the_state_of_another_run_is_refused(tmp_path):
    first = make()
    first.train(2, checkpoints=Checkpoints(tmp_path))
    step, state = Checkpoints(tmp_path).load()
    for change in (dict(batch_size=9), dict(seed=1)):
        (name,) = change
        with pytest.raises(ValueError, match=f"{name} must be .*, as before, got {change[name]}"):
            make(**change).restore(step, state)


def of_two_processes(folder):
    """A checkpoint, as if there had been another process -> step, state"""
    step, state = Checkpoints(folder).load()
    return step, {**state, "randomness": state["randomness"] * 2, "meter": state["meter"] * 2}


def test_on_fewer_processes_dropout_begins_anew_from_the_seed(tmp_path):
    make().train(2, checkpoints=Checkpoints(tmp_path))
    found = []
    for seed in (5, 6):
        resumed = make()
        torch.manual_seed(seed)
        resumed.restore(*of_two_processes(tmp_path))
        resumed.train(3)
        found.append(weights(resumed))
    assert torch.equal(*found)
    made = make()
    made.restore(*Checkpoints(tmp_path).load())  # on as many
    made.train(3)
    assert not torch.equal(weights(made), found[0])


def test_another_number_of_steps_in_an_epoch_is_refused(tmp_path):
    """The last batch of 37 examples has one: one process takes it, two leave it out."""
    make(batch_size=9).train(2, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(ValueError, match="processes must be 2, as before, got 1: the last batch"):
        make(batch_size=9).restore(*of_two_processes(tmp_path))


def test_a_run_that_begins_leaves_those_of_another_alone(tmp_path):
    make().train(2, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(
        ValueError, match="checkpoints must be empty for a run that begins, .*: res"
    ):
        make().train(1, checkpoints=Checkpoints(tmp_path))
    assert [path.name[-1] for path in Checkpoints(tmp_path).paths()] == ["2"]


def test_checkpoints_in_time(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=10)
    make().train(7, checkpoints=checkpoints, checkpoint_every=3)
    assert [path.name[-1] for path in checkpoints.paths()] == ["7", "6", "3"]


def test_interrupted_after_a_step(tmp_path):
    distiller, taken = make(), []

    def on_step():
        taken.append(1)
        if len(taken) == 4:
            signal.raise_signal(signal.SIGINT)
            taken.append("the step goes on")

    with pytest.raises(KeyboardInterrupt):
        distiller.train(9, checkpoints=Checkpoints(tmp_path), on_step=on_step)
    step, state = Checkpoints(tmp_path).load()
    assert step == distiller.steps_taken in (4, 5)
    second = make()
    second.restore(step, state)
    second.train(9 - step)
    whole = make()
    whole.train(9)
    assert torch.equal(weights(second), weights(whole))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored():
    """As it is in jobs that a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        distiller = make()
        distiller.train(3, on_step=lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert distiller.steps_taken == 3


def test_killed_at_any_moment(tmp_path):
    """Killed five times without warning, the run ends where it would have."""
    program = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = {os.path.dirname(__file__)!r}, {str(Path(__file__).parents[1])!r}
        import torch
        torch.set_num_threads(1)
        from test_resume import Checkpoints, make, weights
        checkpoints, distiller = Checkpoints({str(tmp_path)!r}), make()
        found = checkpoints.load()
        if found:
            distiller.restore(*found)
        print("ready", flush=True)
        report = lambda: print(distiller.steps_taken, flush=True)
        left = 60 - distiller.steps_taken
        if left:
            distiller.train(left, checkpoints=checkpoints, checkpoint_every=2, on_step=report)
        torch.save(weights(distiller), {str(tmp_path / "end.pt")!r})
        """
    )
    for kill in (4, 9, 6, None):
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        ) as process:
            lines = 0
            for _ in process.stdout:
                lines += 1
                if lines == kill:
                    process.kill()
            assert process.wait() == (0 if kill is None else -signal.SIGKILL)
    whole = make()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole.train(60)
    torch.set_num_threads(threads)
    assert torch.equal(torch.load(tmp_path / "end.pt"), weights(whole))
