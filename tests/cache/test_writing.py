"""What is written: how large, how exact, once, and again after an interruption."""

import hashlib
import os

import pytest
import torch
from cache_samples import (
    CLASSES,
    KINDS,
    WIDTH,
    generator,
    head_of,
    prediction,
    token_ids,
    write,
)
from filelock import FileLock

from kdkernels import LinearHead, Sampled, TopK, cache
from kdkernels.cache import identity, kinds

pytest.importorskip("zstandard")

QWEN = 151_936


def files_of(path):
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in path.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_within_the_bound_that_is_declared(tmp_path, kind):
    samples = token_ids()
    given = write(tmp_path, kind, samples)
    teacher = cache.open(tmp_path)
    bound = teacher.description["kind"]["bound"]
    for ids, each in zip(samples, given, strict=True):
        found = teacher[ids]
        if kind.startswith("topk"):
            exact = each.double().log_softmax(-1).gather(-1, found.ids.long())
            limit = bound["logprobs"]["of_depth"] * (exact.amax(-1) - exact.amin(-1))
            limit = limit.clamp(min=bound["logprobs"]["absolute"])[:, None]
            assert ((found.logprobs - exact).abs() <= limit).all()
        elif kind.startswith("sampled"):
            assert (found.counts.sum(-1) == 20).all() and bound == {"counts": {"absolute": 0}}
        else:
            name = kind.split(":")[0].replace("dense", "logits")
            found = found if name == "logits" else found.hidden
            limit = bound[name]["relative"] * each.abs() + bound[name].get("absolute", 0)
            limit += bound[name].get("of_largest_in_row", 0) * each.abs().amax(-1, keepdim=True)
            assert ((found.float() - each).abs() <= limit).all()


def test_kept_classes_and_the_tail_sum_to_1(tmp_path):
    """And the mass of the tail, which is stored, is that of the teacher, not of what is rounded."""
    ids = torch.arange(64)
    logits = 6 * torch.randn(64, CLASSES, generator=generator())
    with cache.Writer(tmp_path, "topk:9", vocab_size=CLASSES, teacher="numbers") as writer:
        writer.add(ids, logits)
    found = cache.open(tmp_path)[ids]
    kept = logits.double().softmax(-1).gather(-1, found.ids.long()).sum(-1)
    stored = found.logprobs.double().exp().sum(-1)
    assert ((stored - kept).abs() <= 1e-6).all()


@pytest.mark.parametrize("scale", [1, 4, 20])
@pytest.mark.parametrize("length", [64, 512])
def test_64_classes_of_152_thousand_take_at_most_200_bytes(tmp_path, scale, length):
    """Ids at random, which is the worst: 101 of them by counting."""
    top = _top(512, 64, scale)
    with cache.Writer(tmp_path, "topk:64", vocab_size=QWEN, teacher="numbers") as writer:
        for k in range(0, 512, length):
            ids = torch.randint(QWEN, (length,), generator=generator(k))
            writer.add(ids, TopK(*(x[k : k + length] for x in top)))
    teacher = cache.open(tmp_path)
    assert teacher.tokens == 512
    assert sum(x.stat().st_size for x in tmp_path.iterdir()) <= 200 * 512


def test_50_draws_of_152_thousand_classes_take_at_most_40_bytes(tmp_path):
    """Of a teacher as certain as language models are: 12 different classes of 50."""
    ids, logprobs = _top(512, 2000, 1)
    logits = torch.full((512, QWEN), -float("inf"))
    rank = torch.arange(1, 2001).log()
    logits.scatter_(1, ids, -1.8 * rank.expand(512, -1))
    draws = kinds.SampledKind(QWEN, 50).draw(logits, 0)
    with cache.Writer(tmp_path, "sampled:50", vocab_size=QWEN, teacher="numbers") as writer:
        for k in range(0, 512, 64):
            tokens = torch.randint(QWEN, (64,), generator=generator(k))
            writer.add(tokens, Sampled(draws.ids[k : k + 64], draws.counts[k : k + 64]))
    different = (cache.open(tmp_path).read(tokens).ids >= 0).sum(-1).float().mean()
    assert 11 < different < 14
    assert sum(x.stat().st_size for x in tmp_path.iterdir()) <= 40 * 512


def _top(rows, k, scale):
    """ids (rows, k) of Qwen's vocabulary, all different in a row, and log-probabilities."""
    ids = torch.rand(rows, QWEN, generator=generator()).topk(k).indices
    logits = torch.randn(rows, QWEN, generator=generator(1)) * scale
    return ids, logits.log_softmax(-1).topk(k).values


