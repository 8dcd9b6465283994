"""A checkpoint comes back with its bits, or is refused by name: nothing in between."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from kdkernels.distill.checkpoints import CheckpointError, Checkpoints, load

pytest.importorskip("safetensors", reason="the extra `train` is not installed")

WEIGHT = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
STATE = {
    "model": {"weight": WEIGHT, "tied": WEIGHT, "column": WEIGHT[:, 2], "half": WEIGHT.bfloat16()},
    "optimizer": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}, 1: {}},
    "numbers": [1, 2.5, 1e-300, float("inf"), True, None, "text", 2**70],
    "generator": torch.get_rng_state(),
    "tensor": {"dict": [], "tuple": ()},
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_with_its_bits(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.load() is None
    assert checkpoints.save(7, STATE).name == "step-00000007"
    step, state = checkpoints.load()
    assert step == 7 and same(state, STATE)


def test_the_newest_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 123456789):
        checkpoints.save(step, {"step": step})
    assert [path.name for path in checkpoints.paths()] == ["step-123456789", "step-00000010"]
    assert checkpoints.load() == (123456789, {"step": 123456789})


def test_a_step_may_be_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": 1})
    checkpoints.save(1, {"a": 2})
    assert checkpoints.load() == (1, {"a": 2})


def test_a_number_of_numpy_is_a_number(tmp_path):
    """Of a learning rate from `numpy.logspace`."""
    Checkpoints(tmp_path).save(1, {"lr": np.float64(0.1)})
    assert same(Checkpoints(tmp_path).load()[1], {"lr": 0.1})


@pytest.mark.parametrize("value", [{1.5: 0}, {(): 0}, {"a": {1, 2}}, {"a": object()}])
def test_what_a_state_cannot_hold(tmp_path, value):
    with pytest.raises(TypeError, match="a state"):
        Checkpoints(tmp_path).save(1, value)
    assert os.listdir(tmp_path) == []


def flipped(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_any_damage_is_refused_by_name(tmp_path, name):
    """Every tenth bit flipped, every tenth length: nothing that comes back differs."""
    good = Checkpoints(tmp_path / "good").save(3, STATE)
    path = tmp_path / good.name
    content = (good / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(8 * len(content), (150,), generator=generator).tolist()
    refused = 0
    shutil.copytree(good, path)
    for place in places:
        (path / name).write_bytes(content)
        flipped(path / name, place // 8, place % 8)
        try:
            assert same(load(path)[1], STATE)  # a blank for another, at most
        except CheckpointError as error:
            assert str(path) in str(error) and name in str(error) or "format" in str(error)
            refused += 1
    assert refused > 0.9 * len(places)
    for length in torch.randint(len(content), (50,), generator=generator).tolist():
        (path / name).write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=name):
            load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load(path)


def test_the_last_good_one_is_used(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step})
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="step-0000000[23].*; going on from step-00000001") as seen:
        assert checkpoints.load() == (1, {"step": 1})
    assert len(seen) == 2
    (tmp_path / "step-00000001" / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match="step-00000003.*step-00000002.*step-00000001"):
        checkpoints.load()


def test_another_format_or_step(tmp_path):
    path = Checkpoints(tmp_path).save(1, {})
    with pytest.raises(CheckpointError, match="it is that of step 1"):
        load(path.rename(tmp_path / "step-00000002"))
    with pytest.raises(CheckpointError, match="manifest.json is no manifest"):
        (tmp_path / "step-00000002" / "manifest.json").write_text("[" * 10**5)
        load(tmp_path / "step-00000002")


def test_killed_at_any_moment(tmp_path):
    """A process that saves without end is killed; what is left is whole, its leavings are swept."""
    program = textwrap.dedent(
        f"""
        import torch
        from kdkernels.distill.checkpoints import Checkpoints
        checkpoints = Checkpoints({str(tmp_path)!r})
        found = checkpoints.load()
        step = found[0] if found else 0
        while True:
            step += 1
            checkpoints.save(step, {{"weight": torch.full((50_000,), step)}})
            print(step, flush=True)
        """
    )
    last = 0
    for k in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        ) as process:
            for _ in range(3 + k):
                last = int(process.stdout.readline())
            process.kill()
        step, state = Checkpoints(tmp_path).load()
        assert step >= last and torch.equal(state["weight"], torch.full((50_000,), step))
    Checkpoints(tmp_path).save(10**6, {})
    assert all(name.startswith("step-") for name in os.listdir(tmp_path))
    manifest = json.loads((tmp_path / "step-01000000" / "manifest.json").read_text())
    assert manifest["step"] == 10**6


def test_what_was_just_saved_stays(tmp_path):
    """Where a run goes on from before checkpoints that are there, those lead nowhere."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (3, 8, 9):
        checkpoints.save(step, {"run": "left"})
    checkpoints.save(4, {"run": "this"})
    assert checkpoints.load() == (4, {"run": "this"})
    assert [path.name for path in checkpoints.paths()] == ["step-00000004"]


def test_a_damaged_one_does_not_count(tmp_path):
    """A newer one that is damaged does not take the place of one that is whole."""
    Checkpoints(tmp_path, keep=2).save(1, {"step": 1})
    (Checkpoints(tmp_path, keep=2).save(9, {}) / "state.json").unlink()
    Checkpoints(tmp_path, keep=1).save(5, {"step": 5})
    assert Checkpoints(tmp_path).load() == (5, {"step": 5})
