"""How good a student is: next to the labels, and next to its teacher."""

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import eager
from ..checks import LABELS, row_tensor
from ..functional import kd_loss
from ..kept import keep
from ..objective import make_objective
from ..source_checks import check_sources
from ..source_rows import detached, flat, logit_chunks, map_rows, take_rows, to_device
from ..sources import Ensemble, LinearHead, Sampled, TopK
from . import batches, checks
from .engine import is_sharded
from .predictions import CachedTeacher, Teacher, as_teacher, inference, predict_with

IGNORED = -100
BINS = 15
WARM_UP, CALLS, SECONDS = 5, 100, 2.0


@dataclass(frozen=True)
class Scores:
    """Of a model on labelled examples, at T = 1; rows whose label is −100 do not count.

    A row's answer is the class of its largest logit, of several the first one.
    """

    rows: int  # predictions that count: examples, or tokens
    accuracy: float  # share of rows whose answer is the label
    cross_entropy: float  # mean, in nats
    calibration_error: float  # expected calibration error: see `calibration_error`
    agreement: float | None  # share of rows with the teacher's answer; None without one

    @property
    def errors(self) -> int:
        return round((1 - self.accuracy) * self.rows)

    @property
    def perplexity(self) -> float:
        return torch.tensor(self.cross_entropy, dtype=torch.float64).exp().item()


@dataclass(frozen=True)
class Size:
    """What a model costs. Tensors that share their memory count once."""

    parameters: int
    bytes: int  # of parameters and buffers
    latency_ms: float  # median of a call


def validate(
    model: nn.Module,
    inputs: batches.Inputs,
    labels: Tensor | None = None,
    *,
    teacher: Teacher | None = None,
    shift: bool = False,
    vocab_size: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
) -> Scores:
    """A model's answers -> `Scores`.

    T belongs to the training: a distilled student is used, and judged, at T = 1 (Hinton et al.
    2015, section 2). Logits of a `LinearHead` exist a few rows at a time.

    Args:
        model: a module that maps a batch (B, ...) to logits (B, ..., V), a `LinearHead`, or an
            object that has `logits`; of float32, bfloat16, float16 or float64.
        inputs, labels, workers: as in `Distiller`; with labels.
        teacher: None, or as in `Distiller`: a module that answers the same inputs, its predictions
            for all of them, or `SeveralTeachers`.
        shift: position i predicts label i + 1, as in `kd_loss`.
        vocab_size: as in `kd_loss`: columns from there on are padding, and nobody's answer.
        batch_size: examples per call of the model.

    Raises:
        TypeError: an argument of another type than listed.
        ValueError: no labels, or none that counts; shapes that do not match.
        IndexError: labels outside [0, vocab_size) that are not −100.
    """
    checks.instance("model", model, nn.Module, "a torch.nn.Module")
    checks.data(inputs, labels)
    if teacher is not None:
        checks.teacher(teacher, inputs, labels, None)
    checks.integer("batch_size", batch_size, low=1)
    source, device, answer = batches.of(inputs, labels, workers), _device(model), as_teacher(model)
    ask = None if teacher is None else as_teacher(teacher)
    found = []
    for batch in source.batches(iter(torch.arange(len(source)).split(batch_size))):
        if batch.labels is None:
            raise ValueError("labels must be given, got none")
        batch = batch.to(device)
        other = None if ask is None else detached(to_device(ask(batch), device))
        found += _scored(answer(batch), other, batch.labels, shift, vocab_size)
    if not found:
        raise ValueError(f"labels must count in a row at least, got {IGNORED} everywhere")
    losses, confidence, right, same = (torch.cat(each) for each in zip(*found, strict=True))
    return Scores(
        rows=len(right),
        accuracy=right.double().mean().item(),
        cross_entropy=losses.mean().item(),
        calibration_error=calibration_error(confidence, right),
        agreement=None if teacher is None else same.double().mean().item(),
    )


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Σ over bins of (share of rows) · |accuracy − mean confidence|: Guo et al. 2017, "On
    Calibration of Modern Neural Networks", eq. 3, with bins ((k − 1) / bins, k / bins].

    confidence (N,), float: the probability of the answer; right (N,), bool: whether it was right.
    """
    confidence = confidence.double()
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, torch.bucketize(confidence, edges), right.double() - confidence)
    return (gaps.abs().sum() / len(right)).item()


def size_of(model: nn.Module, inputs: Any) -> Size:
    """What a model costs, its latency for these inputs (B, ...), logits included -> `Size`."""
    with inference(model):
        # Of a sharded model, which takes all processes, each makes as many calls.
        sharded = any(is_sharded(x) for x in model.parameters())
        times, end = list[float](), time.perf_counter() + (0.0 if sharded else SECONDS)
        while len(times) < WARM_UP + CALLS and (len(times) <= WARM_UP or time.perf_counter() < end):
            start = time.perf_counter()
            prediction = predict_with(model, inputs)
            if isinstance(prediction, LinearHead):
                for _ in logit_chunks(prediction):
                    pass
            _finish(_device(model))
            times.append(time.perf_counter() - start)
    parameters = _distinct(model.parameters())
    return Size(
        parameters=sum(x.numel() for x in parameters),
        bytes=sum(x.numel() * x.element_size() for x in _distinct([*parameters, *model.buffers()])),
        latency_ms=1e3 * statistics.median(times[WARM_UP:]),
    )


def compare(
    students: Mapping[str, nn.Module],
    teacher: Teacher | None,
    inputs: batches.Inputs,
    labels: Tensor | None = None,
    *,
    shift: bool = False,
    vocab_size: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Models side by side, with the latency of a single example -> rows as `results.json` has them.

    Args:
        students: {name: module}.
        teacher: as in `validate`. A module has a row of its own, the first, and says how many times
            as fast the students are.
        The others: as in `validate`.

    Returns:
        A list of dicts: see `row`.
    """
    options: dict[str, Any] = dict(
        shift=shift, vocab_size=vocab_size, batch_size=batch_size, workers=workers
    )
    source = batches.of(inputs, labels, workers)
    example = next(iter(source.batches(iter([torch.arange(1)]))))
    rows, size_of_teacher = [], None
    if isinstance(teacher, nn.Module) and not isinstance(teacher, CachedTeacher):
        size_of_teacher = size_of(teacher, example.to(_device(teacher)).inputs)
        rows.append(row("teacher", validate(teacher, inputs, labels, **options), size_of_teacher))
    for name, student in students.items():
        scores = validate(student, inputs, labels, teacher=teacher, **options)
        size = size_of(student, example.to(_device(student)).inputs)
        rows.append(row(name, scores, size, size_of_teacher))
    return rows


