"""Choosing options: every combination, Optuna's choice, and what happens to trials that fail."""

import json
import math

import numpy as np
import pytest
import torch

from kdkernels.distill import html
from kdkernels.distill.presets import sweep_demo
from kdkernels.distill.sweep import Trial, grid, search

pytest.importorskip("rich", reason="the extra `train` is not installed")
pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
pytest.importorskip("optuna", reason="the extra `train` is not installed")
pytest.importorskip("jinja2", reason="the extra `train` is not installed")


def bowl(temperature, alpha):
    """Smallest at T = 4, alpha = 0.7."""
    return math.log(temperature / 4) ** 2 + (alpha - 0.7) ** 2


def test_a_grid_has_every_combination_and_the_best_first():
    found = grid(bowl, temperature=[1, 4, 16], alpha=[0.5, 0.9, 0.6])
    assert len({(x.options["temperature"], x.options["alpha"]) for x in found}) == 9
    assert found[0] == Trial(dict(temperature=4, alpha=0.6), bowl(4, 0.6))
    assert [x.score for x in found] == sorted(bowl(**x.options) for x in found)


def test_a_grid_of_numpy():
    found = grid(bowl, temperature=np.array([1.0, 4.0]), alpha=np.array([0.7]))
    assert [x.options["temperature"] for x in found] == [4.0, 1.0]


def test_of_equal_scores_the_first_one_tried_is_the_best():
    found = grid(lambda temperature: 1.0, temperature=[3, 1, 2])
    assert [x.options["temperature"] for x in found] == [3, 1, 2]


def test_a_search_is_that_of_its_seed():
    def run(seed):
        return search(bowl, 15, seed=seed, temperature=(1.0, 20.0), alpha=(0.0, 1.0))

    first = run(0)
    assert run(0) == first != run(1)
    assert [x.score for x in first] == sorted(bowl(**x.options) for x in first)
    assert all(1 <= x.options["temperature"] <= 20 for x in first)
    assert all(0 <= x.options["alpha"] <= 1 for x in first)


def test_a_search_learns_from_its_scores():
    tried = []

    def train(temperature):
        tried.append(abs(math.log(temperature / 4)))
        return tried[-1]

    search(train, 60, temperature=(0.01, 100.0))
    assert sum(tried[-20:]) < 0.75 * sum(tried[:20])  # measured, of four seeds: 0.33 to 0.60


def test_a_wide_range_is_tried_on_a_log_scale():
    found = search(lambda x: 0.0, 40, x=(0.001, 1000.0))
    assert 10 <= sum(trial.options["x"] < 1 for trial in found) <= 30
    found = search(lambda x: 0.0, 40, x=(0.0, 1000.0))
    assert sum(trial.options["x"] < 1 for trial in found) <= 2


def fails_at_two(temperature):
    if 1.5 < temperature < 2.5:
        raise FloatingPointError("overflow")
    return math.nan if temperature < 1.5 else temperature


def test_what_has_no_score_comes_last_and_is_said():
    with pytest.warns() as warned:
        found = grid(fails_at_two, temperature=[1, 2, 4, 3])
    assert [x.options["temperature"] for x in found] == [3, 4, 1, 2]
    assert math.isnan(found[2].score) and math.isnan(found[3].score)
    assert [str(x.message) for x in warned] == [
        "the trial with temperature=1 scored NaN: it comes last",
        "the trial with temperature=2 failed: FloatingPointError('overflow')",
    ]
    assert {x.filename for x in warned} == {__file__}


def test_a_search_goes_on_after_a_failure():
    with pytest.warns(UserWarning, match="FloatingPointError"):
        found = search(fails_at_two, 12, temperature=(1.6, 5.0))
    assert len(found) == 12 and math.isnan(found[-1].score)
    scored = [x.score for x in found if not math.isnan(x.score)]
    assert len(scored) >= 3 and scored == sorted(scored)


@pytest.mark.parametrize("tried", (grid, search))
def test_nothing_but_failures_is_an_error(tried):
    arguments = ((fails_at_two,), [2]) if tried is grid else ((fails_at_two, 3), (1.6, 2.4))
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="none of . trials has"):
        tried(*arguments[0], temperature=arguments[1])