def test_vocabularies_up_to_2_to_the_32(tmp_path):
    size = 2**32
    ids = torch.tensor([[size - 1, 0, 2**31], [5, -1, 4], [size - 1, -1, -1]])
    logprobs = torch.tensor([[0.5, 0.25, 0.2], [0.6, 1, 0.3], [1, 1, 1]]).log()
    counts = torch.tensor([[30, 1, 19], [49, 0, 1], [50, 7, 7]])
    tokens = torch.tensor([size - 1, 0, 2**31])
    for kind, given in (("topk:3", TopK(ids, logprobs)), ("sampled:50", Sampled(ids, counts))):
        path = tmp_path / kind[:4]
        with cache.Writer(path, kind, vocab_size=size, teacher="numbers") as writer:
            writer.add(tokens, given)
        found = cache.open(path)[tokens]
        assert found.ids.dtype == torch.int64
        assert found.ids.tolist() == [[0, 2**31, size - 1], [4, 5, -1], [size - 1, -1, -1]]
    assert found.counts.tolist() == [[1, 19, 30], [1, 49, 0], [50, 0, 0]]


def test_draws_are_the_teacher_s_on_average():
    """E[counts / N] = p; each class within 5 standard deviations of its binomial."""
    logits = torch.randn(1, 40, generator=generator()) * 2
    rows, draws = 400, 50
    found = kinds.SampledKind(40, draws).draw(logits.expand(rows, -1), 0)
    counts = torch.bincount(found.ids.flatten(), minlength=40).double()
    p, n = logits[0].double().softmax(-1), rows * draws
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()
    again = kinds.SampledKind(40, draws).draw(logits.expand(rows, -1), 0)
    other = kinds.SampledKind(40, draws).draw(logits.expand(rows, -1), 1)
    assert torch.equal(found.ids, again.ids) and not torch.equal(found.ids, other.ids)


def test_what_is_drawn_for_a_sample_depends_on_it_and_the_seed_alone(tmp_path):
    samples, logits = token_ids(), torch.zeros(60, CLASSES)
    found = []
    for k, (order, seed) in enumerate((([0, 1, 3], 0), ([3, 1], 0), ([0, 1, 3], 1))):
        options = {"vocab_size": CLASSES, "teacher": "numbers", "seed": seed}
        with cache.Writer(tmp_path / str(k), "sampled:20", **options) as writer:
            for which in order:
                writer.add(samples[which], logits[: len(samples[which])])
        found.append([cache.open(tmp_path / str(k))[samples[which]].ids for which in (1, 3)])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1])


def test_classes_without_probability_are_not_drawn():
    logits = torch.full((200, 10), -float("inf"))
    logits[:, [3, 7]] = 0.0
    found = kinds.SampledKind(10, 50).draw(logits, 0)
    assert set(found.ids.unique().tolist()) == {3, 7}


@pytest.mark.parametrize("kind", ["topk:7", "hidden:bf16"])
def test_an_interrupted_writer_is_fed_again_and_nothing_is_computed_twice(tmp_path, kind):
    samples = token_ids()
    options = {"vocab_size": CLASSES, "teacher": "numbers", "shard_tokens": 15}
    options["head"] = head_of(kind)
    write(tmp_path / "whole", kind, samples, **options)
    with pytest.raises(RuntimeError), cache.Writer(tmp_path / "again", kind, **options) as writer:
        for k, ids in enumerate(samples[:4]):
            if k == 3:
                raise RuntimeError
            writer.add(ids, prediction(kind, len(ids), k))
    with pytest.raises(cache.CacheError, match="no manifest.json.*goes on where it was"):
        cache.open(tmp_path / "again")
    computed = []

    def asked(k, ids):
        computed.append(k)
        return prediction(kind, len(ids), k)

    with cache.Writer(tmp_path / "again", kind, **options) as writer:
        for k, ids in enumerate(samples):
            writer.add(ids, lambda k=k, ids=ids: asked(k, ids))
    assert computed == [2, 3, 4]  # the first two were a shard
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")
    assert len(cache.open(tmp_path / "again").shards) == 2


