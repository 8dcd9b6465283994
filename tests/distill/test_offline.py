"""A teacher's logits in files: what was written is read, and wrong files are refused."""

import json

import pytest
import torch
from conftest import assert_trained_alike
from torch import nn
from torch.utils.data import TensorDataset

import kdkernels as kdk
from kdkernels import KDLoss
from kdkernels.distill import Distiller, open_predictions, predict, write_predictions

safetensors = pytest.importorskip("safetensors.torch", reason="the extra `train` is not installed")

N, L, H, V = 9, 4, 6, 300


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(H, V)


class Head(nn.Module):
    """The same logits as `linear`, as a source with everything that a head can have."""

    def __init__(self, layer, scale=0.5, softcap=3.0):
        super().__init__()
        self.layer, self.scale, self.softcap = layer, scale, softcap

    def forward(self, inputs):
        return kdk.LinearHead(inputs, self.layer.weight, self.layer.bias, self.scale, self.softcap)


class Capped(Head):
    def forward(self, inputs):
        return self.softcap * (self.layer(inputs) * self.scale / self.softcap).tanh()


@pytest.mark.parametrize("suffix", (".npy", ".safetensors"))
def test_logits_come_back(tmp_path, suffix):
    path, inputs = tmp_path / f"new/teacher{suffix}", draw(N, L, H)
    write_predictions(path, linear(), inputs, batch_size=4)
    found = open_predictions(path, count=N)
    assert torch.equal(found, predict(linear(), inputs, batch_size=4))
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    # A data set's labels are not the teacher's business.
    labelled = TensorDataset(inputs, torch.zeros(N, L, dtype=torch.int64))
    write_predictions(path, linear(), labelled, batch_size=4)
    assert torch.equal(open_predictions(path), found)


def test_logits_in_bfloat16(tmp_path):
    path, inputs = tmp_path / "t.safetensors", draw(N, H)
    write_predictions(path, linear(), inputs, dtype=torch.bfloat16)
    assert torch.equal(open_predictions(path), predict(linear(), inputs).bfloat16())


def test_the_logits_of_a_head(tmp_path):
    inputs, layer = draw(N, L, H), linear()
    write_predictions(tmp_path / "t.npy", Head(layer), inputs)
    found = open_predictions(tmp_path / "t.npy")
    torch.testing.assert_close(found, Capped(layer)(inputs).detach())


@pytest.mark.parametrize("suffix", (".npy", ".safetensors"))
def test_a_student_of_a_file_is_one_of_the_teacher(tmp_path, suffix):
    inputs, labels = draw(N, L, H), torch.arange(N * L).view(N, L)
    path = tmp_path / f"t{suffix}"
    write_predictions(path, linear(1), inputs)
    students = []
    for teacher in (open_predictions(path, N), linear(1)):
        student = linear(2)
        loss = KDLoss(alpha=0.7)
        Distiller(student, teacher, inputs, labels, loss=loss, batch_size=4).train(5)
        students.append(student.weight.detach())
    assert_trained_alike(*students, linear(2).weight.detach(), 1e-4)


def write(path, **tensors):
    safetensors.save_file(tensors, path)


IDS = torch.zeros(N, 3, dtype=torch.int32)
WRONG = {
    "text": (lambda path: path.write_text("logits"), "must be a .safetensors file"),
    "truncated": (
        lambda path: path.write_bytes(safetensors.save({"logits": draw(N, V)})[:-1]),
        "must be a .safetensors file",
    ),
    "empty": (lambda path: path.write_bytes(b""), "must be a .safetensors file"),
    "names": (lambda path: write(path, probs=draw(N, 3)), 'must have "logits", it has probs'),
    "the most probable": (
        lambda path: write(path, ids=IDS, logprobs=draw(N, 3)),
        'must have "logits", it has ids, logprobs',
    ),
    "integers": (
        lambda path: write(path, logits=IDS),
        r"logits in .* must be floating point .*, got torch.int32 of shape \(9, 3\)",
    ),
    "flat": (lambda path: write(path, logits=draw(N)), r"logits in .* of shape \(9,\)"),
    "count": (lambda path: write(path, logits=draw(8, V)), "must be of 9 inputs, got 8"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused(tmp_path, kind):
    make, message = WRONG[kind]
    make(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=message):
        open_predictions(tmp_path / "t.safetensors", count=N)


def test_a_wrong_array_is_refused(tmp_path):
    (tmp_path / "t.npy").write_text(json.dumps([1, 2]))
    with pytest.raises(ValueError, match="teacher predictions must be a .npy file"):
        open_predictions(tmp_path / "t.npy")
    with pytest.raises(FileNotFoundError):
        open_predictions(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "path must end in .npy or .safetensors, got t.pt", dict(path="t.pt")),
        (ValueError, "in .safetensors for bf", dict(path="t.npy", dtype=torch.bfloat16)),
        (TypeError, "dtype must be a float dtype, got torch.int8", dict(dtype=torch.int8)),
        (TypeError, "teacher must be a torch.nn.Module, got Tensor", dict(teacher=draw(N, V))),
        (ValueError, r"inputs must be .* shape \(0, 6\)", dict(inputs=draw(0, H))),
    ],
)
def test_bad_arguments(tmp_path, error, message, change, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        write_predictions(
            **{**dict(path="t.safetensors", teacher=linear(), inputs=draw(N, H)), **change}
        )
    assert not list(tmp_path.iterdir())


def test_predictions_of_other_shapes(tmp_path):
    class Ragged(nn.Module):
        def forward(self, inputs):
            return inputs[..., : 2 + len(inputs)]

    with pytest.raises(ValueError, match=r"predictions of shape \(6,\), got \(3,\) from row 8 on"):
        write_predictions(tmp_path / "t.npy", Ragged(), draw(N, H), batch_size=4)
