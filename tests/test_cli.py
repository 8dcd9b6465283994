import json
import subprocess
import sys

import numpy as np
import pytest

from kdkernels import cache, cli

pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
pytest.importorskip("rich", reason="the extra `train` is not installed")
pytest.importorskip("jinja2", reason="the extra `train` is not installed")
pytest.importorskip("yaml", reason="the extra `train` is not installed")

PICTURES = ("soft_targets.png", "error_against_temperature.png", "learning_curves.png")
SMALL = ["--steps", "10", "--seeds", "2", "--sizes", "30", "60", "--temperatures", "8", "1"]


def distill(*arguments):
    return cli.main(["distill", "--preset", "digits", *map(str, arguments)])


def test_the_demo_in_small(tmp_path, capsys):
    out, logits = tmp_path / "deep" / "out", tmp_path / "teacher.npy"
    assert distill("--out", out, "--teacher-logits", logits, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "60 labels:" in printed.splitlines()[-1] and "T = 8" in printed.splitlines()[-1]
    for picture in PICTURES:
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert (out / "report.html").read_text().count("<img") == len(PICTURES)
    results = json.loads((out / "results.json").read_text())
    cells = [(run["size"], run["temperature"]) for run in results["runs"]]
    assert cells == [(30, None), (30, 1.0), (30, 8.0), (60, None), (60, 1.0), (60, 8.0)]
    assert all(len(run["errors"]) == len(run["agreement"]) == 2 for run in results["runs"])
    assert (results["teacher"]["parameters"], results["student"]["parameters"]) == (571230, 17610)
    assert results["teacher"]["latency_us"] > 0 and results["student"]["latency_us"] > 0

    # The second run reads the teacher that the first one wrote, and gets the same students.
    saved = logits.read_bytes()
    assert np.load(logits, allow_pickle=False).shape == (1000, 10)
    assert distill("--out", tmp_path, "--teacher-logits", logits, *SMALL) == 0
    assert "teacher was read from" in capsys.readouterr().out
    again = json.loads((tmp_path / "results.json").read_text())
    assert [run["errors"] for run in again["runs"]] == [run["errors"] for run in results["runs"]]
    assert again["teacher"] == dict(errors=None, parameters=None, latency_us=None)
    assert again["runs"][0]["agreement"] is None
    assert logits.read_bytes() == saved


def test_one_seed_has_no_standard_error(tmp_path):
    np.save(tmp_path / "t.npy", np.eye(10)[np.arange(1000) % 10])
    few = ["--steps", 1, "--seeds", 1, "--sizes", 10, "--temperatures", 2]
    assert distill("--out", tmp_path, "--teacher-logits", tmp_path / "t.npy", *few) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"][0]["standard_error"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", 0], "seeds must be at least 1, got 0"),
        (["--steps", -5], "steps must be at least 1, got -5"),
        (["--sizes", 100, 1001], "sizes must be in [1, 1000], got 1001"),
        (["--temperatures", 0], "temperature must be in"),
        (["--temperatures", "nan"], "temperature must be in"),
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--teacher-logits", __file__], "teacher_logits must be a .npy file"),
        (["--out", __file__], "File exists"),
        (["--teacher-logits", f"{__file__}/t.npy", *SMALL], "File exists"),
    ],
)
def test_a_wrong_argument_is_one_line_and_code_2(tmp_path, capsys, arguments, message):
    assert distill("--out", tmp_path / "out", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--alpha", "0.5"], "--alpha is no option of the preset digits: --out --sizes"),
        (["distill", "--length", "3"], "--length is no option of the preset digits"),
        (["distill", "--data", "texts"], "student must be given"),
        (["distill", "--teacher", "large"], "student must be given"),
        (["distill", "--teacher-cache", "c"], "student must be given"),
        (["distill", "--config", "/nowhere.yaml"], "No such file or directory"),
    ],
)
def test_options_and_files_that_are_none(capsys, arguments, message):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_predictions_of_other_programs(tmp_path, capsys):
    pytest.importorskip("zstandard", reason="the extra `cache` is not installed")
    lines, out = tmp_path / "served.jsonl", tmp_path / "served"
    sample = {"token_ids": [5, 2], "ids": [[1, 7], [3]], "logprobs": [[-0.5, -2.0], [-0.25]]}
    lines.write_text(json.dumps(sample))
    come = ["cache", "import", str(lines), "--teacher", "served", "--out"]
    assert cli.main([*come, str(out), "--kind", "topk:2", "--vocab-size", "9"]) == 0
    assert capsys.readouterr().out.startswith("2 predictions of 1 samples, ")
    stored = cache.open(out)
    assert stored[[5, 2]].ids.tolist() == [[1, 7], [3, -1]]
    assert (stored.description["teacher"]["name"], stored.description["vocab_size"]) == (
        "served",
        9,
    )

    logits, ids = (
        np.random.default_rng(0).normal(size=(3, 2, 9)).astype(np.float32),
        tmp_path / "i.npy",
    )
    np.save(tmp_path / "logits.npy", logits)
    np.save(ids, np.array([[1, 2], [3, 4], [5, 6]]))
    come[2] = str(tmp_path / "logits.npy")
    assert cli.main([*come, str(tmp_path / "all"), "--inputs", str(ids)]) == 0
    np.save(ids, np.array([[5, 6], [1, 2]]))
    go = ["cache", "export", str(tmp_path / "all"), str(tmp_path / "back.npy"), "--inputs"]
    assert cli.main([*go, str(ids)]) == 0
    assert np.array_equal(np.load(tmp_path / "back.npy"), logits[[2, 0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "x.jsonl", "--teacher", "t"], "--vocab-size must be given for lines"),
        (["import", "x.npy", "--teacher", "t"], "--inputs goes with logits, a .npy file"),
        (["import", "x.jsonl", "--inputs", "i.npy", "--teacher", "t"], "--inputs goes with logits"),
        (["import", "x.jsonl", "--vocab-size", "99", "--teacher", "t"], "No such file"),
        (["import", "wrong.jsonl", "--vocab-size", "99", "--teacher", "t"], "wrong.jsonl, line 1"),
        (["import", "far.jsonl", "--vocab-size", "99", "--teacher", "t"], "far.jsonl, line 1"),
        (["import", "x.jsonl", "--teacher", "t", "--tokenizer", "n"], "tokenizer must have a"),
        (["export", "none", "x.npy", "--inputs", "none.npy"], "none.npy"),
    ],
)
def test_wrong_exchange_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    pytest.importorskip("zstandard", reason="the extra `cache` is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.jsonl").write_text("[]")
    (tmp_path / "far.jsonl").write_text('{"token_ids": [1], "ids": [[777]], "logprobs": [[0]]}')
    if "--tokenizer" in arguments:
        arguments = [*arguments, "--vocab-size", "9"]
    assert cli.main(["cache", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_technique_and_its_report(tmp_path, capsys):
    few = ["--technique", "unlabelled", "--steps", 5, "--seeds", 1]
    assert distill("--out", tmp_path, *few) == 0
    assert json.loads((tmp_path / "results.json").read_text())["technique"] == "unlabelled"
    capsys.readouterr()
    (tmp_path / "report.html").unlink()  # every run leaves one
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert b"<html" in (tmp_path / "report.html").read_bytes()
    assert distill("--out", tmp_path, "--technique", "alchemy") == 2
    assert "technique must be one of" in capsys.readouterr().err
    assert distill("--out", tmp_path, "--sizes", 3, *few) == 2
    assert "--sizes is no option of a technique: --out --technique" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_sweep(tmp_path, capsys):
    few = ["--steps", "5", "--seeds", "1", "--size", "10", "--temperatures", "2", "--alphas"]
    assert cli.main(["sweep", "--out", str(tmp_path), *few, "0.5", "1"]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["trials"]) == 2
    assert cli.main(["sweep", "--out", str(tmp_path), "--size", "0"]) == 2
    assert "size must be in" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["distill", "sweep", "report"])
def test_help_teaches_by_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m kdkernels {command} " in capsys.readouterr().out.partition("example")[2]


@pytest.mark.parametrize("action", ["build", "verify", "info", "import", "export"])
def test_help_of_an_action_of_the_cache(capsys, action):
    with pytest.raises(SystemExit) as stop:
        cli.main(["cache", action, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m kdkernels cache {action} ")
    assert f"python -m kdkernels cache {action} " in printed.partition("example")[2]


def test_presets_are_imported_when_they_run():
    program = "import sys; from kdkernels import cli; cli.main(['info'])\n"
    program += "print(*sys.modules, file=sys.stderr)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(run.stderr.split())
    assert "kdkernels.distill.presets.digits" in loaded
    for module in ("transformers", "accelerate", "rich", "matplotlib", "yaml", "PIL"):
        assert module not in loaded
    assert "kdkernels.distill.presets.digits_demo" not in loaded


@pytest.mark.parametrize(
    "arguments",
    [[], ["teach"], ["distill", "--preset", "faces"], ["cache"], ["cache", "burn"]],
)
def test_an_unknown_command_or_preset_is_code_2(arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_usage_of_the_cache_has_what_must_be_given(capsys):
    for command, wanted in ((["cache"], "ACTION"), (["cache", "import"], "FILE --teacher NAME")):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        usage = f"usage: python -m kdkernels {' '.join(command)} {wanted} [options]\n"
        assert capsys.readouterr().out.startswith(usage)


def test_help_is_code_0(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["distill", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "--teacher-logits" in printed.out


def test_python_m_kdkernels():
    command = [sys.executable, "-m", "kdkernels", "info"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stderr == "" and "torch" in run.stdout


def test_a_training_that_fails_is_code_1(tmp_path, capsys, monkeypatch):
    from kdkernels.distill import TrainingError
    from kdkernels.distill.presets import digits_demo

    def run(demo):
        raise TrainingError("none of the 3 steps had a finite gradient")

    monkeypatch.setattr(digits_demo.Demo, "run", run)
    assert distill("--out", tmp_path) == 1
    assert capsys.readouterr().err == (
        "python -m kdkernels distill: error: none of the 3 steps had a finite gradient\n"
    )
