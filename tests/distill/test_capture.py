"""A teacher into a cache: what is stored, by how many processes, and after what interruption."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import kdkernels as kdk
from kdkernels import cache
from kdkernels.distill import capture
from kdkernels.distill.capture import write_cache

pytest.importorskip("zstandard", reason="the extra `cache` is not installed")

N, L, H, V = 20, 6, 8, 50


class Model(nn.Module):
    """Token ids (B, L) -> logits (B, L, V), and what it was asked for."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(V, H), nn.Linear(H, V)
        self.shapes = []

    def hidden(self, ids):
        self.shapes.append(tuple(ids.shape))
        assert not self.training and not torch.is_grad_enabled()
        return self.embedding(ids).cumsum(-2)  # of what came before, too

    def forward(self, input_ids):
        return self.head(self.hidden(input_ids))


class Head(Model):
    def forward(self, input_ids):
        return kdk.LinearHead(
            self.hidden(input_ids), self.head.weight, self.head.bias, logit_scale=0.5, softcap=9.0
        )


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


def tokens(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def answers(model, ids):
    """-> logits (..., V)"""
    with torch.no_grad():
        return model.eval()(ids)


def files(folder):
    """{name: bytes} of all that is there."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_top(teacher, ids, logits, k):
    """A cache has the most probable classes of the logits (..., V), within its own bound."""
    found = teacher[ids]
    wanted = logits.double().log_softmax(-1).topk(k)
    classes, order = wanted.indices.sort(-1)
    assert torch.equal(found.ids.long(), classes)
    exact = wanted.values.gather(-1, order)
    bound = teacher.description["kind"]["bound"]["logprobs"]
    depth = exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)
    limit = (bound["of_depth"] * depth).clamp(min=bound["absolute"])
    assert ((found.logprobs - exact).abs() <= limit).all()


def test_what_is_read_is_what_the_teacher_says(tmp_path):
    ids, model = tokens(N, L), Model()
    done = []
    found = write_cache(
        tmp_path / "c", model.train(), ids, "topk:5", batch_size=3, on_progress=done.append
    )
    assert model.training and len(found) == N and found.tokens == N * L
    assert done == sorted(done) and done[-1] == N * L
    order = torch.randperm(N)
    check_top(found, ids[order], answers(model, ids)[order], 5)
    description = found.description
    assert description["teacher"] == cache.identity.of_teacher(model, "Model")
    assert (description["vocab_size"], description["tokenizer"], description["data"]) == (
        V,
        *[None] * 2,
    )
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "manifest.json",
        "shard-00000.kdc",
    }


@pytest.mark.parametrize("kind", ("hidden:fp32", "dense:fp32", "topk:50", "sampled:9"))
def test_every_kind_of_a_head(tmp_path, kind):
    ids, model = tokens(N, L), Head()
    found = write_cache(tmp_path, model, ids, kind, name="large", batch_size=4)
    assert found.description["teacher"]["name"] == "large"
    wanted = answers(model, ids)
    logits = 9 * ((wanted.hidden @ wanted.weight.T + wanted.bias) * 0.5 / 9).tanh()
    if kind == "hidden:fp32":
        assert torch.equal(found[ids].hidden, wanted.hidden)
        assert torch.equal(found[ids].weight, wanted.weight)
        assert (found[ids].logit_scale, found[ids].softcap) == (0.5, 9.0)
    elif kind == "dense:fp32":
        torch.testing.assert_close(found[ids], logits)
    elif kind == "topk:50":
        check_top(found, ids, logits, 50)
    else:
        assert (found[ids].counts.sum(-1) == 9).all()


def test_draws_are_the_teachers_and_depend_on_the_seed_and_the_sample_alone(tmp_path):
    ids, model = tokens(N, L), Model()
    ids[:, 0] = 3  # after which the teacher says the same
    first = write_cache(tmp_path / "a", model, ids, "sampled:400")
    other = write_cache(tmp_path / "b", model, ids, "sampled:400", seed=1)
    shuffled = write_cache(tmp_path / "c", model, ids.flip(0), "sampled:400", shard_tokens=30)
    drawn = first[ids]
    frequency = torch.zeros(N, L, V + 1).scatter(
        -1, drawn.ids.long() % (V + 1), drawn.counts.float()
    )
    p = answers(model, ids).softmax(-1)
    # The sum over 50 classes of (O − E)² / E: a mean of 49, a standard deviation of 10.
    chi = ((frequency[..., :V] - 400 * p) ** 2 / (400 * p)).sum(-1).mean()
    assert abs(chi - 49) < 5
    assert torch.equal(shuffled[ids].ids, drawn.ids)
    assert not torch.equal(other[ids].counts[0, 0], drawn.counts[0, 0])
    firsts = {tuple(drawn.counts[k, 0].tolist()) for k in range(N)}
    assert len(firsts) == N


def test_padded_classes_are_left_out(tmp_path):
    ids, model = tokens(N, L) % 40, Model()
    with torch.no_grad():
        model.head.bias[40:] = 99.0  # would be the most probable
    found = write_cache(tmp_path, model, ids, "topk:40", vocab_size=40)
    assert found.description["vocab_size"] == 40
    check_top(found, ids, answers(model, ids)[..., :40], 40)


def test_a_stored_head_has_no_padded_classes(tmp_path):
    ids, model = tokens(N, L) % 40, Head()
    found = write_cache(tmp_path, model, ids, "hidden:fp32", vocab_size=40)[ids]
    assert torch.equal(found.weight, model.head.weight[:40])
    assert torch.equal(found.bias, model.head.bias[:40])
    kdk.kd_loss(torch.randn(N, L, 40), found)


@pytest.mark.parametrize("kind", ("dicts", "pairs", "ids"))
def test_data_sets(tmp_path, kind):
    ids, model = tokens(N, L), Model()
    data = {
        "dicts": Rows([{"input_ids": x, "labels": x} for x in ids]),
        "pairs": TensorDataset(ids, ids),
        "ids": Rows(ids.int().numpy()),
    }
    found = write_cache(tmp_path, model, data[kind], "dense:fp32")
    wanted = answers(model, ids)
    assert (found[ids] - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_padding_is_not_given_to_the_teacher(tmp_path):
    """What is stored for a sample is the same whether it came padded, packed or alone."""
    ids, model = tokens(3, 9), Model()
    mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 2, 3, 3, 3]])
    rows = [{"input_ids": x, "attention_mask": m} for x, m in zip(ids, mask, strict=True)]
    found = write_cache(tmp_path, model, Rows(rows), "dense:fp32", batch_size=2)
    assert model.shapes[1:] == [(1, 9), (1, 6), (2, 3), (1, 3)]  # the first is a trial
    for sample in (ids[0], ids[1, 2:8], ids[2, :3], ids[2, 3:6], ids[2, 6:]):
        torch.testing.assert_close(found[sample], answers(model, sample[None])[0])
    assert len(found) == 5
    assert found.read(ids, mask).shape == (3, 9, V)


def test_a_sample_that_comes_twice_is_asked_for_once(tmp_path):
    ids, model = tokens(N, L), Model()
    twice = torch.cat([ids, ids[:7], ids[3:]])
    found = write_cache(tmp_path / "twice", model, twice, batch_size=4, kind="topk:5")
    assert len(found) == N and sum(rows for rows, _ in model.shapes) == N + 1
    write_cache(tmp_path / "once", Model(), ids, batch_size=4, kind="topk:5")
    assert files(tmp_path / "twice") == files(tmp_path / "once")


def test_images_are_found_by_their_pixels(tmp_path):
    images = torch.randn(N, 3, 2, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5))
    found = write_cache(tmp_path, model, images, "dense:fp32", shard_tokens=8)
    assert len(found) == N and len(list(tmp_path.glob("*.kdc"))) == 3
    order = torch.randperm(N)
    torch.testing.assert_close(found[images[order]], answers(model, images)[order])


def test_batches_begin_with_their_shard(tmp_path):
    ids, model = tokens(N, L), Model()
    write_cache(tmp_path, model, ids, "topk:5", batch_size=4, shard_tokens=6 * L)
    assert [rows for rows, _ in model.shapes[1:]] == [4, 2, 4, 2, 4, 2, 2]


OPTIONS = dict(kind="topk:5", batch_size=4, shard_tokens=3 * L)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("asked", (1, 2, 5, 7))
def test_after_an_interruption_the_files_are_the_same(tmp_path, asked):
    class Interrupted(Model):
        def forward(self, input_ids):
            if len(self.shapes) == asked:
                raise Stopped
            return super().forward(input_ids)

    ids = tokens(N, L)
    whole = write_cache(tmp_path / "whole", Model(), ids, name="t", **OPTIONS)
    with pytest.raises(Stopped):
        write_cache(tmp_path / "cut", Interrupted(), ids, name="t", **OPTIONS)
    with pytest.raises(cache.CacheError, match="interrupted"):
        cache.open(tmp_path / "cut")
    again = Model()
    found = write_cache(tmp_path / "cut", again, ids, name="t", **OPTIONS)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    assert found.checksum == whole.checksum
    # Nothing complete is done again: of 7 shards, each of a batch, and a trial.
    assert len(again.shapes) == 1 + 7 - max(0, asked - 1)


def test_a_damaged_or_missing_shard_is_written_again(tmp_path):
    ids = tokens(N, L)
    write_cache(tmp_path, Model(), ids, **OPTIONS)
    before = files(tmp_path)
    (tmp_path / "shard-00002.kdc").unlink()
    path = tmp_path / "shard-00004.kdc"
    path.write_bytes(path.read_bytes()[:-1])
    model = Model()
    write_cache(tmp_path, model, ids, **OPTIONS)
    assert files(tmp_path) == before and len(model.shapes) == 3


def test_a_shard_that_becomes_another_is_published(tmp_path):
    """As on another machine, whose sums round otherwise."""

    class Elsewhere(Model):
        def forward(self, input_ids):
            return super().forward(input_ids) * 1.1

    ids = tokens(N, L)
    write_cache(tmp_path, Model(), ids, name="t", **OPTIONS)
    (tmp_path / "shard-00002.kdc").unlink()
    found = write_cache(tmp_path, Elsewhere(), ids, name="t", **OPTIONS)
    assert found.has(ids).all() and cache.verify(tmp_path) == []
    (tmp_path / "shard-00000.kdc").unlink()
    assert len(write_cache(tmp_path, Elsewhere(), ids[:3], name="t", **OPTIONS)) == N
    assert "shard-00000.lock" not in files(tmp_path)


def test_another_build_in_the_same_directory_is_refused(tmp_path):
    ids = tokens(N, L)
    write_cache(tmp_path, Model(), ids, data={"length": L}, **OPTIONS)
    before = files(tmp_path)

    def refused(message, inputs=ids, model=0, **changes):
        given = {"data": {"length": L}, **OPTIONS, **changes}
        with pytest.raises(cache.CacheMismatchError, match=message):
            write_cache(tmp_path, Model(model), inputs, **given)
        assert {k: x for k, x in files(tmp_path).items() if "lock" not in k} == before

    refused(r"teacher\.weights is .*, wanted", model=1)
    refused("kind.k is 5, wanted 6", kind="topk:6")
    refused("data.length is 6, wanted 7", data={"length": 7})
    refused("seed is 0, wanted 1", seed=1)
    refused("must have samples 0 to 3 of the inputs, it has others", tokens(N, L, seed=9))
    refused("must have samples 0 to 4 .*, or another shard_tokens", shard_tokens=4 * L)


def test_more_inputs_are_added(tmp_path):
    """Where a shard ends with the inputs, nothing that is there changes."""
    ids = tokens(N, L)
    few, model = write_cache(tmp_path, Model(), ids[:6], **OPTIONS), Model()
    assert len(few) == 6
    all_of_them = write_cache(tmp_path, model, ids, **OPTIONS)
    assert len(all_of_them) == N and len(model.shapes) == 1 + 5
    assert all_of_them.has(ids).all()
    assert len(write_cache(tmp_path, model, ids[:6], **OPTIONS)) == N


PROGRAM = """
import os, sys, time
sys.path[:0] = {path!r}
import test_capture
from kdkernels.distill.capture import write_cache

class Slow(test_capture.Model):
    def forward(self, input_ids):
        with open(sys.argv[2], "a") as log:
            log.write(f"{{os.getpid()}}\\n")
        if self.shapes:  # not in the trial
            time.sleep(float(sys.argv[3]))
        return super().forward(input_ids)

write_cache(sys.argv[1], Slow(), test_capture.tokens(20, 6), name="t", **test_capture.OPTIONS)
"""


def started(folder, log, seconds, **environment):
    program = PROGRAM.format(path=[os.getcwd(), os.path.dirname(__file__)])
    command = [sys.executable, "-c", program, str(folder), str(log), str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_processes_share_the_work(tmp_path):
    """Each shard is written once, and all return with the whole cache."""
    write_cache(tmp_path / "one", Model(), tokens(20, 6), name="t", **OPTIONS)
    log = tmp_path / "log"
    given = dict(folder=tmp_path / "two", log=log, seconds=0.3)
    runs = [started(**given, RANK=str(k), WORLD_SIZE="2") for k in range(2)]
    for run in runs:
        assert run.wait(60) == 0, run.stderr.read()
        run.stderr.close()
    assert files(tmp_path / "two") == files(tmp_path / "one")
    asked = log.read_text().split()
    assert len(asked) == 2 + 7 and len(set(asked)) == 2  # a trial each


def test_a_process_begins_with_shards_of_its_own(tmp_path, monkeypatch):
    numbers, shard = [], cache.build.Build.shard

    def spy(build, number):
        numbers.append(number)
        return shard(build, number)

    monkeypatch.setattr(cache.build.Build, "shard", spy)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    write_cache(tmp_path, Model(), tokens(N, L), **OPTIONS)
    assert numbers == [1, 4, 0, 2, 3, 5, 6]


def test_what_a_killed_process_had_is_taken_over(tmp_path):
    write_cache(tmp_path / "one", Model(), tokens(20, 6), name="t", **OPTIONS)
    log, folder = tmp_path / "log", tmp_path / "two"
    with started(folder, log, 1000.0) as slow:
        while not (log.exists() and log.read_text().count("\n") == 2):  # at its first shard
            assert slow.poll() is None, slow.stderr.read()
            time.sleep(0.02)
        with started(folder, tmp_path / "other", 0.0) as other:
            deadline = time.monotonic() + 60
            while len(list(folder.glob("*.kdc"))) < 6:  # all but the one that is being written
                assert other.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            assert not (folder / "manifest.json").exists() and slow.poll() is None
            slow.send_signal(signal.SIGKILL)
            assert other.wait(60) == 0, other.stderr.read()
    assert files(folder) == files(tmp_path / "one")


def masked(mask):
    return Rows([{"input_ids": tokens(L), "attention_mask": mask}])


def ones(*shape):
    return torch.ones(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "teacher must be a torch.nn.Module, got function", dict(teacher=lambda x: x)),
        (ValueError, "kind must be topk:K", dict(kind="top:5")),
        (ValueError, "kind must be topk:K", dict(kind="topk:51")),
        (TypeError, "kind must be text, got int", dict(kind=5)),
        (ValueError, "head must be a LinearHead for kind 'hidden:bf16'", dict(kind="hidden:bf16")),
        (ValueError, "batch_size must be at least 1, got 0", dict(batch_size=0)),
        (ValueError, "shard_tokens must be at least 1, got 0", dict(shard_tokens=0)),
        (TypeError, "seed must be an int, got float", dict(seed=0.5)),
        (ValueError, "tail must be one of", dict(tail="none")),
        (ValueError, r"inputs must be .* shape \(0, 6\)", dict(inputs=tokens(0, L))),
        (TypeError, r"token ids, \(L,\) .* shape \(2, 6\)", dict(inputs=tokens(N, 2, L))),
        (
            ValueError,
            r"by their input_ids alone, .* \['pixel_values'\]",
            dict(inputs=Rows([{"input_ids": tokens(L), "pixel_values": 0}])),
        ),
        (
            ValueError,
            "must have a token that counts",
            dict(inputs=masked(torch.zeros(L, dtype=torch.int64))),
        ),
        (
            ValueError,
            r"of the shape \(6,\) of .*int64 of shape \(5,\)",
            dict(inputs=masked(ones(5))),
        ),
        (ValueError, r"int64 of shape \(1, 6\)", dict(inputs=masked(ones(1, L)))),
        (ValueError, "attention_mask must be .* torch.bool", dict(inputs=masked(ones(L).bool()))),
        (ValueError, "at most the teacher's 50 classes, got 51", dict(vocab_size=51)),
    ],
)
def test_bad_arguments(tmp_path, error, message, change):
    given = dict(path=tmp_path / "c", teacher=Model(), inputs=tokens(N, L), kind="topk:5")
    with pytest.raises(error, match=message):
        write_cache(**{**given, **change})
    assert not list(tmp_path.glob("c/*.kdc"))


def test_a_teacher_that_fails_leaves_no_manifest(tmp_path):
    model = Model()
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        write_cache(tmp_path, model, tokens(N, L), "topk:5")
    assert not (tmp_path / "manifest.json").exists() and not list(tmp_path.glob("*.kdc*"))


def test_runs_of_a_mask():
    def runs(*mask):
        return capture._runs(torch.arange(len(mask)), torch.tensor(mask))

    assert runs(0, 1, 1, 0, 2, 3, 3, 0) == [(1, 3), (4, 5), (5, 7)]
    assert runs(1, 1) == [(0, 2)] and runs(0, 0) == []
    assert capture._runs(np.arange(3), None) == [(0, 3)]
