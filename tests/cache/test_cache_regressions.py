"""What once went wrong."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_samples import CLASSES, WIDTH, generator, head_of, token_ids, write

from kdkernels import LinearHead, TopK, cache
from kdkernels.cache import kinds

pytest.importorskip("zstandard")


@pytest.mark.parametrize("unfinished", [False, True])
def test_the_head_of_stored_states_is_not_exchanged(tmp_path, unfinished):
    """Of a cache that is written on, by whoever calls another teacher by the same name."""
    pytest.importorskip("safetensors")
    samples = token_ids()
    write(tmp_path, "hidden:bf16", samples, shard_tokens=15)
    if unfinished:
        (tmp_path / "manifest.json").unlink()
    before = (tmp_path / "head.safetensors").read_bytes()
    with pytest.raises(cache.CacheMismatchError, match="kind.head is '[0-9a-f]{64}', wanted"):
        write(tmp_path, "hidden:bf16", samples, shard_tokens=15, head=head_of("hidden", seed=2))
    assert (tmp_path / "head.safetensors").read_bytes() == before


@pytest.mark.parametrize("k", [64, 20_000])
def test_many_classes_that_round_the_same_way_are_within_the_bound(tmp_path, k):
    """Just nearer to a depth of 8 than to the next, they shift their row, in which one class is
    rounded the other way."""
    depths = torch.full((k,), 8 + 2**-6 - 1e-6, dtype=torch.float64)
    depths[0], depths[-1] = 0, 8 + 2**-6 + 1e-6
    exact = (-depths).log_softmax(-1) - 0.01
    with cache.Writer(tmp_path, f"topk:{k}", vocab_size=k + 1, teacher="numbers") as writer:
        writer.add([1], TopK(torch.arange(k)[None], exact[None]))
    teacher = cache.open(tmp_path)
    bound = teacher.description["kind"]["bound"]["logprobs"]
    error = (teacher[[1]].logprobs[0] - exact).abs().max()
    assert error <= max(bound["absolute"], bound["of_depth"] * depths[-1])


def test_what_json_says_otherwise_is_the_same_cache(tmp_path):
    """Tuples become lists, and numbers that are keys become text."""
    for _ in range(2):
        write(tmp_path, "topk:7", data={"shape": (1, 2), "of": {3: 4}})
    assert cache.open(tmp_path).description["data"] == {"shape": [1, 2], "of": {"3": 4}}


@pytest.mark.parametrize("name", ["teacher", "tokenizer", "data", "seed"])
@pytest.mark.parametrize("value", [{"a": torch.float32}, {"a": math.nan}])
def test_what_json_cannot_say_is_an_error_before_anything_is_written(tmp_path, name, value):
    options = {"vocab_size": CLASSES, "teacher": "numbers", name: value}
    with pytest.raises(TypeError, match=f"{name} must be what JSON can say, got {{'a': "):
        cache.Writer(tmp_path / "c", "topk:7", **options)
    assert not (tmp_path / "c").exists()


def test_prompt_logprobs_that_are_of_the_next_token_are_not_taken_for_vllm_s(tmp_path):
    """They would all be a place too early, and the first of them lost."""
    logprobs = [{str(k): {"logprob": -0.5}} for k in (6, 7, 8)]
    (tmp_path / "lines").write_text(
        json.dumps({"prompt_token_ids": [5, 6, 7], "prompt_logprobs": logprobs})
    )
    with pytest.raises(ValueError, match="line 1: .*must begin with null"):
        cache.import_jsonl(
            tmp_path / "c", tmp_path / "lines", "topk:1", vocab_size=9, teacher="numbers"
        )


@pytest.mark.parametrize("offset", [0, 1e4, -1e6])
def test_log_probabilities_do_not_depend_on_what_all_logits_share(offset):
    logits = 4 * torch.randn(50, CLASSES, generator=generator()) + offset
    found = kinds.most_probable(logits, 20)
    exact = logits.double().log_softmax(-1).gather(-1, found["ids"])
    assert ((found["logprobs"] - exact).abs() <= 1e-6 * (1 + exact.abs())).all()


@pytest.mark.parametrize("kind", ["topk:7", "sampled:20", "dense:fp32"])
@pytest.mark.parametrize(
    "given, message",
    [
        (torch.zeros(6, CLASSES - 1), "and 1000 classes or more, got torch.float32 of shape"),
        (torch.zeros(6, CLASSES, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(2, 3, CLASSES), r"got torch.float32 of shape \(2, 3, 1000\)"),
        (LinearHead(torch.zeros(6, 4), torch.zeros(CLASSES - 1, 4)), "and 999 classes"),
    ],
)
def test_logits_of_fewer_classes_or_of_other_shape_are_an_error(tmp_path, kind, given, message):
    options = {"vocab_size": CLASSES, "teacher": "numbers"}
    with pytest.raises(ValueError, match=message):
        with cache.Writer(tmp_path, kind, **options) as writer:
            writer.add(torch.arange(6), given)


def test_a_row_without_any_probability_is_not_stored(tmp_path):
    logits = torch.zeros(2, CLASSES)
    logits[1] = -math.inf
    with pytest.raises(ValueError, match="logits must have a finite one in each row"):
        with cache.Writer(tmp_path, "dense:fp32", vocab_size=CLASSES, teacher="numbers") as writer:
            writer.add([1, 2], logits)


@pytest.mark.parametrize("kind", ["hidden:fp8", "hidden:fp32"])
def test_states_beyond_float32_are_not_stored(tmp_path, kind):
    pytest.importorskip("safetensors")
    options = {"vocab_size": CLASSES, "teacher": "numbers", "head": head_of(kind)}
    with pytest.raises(ValueError, match="hidden must be in the range of fp32, got 1e.300"):
        with cache.Writer(tmp_path, kind, **options) as writer:
            writer.add([1], torch.full((1, WIDTH), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-38, 1e-40, 3e38])
def test_rows_of_the_smallest_and_largest_states_are_within_the_bound_of_fp8(size):
    kind = kinds.HiddenKind(CLASSES, "fp8", WIDTH, "")
    hidden = torch.randn(200, WIDTH, generator=generator()).clamp(-1, 1) * size
    columns = kind.encode(hidden, 0)
    columns = {name: x.reshape(-1) for name, x in columns.items()}
    error = (kind.decode(columns)["hidden"].double() - hidden.double()).abs()
    bound = kind.describe()["bound"]["hidden"]
    largest = hidden.double().abs().amax(-1, keepdim=True)
    limit = bound["relative"] * hidden.double().abs() + bound["of_largest_in_row"] * largest
    assert (error <= limit + bound["absolute"]).all()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"?")])
def test_a_cache_with_a_damaged_shard_does_not_lose_the_shards_after_it(tmp_path, damage):
    samples = token_ids()
    write(tmp_path, "topk:7", samples, shard_tokens=15)
    damage(tmp_path / "shard-00000.kdc")
    with pytest.raises(cache.CacheError, match="has a damaged shard, number 0: give all samples"):
        write(tmp_path, "topk:7", [], shard_tokens=15)
    write(tmp_path, "topk:7", samples, shard_tokens=15)
    assert cache.open(tmp_path).has(samples).all()


def test_a_list_of_numbers_is_a_sample_whatever_made_them(tmp_path):
    write(tmp_path, "topk:7", [torch.tensor([5, 6])])
    teacher = cache.open(tmp_path)
    for ids in ([5, 6], list(np.array([5, 6])), list(torch.tensor([5, 6]))):
        assert teacher[ids].ids.shape == (2, 7)
        assert ids in teacher and teacher.has([ids]).all()


@pytest.mark.parametrize("value, error", [(0, ValueError), ("x", TypeError), (2.5, TypeError)])
def test_shard_tokens_are_a_count(tmp_path, value, error):
    with pytest.raises(error, match="shard_tokens must be"):
        write(tmp_path / "c", "topk:7", shard_tokens=value)
    assert not (tmp_path / "c").exists()


def test_of_a_head_no_more_is_read_than_the_manifest_says(tmp_path):
    pytest.importorskip("safetensors")
    write(tmp_path, "hidden:bf16")
    size = (tmp_path / "head.safetensors").stat().st_size
    os.truncate(tmp_path / "head.safetensors", 2**36)  # a hole
    with pytest.raises(cache.CacheCorruptError, match="not what was written") as error:
        cache.open(tmp_path)
    assert error.value.end == size + 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher": {"id": "x"}}, "teacher must be a dict that says its name, got"),
        ({"teacher": None}, "teacher must be a dict that says its name, got None"),
        ({"tokenizer": {"digest": "ab"}}, "tokenizer must be a dict that says its digest, size"),
        ({"data": "texts"}, "data must be a dict, got 'texts'"),
    ],
)
def test_a_cache_says_of_whom_it_is(tmp_path, options, message):
    with pytest.raises(TypeError, match=message):
        write(tmp_path / "c", "topk:7", **options)
    assert not (tmp_path / "c").exists()
