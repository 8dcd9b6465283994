"""Jobs in two processes: the student and the cache of one, whatever is sharded."""

import types

import processes
import pytest
import torch
from conftest import assert_trained_alike

pytest.importorskip("transformers", reason="the extra `train` is not installed")
pytest.importorskip("accelerate", reason="the extra `train` is not installed")
pytest.importorskip("yaml", reason="the extra `train` is not installed")
pytest.importorskip("zstandard", reason="the extra `cache` is not installed")

from test_job import made, options, refused, weights  # noqa: E402, F401

from kdkernels import cli  # noqa: E402
from kdkernels.distill.jobs import job  # noqa: E402

FLAGS = "--length 16 --steps 6 --batch-size 4 --learning-rate 1e-2 --record-every 3".split()
FLAGS += ["--checkpoint-every", "4", "--no-tensorboard"]


def distil(root, out, *more):
    places = [x for name in ("student", "teacher", "data") for x in (f"--{name}", f"{root}/{name}")]
    return cli.main(["distill", *places, *FLAGS, "--out", str(out), *more])


def build(root, out, *more):
    flags = ["--teacher", f"{root}/teacher", "--data", f"{root}/data", "--out", str(out), *more]
    flags += ["--length", "16", "--shard-tokens", "64", "--kind", "topk:4"]
    return cli.main(["cache", "build", *flags])


def in_two(root, out):
    written = ["--write-teacher-predictions", "--teacher-predictions", f"{out}/logits.npy"]
    assert distil(root, f"{out}/written", *written) == 0
    assert distil(root, f"{out}/teacher", "--shard-teacher") == 0
    job._accelerator = lambda options, student: processes.accelerator("fsdp", job._fsdp(student))
    assert distil(root, f"{out}/one", "--shard-student") == 0  # it goes on
    assert distil(root, f"{out}/student", "--shard-student", "--shard-teacher") == 0
    assert build(root, f"{out}/cache", "--shard-teacher") == 0


def test_two_processes_leave_what_one_leaves(made, tmp_path, capsys):  # noqa: F811
    assert distil(made, tmp_path / "one") == 0 and build(made, tmp_path / "one cache") == 0
    student = tmp_path / "one" / "student"
    end, before = weights(student), weights(made / "student")
    (student / "model.safetensors").unlink()
    last = tmp_path / "one" / "checkpoints" / "step-00000006"
    last.rename(tmp_path / "unread")
    processes.run(f"test_job_processes.in_two({str(made)!r}, {str(tmp_path)!r})", 2)
    for name in ("one", "teacher", "student", "written"):
        assert_trained_alike(weights(tmp_path / name / "student"), end, before, 1e-4)
        assert (tmp_path / name / "report.html").exists()
    assert {each.name: each.read_bytes() for each in (tmp_path / "cache").iterdir()} == {
        each.name: each.read_bytes() for each in (tmp_path / "one cache").iterdir()
    }


def test_teachers_have_the_devices_that_are_named(made, tmp_path):  # noqa: F811
    found = []
    teacher = types.SimpleNamespace(to=lambda device: found.append(str(device)))
    of_job = types.SimpleNamespace(options=options(made, tmp_path, teacher_device="cuda:2,cuda:3"))
    for place in range(3):
        of_job.accelerator = types.SimpleNamespace(
            device=torch.device("cuda", place), local_process_index=place
        )
        job.Job._place(of_job, teacher)
    assert found == ["cuda:2", "cuda:3", "cuda:2"]
    of_job.options = options(made, tmp_path, teacher_device="cpu")
    with pytest.raises(ValueError, match="teacher_device must be of the student's kind, cuda"):
        job.Job._place(of_job, teacher)


def test_what_does_not_go_together(made, tmp_path):  # noqa: F811
    refused(made, tmp_path, "teacher_device must be a device: .*nothing", teacher_device="nothing")
    refused(made, tmp_path, "shard_teacher goes with several processes", shard_teacher=True)
    refused(made, tmp_path, "shard_student goes with several processes", shard_student=True)
    both = dict(teacher_device="cuda", shard_teacher=True)
    with pytest.raises(ValueError, match="teacher_device and shard_teacher must not both be given"):
        options(made, tmp_path, **both)
    writing = dict(write_teacher_predictions=True, teacher_predictions=tmp_path / "p.npy")
    refused(made, tmp_path, "not be given with shard_teacher", shard_teacher=True, **writing)
