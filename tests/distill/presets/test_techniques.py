"""Each technique on the digits, with few steps: what it is about, and what a run leaves."""

import itertools
import json

import pytest
import torch
from torch import nn

import kdkernels as kdk
from kdkernels import KDLoss
from kdkernels.distill import Distiller, SeveralTeachers, predict
from kdkernels.distill.offline import open_predictions, write_predictions
from kdkernels.distill.presets import digits, techniques
from kdkernels.distill.presets.study import Study, mlp, small
from kdkernels.distill.presets.techniques import TECHNIQUES
from kdkernels.distill.presets.techniques_demo import PICTURE, Demo

for package in ("matplotlib", "rich", "safetensors", "scipy", "zstandard"):
    pytest.importorskip(package, reason="the extra `train` is not installed")


@pytest.fixture(autouse=True, scope="module")
def quick():
    with digits.one_thread():
        yield


def study_of(technique, steps, seeds=2, out=None):
    """-> {name of a row: the row}, what the technique says of it, the study."""
    study = Study(out, seeds=seeds, steps=steps)
    said = TECHNIQUES[technique](study)
    return {row["name"]: row for row in study.comparison}, said, study


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_teacher_comes_first_and_helps():
    rows, said, _ = study_of("teacher-first", 250, seeds=1)
    teacher, labels, soft, both = rows.values()
    assert teacher["errors"] + 20 < soft["errors"] < labels["errors"] - 15
    assert both["errors"] < labels["errors"] - 15
    assert teacher["parameters"] > 30 * soft["parameters"]
    assert said.startswith(f"100 images: {labels['errors']:.1f} errors with labels")


def test_an_unlabelled_student_agrees_with_its_teacher(monkeypatch):
    given, fit = [], Study.fit

    def spy(study, model, teacher, images, labels=None, **options):
        given.append((teacher, images, labels))
        return fit(study, model, teacher, images, labels, **options)

    monkeypatch.setattr(Study, "fit", spy)
    rows, _, study = study_of("unlabelled", 250, seeds=1)
    teacher, _, soft = rows.values()
    assert soft["agreement"] > 0.93
    # Nothing of the teacher but logits, none of its own images, no labels.
    seen, images, labels = given[-1]
    assert seen.shape == (500, 10) and labels is None
    assert torch.equal(images, study.train.images[500:])


def test_a_digit_that_was_never_seen_is_recognised():
    rows, said, study = study_of("missing-digit", 200, seeds=1)
    teacher, hard, soft, raised = rows.values()
    assert hard["3s recognised"] == 0 < soft["3s recognised"] < raised["3s recognised"]
    assert raised["3s recognised"] > 0.75 and teacher["3s recognised"] > 0.95
    assert raised["errors"] + 30 < hard["errors"]
    assert study.notes[0].startswith("The bias was raised by ")


def test_the_bias_is_the_middle_of_the_best():
    """Every image has 1 at its class, the 3s have 1.5 less: what adds 0.5 to 2.5 is right."""
    images, model = torch.eye(10).repeat(3, 1), nn.Sequential(nn.Linear(10, 10))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(10))
        model[0].bias.copy_(-1.5 * torch.eye(10)[3])
    found = techniques._best_bias(model, digits.Split(images, torch.arange(30) % 10))
    assert found == pytest.approx(1.5, abs=0.11)
    raised = techniques._with_bias(model, found)
    assert torch.equal(raised(images).argmax(-1), torch.arange(30) % 10)
    assert model[0].bias[3] == -1.5


@pytest.mark.parametrize("suffix", (".npy", ".safetensors"))
def test_a_stored_teacher_teaches_as_the_present_one_bit_for_bit(tmp_path, suffix):
    images = digits.load()[0].images[:60]
    teacher = nn.Linear(64, 10)
    with torch.no_grad():  # sums of sixteenths, exact in any order
        for each in teacher.parameters():
            each.copy_((16 * each).round() / 16)
    path = tmp_path / f"teacher{suffix}"
    write_predictions(path, teacher, images, batch_size=7)
    students = []
    for each in (teacher, open_predictions(path)):
        student, loss = small(0), KDLoss(temperature=4.0)
        Distiller(student, each, images, loss=loss, batch_size=25).train(10)
        students.append(student)
    assert same_bits(*students)
    assert not same_bits(students[0], small(0))


def test_offline_files(tmp_path):
    rows, _, _ = study_of("offline", 60, out=tmp_path)
    memory, stored, top = (rows[name] for name in list(rows)[2:])
    for key in ("errors", "cross_entropy", "agreement"):
        assert stored[key] == pytest.approx(memory[key], rel=1e-3)
    assert stored["file bytes"] == (tmp_path / "teacher_logits.safetensors").stat().st_size
    assert top["file bytes"] == (tmp_path / "teacher_top3" / "shard-00000.kdc").stat().st_size
    assert top["errors"] < rows["labels"]["errors"] + 30


def test_an_ensemble_is_that_of_the_loss():
    images = digits.load()[0].images[:40]
    teachers = [small(seed) for seed in (1, 2, 3)]
    student, weights = small(0), [3, 1, 2]
    logits = [predict(each, images) for each in teachers]
    expected = kdk.kd_loss(student(images), kdk.Ensemble(logits, weights), temperature=4.0)
    several = SeveralTeachers(teachers, weights)
    distiller = Distiller(student, several, images, loss=KDLoss(temperature=4.0))
    assert distiller.train(1).losses[0] == pytest.approx(expected.item(), rel=1e-6)


def test_who_has_seen_more_has_more_weight():
    rows, _, _ = study_of("ensemble", 120)
    errors = [row["errors"] for row in rows.values()]
    assert errors[0] > errors[1] > errors[2]  # of the teachers
    _, alike, weighted = errors[3:]
    assert weighted < alike


