"""A job: from directories to a directory, or a message before the first step."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import assert_trained_alike

transformers = pytest.importorskip("transformers", reason="the extra `train` is not installed")
pytest.importorskip("accelerate", reason="the extra `train` is not installed")
pytest.importorskip("yaml", reason="the extra `train` is not installed")

from checkpoints_made import (  # noqa: E402
    WORDS,
    image_model,
    images,
    language_model,
    models_and_texts,
    texts,
    tokenizer,
)

from kdkernels import cli  # noqa: E402
from kdkernels.distill.jobs.config import Config  # noqa: E402
from kdkernels.distill.jobs.job import Job  # noqa: E402
from kdkernels.distill.offline import open_predictions  # noqa: E402

V = len(WORDS) + 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The directories of a student, a teacher and texts."""
    return models_and_texts(tmp_path_factory.mktemp("made"))


def options(made, tmp_path, **changes):
    given = dict(student=str(made / "student"), teacher=str(made / "teacher"))
    given.update(data=str(made / "data"), out=str(tmp_path / "out"), length=16, steps=6)
    given.update(batch_size=4, learning_rate=1e-2, record_every=3, tensorboard=False)
    given.update({k: str(x) if hasattr(x, "parts") else x for k, x in changes.items()})
    return Config(**given)


