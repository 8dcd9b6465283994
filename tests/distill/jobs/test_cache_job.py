"""The command `cache`, and students of what it wrote: of the same examples, or it says why not."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import assert_trained_alike

transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")
pytest.importorskip("accelerate", reason="the extra `train` is not installed")
pytest.importorskip("yaml", reason="the extra `train` is not installed")
pytest.importorskip("zstandard", reason="the extra `cache` is not installed")

from checkpoints_made import (  # noqa: E402
    WORDS,
    image_model,
    images,
    language_model,
    models_and_texts,
    texts,
    tokenizer,
)

from kdkernels import cache, cli  # noqa: E402
from kdkernels.distill.jobs import CacheConfig, CacheJob, Config, Job, cache_job  # noqa: E402

V = len(WORDS) + 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The directories of a student, a teacher, texts, and caches of the teacher for them."""
    root = models_and_texts(tmp_path_factory.mktemp("made"))
    for kind in ("topk:4", "hidden:fp32"):
        build(root, root / kind.partition(":")[0], kind=kind).run()
    return root


def build(made, out, **changes):
    given = dict(teacher=made / "teacher", data=made / "data", out=out, length=16, kind="topk:4")
    given.update(changes)
    given.update({k: str(x) for k, x in given.items() if hasattr(x, "parts")})
    return CacheJob(CacheConfig(**given))


def options(made, tmp_path, **changes):
    given = dict(student=made / "student", teacher_cache=made / "topk", data=made / "data")
    given.update(out=tmp_path / "out", length=16, steps=6, batch_size=4, learning_rate=1e-2)
    given.update(record_every=3, tensorboard=False, **changes)
    given.update({k: str(x) for k, x in given.items() if hasattr(x, "parts")})
    return Config(**given)


