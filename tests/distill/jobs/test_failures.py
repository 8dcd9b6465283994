"""One of several processes fails: all of them end in time, and say which it was in a line each."""

import contextlib
import datetime
import os
import re
import signal
import sys
import time
from pathlib import Path

import processes
import pytest
import torch

from kdkernels import cli
from kdkernels.distill import Distiller, failures

pytest.importorskip("transformers", reason="the extra `train` is not installed")
pytest.importorskip("accelerate", reason="the extra `train` is not installed")
pytest.importorskip("yaml", reason="the extra `train` is not installed")

SECONDS = 8  # that processes wait for each other
COMMAND = "python -m kdkernels distill: error: process {} of 2: "
DEAD = "process 1 died or hangs: .*Connection (closed|reset) by peer"
HOWS = "killed", "raises", "hangs", "alone"


def fail(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises":
        raise KeyError("a name\nin two lines")
    time.sleep(SECONDS + failures.GRACE + 2)


def command(how, folder, flags):
    """The command, whose process 1 fails in its third step, once both have been started."""
    import accelerate  # noqa: F401
    import transformers  # noqa: F401

    (Path(folder) / os.environ["RANK"]).touch()
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.05)
    step = Distiller._step

    def failing(self, batch):
        if self.steps_taken == 2 and self.engine.process_index == 1:
            fail(how)
        return step(self, batch)

    Distiller._step = failing
    if how == "alone" and os.environ["RANK"] == "1":
        flags += ["--student", "nowhere"]
    sys.exit(cli.main(flags))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{how a process fails: [(exit code, stdout, stderr) of both]}"""
    from checkpoints_made import language_model, texts

    root = tmp_path_factory.mktemp("failures")
    language_model(root / "student")
    language_model(root / "teacher", seed=1)
    texts(root / "data", count=3)
    flags = "--length 16 --steps 1000 --batch-size 4 --no-tensorboard".split()
    flags += ["--timeout", str(SECONDS / 60)]
    for name in ("student", "teacher", "data"):
        flags += [f"--{name}", str(root / name)]
    running = {}
    for how in HOWS:
        own = ["distill", *flags, "--out", str(root / how / "out")]
        (root / how / "started").mkdir(parents=True)
        call = f"test_failures.command({how!r}, {str(root / how / 'started')!r}, {own!r})"
        running[how] = processes.start(call, 2)
    return {how: processes.ends(each) for how, each in running.items()}


def test_a_process_that_is_killed_is_named_by_the_others(results):
    survivor, killed = results["killed"]
    assert killed[0] == -signal.SIGKILL
    assert survivor[0] == 1 and survivor[2].count("\n") == 1
    assert re.match(COMMAND.format(0) + DEAD, survivor[2])


def test_an_exception_is_a_line_of_its_own_process_and_of_the_others(results):
    said = "KeyError: 'a name\\nin two lines'"
    other, failed = results["raises"]
    assert failed[0] == 1 and failed[2] == f"{COMMAND.format(1)}{said}\n"
    assert other[0] == 1 and other[2] == f"{COMMAND.format(0)}process 1 failed: {said}\n"


def test_a_process_that_hangs_is_noticed(results):
    other, hung = results["hangs"]
    assert other[0] == 1 and other[2].count("\n") == 1
    assert "process 1 died or hangs: Timed out waiting 8000ms" in other[2]
    assert hung[0] == 1 and hung[2].count("\n") == 1
    assert re.match(COMMAND.format(1) + "(process 0|another process) is gone: ", hung[2])


def test_a_process_with_a_wrong_argument_leaves_nobody_waiting(results):
    other, wrong = results["alone"]
    assert wrong[0] == 2 and wrong[2].count("\n") == 1
    assert "student must be a directory, nowhere is none" in wrong[2]
    assert other[0] == 2 and other[2].count("\n") == 1


def train(how):
    """A script."""
    from accelerate import Accelerator
    from test_resume import make

    found = make(accelerator=Accelerator(cpu=True))
    place = found.engine.process_index
    found.train(5, on_step=lambda: fail(how) if place == 1 and found.steps_taken == 2 else None)


def test_a_script_raises_what_happened():
    (code, _, errors), _ = processes.ends(
        processes.start("test_failures.train('killed')", 2, apart=True)
    )
    assert code != 0 and re.search(f"ProcessError: {DEAD}", errors)
    assert errors.count("Traceback") == 1


def one_after_the_other():
    """A failure that both processes get over, and one of a text that might be a collective's."""
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    with contextlib.suppress(ValueError), failures.shared():
        raise ValueError("an old one")
    torch.distributed.barrier()
    with failures.shared():
        if torch.distributed.get_rank() == 1:
            open("/nowhere/gloo/notes.txt")
        torch.distributed.barrier()


def test_it_is_the_last_failure_and_no_other_that_is_named():
    ends = processes.ends(processes.start("test_failures.one_after_the_other()", 2))
    (_, _, other), (_, _, failed) = ends
    assert "ProcessError: process 1 failed: FileNotFoundError: " in other
    assert "ProcessError" not in failed and "FileNotFoundError: " in failed


def test_one_process_raises_what_it_raised():
    with pytest.raises(KeyError, match="alone"), failures.shared():
        raise KeyError("alone")
    assert not failures.several() and torch.distributed.is_available()