def weights(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([x.flatten() for x in model.state_dict().values()])


def refused(made, tmp_path, message, error=ValueError, **changes):
    with pytest.raises(error, match=message):
        Job(options(made, tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_leaves_a_student_that_is_better_than_before(made, tmp_path, capsys):
    results = Job(options(made, tmp_path, steps=30, warmup=2, tensorboard=True)).run()
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == results
    teacher, before, student = results["comparison"]
    assert [row["name"] for row in results["comparison"]] == [
        "teacher",
        "student before",
        "student",
    ]
    assert student["cross_entropy"] < 0.9 * before["cross_entropy"]
    assert student["perplexity"] == pytest.approx(np.exp(student["cross_entropy"]))
    assert teacher["agreement"] == 1.0 and teacher["parameters"] > student["parameters"]
    assert results["curves"][0]["steps"] == list(range(3, 31, 3))
    assert results["curves"][0]["values"][-1] == pytest.approx(student["cross_entropy"])
    assert any("held out" in note for note in results["notes"])
    assert Config.load(out / "config.yaml") == options(
        made, tmp_path, steps=30, warmup=2, tensorboard=True
    )
    saved = weights(out / "student")
    assert not torch.equal(saved, weights(made / "student"))
    tokens = transformers.AutoTokenizer.from_pretrained(out / "student")
    assert tokens.get_vocab() == tokenizer().get_vocab()
    assert (out / "log.csv").read_text().count("\n") == 11
    assert (out / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").iterdir())
    printed = capsys.readouterr().out
    assert "tokens/s" not in printed and "\r" not in printed  # it is no terminal
    table = printed.partition("On the test data")[2]
    assert "…" not in table and "student before" in table  # nothing is cut

    # Once more: there is nothing left to do.
    again = Job(options(made, tmp_path, steps=30, warmup=2, tensorboard=True)).run()
    assert again["comparison"][2]["cross_entropy"] == student["cross_entropy"]
    assert torch.equal(weights(out / "student"), saved)


def test_an_interrupted_run_goes_on_to_the_same_bits(made, tmp_path):
    student = language_model(tmp_path / "student", attention_dropout=0.2)
    given = dict(student=student, alpha_warmup=4, warmup=3, patience=5, accumulate=2)
    Job(options(made, tmp_path / "whole", **given)).run()
    first = Job(options(made, tmp_path / "cut", **given))
    student, calls = first.parts.student, []

    def interrupt(*_):
        calls.extend([1] * student.training)
        if len(calls) == 7:  # in the fourth step, of two parts each
            signal.raise_signal(signal.SIGINT)
            calls.append("once")

    handle = student.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    handle.remove()
    assert first.distiller.steps_taken == 4
    assert not (tmp_path / "cut" / "out" / "student").exists()
    torch.manual_seed(99)
    Job(options(made, tmp_path / "cut", **given)).run()
    both = [tmp_path / name / "out" for name in ("whole", "cut")]
    assert torch.equal(*(weights(out / "student") for out in both))
    curves = [json.loads((out / "results.json").read_text())["curves"][0] for out in both]
    assert curves[0] == curves[1]
    log = [line.split(",")[0] for line in (both[1] / "log.csv").read_text().splitlines()]
    assert log == ["step", "3", "6"]


def test_checkpoints_of_other_options_are_refused_by_name(made, tmp_path):
    Job(options(made, tmp_path)).run()
    with pytest.raises(ValueError, match="other options: alpha was 0.5 and is 0.9, .*choose an"):
        Job(options(made, tmp_path, alpha=0.9, batch_size=2))
    Job(options(made, tmp_path, checkpoint_every=7))


def test_a_teacher_that_was_written_to_a_file_makes_the_same_student(made, tmp_path):
    Job(options(made, tmp_path / "live")).run()
    file = tmp_path / "teacher.safetensors"
    Job(
        options(made, tmp_path / "all", teacher_predictions=file, write_teacher_predictions=True)
    ).run()
    Job(options(made, tmp_path / "read", teacher_predictions=file, teacher=None)).run()
    live, written, read = (
        weights(tmp_path / x / "out" / "student") for x in ("live", "all", "read")
    )
    assert torch.equal(written, read)
    assert_trained_alike(live, read, weights(made / "student"), 1e-4)


def test_a_file_is_of_the_same_number_of_blocks_only(made, tmp_path):
    file = tmp_path / "teacher.safetensors"
    Job(options(made, tmp_path, teacher_predictions=file, write_teacher_predictions=True)).run()
    assert open_predictions(file).shape[1:] == (16, V)
    texts(tmp_path / "less", count=3)
    refused(
        made,
        tmp_path / "other",
        "must be of .* inputs, got",
        teacher_predictions=file,
        data=tmp_path / "less",
    )


def test_predictions_for_other_examples_are_refused(made, pictures, tmp_path):
    path = tmp_path / "teacher.safetensors"
    given = dict(teacher_predictions=path, write_teacher_predictions=True)
    for models, name in ((made, "text"), (pictures, "images")):
        Job(options(models, tmp_path, out=tmp_path / name, **given)).run()
        read = dict(teacher=None, teacher_predictions=path)
        Job(options(models, tmp_path, out=tmp_path / f"{name}-again", **read))
        # As many examples, others of them held out.
        refused(models, tmp_path, "written for others", seed=1, **read)
    path.with_name(f"{path.name}.json").unlink()
    Job(options(pictures, tmp_path, seed=1, **read))


def test_what_cannot_be_written_is_found_before_the_first_step(made, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "t.safetensors"
    given = dict(teacher_predictions=path, write_teacher_predictions=True)
    refused(made, tmp_path, "file", error=OSError, **given)


def test_padding_is_not_written(made, tmp_path):
    padded = language_model(tmp_path / "padded", seed=3, vocab_size=2 * V)
    path = tmp_path / "t.safetensors"
    given = dict(teacher=padded, teacher_predictions=path, write_teacher_predictions=True)
    Job(options(made, tmp_path, **given)).run()
    assert open_predictions(path).shape[1:] == (16, V)


def test_a_teacher_is_trained_first_on_labels_alone(made, tmp_path):
    refused(made, tmp_path, "alpha must be 0 without a teacher, got 0.5", teacher=None)
    results = Job(options(made, tmp_path, teacher=None, alpha=0.0, steps=20)).run()
    before, after = results["comparison"]
    assert after["cross_entropy"] < before["cross_entropy"] and after["targets"] == "labels"
    assert after["agreement"] is None
    Job(options(made, tmp_path / "then", teacher=tmp_path / "out" / "student")).run()


def test_hints_and_early_stopping(made, tmp_path):
    layers = {"student": "model.layers.1", "teacher": "model.layers.2", "weight": 0.1}
    attention = {"student": "model.layers.0.self_attn", "teacher": "model.layers.0.self_attn"}
    attention.update(kind="attention", select=1, rows=2)
    given = dict(hints=[layers, attention], steps=60, patience=1)
    results = Job(options(made, tmp_path, learning_rate=0.3, **given)).run()
    assert results["terms"][0]["hints"] > 0
    assert any("Stopped early, after" in note for note in results["notes"])
    best = min(results["curves"][0]["values"])
    assert results["comparison"][2]["cross_entropy"] == pytest.approx(best)
    again = Job(options(made, tmp_path, learning_rate=0.3, **given)).run()
    assert again["comparison"][2]["cross_entropy"] == pytest.approx(best)


def test_a_teacher_stays_in_the_dtype_it_was_saved_in_and_the_student_does_not(made, tmp_path):
    half = language_model(tmp_path / "half", seed=1, dtype=torch.bfloat16, kind="Gemma2")
    job = Job(options(made, tmp_path, teacher=half, student=half))
    assert job.parts.teacher.model.dtype == torch.bfloat16
    assert job.parts.student.model.dtype == torch.float32
    job.run()
    assert all(x.dtype == torch.bfloat16 for x in job.parts.teacher.parameters())


def test_heads_that_are_padded_differently(made, tmp_path):
    wide = language_model(tmp_path / "wide", seed=1, vocab_size=V + 7)
    results = Job(options(made, tmp_path, teacher=wide)).run()
    assert f"rows from {V} on are padding" in results["notes"][0]


def test_a_model_that_cannot_be_taken_apart_is_trained_on_its_logits(made, tmp_path, monkeypatch):
    from kdkernels.distill.jobs import models

    def cannot(model):
        raise ValueError("it is odd")

    monkeypatch.setattr(models, "HiddenStates", type("No", (), {"__new__": lambda c, m: cannot(m)}))
    whole = Job(options(made, tmp_path / "logits"))
    monkeypatch.undo()
    results = whole.run()
    assert "the student's logits are computed in full: it is odd" in results["notes"]
    parts = Job(options(made, tmp_path)).run()
    assert parts["curves"][0]["values"] == pytest.approx(results["curves"][0]["values"], rel=1e-4)


def test_an_adapter_is_trained_and_nothing_else(made, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = transformers.AutoModelForCausalLM.from_pretrained(made / "student")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(adapter.read_text())
    adapter.write_text(json.dumps({**content, "base_model_name_or_path": str(made / "student")}))
    given = dict(student=tmp_path / "adapter", steps=20, gradient_checkpointing=True)
    job = Job(options(made, tmp_path, **given))
    trained = [n for n, x in job.parts.student.named_parameters() if x.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    results = job.run()
    _, before, after = results["comparison"]
    assert after["cross_entropy"] < before["cross_entropy"]
    saved = {path.name for path in (tmp_path / "out" / "student").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


def test_directories_and_models_that_are_not_there(made, tmp_path):
    gone = tmp_path / "gone"
    refused(made, tmp_path, "student must be a directory", NotADirectoryError, student=gone)
    refused(made, tmp_path, "teacher must be a directory", NotADirectoryError, teacher=gone)
    refused(made, tmp_path, "data must be a directory", NotADirectoryError, data=gone)
    refused(made, tmp_path, "test must be a directory", NotADirectoryError, test=gone)
    refused(made, tmp_path, "student must be the directory of a model", student=made / "data")
    refused(made, tmp_path, "must have text files", data=made / "student")
    refused(
        made,
        tmp_path,
        "teacher_predictions must be a file",
        FileNotFoundError,
        teacher_predictions=gone,
    )


def test_a_model_without_its_weights_or_for_something_else(made, tmp_path):
    config = transformers.AutoConfig.from_pretrained(made / "student")
    other = transformers.LlamaForSequenceClassification(config)
    other.save_pretrained(tmp_path / "other")
    refused(made, tmp_path, "got LlamaForSequenceClassification", student=tmp_path / "other")
    facts = json.loads((tmp_path / "other" / "config.json").read_text())
    facts["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "other" / "config.json").write_text(json.dumps(facts))
    refused(made, tmp_path, r"has missing keys: \['lm_head.weight'\]", student=tmp_path / "other")


def test_tokenizers_that_differ(made, tmp_path):
    swapped = tokenizer([WORDS[1], WORDS[0], *WORDS[2:]])
    teacher = language_model(tmp_path / "teacher", tokens=swapped)
    refused(
        made,
        tmp_path,
        "they differ in 2 of 17 tokens: 'the' is 2 to the student's, 3 to the",
        teacher=teacher,
    )
    teacher = language_model(tmp_path / "other", tokens=tokenizer(eos="<end>"))
    refused(made, tmp_path, "tokenizers of student and teacher must be the same", teacher=teacher)
    teacher = language_model(tmp_path / "none", tokens=False)
    refused(made, tmp_path, "teacher must have a tokenizer in its directory", teacher=teacher)


def test_vocabularies_that_do_not_match(made, tmp_path):
    narrow = language_model(tmp_path / "narrow", vocab_size=V - 3)
    refused(made, tmp_path, f"for each of the tokenizer's {V} tokens, got {V - 3}", student=narrow)
    refused(made, tmp_path, f"each of vocab_size={V + 1}, got {V}", vocab_size=V + 1)
    refused(made, tmp_path, "token ids must be below 8, got", vocab_size=8)


def test_options_that_do_not_go_together(made, tmp_path):
    file = tmp_path / "x.safetensors"
    write = dict(teacher_predictions=file, write_teacher_predictions=True)
    refused(made, tmp_path, "needs a teacher and", write_teacher_predictions=True)
    refused(made, tmp_path, "tail goes with teacher_cache", tail="bucket")
    refused(
        made,
        tmp_path,
        "must end in .safetensors or .npy, got x.pt",
        **{**write, "teacher_predictions": "x.pt"},
    )
    refused(made, tmp_path, "length must be at most 64, the positions", length=65)
    refused(made, tmp_path, "temperature must be in", temperature=0.0)
    refused(made, tmp_path, "divergence", divergence="kl")
    refused(made, tmp_path, "beta", beta=0.5)
    refused(made, tmp_path, "unknown backend 'abacus'", backend="abacus")
    hint = {"student": "model.layers.7", "teacher": "model.layers.0"}
    refused(made, tmp_path, "no module 'model.layers.7'; similar ones: model.layers", hints=[hint])
    refused(made, tmp_path, "'wieght' is no option of a feature", hints=[{**hint, "wieght": 1}])
    refused(made, tmp_path, "hints must be of kind", hints=[{**hint, "kind": "logits"}])
    refused(made, tmp_path, "name a module of the teacher", hints=[{"student": "model"}])
    refused(made, tmp_path, "hints need the teacher itself", hints=[hint], **write)
    alone = dict(hints=[hint], teacher=None, alpha=0.0)
    refused(made, tmp_path, "hints need the teacher itself, not labels alone", **alone)


def test_a_file_of_other_inputs(made, tmp_path):
    np.save(tmp_path / "t.npy", np.zeros((3, 16, V), np.float32))
    refused(made, tmp_path, "inputs, got 3", teacher_predictions=tmp_path / "t.npy")


def command(made, tmp_path, *more):
    flags = ["--student", made / "student", "--data", made / "data", "--out", tmp_path / "out"]
    flags += ["--length", 16, "--no-tensorboard", *more]
    return ["distill", *map(str, flags)]


def test_the_command_with_options_of_a_file(made, tmp_path, capfd):
    path = tmp_path / "run.yaml"
    path.write_text(f"teacher: {made / 'teacher'}\nsteps: 500\nlearning_rate: 1e-3\n")
    assert cli.main(command(made, tmp_path, "--config", path, "--steps", 2)) == 0
    found = Config.load(tmp_path / "out" / "config.yaml")
    assert (found.steps, found.learning_rate) == (2, 1e-3)
    printed = capfd.readouterr()
    assert "student before" in printed.out and printed.err == ""
    # The run's own file is one of options, too.
    again = ["distill", "--config", str(tmp_path / "out" / "config.yaml")]
    assert cli.main(again) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "alpha must be 0 without a teacher"),
        (["--teacher", "nowhere"], "teacher must be a directory, nowhere is none"),
        (["--preset", "text"], "--preset goes without --student"),
        (["--sizes", "3"], "--sizes is no option of checkpoints: --student"),
        (["--config", "no.yaml"], "No such file or directory: 'no.yaml'"),
        (["--hints", "3", "--alpha", "0"], "hints must be a list, got 3"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(made, tmp_path, capsys, flags, message):
    assert cli.main(command(made, tmp_path, *flags)) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoints_are_code_2(made, tmp_path, capsys):
    flags = ["--alpha", 0, "--steps", 2]
    assert cli.main(command(made, tmp_path, *flags)) == 0
    for path in (tmp_path / "out" / "checkpoints").glob("*/tensors.safetensors"):
        path.write_bytes(b"")
    capsys.readouterr()
    assert cli.main(command(made, tmp_path, *flags)) == 2
    assert "no checkpoint can be used" in capsys.readouterr().err


def test_ctrl_c_is_code_130_and_the_same_command_goes_on(made, tmp_path):
    flags = command(made, tmp_path, "--teacher", made / "teacher", "--record-every", 1)
    line = [sys.executable, "-m", "kdkernels", *flags, "--steps"]
    with subprocess.Popen(
        [*line, "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        log = tmp_path / "out" / "log.csv"
        while not (log.exists() and log.read_text().count("\n") > 1):  # a step was taken
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        try:
            _, errors = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode == 130
    (path,) = (tmp_path / "out" / "checkpoints").iterdir()
    step = int(path.name.rpartition("-")[2])
    assert errors == f"interrupted at step {step}: the same command goes on from there\n"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    image_model(root / "student", labels=["blue", "red"])
    image_model(root / "teacher", labels=["blue", "red"], seed=1, hidden_size=32)
    images(root / "data")
    images(root / "test", count=4)
    return root


def test_image_classifiers(pictures, tmp_path):
    given = dict(test=pictures / "test", steps=30, temperature=2.0, alpha=0.2)
    results = Job(options(pictures, tmp_path, **given)).run()
    _, before, student = results["comparison"]
    assert student["accuracy"] == 1.0 and student["cross_entropy"] < before["cross_entropy"]
    assert "perplexity" not in student and results["notes"] == []
    saved = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out" / "student"
    )
    assert saved.config.id2label == {0: "blue", 1: "red"}


def test_a_student_without_names_has_the_labels_of_its_teacher(pictures, tmp_path):
    plain = image_model(tmp_path / "plain", num_labels=2)
    teacher = image_model(tmp_path / "named", labels=["red", "blue"])
    job = Job(options(pictures, tmp_path, student=plain, teacher=teacher))
    assert job.parts.train.labels == {"red": 0, "blue": 1}


def test_images_that_do_not_fit(pictures, tmp_path):
    def wrong(message, **changes):
        refused(pictures, tmp_path, message, **changes)

    data = shutil.copytree(pictures / "data", tmp_path / "data")
    (data / "red").rename(data / "green")
    wrong("among the model's labels blue, red, got green", data=data)
    wrong("vocab_size goes with language models", vocab_size=2)
    plain = image_model(tmp_path / "plain", num_labels=3)
    wrong(
        "folder for each of the model's 3 labels, got 2: blue, red",
        student=plain,
        teacher=None,
        alpha=0.0,
    )
    wrong("must have the same labels, got 2 and 3", teacher=plain)
    other = image_model(tmp_path / "other", labels=["red", "blue"])
    wrong(r"must have the same labels, 0 is \('blue', 'red'\)", teacher=other)
    large = image_model(tmp_path / "large", labels=["blue", "red"], image_size=16)
    wrong("must take images alike", teacher=large)


def test_texts_for_an_image_classifier(made, pictures, tmp_path):
    refused(made, tmp_path, "teacher must be for text", teacher=pictures / "teacher")