def test_specialists_know_what_the_generalist_confuses():
    rows, _, study = study_of("specialists", 200)
    alone, joined, _, _ = rows.values()
    assert joined["errors"] <= alone["errors"] and joined["cross_entropy"] < alone["cross_entropy"]
    named = [note.removeprefix("A specialist for ").rstrip(".") for note in study.notes]
    digits_named = sorted(int(each) for each in ", ".join(named).split(", "))
    assert digits_named == list(range(10))


def test_a_specialist_starts_as_the_generalist(monkeypatch):
    study = Study(None, seeds=1, steps=1)
    monkeypatch.setattr(study, "fit", lambda *arguments, **options: None)
    generalist, classes = small(0), torch.tensor([2, 7])
    model, correction = techniques._specialist(study, generalist, torch.arange(200), classes)
    images = study.test.images
    logits, of_all = model(images), generalist(images)
    torch.testing.assert_close(logits[:, :2], of_all[:, classes])
    others = [k for k in range(10) if k not in (2, 7)]
    torch.testing.assert_close(logits[:, 2], of_all[:, others].mean(1))
    assert correction > 0 and generalist[-1].out_features == 10


@pytest.mark.parametrize("technique", ("hints", "attention"))
def test_hints_grow_smaller_and_leave_nothing_in_the_student(monkeypatch, technique):
    lessons, fit = [], Study.fit

    def spy(study, model, *arguments, **options):
        keys = list(model.state_dict())
        lessons.append(fit(study, model, *arguments, **options))
        assert list(model.state_dict()) == keys
        return lessons[-1]

    monkeypatch.setattr(Study, "fit", spy)
    study_of(technique, 60)
    assert "hints" not in lessons[-3].terms[-1]  # soft targets alone
    for history in lessons[-2:]:
        assert 0 < history.terms[-1]["hints"] < 0.7 * history.terms[0]["hints"]


def test_the_projection_of_a_hint_is_learned():
    images = digits.load()[0].images[:50]
    teacher, student = mlp(0, 64, 40, 10), mlp(1, 64, 20, 10)
    hint = kdk.distill.FeatureHint("relu1", "relu1")
    distiller = Distiller(student, teacher, images, loss=KDLoss(), hints=[hint])
    (hint,) = distiller.hints
    before = hint.projection.weight.detach().clone()
    distiller.train(3)
    assert hint.projection.weight.shape == (40, 20)
    assert not torch.equal(before, hint.projection.weight)


def test_every_generation_teaches_the_next(monkeypatch):
    lessons, fit = [], Study.fit

    def spy(study, model, teacher, *arguments, **options):
        lessons.append((model, teacher))
        return fit(study, model, teacher, *arguments, **options)

    monkeypatch.setattr(Study, "fit", spy)
    rows, _, _ = study_of("born-again", 40)
    families = [lessons[:4], lessons[4:]]  # of a seed each
    for family in families:
        students = [model for model, _ in family]
        assert [teacher for _, teacher in family] == [None, *students[:-1]]
        assert not any(same_bits(a, b) for a, b in itertools.combinations(students, 2))
    *single, together = rows.values()
    assert together["parameters"] == 4 * single[0]["parameters"]
    assert together["cross_entropy"] < sum(row["cross_entropy"] for row in single) / 4


def test_early_stopping_looks_at_images_of_its_own(monkeypatch):
    calls, fit = [], Study.fit

    def spy(study, model, teacher, images, labels=None, **options):
        calls.append((images, options.get("test"), options.get("alpha_warmup")))
        return fit(study, model, teacher, images, labels, **options)

    monkeypatch.setattr(Study, "fit", spy)
    rows, _, study = study_of("schedule", 60)
    assert len(rows) == 5 and "Stopped after" in study.notes[0]
    stopped = [(images, test) for images, test, _ in calls if test is not None]
    assert len(stopped) == 2
    for images, (validation, labels) in stopped:
        assert len(images) == 100 and len(validation) == len(labels) == 50
        assert len(torch.cat([images, validation]).unique(dim=0)) == 150
    assert [warmup for _, _, warmup in calls[-2:]] == [30, 30]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_run_leaves_results_and_a_picture(tmp_path, capsys, technique):
    results = Demo(tmp_path / "run", technique, seeds=2, steps=20).run()
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert (tmp_path / "run" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert results["title"] and results["options"]["seeds"] == 2
    for row in results["comparison"]:
        assert 0 <= row["errors"] <= 797 and row["accuracy"] == 1 - row["errors"] / 797
        assert row["cross_entropy"] > 0 and row["parameters"] > 0
    for curve in results["curves"]:
        assert curve["steps"] == [20] and len(curve["values"]) == 1 and curve["ylabel"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == results["result"] == results["notes"][-1]


def test_the_same_seeds_give_the_same_results(tmp_path):
    first, second = (
        Demo(tmp_path, "teacher-first", seeds=2, steps=5).run()["comparison"] for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    "options, error, text",
    (
        (dict(technique="magic"), ValueError, "technique must be one of teacher-first, unlabelled"),
        (dict(seeds=0), ValueError, "seeds must be at least 1, got 0"),
        (dict(steps=True), TypeError, "steps must be an int, got bool"),
        (dict(backend="none"), ValueError, "backend"),
    ),
)
def test_wrong_options_stop_before_anything(tmp_path, options, error, text):
    options = {"technique": "hints", **options}
    with pytest.raises(error, match=text):
        Demo(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_every_technique_names_its_paper():
    for technique in TECHNIQUES.values():
        assert " 19" in technique.__doc__ or " 20" in technique.__doc__
