"""What else distillation can do: each technique on the digits, in seconds, with its paper.

A technique is a function of a `Study`: it trains models there, of several seeds and judged on 797
images that nobody trained on, and returns what came out, in a line.
"""

import copy
import math
import shutil
import statistics

import torch
from torch import nn

from ..capture import write_cache
from ..evaluation import predict
from ..generations import born_again
from ..hints import AttentionTransfer, FeatureHint
from ..offline import open_predictions, write_predictions
from ..predictions import SeveralTeachers
from ..specialists import combine, confusable_classes, specialist_labels, specialist_rows
from . import digits
from .study import convolutions, mlp, small

LABELLED = 100  # images of each student's own, where a technique does not say how many


def teacher_first(study):
    """No teacher is given: it is trained first, then its soft targets train the students.

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2: α of
    the soft targets and λ = 1 − α of the labels, which get "a considerably lower weight".
    """
    teacher, rows, labels = study.teacher(), study.drawn(LABELLED), study.train.labels
    told = study.outputs(teacher)
    study.students("labels", rows, None, labels, like=teacher)
    study.students("soft targets", rows, told, like=teacher)
    study.students("soft targets and labels", rows, told, labels, like=teacher, alpha=0.9)
    return (
        f"{LABELLED} images: {study.errors('labels')} errors with labels, "
        f"{study.errors('soft targets')} with soft targets, "
        f"{study.errors('soft targets and labels')} with both"
    )


def unlabelled(study):
    """A mystery teacher, seen only through its outputs for images that nobody labelled and that
    it was not trained on.

    Hinton et al. 2015, section 2: the transfer set may be unlabelled. Next to it students of a
    teacher that gives its answers alone, and no probabilities.
    """
    half = digits.TRAINING // 2
    teacher, rows = study.teacher(torch.arange(half)), torch.arange(half, digits.TRAINING)
    told = study.outputs(teacher)
    answers = told(slice(None)).argmax(-1)
    study.students("its answers", study.same(rows), None, answers, like=teacher)
    study.students("its probabilities", study.same(rows), told, like=teacher)
    hard, soft = (row["agreement"] for row in study.comparison[-2:])
    return (
        f"{half} unlabelled images: students agree with their teacher on {soft:.1%} of new images, "
        f"on {hard:.1%} if it gives its answers alone"
    )


MISSING = 3
BIASES = [k / 10 for k in range(101)]


def missing_digit(study):
    """Students never see a 3, and recognise it from what the teacher says about other digits.

    Hinton et al. 2015, section 3. Most of what they still get wrong is for the bias of that class,
    too low by far, which is raised afterwards by what suits the training images best (in the
    paper: the test images).
    """
    teacher, labels = study.teacher(), study.train.labels
    rows = study.same((labels != MISSING).nonzero()[:, 0])
    hard = study.students("labels, no 3", rows, None, labels, like=teacher)
    told, hot = study.outputs(teacher), dict(temperature=20.0)  # the paper's
    soft = study.students("soft targets, no 3", rows, told, like=teacher, **hot)
    biases = [_best_bias(model, study.train) for model in soft]
    raised = [_with_bias(*pair) for pair in zip(soft, biases, strict=True)]
    study.row("the same, bias raised", raised, teacher)
    threes = study.test.labels == MISSING
    for row, models in zip(study.comparison, ([teacher], hard, soft, raised), strict=True):
        found = study.answers(models)[threes].argmax(-1) == MISSING
        row["3s recognised"] = found.double().mean().item()
    study.notes.append(f"The bias was raised by {statistics.fmean(biases):.1f} in the mean.")
    hard, soft, raised = (row["3s recognised"] for row in study.comparison[1:])
    return (
        f"Students that never saw a 3 recognise {soft:.0%} of them, {raised:.0%} with the bias "
        f"raised; {hard:.0%} if labels taught them"
    )


def _with_bias(model, bias):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[-1].bias[MISSING] += bias
    return model


def _best_bias(model, train):
    """What to add to the bias for the fewest errors on the training images; the middle of all
    that are as good."""
    logits = predict(model, train.images)  # (1000, 10)
    errors = []
    for bias in BIASES:
        raised = logits.clone()
        raised[:, MISSING] += bias
        errors.append((raised.argmax(-1) != train.labels).sum().item())
    best = [bias for bias, each in zip(BIASES, errors, strict=True) if each == min(errors)]
    return statistics.median_low(best)