def refused(made, tmp_path, message, error=ValueError, **changes):
    with pytest.raises(error, match=message):
        Job(options(made, tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def weights(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([x.flatten() for x in model.state_dict().values()])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cache_has_what_the_teacher_says_of_the_training_examples(made):
    found = cache.open(made / "hidden")
    train = Job(options(made, made / "nowhere", teacher_cache=made / "hidden")).parts.train
    assert len(found) == len(train) > 10 and found.has(train.ids).all()
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "teacher")
    ids = train[3]["input_ids"]
    with torch.no_grad():
        wanted = model(ids[None]).logits[0]
    head = found[ids]
    logits = head.hidden @ head.weight.T
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    description = found.description
    assert description["teacher"] == cache.identity.of_teacher(model, "teacher")
    assert description["tokenizer"] == cache.identity.of_tokenizer(tokenizer())
    assert description["vocab_size"] == V
    facts = {name: description["data"][name] for name in ("length", "test_share", "seed")}
    assert facts == {"length": 16, "test_share": 0.1, "seed": 0}


def test_a_student_of_a_cache_is_one_of_the_teacher(made, tmp_path):
    """Of all that the teacher says; with the teacher beside it or without."""
    Job(options(made, tmp_path / "live", teacher=made / "teacher", teacher_cache=None)).run()
    stored = dict(teacher_cache=made / "hidden")
    alone = Job(options(made, tmp_path / "alone", **stored))
    assert alone.parts.teacher is None
    rows = alone.run()["comparison"]
    assert [row["name"] for row in rows] == ["student before", "student"]
    beside = Job(options(made, tmp_path / "beside", teacher=made / "teacher", **stored)).run()
    assert [row["name"] for row in beside["comparison"]] == ["teacher", "student before", "student"]
    assert any("learns from a cache of teacher: hidden:fp32" in x for x in beside["notes"])
    live, read, both = (weights(tmp_path / x / "out/student") for x in ("live", "alone", "beside"))
    assert_trained_alike(live, read, weights(made / "student"), 1e-3)
    assert torch.equal(read, both)


def test_hints_of_a_teacher_beside_its_cache(made, tmp_path):
    hint = {"student": "model.layers.1", "teacher": "model.layers.2", "weight": 0.1}
    given = dict(hints=[hint], teacher=made / "teacher")
    Job(options(made, tmp_path / "live", teacher_cache=None, **given)).run()
    results = Job(options(made, tmp_path / "read", teacher_cache=made / "hidden", **given)).run()
    assert results["terms"][0]["hints"] > 0
    live, read = (weights(tmp_path / x / "out" / "student") for x in ("live", "read"))
    assert_trained_alike(live, read, weights(made / "student"), 1e-3)
    refused(made, tmp_path, "need the teacher itself, not teacher_cache alone", hints=[hint])


def test_the_most_probable_tokens_and_their_tail(made, tmp_path):
    Job(options(made, tmp_path / "bucket")).run()
    Job(options(made, tmp_path / "rest", tail="renormalize", temperature=2.0)).run()
    bucket, rest = (weights(tmp_path / x / "out" / "student") for x in ("bucket", "rest"))
    assert not torch.equal(bucket, rest)
    refused(made, tmp_path, "temperature must be 1 with TopK", temperature=2.0)
    refused(made, tmp_path, "tail must be one of bucket, renormalize, got 'cut'", tail="cut")
    hidden = dict(teacher_cache=made / "hidden", tail="bucket")
    refused(made, tmp_path, "tail goes with a cache of kind topk, got hidden:fp32", **hidden)


def test_a_head_with_adapters_has_no_hidden_states(made, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "teacher")
    settings = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    message = "kind must not be hidden:bf16, the teacher's logits are computed in full: .* adapters"
    with pytest.raises(ValueError, match=message):
        build(made, tmp_path / "c", teacher=tmp_path / "adapter", kind="hidden:bf16")
    build(made, tmp_path / "c", teacher=tmp_path / "adapter", kind="dense:fp32").run()


def test_a_missing_package_is_one_line_and_code_2(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    assert cli.main(command(made, tmp_path / "c")) == 2
    assert "import of transformers.utils halted" in capsys.readouterr().err


def test_draws_depend_on_the_seed(made, tmp_path):
    given = dict(kind="sampled:9", test=texts(tmp_path / "test", count=2))
    one, other = (build(made, tmp_path / str(k), seed=k, **given).run() for k in range(2))
    ids = next(one.samples())
    assert other.has([ids]).all() and one.description["data"] == other.description["data"]
    assert not torch.equal(one[ids].counts, other[ids].counts)


def test_a_teacher_of_another_dtype(made, tmp_path):
    build(made, tmp_path / "half", dtype="bfloat16", kind="hidden:bf16").run()
    found = cache.open(tmp_path / "half")
    assert found.description["teacher"]["dtype"] == "bfloat16"
    given = dict(teacher_cache=tmp_path / "half", teacher=made / "teacher")
    job = Job(options(made, tmp_path, **given))
    assert job.parts.teacher.model.dtype == torch.bfloat16  # or it would not be the cache's
    job.run()


def test_another_teacher_is_refused(made, tmp_path):
    other = language_model(tmp_path / "other", seed=5, hidden_size=32, num_hidden_layers=3)
    digest = cache.open(made / "topk").description["teacher"]["weights"][:12]
    refused(
        made,
        tmp_path,
        f"teacher must be 'teacher', of which .*topk is: its weights are {digest}, float32, those "
        "of .*other are ",
        teacher=other,
    )


def test_another_tokenizer_is_refused(made, tmp_path):
    swapped = tokenizer([WORDS[1], WORDS[0], *WORDS[2:]])
    student = language_model(tmp_path / "swapped", tokens=swapped)
    refused(made, tmp_path, "must be of the student's tokenizer: .* 17 tokens, ", student=student)
    other_end = tokenizer()
    other_end.eos_token = "cat"
    student = language_model(tmp_path / "end", tokens=other_end)
    message = "of which 1 ends a text; the student's has 17 tokens, .*, of which 4 ends a text"
    refused(made, tmp_path, message, student=student)
    # What a student may have of its own.
    padded = tokenizer()
    padded.pad_token = "cat"
    Job(options(made, tmp_path, student=language_model(tmp_path / "padded", tokens=padded)))


def test_another_vocabulary_is_refused(made, tmp_path):
    build(made, tmp_path / "wide", teacher=wide(tmp_path), vocab_size=V + 3).run()
    refused(
        made,
        tmp_path,
        f"must be of a vocabulary of {V}, .*wide is of {V + 3}: `cache build --vocab-size {V}`",
        teacher_cache=tmp_path / "wide",
    )
    refused(made, tmp_path, f"vocabulary of {V - 1}, .* is of {V}: `cache", vocab_size=V - 1)
    # Logits of padded tokens can be left out afterwards.
    build(
        made, tmp_path / "dense", teacher=wide(tmp_path), vocab_size=V + 3, kind="dense:fp32"
    ).run()
    results = Job(options(made, tmp_path, teacher_cache=tmp_path / "dense")).run()
    assert any(f"rows from {V} on are padding" in note for note in results["notes"])


def wide(tmp_path):
    if not (tmp_path / "wide-model").exists():
        language_model(tmp_path / "wide-model", seed=1, vocab_size=V + 7)
    return tmp_path / "wide-model"


def test_padding_of_a_teacher_is_left_out_unless_told(made, tmp_path):
    for name in (f"topk:{V}", "hidden:fp32"):
        build(made, tmp_path / name, teacher=wide(tmp_path), kind=name).run()
        assert cache.open(tmp_path / name).description["vocab_size"] == V
        Job(options(made, tmp_path / f"of-{name}", teacher_cache=tmp_path / name)).run()


def test_examples_that_a_cache_has_not_are_refused(made, tmp_path):
    refused(
        made, tmp_path, "lacks .*, first example 0: length was 16 and is 8", length=8, batch_size=2
    )
    refused(made, tmp_path, "test_share was 0.1 and is 0.5", test_share=0.5)
    other = Job(options(made, tmp_path, seed=1, teacher_cache=None, alpha=0.0)).parts.train
    there = cache.open(made / "topk").has(other.ids)
    shutil.rmtree(tmp_path / "out")
    assert there.any() and not there.all()
    where = f"lacks {(~there).sum()} of {len(there)}, first example {there.argmin()}"
    refused(made, tmp_path, f"{where}: seed was 0 and is 1", seed=1)
    refused(made, tmp_path, "files of data are others", data=texts(tmp_path / "more", count=7))
    test = texts(tmp_path / "test", count=2)
    refused(made, tmp_path, "test_share was 0.1 and is none; seed was 0 and is none", test=test)
    # Fewer of them, or in another order, are there all the same.
    train = Job(options(made, tmp_path)).parts.train
    assert cache.open(made / "topk").has(train.ids[2::-1]).all()


def test_a_cache_that_says_nothing_of_its_tokenizer_or_data(made, tmp_path):
    train = Job(options(made, tmp_path)).parts.train
    with cache.Writer(tmp_path / "c", "topk:2", vocab_size=V, teacher="served") as writer:
        for row in range(len(train)):
            logits = torch.randn(16, V, generator=torch.Generator().manual_seed(row))
            writer.add(train.ids[row], logits)
    given = dict(teacher_cache=tmp_path / "c")
    results = Job(options(made, tmp_path, **given)).run()
    assert any("does not say of which tokenizer" in note for note in results["notes"])
    Job(options(made, tmp_path / "beside", teacher=made / "teacher", **given))
    refused(made, tmp_path / "x", "it does not say of which data it is", length=8, **given)


def test_options_that_do_not_go_together(made, tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.zeros((3, 16, V), np.float32))
    refused(made, tmp_path, "must not both be given", teacher_predictions=str(file))
    gone = tmp_path / "gone"
    refused(
        made, tmp_path, "a cache must be a directory, .*gone is none", OSError, teacher_cache=gone
    )
    refused(made, tmp_path, "no manifest.json", teacher_cache=made / "data")
    refused(made, tmp_path, "alpha must be 0 without a teacher", teacher_cache=None)


def test_another_cache_of_the_same_run_is_refused(made, tmp_path):
    Job(options(made, tmp_path)).run()
    with pytest.raises(ValueError, match="teacher_cache was '.*topk' and is '.*hidden'"):
        Job(options(made, tmp_path, teacher_cache=made / "hidden"))


def test_a_cache_that_was_written_anew_or_damaged_is_code_2(made, tmp_path, capsys):
    found = tmp_path / "c"
    flags = ["--student", made / "student", "--data", made / "data", "--length", 16, "--steps", 2]
    flags += ["--teacher-cache", found, "--out", tmp_path / "run", "--no-tensorboard"]
    train = ["distill", *map(str, flags)]
    assert cli.main(command(made, found)) == cli.main(train) == 0
    shutil.rmtree(found)
    assert cli.main(command(made, found, "--kind", "topk:5")) == 0
    capsys.readouterr()
    assert cli.main(train) == 2
    printed = capsys.readouterr().err
    assert "the teacher's cache must be" in printed and printed.count("\n") == 1

    content = bytearray((found / "shard-00000.kdc").read_bytes())
    for entry in cache.open(found).shards[0].index:
        content[int(entry["offset"]) + 9] ^= 1
    (found / "shard-00000.kdc").write_bytes(content)
    assert cli.main([*train, "--out", str(tmp_path / "other")]) == 2
    assert "shard-00000.kdc is damaged: block" in capsys.readouterr().err


def test_images(tmp_path):
    image_model(tmp_path / "student", labels=["blue", "red"])
    images(tmp_path / "data")
    with pytest.raises(ValueError, match="teacher must be a causal .*write-teacher-predictions"):
        build(tmp_path, tmp_path / "c", teacher=tmp_path / "student")
    with pytest.raises(ValueError, match="teacher_cache goes with language models"):
        Job(options(tmp_path, tmp_path, teacher_cache=tmp_path / "c"))


def command(made, out, *more):
    flags = ["--teacher", made / "teacher", "--data", made / "data", "--out", out]
    return ["cache", "build", *map(str, [*flags, "--length", 16, "--kind", "topk:4", *more])]


def test_the_command(made, tmp_path, capfd):
    out = tmp_path / "c"
    assert cli.main(command(made, out, "--shard-tokens", 100)) == 0
    printed = capfd.readouterr()
    number = r"[\d,.]+"
    line = rf"{number} tokens of {number} examples, {number} bytes each, (\d+) of them written in "
    assert re.match(line, printed.out).group(1) == str(cache.open(out).tokens)
    assert printed.out.count("\n") == 1 and printed.err == ""  # it is no terminal
    before = files(out)
    assert len(before) > 3
    assert cli.main(command(made, out, "--shard-tokens", 100)) == 0
    assert re.match(line, capfd.readouterr().out).group(1) == "0" and files(out) == before

    student = ["--student", made / "student", "--data", made / "data", "--length", 16]
    student += ["--teacher-cache", out, "--steps", 2, "--out", tmp_path / "run"]
    assert cli.main(["distill", *map(str, student), "--no-tensorboard"]) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_an_interrupted_command_goes_on(made, tmp_path, capsys, monkeypatch):
    flags = ["--shard-tokens", 100]
    assert cli.main(command(made, tmp_path / "whole", *flags)) == 0
    encode, calls = cache.codec.Codec.encode, []

    def interrupted(codec, *arguments):
        calls.append(1)
        if len(calls) == 9:  # in the second shard
            raise KeyboardInterrupt
        return encode(codec, *arguments)

    monkeypatch.setattr(cache.codec.Codec, "encode", interrupted)
    capsys.readouterr()
    assert cli.main(command(made, tmp_path / "cut", *flags)) == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on from there\n"
    assert "manifest.json" not in files(tmp_path / "cut")
    assert cli.main(command(made, tmp_path / "cut", *flags)) == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    total = len(cache.open(tmp_path / "whole"))
    assert len(calls) == 9 + total - 7  # seven are of the first shard


def test_one_of_several_processes_talks(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(command(made, tmp_path / "c")) == 0
    assert capsys.readouterr() == ("", "")
    assert cache.open(tmp_path / "c").checksum == cache.open(made / "topk").checksum


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "top4"], "kind must be topk:K with K in [1, 17]"),
        (["--kind", "topk:18"], "kind must be topk:K with K in [1, 17]"),
        (["--length", 65], "length must be at most 64, the positions of the teacher, got 65"),
        (["--length", 0], "length must be at least 1, got 0"),
        (["--vocab-size", 99], "head must have a row for each of vocab_size=99, got 17"),
        (["--vocab-size", 8], "token ids must be below 8, got"),
        (["--dtype", "int8"], "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        (["--test-share", 1], "test_share must be in (0, 1), got 1"),
        (["--teacher", "nowhere"], "teacher must be a directory, nowhere is none"),
        (["--data", "nowhere"], "data must be a directory, nowhere is none"),
        (["--out", __file__], "File exists"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(made, tmp_path, capsys, flags, message):
    assert cli.main(command(made, tmp_path / "c", *flags)) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert printed.err.startswith("python -m kdkernels cache build: error: ")
    assert not (tmp_path / "c").exists()


def test_another_cache_in_the_same_directory_is_code_2(made, capsys):
    before = files(made / "topk")
    assert cli.main(command(made, made / "topk", "--length", 8)) == 2
    assert "data.length is 16, wanted 8" in capsys.readouterr().err
    assert files(made / "topk") == before


def test_verify_names_every_damage(made, tmp_path, capsys):
    out = tmp_path / "c"
    assert cli.main(command(made, out, "--shard-tokens", 100)) == 0
    capsys.readouterr()
    assert cli.main(["cache", "verify", str(out)]) == 0
    assert capsys.readouterr() == (f"{out} is whole\n", "")

    def flip(name, place):
        content = bytearray((out / name).read_bytes())
        content[place] ^= 4
        (out / name).write_bytes(content)

    entry = cache.open(out).shards[0].index[0]
    flip("shard-00000.kdc", int(entry["offset"]) + 5)
    (out / "shard-00001.kdc").unlink()
    assert cli.main(["cache", "verify", str(out)]) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 2 and printed.err == ""
    assert any("shard-00001.kdc is damaged: file, bytes 0 to" in line for line in lines)
    begin, size = int(entry["offset"]), int(entry["size"])
    assert any(
        re.search(rf"shard-00000.kdc is damaged: block \d+, bytes {begin} to {begin + size}", line)
        for line in lines
    )

    flip("manifest.json", 9)
    assert cli.main(["cache", "verify", str(out)]) == 1
    assert "manifest.json is damaged" in capsys.readouterr().out
    assert cli.main(["cache", "verify", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_info_says_what_a_cache_is(made, tmp_path, capsys):
    assert cli.main(["cache", "info", str(made / "topk")]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    found = cache.open(made / "topk")
    assert (lines["kind"], lines["vocabulary"]) == ("topk:4", f"{V}")
    assert lines["samples"] == f"{len(found)}, of tokens" and lines["predictions"] == str(
        found.tokens
    )
    whole, alone = map(float, re.findall(r"\d+\.\d", lines["bytes"]))
    assert whole == round(found.bytes / found.tokens, 1) > alone > 4
    weights = found.description["teacher"]["weights"][:12]
    assert lines["teacher"] == f"teacher, float32, weights {weights}"
    assert "length 16" in lines["data"] and f"tokens {V}" in lines["tokenizer"]
    assert "logprobs absolute" in lines["rounding"]
    with cache.Writer(tmp_path / "c", "topk:2", vocab_size=V, teacher="served") as writer:
        writer.add([1, 2], torch.zeros(2, V))
    assert cli.main(["cache", "info", str(tmp_path / "c")]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["teacher"], lines["tokenizer"], lines["data"]) == ("served", *["not said"] * 2)
    assert cli.main(["cache", "info", str(tmp_path / "none")]) == 2
    assert "none is none" in capsys.readouterr().err


def test_a_cache_is_json_without_paths(made):
    """Nothing of the machine it was made on."""
    content = (made / "topk" / "manifest.json").read_text()
    assert json.loads(content)["description"]["teacher"]["name"] == "teacher"
    assert str(made) not in content


def test_the_teacher_is_on_the_device_of_its_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cache_job._device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cache_job._device() == torch.device("cpu")