def test_a_damaged_shard_is_written_again(tmp_path):
    samples = token_ids()
    write(tmp_path, "topk:7", samples, shard_tokens=15)
    before = files_of(tmp_path)
    for name in ("shard-00000.kdc", "shard-00001.kdc"):
        with open(tmp_path / name, "r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"?")
        write(tmp_path, "topk:7", samples, shard_tokens=15)
        assert files_of(tmp_path) == before


def test_a_sample_is_stored_once(tmp_path):
    samples = token_ids()
    given = write(tmp_path / "once", "topk:7", samples, shard_tokens=15)
    options = {"vocab_size": CLASSES, "teacher": "numbers", "shard_tokens": 15}
    with cache.Writer(tmp_path / "twice", "topk:7", **options) as writer:
        for k in (0, 0, 1, 2, 1, 0, 3, 4, 4):
            writer.add(samples[k], given[k])
        for k in (0, 4):  # of a shard that is complete, and of the last
            with pytest.raises(ValueError, match="came before, with another prediction"):
                writer.add(samples[k], given[k] + torch.arange(CLASSES))
    assert files_of(tmp_path / "twice") == files_of(tmp_path / "once")
    assert len(cache.open(tmp_path / "twice")) == len(samples)


def test_a_shard_that_another_process_writes_is_left_to_it(tmp_path):
    samples = token_ids()
    with FileLock(tmp_path / "shard-00000.lock"):
        with pytest.raises(cache.CacheError, match="is being written by another process"):
            write(tmp_path, "topk:7", samples)
    write(tmp_path, "topk:7", samples)
    assert sorted(files_of(tmp_path)) == ["manifest.json", "shard-00000.kdc"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher": "another"}, "teacher.name is 'numbers', wanted 'another'"),
        ({"kind": "topk:8"}, "kind.k is 7, wanted 8"),
        ({"vocab_size": CLASSES + 1}, "vocab_size is 1000, wanted 1001"),
        ({"seed": 1}, "seed is 0, wanted 1"),
        ({"data": {"length": 8}}, "data is None, wanted"),
    ],
)
def test_another_cache_is_not_written_into_one(tmp_path, options, message):
    write(tmp_path, "topk:7", shard_tokens=15)
    kind = options.pop("kind", "topk:7")
    for unfinished in (False, True):
        if unfinished:
            (tmp_path / "manifest.json").unlink()
        before = files_of(tmp_path)
        with pytest.raises(cache.CacheMismatchError, match=message):
            write(tmp_path, kind, **options)
        assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "kind, options, error, message",
    [
        ("topk", {}, ValueError, r"kind must be topk:K .* got 'topk'"),
        ("topk:0", {}, ValueError, "got 'topk:0'"),
        ("topk:1001", {}, ValueError, r"K in \[1, 1000\]"),
        ("topk:07", {}, ValueError, "got 'topk:07'"),
        ("sampled:-1", {}, ValueError, "got 'sampled:-1'"),
        ("dense:int8", {}, ValueError, "got 'dense:int8'"),
        (64, {}, TypeError, "kind must be text, got int"),
        ("hidden:bf16", {}, ValueError, "head must be a LinearHead for kind 'hidden:bf16'"),
        ("topk:7", {"head": head_of("hidden")}, ValueError, "head must be None for kind 'topk:7'"),
        ("topk:7", {"vocab_size": 0}, ValueError, "vocab_size must be in"),
        ("topk:7", {"vocab_size": 2**32 + 1}, ValueError, "vocab_size must be in"),
        ("topk:7", {"vocab_size": 10.0}, TypeError, "vocab_size must be an int"),
        ("topk:7", {"tail": "ghost"}, ValueError, "tail must be one of bucket, renormalize"),
    ],
)
def test_what_is_no_cache_is_an_error_before_anything_is_written(
    tmp_path, kind, options, error, message
):
    options = {"vocab_size": CLASSES, "teacher": "numbers", **options}
    with pytest.raises(error, match=message):
        cache.Writer(tmp_path / "c", kind, **options)
    assert not (tmp_path / "c").exists()


NAN, INF = float("nan"), float("inf")


def top(ids, logprobs):
    return TopK(torch.tensor([ids]), torch.tensor([logprobs]))