def offline(study):
    """The teacher answers once, into files, from which students learn: there is no teacher then.

    Hinton et al. 2015, section 2, with soft targets that were stored: as logits in the order of the
    images, and in a cache, which finds what it has by the image. Of the 3 most probable classes
    alone nobody knows what the others are at another temperature: those students learn at T = 1,
    the others one bucket.
    """
    teacher, labels = study.teacher(), study.train.labels
    rows = torch.arange(2 * LABELLED)
    same = study.same(rows)
    study.students("labels", same, None, labels, like=teacher)
    study.students("logits in memory", same, study.outputs(teacher), like=teacher)
    file, folder = study.out / "teacher_logits.safetensors", study.out / "teacher_top3"
    write_predictions(file, teacher, study.train.images[rows])
    logits = open_predictions(file, count=len(rows))
    study.students("a file of logits", same, lambda rows: logits, like=teacher)
    study.comparison[-1]["file bytes"] = file.stat().st_size
    shutil.rmtree(folder, ignore_errors=True)  # a cache is of one teacher, this may be another
    top = write_cache(folder, teacher, study.train.images[rows], "topk:3")
    study.students("a cache of the top 3", same, lambda rows: top, like=teacher, temperature=1.0)
    study.comparison[-1]["file bytes"] = top.bytes
    return (
        f"{len(rows)} images: {study.errors('labels')} errors with labels, "
        f"{study.errors('a file of logits')} with a file of logits, "
        f"{study.errors('logits in memory')} with the same in memory, "
        f"{study.errors('a cache of the top 3')} with a cache of the 3 most probable classes"
    )


def ensemble(study):
    """Several teachers, each of which has seen other images, teach one student.

    Hinton et al. 2015, sections 1 and 4: an ensemble goes into one model. A teacher's weight is
    the number of its labels.
    """
    sizes, outputs = (50, 150, 450), []
    for seed, rows in enumerate(torch.arange(sum(sizes)).split(sizes)):
        teacher = mlp(seed, *digits.TEACHER_WIDTHS)
        study.fit(teacher, None, study.train.images[rows], study.train.labels[rows])
        study.row(f"teacher, {len(rows)} labels", [teacher])
        outputs.append(study.outputs(teacher))
    rows = study.drawn(LABELLED)
    study.students("student of the best", rows, outputs[-1])
    for name, weights in (("of all, alike", None), ("of all, weighted", sizes)):

        def told(rows, weights=weights):
            return SeveralTeachers([each(rows) for each in outputs], weights)

        study.students(f"student {name}", rows, told)
    return (
        f"errors of a student of the best teacher {study.errors('student of the best')}, of all "
        f"three {study.errors('student of all, alike')}, weighted by their labels "
        f"{study.errors('student of all, weighted')}"
    )


def specialists(study):
    """A generalist, and specialists for the digits that it confuses, go into one student.

    Hinton et al. 2015, section 5. They know the labels of 200 images; the digits that go together
    and the transfer take all images, without labels.
    """
    images, labels = study.train.images, study.train.labels
    own = torch.arange(200)
    generalist = small(0)
    study.fit(generalist, None, images[own], labels[own])
    study.row("generalist", [generalist])
    every, test = (predict(generalist, each) for each in (images, study.test.images))
    answers, test_answers = [], []
    for classes in confusable_classes(every, 4):
        model, correction = _specialist(study, generalist, own, classes)
        study.notes.append(f"A specialist for {', '.join(map(str, classes.tolist()))}.")
        for found, inputs in ((answers, images), (test_answers, study.test.images)):
            logits = predict(model, inputs)  # (N, S + 1)
            logits[:, -1] += correction
            found.append((classes, logits))
    together = combine(every, answers)
    logits = combine(test, test_answers)[:, None]
    study.row("with its specialists", [generalist], logits=logits)
    rows = study.same(torch.arange(digits.TRAINING))
    study.students("student of the generalist", rows, every.__getitem__)
    study.students("student of all", rows, together.__getitem__)
    alone, joined = study.comparison[:2]
    return (
        f"{alone['errors']:.0f} errors of the generalist, {joined['errors']:.0f} with its "
        f"specialists; students: {study.errors('student of the generalist')} and "
        f"{study.errors('student of all')}"
    )


def _specialist(study, generalist, own, classes):
    """Starts as the generalist, the dustbin as the mean of its classes (section 5.2)
    -> module, the correction of its dustbin."""
    model = copy.deepcopy(generalist)
    others = [k for k in range(digits.CLASSES) if k not in classes]
    last = nn.Linear(model[-1].in_features, len(classes) + 1)
    with torch.no_grad():
        for new, old in zip(last.parameters(), generalist[-1].parameters(), strict=True):
            new.copy_(torch.cat([old[classes], old[others].mean(0, keepdim=True)]))
    model[-1] = last
    labels = study.train.labels[own]
    rows, correction = specialist_rows(labels, classes, torch.Generator().manual_seed(0))
    targets = specialist_labels(labels, classes)[rows]
    test = study.test.images, specialist_labels(study.test.labels, classes)
    study.fit(model, None, study.train.images[own][rows], targets, test=test)
    return model, correction


