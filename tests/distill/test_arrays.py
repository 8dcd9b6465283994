import io
import os
import pickle

import numpy as np
import pytest
import torch

from kdkernels.distill.arrays import load_logits, save_logits

SHAPE = (4, 3)
LOGITS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def test_logits_come_back_with_their_bits(tmp_path):
    path = tmp_path / "new" / "teacher.npy"
    save_logits(path, LOGITS)
    assert torch.equal(load_logits(path, SHAPE), LOGITS)
    assert os.listdir(path.parent) == ["teacher.npy"]


@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4"])
def test_any_float_becomes_float32(tmp_path, dtype):
    np.save(tmp_path / "t.npy", LOGITS.numpy().astype(dtype))
    logits = load_logits(tmp_path / "t.npy", SHAPE)
    assert logits.dtype == torch.float32
    expected = LOGITS.half().float() if dtype == "<f2" else LOGITS
    assert torch.equal(logits, expected)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive():
    file = io.BytesIO()
    np.savez(file, LOGITS.numpy())
    return file.getvalue()


class Opened:
    """Unpickling it would raise something that nobody expects."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('a pickle was loaded')",))


WRONG = {
    "empty": (b"", "must be a .npy file"),
    "text": (b"not an array", "must be a .npy file"),
    "truncated": (npy(LOGITS.numpy())[:-5], "must be a .npy file"),
    "pickle": (pickle.dumps(Opened()), "must be a .npy file"),
    "objects": (npy(np.array([[Opened()] * 3] * 4)), "must be a .npy file"),
    "archive": (archive(), "must be a .npy file"),
    "trailing": (npy(LOGITS.numpy()) + b"x", "must be a .npy file, .* more after the array"),
    "half a header": (npy(LOGITS.numpy()).replace(b"}", b"("), "must be a .npy file"),
    "claims terabytes": (
        npy(LOGITS.numpy()).replace(b"(4, 3)", b"(4, 3000000000000)"),
        "must be a .npy file",
    ),
    "claims more than a size holds": (
        npy(LOGITS.numpy()).replace(b"(4, 3)", b"(4, 3" + b"0" * 30 + b")"),
        "must be a .npy file",
    ),
    "a number for a key": (
        npy(LOGITS.numpy()).replace(b"'descr'", b"1234567"),
        "must be a .npy file",
    ),
    "no dtype": (npy(LOGITS.numpy()).replace(b"<f4", b",f4"), "must be a .npy file"),
    "empty dtype": (npy(LOGITS.numpy()).replace(b"'<f4'", b"()   "), "must be a .npy file"),
    "deep": (b"\x93NUMPY\x01\x00\xa0\x0f" + b"-" * 3999 + b"1", "must be a .npy file"),
    "integers": (
        npy(np.zeros(SHAPE, int)),
        r"must be floating point .*, got int64 of shape \(4, 3\)",
    ),
    "transposed": (
        npy(np.zeros((3, 4))),
        r"must be .* of shape \(4, 3\), .* got float64 of shape \(3, 4\)",
    ),
    "nan": (npy(np.full(SHAPE, np.nan)), "must be finite in float32, got 12"),
    "too large": (npy(np.full(SHAPE, 1e300)), "must be finite in float32, got 12"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused(tmp_path, kind):
    contents, message = WRONG[kind]
    (tmp_path / "t.npy").write_bytes(contents)
    with pytest.raises(ValueError, match=f"teacher_logits {message}"):
        load_logits(tmp_path / "t.npy", SHAPE)
