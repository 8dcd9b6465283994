"""`bench cache` measures what is on disk, and says no more than that. Nothing is about speed."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("zstandard")
pytest.importorskip("mistral_common")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import command as bench  # noqa: E402
from benchmarks import results  # noqa: E402
from benchmarks.cache import command, pages, speed, students  # noqa: E402
from kdkernels import cache  # noqa: E402
from kdkernels.cache.kinds import most_probable  # noqa: E402
from kdkernels.distill.presets import text  # noqa: E402

TINY = text.BLOCK // 4


@pytest.fixture(scope="module")
def predicted():
    """What an untrained teacher says of three short blocks."""
    teacher = text.language_model(8, 0).requires_grad_(False)
    ids = torch.arange(3 * TINY).view(3, TINY)
    return students.Predicted(teacher, text.Blocks(ids), 60, seed=0)


def lines(budget, method, **scores):
    """Records of a student: of each score a value for each seed."""
    found = []
    for values in zip(*scores.values(), strict=True):
        same = dict(kind="topk:9", tokens=640, bytes_per_token=39.0, kept=0.5, stored_kl=1e-5)
        of_all = {field: 0.5 for field in students.SCORES}
        found.append({"alpha": 1.0, "budget": budget, "method": method, **same, **of_all})
        found[-1].update(zip(scores, values, strict=True))
    return found


# All of it


def test_a_run_writes_what_it_measured(tmp_path, capsys):
    assert bench.main(["cache", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    documents = {x["suite"]: x for x in map(_loaded, sorted(tmp_path.glob("*.json")))}
    assert set(documents) == {"cache-speed", "cache-students"}
    for document in documents.values():
        name = results.file_name(document["machine"], document["suite"], "some")
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == len(document["rows"])
        page = (tmp_path / f"{name}.summary.md").read_text()
        assert document["machine"]["commit"] in page and "zstandard" in page
        for block in [x for x in page.split("\n\n") if x.startswith("| ")]:
            assert len({row.count("|") for row in block.splitlines()}) == 1
        assert all(row["kind"] is None or row["kind"] in printed for row in document["rows"])

    for row in documents["cache-speed"]["rows"]:
        parts = [row[f"bytes_{part}"] for part in speed.PARTS]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(row["bytes"])
        assert row["bytes_tokens"] > 0
        assert (row["bytes_ids"] > 0) == row["kind"].startswith(("topk", "sampled"))
        for name in ("write", "first", "again"):
            assert 0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]
    assert "target" not in printed  # of so few classes nothing was promised

    rows = documents["cache-students"]["rows"]
    methods = [row["method"] for row in rows]
    assert methods[0] == students.TEACHER and rows[0]["kl"] == 0 and rows[0]["agreement"] == 1
    assert set(methods) == set(students.METHODS) - {students.LOGITS}  # none of them fits
    for row in rows[1:]:
        assert row["kl"] > 0 and row["perplexity"] > 1
        assert (row["kind"] is None) == (row["method"] in (students.HARD, students.LIVE))
        assert row["kind"] is None or 30 < row["bytes_per_token"] <= row["budget"]
    by_method = {row["method"]: row for row in rows}
    assert by_method[students.HIDDEN]["blocks"] == 1 < by_method[students.BUCKET]["blocks"]
    assert "<svg" in next(tmp_path.glob("*.svg")).read_text()[:500]


def test_pages_are_renewed_from_the_records(monkeypatch, tmp_path):
    document = {
        "suite": "cache-speed",
        "machine": results.machine(),
        "settings": vars(speed.Settings()),
        "rows": [_measured("topk:64", 512, bytes=180.0, again=2e6)],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("nothing to include")
    assert bench.main(["--include", str(page)]) == 0
    assert "| topk:64 | 512 |" in (tmp_path / "a.summary.md").read_text()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["speeds"], "unknown part speeds: expected speed or students"),
        (["--seeds", "0"], "argument --seeds: 0: expected at least 1"),
        (["--budgets", "many"], "argument --budgets: invalid positive value: 'many'"),
    ],
)
def test_wrong_arguments_say_what_is_expected(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["cache", *arguments])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(results, "versions", lambda *names: dict.fromkeys(names))
    with pytest.raises(SystemExit):
        bench.main(["cache"])
    assert "numpy is missing: pip install" in capsys.readouterr().err


def test_only_the_published_settings_replace_the_published_files():
    def some(*arguments):
        return command.chosen("students", command.make_parser().parse_args(arguments))[1]

    assert not some() and not some("--seeds", str(students.Settings.seeds))
    assert some("--quick") and some("--seeds", "9") and some("--alphas", "0.5")
    assert some("--budgets", "40")


# Students


def test_as_much_is_kept_as_fits(predicted, tmp_path):
    ids = predicted.blocks.ids
    for name, option in (("topk", "k"), ("sampled", "draws")):
        path, number = predicted.write_most(tmp_path / name, name, 50)
        assert getattr(cache.open(path).kind, option) == number > 1
        assert students.size(path) <= 50 * ids.numel()
        more = predicted.write(tmp_path / f"{name}-more", f"{name}:{number + 1}", ids)
        assert students.size(more) > 50 * ids.numel()


def test_caches_hold_what_the_teacher_says(predicted, tmp_path):
    ids = predicted.blocks.ids
    with torch.no_grad():
        head = predicted.teacher(input_ids=ids)
        logits = (head.hidden @ head.weight.T).flatten(0, 1)
    best = most_probable(logits, 5)
    stored = cache.open(predicted.write(tmp_path / "topk", "topk:5", ids))
    read = stored[ids]
    assert torch.equal(read.ids.flatten(0, 1).long(), best["ids"].sort(-1).values)
    lost = predicted.topk_lost(stored, 5)
    assert lost["kept"] == pytest.approx(best["logprobs"].exp().sum(-1).mean().item(), rel=1e-5)
    assert 0 < lost["stored_kl"] < 1e-4

    drawn = cache.open(predicted.write(tmp_path / "sampled", "sampled:7", ids))[ids]
    counts = torch.zeros(logits.shape).scatter_add(
        -1,
        drawn.ids.flatten(0, 1).long().clamp(min=0),
        drawn.counts.flatten(0, 1).float(),
    )
    ones = torch.ones(len(logits), 7)
    first = predicted.drawn.flatten(0, 1)[:, :7].long()
    assert torch.equal(counts, torch.zeros(logits.shape).scatter_add(-1, first, ones))

    whole = cache.open(predicted.write(tmp_path / "dense", "dense:fp32", ids[:1]))
    assert abs(predicted.exact_lost(whole, ids[:1])) < 1e-6
    other = students.Predicted(text.language_model(8, 1), predicted.blocks, 2, seed=0)
    assert other.exact_lost(whole, ids[:1]) > 1e-4


def test_what_is_lost_is_compared_as_students_get_it():
    p = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    assert students.whole(p, "bucket").tolist() == [[0.5, 0.25, 0.25]]
    assert students.whole(p, "renormalize")[0].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_whole_predictions_are_those_of_fewer_blocks_or_of_a_part(predicted):
    one = (2 * text.VOCABULARY * TINY) / predicted.blocks.ids.numel()  # a block's logits, about

    def shape(budget):
        found = list(students.whole_predictions(predicted, students.LOGITS, "dense:fp16", budget))
        return found and tuple(found[0][3].ids.shape)

    assert shape(2 * one) == (2, TINY) and shape(9 * one) == (3, TINY)
    part = shape(one / 2)
    assert part[0] == 1 and TINY / 3 < part[1] < TINY
    assert shape(one / TINY) == []  # one token has no label


@pytest.mark.parametrize("most", (0, 1, 2, 7, 100))
def test_the_largest_that_fits_is_found(most):
    for limit in range(most + 1):
        tried = []

        def fits(n, limit=limit, tried=tried):
            tried.append(n)
            return n <= limit

        assert students.largest(fits, most) == limit
        assert max(tried, default=0) <= max(1, 2 * limit), "it is written to disk"


# What is said


def test_the_best_and_what_differs_from_it_by_chance_are_bold():
    records = [
        *lines(40, students.BUCKET, perplexity=(100, 110, 120), kl=(1, 1, 1)),
        # Always 1 more: seeds differ by far more, but that is not what counts.
        *lines(40, students.RENORMALIZED, perplexity=(101, 111, 121), kl=(1.5, 0.4, 1.4)),
        *lines(40, students.SAMPLED, perplexity=(95, 114, 122), kl=(2, 2, 2.1)),
        *lines(99, students.BUCKET, perplexity=(9, 9, 9.5), kl=(1, 1, 1)),
    ]
    rows = {(row[1], row[2]): row for row in pages.student_rows(records)}
    place = pages.STUDENT_HEADER.index("perplexity")
    shown = {method: row[place] for (budget, method), row in rows.items() if budget == "40"}
    assert shown[students.BUCKET] == "**110.0 ± 5.8**"
    assert shown[students.RENORMALIZED] == "111.0 ± 5.8"
    assert shown[students.SAMPLED].startswith("**110.3")
    kl = pages.STUDENT_HEADER.index("KL from the teacher")
    bold = [method for (budget, method), row in rows.items() if budget == "40" and "**" in row[kl]]
    assert set(bold) == {students.BUCKET, students.RENORMALIZED}
    assert "**" in rows["99", students.BUCKET][place]


def test_of_one_seed_nothing_is_said_to_be_better():
    records = lines(40, students.BUCKET, kl=(1,)) + lines(40, students.SAMPLED, kl=(2,))
    rows = str(pages.student_rows(records))
    assert students.SAMPLED in rows and "**" not in rows and "±" not in rows


def test_targets_are_judged_by_a_realistic_teacher_at_every_length():
    rows = [
        _measured("topk:64", 64, bytes=201.0, again=9e5),
        _measured("topk:64", 512, bytes=200.0, again=1e6),
        _measured("topk:64", 512, bytes=999.0, again=1.0, teacher="even"),
    ]
    found = [(row[0], row[1], row[3], row[-1]) for row in pages.target_rows(rows)]
    assert found == [
        ("topk:64", "64", "≥ 1,000,000", "missed"),
        ("topk:64", "512", "≥ 1,000,000", "met"),
        ("topk:64", "64", "≤ 200", "missed"),
        ("topk:64", "512", "≤ 200", "met"),
    ]


def test_no_format_could_keep_draws_of_an_even_teacher_in_the_target():
    document = {
        "settings": vars(speed.Settings()),
        "rows": [_measured("sampled:50", 512, teacher="even", distinct=50.0)],
        "machine": results.machine(),
    }
    bits = sum(math.log2((151_936 - k) / (k + 1)) for k in range(50))
    assert 40 < bits / 8 and f"are {bits / 8:.0f} bytes by counting" in pages.speed_page(document)


def _measured(kind, length, teacher=speed.REALISTIC, **known):
    fields = ["bytes", *(f"bytes_{part}" for part in speed.PARTS)]
    for name in ("write", "first", "again"):
        fields += [name, f"{name}_min", f"{name}_max"]
    fields += ["distinct", "workers_1", "workers_2"]
    return dict(kind=kind, length=length, teacher=teacher) | dict.fromkeys(fields, 1.0) | known


def _loaded(path):
    return json.loads(Path(path).read_text())