def hints(study):
    """A student that is thinner than its teacher learns its features too, through a projection.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", section 2; there the hint comes before
    the soft targets, here they are one loss.
    """
    images, labels = study.train.images, study.train.labels
    teacher = mlp(0, *digits.TEACHER_WIDTHS)
    study.fit(teacher, None, images, labels)
    study.row("teacher", [teacher])

    def make(seed):
        return mlp(seed, digits.SIDE**2, 50, 50, 50, digits.CLASSES)

    def hint():
        return [FeatureHint("relu2", "relu2", weight=100.0)]

    rows, same = study.drawn(LABELLED), dict(make=make, like=teacher)
    study.students("labels", rows, None, labels, **same)
    study.students("soft targets", rows, study.outputs(teacher), **same)
    study.students("soft targets and a hint", rows, lambda rows: teacher, hints=hint, **same)
    return (
        f"{LABELLED} images: {study.errors('labels')} errors with labels, "
        f"{study.errors('soft targets')} with soft targets, "
        f"{study.errors('soft targets and a hint')} with a hint, too"
    )


def attention(study):
    """A small convolutional network is to look where its teacher does.

    Zagoruyko, Komodakis 2017, "Paying More Attention to Attention", section 3.1.
    """
    teacher = convolutions(0, 16)
    study.fit(teacher, None, study.train.images, study.train.labels)
    study.row("teacher", [teacher])

    def make(seed):
        return convolutions(seed, 8)

    def maps():
        return [AttentionTransfer(f"conv{k}", f"conv{k}", weight=1.0) for k in (1, 2)]

    rows, same = study.drawn(LABELLED), dict(make=make, like=teacher)
    study.students("labels", rows, None, study.train.labels, **same)
    study.students("soft targets", rows, study.outputs(teacher), **same)
    study.students("soft targets and attention", rows, lambda rows: teacher, hints=maps, **same)
    return (
        f"{LABELLED} images: {study.errors('labels')} errors with labels, "
        f"{study.errors('soft targets')} with soft targets, "
        f"{study.errors('soft targets and attention')} with attention, too"
    )


GENERATIONS = 4


def generations(study):
    """Each student becomes the teacher of the next one of its kind, and all together an ensemble.

    Furlanello et al. 2018, "Born-Again Neural Networks", section 3: labels and the teacher's
    probabilities at T = 1, for the first one labels alone.
    """
    families, histories = [], []
    advance = study.progress("generations", study.seeds * study.steps * GENERATIONS)
    for seed, rows in enumerate(study.drawn(LABELLED)):
        images, labels, lessons = study.train.images[rows], study.train.labels[rows], []

        def make(generation, seed=seed):
            return small(seed + generation * study.seeds)

        def train(student, teacher, images=images, labels=labels, lessons=lessons):
            options = dict(temperature=1.0, alpha=0.0 if teacher is None else 0.5)
            lessons.append(study.fit(student, teacher, images, labels, on_step=advance, **options))

        families.append(born_again(make, train, GENERATIONS))
        histories.append(lessons)
    for k in range(GENERATIONS):
        study.row(f"generation {k}", [students[k] for students in families])
        study.curve(f"generation {k}", [lessons[k] for lessons in histories])
    logits = torch.stack([study.answers(students) for students in families], 1)
    together = logits.log_softmax(-1).logsumexp(2) - math.log(GENERATIONS)  # (797, seeds, 10)
    study.row("all generations", [nn.ModuleList(families[0])], logits=together)
    last = f"generation {GENERATIONS - 1}"
    return (
        f"{LABELLED} labels: {study.errors('generation 0')} errors of the first generation, "
        f"{study.errors(last)} of the last, {study.errors('all generations')} of all together"
    )


def schedule(study):
    """When to stop, and when to begin: early stopping on images of its own, warm-up of α.

    Prechelt 1998, "Early Stopping — But When?"; the weights of the smallest validation
    cross-entropy are put back. 100 images train, another 50 decide.
    """
    teacher, labels = study.teacher(), study.train.labels
    rows = [both[:LABELLED] for both in study.drawn(LABELLED + 50)]
    study.students("labels", rows, None, labels, like=teacher)
    stopped, steps = [], []
    for seed, both in enumerate(study.drawn(LABELLED + 50)):
        own, other = both[:LABELLED], both[LABELLED:]
        model, test = small(seed), (study.train.images[other], labels[other])
        images = study.train.images[own]
        history = study.fit(model, None, images, labels[own], test=test, patience=3)
        stopped.append(model)
        steps.append(history.steps[-1])
    study.row("labels, stopped early", stopped, teacher)
    told, both = study.outputs(teacher), dict(like=teacher, alpha=0.9)
    study.students("soft targets and labels", rows, told, labels, **both)
    study.students("α warmed up", rows, told, labels, alpha_warmup=study.steps // 2, **both)
    study.notes.append(f"Stopped after {statistics.fmean(steps):.0f} steps in the mean.")
    hard, early = (row["cross_entropy"] for row in study.comparison[1:3])
    return (
        f"labels: cross-entropy {hard:.3f}, {early:.3f} stopped early; soft targets: "
        f"{study.errors('soft targets and labels')} errors, {study.errors('α warmed up')} with α "
        "warmed up"
    )


TECHNIQUES = {
    "teacher-first": teacher_first,
    "unlabelled": unlabelled,
    "missing-digit": missing_digit,
    "offline": offline,
    "ensemble": ensemble,
    "specialists": specialists,
    "hints": hints,
    "attention": attention,
    "born-again": generations,
    "schedule": schedule,
}
