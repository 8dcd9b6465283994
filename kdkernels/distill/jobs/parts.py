"""What a task, text or images, makes of the directories that a `Config` names."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import caches, folders, models
from .config import Config


class Parts(NamedTuple):
    """What a task makes of the directories."""

    student: Any
    teacher: Any  # or None
    train: Any  # data sets
    test: Any
    kept: list[Any]  # what is saved with the student: its tokenizer, its image processor
    vocab_size: int | None = None
    cache: Any = None  # a `TeacherCache`, of the option teacher_cache


def of_text(options: Any, notes: list[str]) -> Parts:
    """Causal language models and text files -> `Parts`."""
    files = files_of(options, folders.TEXT, "text files")
    student = _student(options, models.TEXT)
    tokenizer = models.tokenizer_of("student", options.student)
    cache = caches.opened(options, tokenizer, notes) if options.teacher_cache else None
    teacher = _teacher(options, models.TEXT, caches.dtype_of(cache))
    if teacher is not None:
        models.check_tokenizers(tokenizer, models.tokenizer_of("teacher", options.teacher))
    if teacher is not None and cache is not None:
        caches.check_teacher(options, cache, teacher)
    named = {"student": student, **({} if teacher is None else {"teacher": teacher})}
    heads = {name: models.head_rows(model) for name, model in named.items()}
    if cache is not None:
        heads["teacher_cache"] = cache.description["vocab_size"]
    size = models.vocab_size_of(options.vocab_size, heads, models.token_count(tokenizer))
    if size != options.vocab_size:
        notes.append(f"The heads' rows from {size} on are padding: the tokenizer has no more.")
    if cache is not None:
        caches.check_vocabulary(options, cache, size or heads["student"])
    for name, model in named.items():
        models.check_length(name, model, options.length)
    train, test = (folders.TextFolder(each, tokenizer, options.length) for each in files)
    largest = max(train.largest, test.largest)
    models.check_largest(largest, size or min(heads.values()))
    if cache is not None:
        caches.check_examples(options, cache, train)
    if teacher is not None:
        teacher = models.without_logits("teacher", teacher, notes)
    student = models.without_logits("student", student, notes)
    return Parts(student, teacher, train, test, [tokenizer], size, cache)


def of_images(options: Any, notes: list[str]) -> Parts:
    """Image classifiers and folders of images -> `Parts`."""
    if options.teacher_cache:
        raise ValueError(
            "teacher_cache goes with language models: of an image classifier's teacher, use "
            "write_teacher_predictions"
        )
    files = files_of(options, folders.IMAGES, "folders of images")
    student, teacher = _student(options, models.IMAGES), _teacher(options, models.IMAGES)
    if options.vocab_size is not None:
        raise ValueError("vocab_size goes with language models only")
    names = sorted({path.parent.name for split in files for path in split})
    if teacher is not None:
        folders.check_labels(student.config, teacher.config)
    both = [each.config for each in (student, teacher) if each is not None]
    labels = folders.label_ids(names, *both)
    transform = folders.transform_of(options.student, student.config)
    if teacher is not None and folders.transform_of(options.teacher, teacher.config) != transform:
        raise ValueError(
            "teacher and student must take images alike, their image processors (or sizes) "
            "differ: write the teacher's predictions to a file, and train from that"
        )
    train, test = (folders.ImageFolder(each, labels, transform) for each in files)
    return Parts(student, teacher, train, test, transform.kept())


def files_of(options: Any, suffixes: tuple[str, ...], what: str) -> tuple[list[Path], list[Path]]:
    """-> (paths to train on, paths to test on)"""
    found = folders.find("data", options.data, suffixes, what)
    if options.test is None:
        return folders.held_out(found, options.test_share, options.seed)
    return found, folders.find("test", options.test, suffixes, what)


def _student(options: Config, task: str) -> Any:
    student = models.load(
        "student",
        options.student,
        task,
        dtype=torch.float32,  # optimisers lose small steps in less
        attention=_has_attention(options),
        trainable=True,
    )
    if options.gradient_checkpointing:
        # Its name until transformers 5.
        old = student.gradient_checkpointing_enable
        getattr(student, "activation_checkpointing_enable", old)()
    return student


def _teacher(options: Config, task: str, dtype: Any = "auto") -> Any:
    """dtype: "auto": as it was saved -> the teacher, or None"""
    if options.teacher is None:
        return None
    found = models.task_of("teacher", models.config_of("teacher", options.teacher))
    if found != task:
        raise ValueError(f"teacher must be for {task}, as the student is, got one for {found}")
    attention = _has_attention(options)
    return models.load("teacher", options.teacher, task, dtype=dtype, attention=attention)


def _has_attention(options: Config) -> bool:
    return any(isinstance(x, dict) and x.get("kind") == "attention" for x in options.hints)