@pytest.mark.parametrize(
    "kind, given, error, message",
    [
        ("topk:2", top([1, 1], [-1.0, -2.0]), ValueError, "different in a row, got 1 twice"),
        ("topk:2", top([1, 2, 3], [-3.0] * 3), ValueError, "at most 2 of a row, got 3"),
        ("topk:2", top([1, 1000], [-1.0, -2.0]), IndexError, r"in \[-1, 1000\), got 1 to 1000"),
        ("topk:2", top([1, -2], [-1.0, -2.0]), IndexError, "got -2 to 1"),
        ("topk:2", top([1, 2], [-1.0, 0.5]), ValueError, "logprobs must not be above 0"),
        ("topk:2", top([1, 2], [-1.0, NAN]), ValueError, "and not NaN"),
        ("topk:2", top([1, 2], [-0.1, -0.1]), ValueError, "sum to 1 at most, got 1.81"),
        ("topk:2", top([1, 2], [-1.0]), ValueError, r"logprobs must be \(1, 2\), as ids"),
        ("topk:2", TopK(torch.rand(1, 2), torch.rand(1, 2)), TypeError, "ids must be integers"),
        ("topk:2", top([[1, 2], [3, 4]], [[-1.0] * 2] * 2), TypeError, "integers of shape"),
        (
            "topk:2",
            [1, 2],
            TypeError,
            "prediction must be one of TopK, Tensor, LinearHead, got list",
        ),
        ("dense:fp32", top([1], [-1.0]), TypeError, "one of Tensor, LinearHead, got TopK"),
        ("topk:2", torch.zeros(2, 1000), ValueError, "must have 1 rows, as ids, got 2"),
        ("topk:2", torch.full((1, 1000), NAN), ValueError, "must be finite or −inf, got NaN"),
        (
            "sampled:3",
            Sampled(torch.tensor([[1, 2]]), torch.tensor([[1, 1]])),
            ValueError,
            "must sum to 3, got 2",
        ),
        (
            "sampled:3",
            Sampled(torch.tensor([[1, 2]]), torch.tensor([[1.5, 1.5]])),
            ValueError,
            "whole numbers",
        ),
        (
            "sampled:3",
            Sampled(torch.tensor([[1, 2]]), torch.tensor([[4, -1]])),
            ValueError,
            "not negative",
        ),
        ("hidden:bf16", torch.full((1, 16), INF), ValueError, "hidden must be finite, got inf"),
        ("hidden:bf16", torch.zeros(1, 15), ValueError, r"of shape \(n, 16\), got"),
        ("hidden:fp16", torch.full((1, 16), 1e6), ValueError, "in the range of fp16, got 1e"),
        ("dense:fp32", torch.full((1, 1000), INF), ValueError, "finite or −inf, got inf"),
        ("dense:fp16", torch.full((1, 1000), -1e6), ValueError, "in the range of fp16"),
    ],
)
def test_a_prediction_that_cannot_be_stored_is_an_error(tmp_path, kind, given, error, message):
    with pytest.raises(error, match=message):
        with cache.Writer(
            tmp_path, kind, vocab_size=CLASSES, teacher="numbers", head=head_of(kind)
        ) as writer:
            writer.add(torch.tensor([3]), given)
    assert not list(tmp_path.glob("*.kdc")) and not list(tmp_path.glob("*.partial"))


def test_what_a_server_rounded_is_taken(tmp_path):
    """Probabilities of 1.004 in all, a class without any, a row without classes."""
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [-1, -1, -1]])
    logprobs = torch.tensor([[0.502, 0.502, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.5]]).log()
    tokens = torch.arange(3)
    with cache.Writer(tmp_path, "topk:3", vocab_size=CLASSES, teacher="numbers") as writer:
        writer.add(tokens, TopK(ids, logprobs))
    found = cache.open(tmp_path)[tokens]
    assert found.ids.tolist() == [[1, 2], [4, -1], [-1, -1]]
    assert torch.allclose(found.logprobs[0].exp(), torch.tensor(0.5), rtol=1e-6, atol=0)
    assert found.logprobs[1, 0] == 0


def test_a_head_of_other_size_than_its_states_is_an_error(tmp_path):
    write(tmp_path, "hidden:bf16")
    other = LinearHead(torch.zeros(0, 8), torch.zeros(CLASSES, 8))
    with pytest.raises(cache.CacheMismatchError, match="kind.size is 16, wanted 8"):
        write(tmp_path, "hidden:bf16", head=other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_a_head_is_stored_in_pieces_as_safetensors_stores_it(monkeypatch, dtype, biased):
    """Of weights that are not contiguous, too: a tied or a cut one."""
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.setattr(identity, "PIECE", 100)
    weight = torch.randn(WIDTH, CLASSES, generator=generator()).to(dtype).T
    bias = torch.randn(CLASSES, generator=generator(1)).to(dtype) if biased else None
    found = list(kinds.head_file(LinearHead(torch.zeros(0, WIDTH), weight, bias)))
    named = {"weight": weight.contiguous(), **({"bias": bias} if biased else {})}
    assert b"".join(map(bytes, found)) == safetensors.save(named)
    assert max(map(len, found[1:])) == 100 * weight.itemsize


def test_a_head_of_numbers_that_are_no_floats_is_an_error(tmp_path):
    head = LinearHead(torch.zeros(0, WIDTH), torch.zeros(CLASSES, WIDTH, dtype=torch.int8))
    with pytest.raises(TypeError, match="the head's weight must be one of .*, got torch.int8"):
        write(tmp_path, "hidden:bf16", head=head)