def test_an_interruption_is_no_failure():
    def train(temperature):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid(train, temperature=[1, 2])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "values must have an option", lambda: grid(bowl)),
        (ValueError, r"alpha must have values to try, got \[\]", lambda: grid(bowl, alpha=[])),
        (ValueError, "trials must be at least 1", lambda: search(bowl, 0, alpha=(0, 1))),
        (TypeError, "trials must be an int", lambda: search(bowl, 1.0, alpha=(0, 1))),
        (ValueError, "ranges must have an option", lambda: search(bowl, 1)),
        (ValueError, r"alpha must be \(low, high\)", lambda: search(bowl, 1, alpha=(1, 0))),
        (ValueError, r"alpha must be .* got 0.5", lambda: search(bowl, 1, alpha=0.5)),
        (ValueError, r"alpha must be .* got \(0, 1, 2\)", lambda: search(bowl, 1, alpha=(0, 1, 2))),
        (ValueError, "alpha must be .*nan", lambda: search(bowl, 1, alpha=(0, math.nan))),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A grid of 2 · 2, at a third of the steps."""
    folder = tmp_path_factory.mktemp("sweep")
    options = dict(temperatures=[8.0, 1.0], alphas=[1.0, 0.0], seeds=3, steps=200)
    return folder, sweep_demo.Demo(folder, **options).run()


def test_the_sweep_of_digits(swept):
    folder, results = swept
    assert json.loads((folder / "results.json").read_text()) == results
    trials = results["trials"]
    assert len(trials) == 4
    assert [x["score"] for x in trials] == sorted(x["score"] for x in trials)
    # alpha = 0 reads no teacher: hard labels at every temperature.
    hard = {x["score"] for x in trials if x["options"]["alpha"] == 0}
    assert len(hard) == 1 and trials[0]["options"] == {"temperature": 8.0, "alpha": 1.0}
    assert trials[0]["score"] < hard.pop()
    teacher, before, after = results["comparison"]
    assert before["errors"] > after["errors"] > 0
    assert before["errors"] == pytest.approx((1 - before["accuracy"]) * 797)
    assert after["agreement"] > before["agreement"]
    assert before["parameters"] == 17_610 < teacher["parameters"]
    assert [x["values"][-1] for x in results["curves"]] == [trials[-1]["score"], trials[0]["score"]]
    assert f"{before['errors']:.1f} → {after['errors']:.1f} errors" in results["notes"][0]
    assert "T = 8 is the highest tried" in results["notes"][1]
    page = html.write(folder).read_text("utf-8")
    assert page.count("<img") == 2 and results["notes"][0] in page


def test_splits_of_the_sweep_share_no_image(tmp_path):
    demo = sweep_demo.Demo(tmp_path)
    splits = [demo.train_split, demo.validation_split, demo.test_split]
    assert [len(x.labels) for x in splits] == [700, 300, 797]
    assert len(torch.cat([x.images for x in splits]).unique(dim=0)) == 1797


def test_the_optimiser_sweeps_digits(tmp_path, capsys):
    options = dict(temperatures=[1.0, 20.0], alphas=[0.5, 1.0], trials=3, seeds=2, steps=20)
    first = sweep_demo.Demo(tmp_path / "a", **options).run()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == first["notes"][0] and last.startswith("100 labels: ")
    assert len(first["trials"]) == 3
    for trial in first["trials"]:
        assert 1 <= trial["options"]["temperature"] <= 20 and 0.5 <= trial["options"]["alpha"] <= 1
    assert sweep_demo.Demo(tmp_path / "b", **options).run()["trials"] == first["trials"]
    assert (tmp_path / "a" / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"size must be in \[1, 700\], got 701", dict(size=701)),
        (ValueError, "seeds must be at least 1", dict(seeds=0)),
        (ValueError, "steps must be at least 1", dict(steps=0)),
        (ValueError, "trials must be at least 1", dict(trials=0)),
        (ValueError, "must not be empty", dict(alphas=[])),
        (ValueError, "temperature must be in", dict(temperatures=[0.0])),
        (ValueError, "alpha must be in", dict(alphas=[1.5])),
        (ValueError, "unknown backend", dict(backend="fast")),
    ],
)
def test_bad_options_of_the_sweep(tmp_path, error, message, options):
    with pytest.raises(error, match=message):
        sweep_demo.Demo(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
