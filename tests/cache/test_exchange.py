"""Predictions of other programs: found by their tokens, and what goes out is what came in."""

import json

import numpy as np
import pytest
import torch

from kdkernels import TopK, cache

pytest.importorskip("zstandard")

TOKENS = [[3, 1, 4], [1, 5, 9, 2]]
VLLM = [
    {
        "prompt_token_ids": [3, 1, 4],
        "prompt_logprobs": [
            None,
            {"1": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}, "7": {"logprob": -2.0}},
            {"2": {"logprob": -0.25}, "9": {"logprob": -3.0}, "4": {"logprob": -9.0}},
        ],
        "prompt": "more than is needed",
    },
    {"prompt_token_ids": [1, 5, 9, 2], "prompt_logprobs": [None, {"5": -0.1}, None, {"2": -1}]},
]
ARRAYS = [
    {"token_ids": [3, 1, 4], "ids": [[1, 7], [2, 9, 4], []],
     "logprobs": [[-0.5, -2], [-0.25, -3, -9], []]},
    {"token_ids": [1, 5, 9, 2], "ids": [[5], [], [2], []], "logprobs": [[-0.1], [], [-1], []]},
]  # fmt: skip


def lines(path, samples, end="\n"):
    path.write_text("\n".join(map(json.dumps, samples)) + end)
    return path


@pytest.mark.parametrize("samples", [VLLM, ARRAYS], ids=["vllm", "arrays"])
@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
def test_lines_of_a_server_are_what_comes_after_each_token(tmp_path, samples, end):
    file = lines(tmp_path / "x.jsonl", samples, end)
    cache.import_jsonl(tmp_path / "c", file, "topk:3", vocab_size=10, teacher="served")
    teacher = cache.open(tmp_path / "c")
    assert teacher.description["teacher"]["name"] == "served"
    found = teacher[TOKENS]
    assert found.ids[0, :3].tolist() == [[1, 7, -1], [2, 4, 9], [-1, -1, -1]]
    assert found.ids[1].tolist() == [[5, -1, -1], [-1] * 3, [2, -1, -1], [-1] * 3]
    bound = teacher.description["kind"]["bound"]["logprobs"]["absolute"]
    expected = torch.tensor([[-0.5, -2], [-0.25, -9]])
    assert ((found.logprobs[0, :2, :2] - expected).abs() <= bound).all()


