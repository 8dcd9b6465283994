"""What a task, text or images, makes of the directories that a `Config` names."""

from typing import Any, NamedTuple

import torch

from . import folders, models


class Parts(NamedTuple):
    """What a task makes of the directories."""

    student: Any
    teacher: Any  # or None
    train: Any  # data sets
    test: Any
    kept: list  # what is saved with the student: its tokenizer, its image processor
    vocab_size: int | None = None


def of_text(options, notes):
    """Causal language models and text files -> `Parts`."""
    files = _files(options, folders.TEXT, "text files")
    student, teacher = _pair(options, models.TEXT)
    tokenizer = models.tokenizer_of("student", options.student)
    if teacher is not None:
        models.check_tokenizers(tokenizer, models.tokenizer_of("teacher", options.teacher))
    named = {"student": student, **({} if teacher is None else {"teacher": teacher})}
    heads = {name: models.head_rows(model) for name, model in named.items()}
    size = models.vocab_size_of(options.vocab_size, heads, max(tokenizer.get_vocab().values()) + 1)
    if size != options.vocab_size:
        notes.append(f"The heads' rows from {size} on are padding: the tokenizer has no more.")
    for name, model in named.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and options.length > limit:
            raise ValueError(
                f"length must be at most {limit}, the positions of the {name}, got {options.length}"
            )
    train, test = (folders.TextFolder(each, tokenizer, options.length) for each in files)
    limit = size or min(heads.values())
    if (largest := max(train.largest, test.largest)) >= limit:
        raise ValueError(f"token ids must be below {limit}, got {largest} in the data")
    if teacher is not None:
        teacher = models.without_logits("teacher", teacher, notes)
    student = models.without_logits("student", student, notes)
    return Parts(student, teacher, train, test, [tokenizer], size)


def of_images(options, notes):
    """Image classifiers and folders of images -> `Parts`."""
    files = _files(options, folders.IMAGES, "folders of images")
    student, teacher = _pair(options, models.IMAGES)
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


def _files(options, suffixes, what):
    """-> (paths to train on, paths to test on)"""
    found = folders.find("data", options.data, suffixes, what)
    if options.test is None:
        return folders.held_out(found, options.test_share, options.seed)
    return found, folders.find("test", options.test, suffixes, what)


def _pair(options, task):
    """-> the student, and the teacher or None"""
    attention = any(isinstance(x, dict) and x.get("kind") == "attention" for x in options.hints)
    student = models.load(
        "student",
        options.student,
        task,
        dtype=torch.float32,  # optimisers lose small steps in less
        attention=attention,
        trainable=True,
    )
    if options.gradient_checkpointing:
        # Its name until transformers 5.
        old = student.gradient_checkpointing_enable
        getattr(student, "activation_checkpointing_enable", old)()
    if options.teacher is None:
        return student, None
    found = models.task_of("teacher", models.config_of("teacher", options.teacher))
    if found != task:
        raise ValueError(f"teacher must be for {task}, as the student is, got one for {found}")
    return student, models.load("teacher", options.teacher, task, attention=attention)
