"""One list of options: in a file, on the command line, in Python."""

import argparse
import dataclasses

import pytest

pytest.importorskip("yaml", reason="the extra `train` is not installed")

from kdkernels.distill.jobs import config  # noqa: E402
from kdkernels.distill.jobs.config import Config  # noqa: E402

LEAST = dict(student="s", data="d")


def test_what_is_dumped_is_loaded(tmp_path):
    hints = [{"student": "a.1", "teacher": "b.2", "weight": 0.5}]
    whole = Config(teacher="t", steps=7, alpha=0.25, hints=hints, clip_norm=None, **LEAST)
    whole.dump(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == whole
    changed = Config.load(tmp_path / "config.yaml", alpha=0.5, seed=3)
    assert changed == dataclasses.replace(whole, alpha=0.5, seed=3)
    assert config.differences(whole, changed) == ["alpha", "seed"]


def test_a_file_names_what_it_changes_only(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("student: s\ndata: d\nlearning_rate: 1e-3\ntemperature: 2\n")
    assert Config.load(path) == Config(learning_rate=1e-3, temperature=2, **LEAST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature: 2", "'temprature' is not an option; near: temperature"),
        ("learning-rate: 2", "'learning-rate' is not an option; near: learning_rate"),
        ("xyzzy: 2", "'xyzzy' is not an option$"),
        ("3: 2", "3 is not an option$"),
        ("[1, 2]", "must have a line `option: value` for each, got a list"),
        ("a: [", "must be YAML"),
    ],
)
def test_files_that_are_no_options(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Config.load(path, **LEAST)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        (dict(batch_size="many"), TypeError, "batch_size must be an integer, got 'many'"),
        (dict(batch_size=2.0), TypeError, "batch_size must be an integer, got 2.0"),
        (dict(batch_size=None), TypeError, "batch_size must be an integer, got None"),
        (dict(batch_size=True), TypeError, "batch_size must be an integer, got True"),
        (dict(steps=[1]), TypeError, r"steps must be an integer or nothing, got \[1\]"),
        (dict(alpha="half"), TypeError, "alpha must be a number, got 'half'"),
        (dict(tensorboard="yes"), TypeError, "tensorboard must be true or false, got 'yes'"),
        (dict(teacher=3), TypeError, "teacher must be text or nothing, got 3"),
        (dict(hints={"student": "a"}), TypeError, "hints must be a list"),
        (dict(hints="{"), ValueError, "hints must be YAML"),
        (dict(student=""), ValueError, "student must be given"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(workers=-1), ValueError, "workers must be at least 0, got -1"),
        (dict(learning_rate=0.0), ValueError, "learning_rate must be positive and finite, got 0"),
        (dict(weight_decay="nan"), ValueError, "weight_decay must be at least 0, got nan"),
        (dict(test_share=1.0), ValueError, r"test_share must be in \(0, 1\), got 1"),
        (dict(scheduler="step"), ValueError, "scheduler must be one of constant, linear, cosine"),
        (dict(mixed_precision="int8"), ValueError, "mixed_precision must be one of no, bf16, fp16"),
        (dict(steps=1, epochs=1), ValueError, "steps and epochs must not both be given"),
    ],
)
def test_wrong_values(option, error, message):
    with pytest.raises(error, match=message):
        Config.of({**LEAST, **option})


def test_the_command_line_has_the_same_options():
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    assert vars(parser.parse_args([])) == {}
    flags = ["--student", "s", "--data", "d", "--alpha", "1", "--no-tensorboard"]
    flags += ["--hints", "[{student: a, teacher: b}]", "--write-teacher-predictions"]
    found = Config.of(vars(parser.parse_args(flags)))
    hints = [{"student": "a", "teacher": "b"}]
    given = dict(alpha=1.0, tensorboard=False, write_teacher_predictions=True)
    assert found == Config(hints=hints, **given, **LEAST)
    text = parser.format_help()
    for each in config.fields():
        assert f"--{each.name.replace('_', '-')}" in text and each.metadata["help"]