def test_lines_are_the_same_as_arrays_in_memory(tmp_path):
    file = lines(tmp_path / "x.jsonl", ARRAYS)
    cache.import_jsonl(tmp_path / "a", file, "topk:3", vocab_size=10, teacher="served")
    with cache.Writer(tmp_path / "b", "topk:3", vocab_size=10, teacher="served") as writer:
        ids = torch.tensor([[1, 7, -1], [2, 9, 4], [-1, -1, -1]])
        logprobs = torch.tensor([[-0.5, -2, 0], [-0.25, -3, -9], [0, 0, 0]], dtype=torch.float64)
        writer.add(TOKENS[0], TopK(ids, logprobs))
        ids, logprobs = torch.tensor([[5], [-1], [2], [-1]]), torch.tensor([[-0.1], [0], [-1], [0]])
        writer.add(np.array(TOKENS[1]), TopK(ids, logprobs.double()))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    "line, error, message",
    [
        ("{", ValueError, "line 3: JSONDecodeError"),
        ("[1]", ValueError, "line 3: "),
        ('{"token_ids": [1]}', ValueError, "line 3: KeyError.*ids"),
        ('{"token_ids": [1], "ids": [[1]], "logprobs": [[-1, -2]]}', ValueError, "as many"),
        ('{"token_ids": [1], "ids": [[1]], "logprobs": []}', ValueError, "line 3"),
        ('{"token_ids": [1, 2], "ids": [[1]], "logprobs": [[-1]]}', ValueError, "2 rows, as ids"),
        ('{"token_ids": [1], "ids": [[10]], "logprobs": [[-1]]}', IndexError, r"line 3: .*, 10\)"),
        ('{"token_ids": [1], "ids": [[1]], "logprobs": [[NaN]]}', ValueError, "not NaN"),
        ('{"token_ids": [-1], "ids": [[1]], "logprobs": [[-1]]}', ValueError, "ids must be in"),
        ('{"token_ids": [1.5], "ids": [[1]], "logprobs": [[-1]]}', ValueError, "must be integers"),
        (
            '{"prompt_token_ids": [1, 2], "prompt_logprobs": [null, {"x": -1}]}',
            ValueError,
            "line 3",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, error, message):
    file = lines(tmp_path / "x.jsonl", ARRAYS)
    file.write_text(file.read_text() + line)
    with pytest.raises(error, match=message):
        cache.import_jsonl(tmp_path / "c", file, "topk:3", vocab_size=10, teacher="served")
    with pytest.raises(cache.CacheError, match="no manifest"):
        cache.open(tmp_path / "c")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_logits_of_a_npy_file_come_back_with_their_bits(tmp_path, dtype):
    logits = np.random.default_rng(0).normal(size=(5, 10)).astype(dtype)
    images = torch.randn(5, 1, 4, 4)
    np.save(tmp_path / "x.npy", logits)
    kind = "dense:fp32" if dtype == np.float32 else "dense:fp16"
    cache.import_npy(tmp_path / "c", tmp_path / "x.npy", images, kind, teacher="mystery")
    teacher = cache.open(tmp_path / "c")
    order = [3, 0, 4, 1, 2]
    assert np.array_equal(teacher[images[order]].numpy(), logits[order])
    cache.export_npy(tmp_path / "y.npy", teacher, images)
    assert (tmp_path / "y.npy").read_bytes()[-logits.nbytes :] == logits.tobytes()
    assert np.array_equal(np.load(tmp_path / "y.npy"), logits)
    assert np.load(tmp_path / "y.npy").dtype == dtype


def test_logits_of_tokens_come_back_in_any_order(tmp_path):
    logits = np.random.default_rng(0).normal(size=(3, 4, 10)).astype(np.float32)
    ids = torch.arange(12).view(3, 4)
    np.save(tmp_path / "x.npy", logits)
    cache.import_npy(tmp_path / "c", tmp_path / "x.npy", ids, teacher="mystery")
    teacher = cache.open(tmp_path / "c")
    assert np.array_equal(teacher[ids.flip(0)].numpy(), logits[::-1])
    cache.export_npy(tmp_path / "y.npy", teacher, ids.flip(0))
    assert np.array_equal(np.load(tmp_path / "y.npy"), logits[::-1])
    cache.import_npy(tmp_path / "k", tmp_path / "x.npy", ids, "topk:2", teacher="mystery")
    wanted = torch.from_numpy(logits).topk(2).indices.sort().values
    assert torch.equal(cache.open(tmp_path / "k")[ids].ids.long(), wanted)


def test_what_is_no_array_of_these_inputs_is_an_error(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 10), np.float32))
    np.save(tmp_path / "int.npy", np.zeros((5, 10), np.int32))
    for name, inputs in (("x", torch.zeros(4, 3)), ("int", torch.zeros(5, 3))):
        with pytest.raises(ValueError, match=r"file must have floating point logits \(N, V\)"):
            cache.import_npy(tmp_path / "c", tmp_path / f"{name}.npy", inputs, teacher="mystery")
    assert not (tmp_path / "c").exists()
    file = lines(tmp_path / "x.jsonl", ARRAYS)
    cache.import_jsonl(tmp_path / "c", file, "topk:3", vocab_size=10, teacher="served")
    with pytest.raises(ValueError, match="cache must be of kind dense, got topk:3"):
        cache.export_npy(tmp_path / "y.npy", cache.open(tmp_path / "c"), [TOKENS[0]])
    np.save(tmp_path / "t.npy", np.zeros((1, 3, 10), np.float32))
    cache.import_npy(tmp_path / "d", tmp_path / "t.npy", torch.tensor([TOKENS[0]]), teacher="x")
    with pytest.raises(cache.CacheMissError):
        cache.export_npy(tmp_path / "y.npy", cache.open(tmp_path / "d"), [[1, 2, 3]])
    assert not (tmp_path / "y.npy").exists()