def row(
    name: str, scores: Scores, size: Size | None = None, teacher: Size | None = None
) -> dict[str, Any]:
    """A model's line of a comparison -> a dict of text and numbers; None: there is none.

    scores: `Scores`; size: None or its `Size`; teacher: None or that of its teacher.
    """
    line: dict[str, Any] = {"name": name}
    for key in "accuracy errors cross_entropy perplexity agreement calibration_error".split():
        line[key] = getattr(scores, key)
    if size is not None:
        line.update(vars(size))
        line["speed_up"] = teacher and teacher.latency_ms / size.latency_ms
    return line


def _scored(
    prediction: Any, teacher: Any, labels: Any, shift: bool, vocab_size: int | None
) -> list[tuple[Tensor, ...]]:
    """Of the rows that count, a few at a time, on the CPU: a list of (cross-entropy, confidence,
    rightness, agreement), each (n,)."""
    columns = check_sources(prediction, prediction if teacher is None else teacher, vocab_size)
    leading = prediction.hidden if isinstance(prediction, LinearHead) else prediction
    row_tensor("labels", labels, leading.shape[:-1], leading.device, LABELS)
    if shift:
        labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
    labels = labels.flatten()
    counting = (labels != IGNORED).nonzero()[:, 0]
    teacher = None if teacher is None else map_rows(teacher, flat)
    found = []
    for rows, logits in logit_chunks(prediction, columns, counting):
        answers = logits.argmax(-1)
        # alpha = 0: the cross-entropy alone; the second argument is not read.
        losses, surprise = (
            kd_loss(logits, logits, each, alpha=0.0, reduction="none")
            for each in (labels[rows], answers)
        )
        same = answers
        if teacher is not None:
            same = _answers(map_rows(teacher, partial(take_rows, rows)), columns)
        part = losses.double(), surprise.double().neg().exp(), answers == labels[rows]
        found.append(tuple(x.cpu() for x in (*part, answers == same)))
    return found


def _answers(teacher: Any, columns: int) -> Tensor:
    """The most probable class of rows (n, ·) of any source -> (n,) int64."""
    if isinstance(teacher, (torch.Tensor, LinearHead)):
        return eager.logits(teacher, columns).argmax(-1)
    objective = make_objective(
        divergence="forward_kl",
        beta=None,
        temperature=1.0,
        alpha=1.0,
        t_squared=True,
        label_smoothing=0.0,
        ignore_index=IGNORED,
        vocab_size=columns,
        reduction="none",
        has_labels=False,
    )

    def kept(source: Any) -> Any:
        if isinstance(source, Ensemble):
            return replace(source, teachers=[kept(x) for x in source.teachers])
        return keep(source, None, objective) if isinstance(source, (TopK, Sampled)) else source

    return eager.log_probabilities(kept(teacher), None, objective, torch.float32).argmax(-1)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list(
        {id(x) if is_sharded(x) else (x.data_ptr(), x.numel()): x for x in tensors}.values()
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.empty(())).device


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
