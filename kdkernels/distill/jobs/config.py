"""`Config`: every option of a distillation of real checkpoints, once.

A YAML file, the command line and Python take the same options, those of this one list.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from ...files import atomic

DATA, LOSS, TRAINING, RUN = "models and data", "loss", "training", "run"


def _option(group, default, text, metavar="NAME"):
    return field(default=default, metadata={"group": group, "help": text, "metavar": metavar})


@dataclass(frozen=True)
class Config:
    """The options of a `Job`; the text of each is its help on the command line.

    Raises:
        TypeError: a value of another type than annotated.
        ValueError: numbers outside what is listed, two options that exclude each other.
    """

    student: str = _option(
        DATA,
        "",
        "directory of the model to train, as save_pretrained wrote it: a causal language "
        "model, an image classifier, or a PEFT adapter of one; not changed",
        "DIR",
    )
    teacher: str | None = _option(
        DATA,
        None,
        "directory of the teacher; without it and without teacher_predictions the "
        "student is trained on labels alone, with alpha 0: a teacher of its own, later",
        "DIR",
    )
    data: str = _option(
        DATA,
        "",
        "directory of the training data: text files, or a folder of images for each class",
        "DIR",
    )
    test: str | None = _option(
        DATA, None, "directory of the test data; without it test_share of `data` is held out", "DIR"
    )
    test_share: float = _option(
        DATA, 0.1, "share of the documents or images that are held out, in (0, 1)"
    )
    length: int = _option(DATA, 512, "tokens of a text example")
    teacher_predictions: str | None = _option(
        DATA,
        None,
        "file (.npy, .safetensors) of the teacher's predictions for all training "
        "examples, used in place of the teacher",
        "FILE",
    )
    write_teacher_predictions: bool = _option(
        DATA, False, "write the file teacher_predictions with the teacher first"
    )
    topk: int | None = _option(
        DATA, None, "classes of each prediction in that file, the most probable; default: all"
    )
    tail: str = _option(
        LOSS,
        "bucket",
        "of the classes beyond topk: bucket, one more class, or renormalize, which a temperature "
        "other than 1 needs",
    )
    temperature: float = _option(LOSS, 1.0, "of the teacher's and the student's distributions")
    alpha: float = _option(LOSS, 0.5, "weight of the teacher against the labels, in [0, 1]")
    divergence: str = _option(LOSS, "forward_kl", "from the teacher, as kd_loss names them")
    beta: float | None = _option(LOSS, None, "mixture weight of divergences that have one")
    label_smoothing: float = _option(LOSS, 0.0, "of the labels, in [0, 1]")
    vocab_size: int | None = _option(
        LOSS,
        None,
        "real tokens of a head, where its last rows are padding; default: all rows, or "
        "the tokenizer's where teacher and student are padded differently",
    )
    hints: list = _option(
        LOSS,
        (),
        "losses inside of the models, a list of {student: MODULE, teacher: MODULE}, "
        "with kind (feature or attention), weight, select, dim, rows",
    )
    alpha_warmup: int = _option(LOSS, 0, "steps over which alpha grows to its value")
    backend: str | None = _option(LOSS, None, "of the loss; default: the fastest that is usable")
    steps: int | None = _option(TRAINING, None, "optimiser steps")
    epochs: float | None = _option(
        TRAINING, None, "passes over the data in place of steps; default: 1"
    )
    batch_size: int = _option(TRAINING, 8, "examples of a step")
    accumulate: int = _option(TRAINING, 1, "parts of a batch, one after the other, to save memory")
    learning_rate: float = _option(TRAINING, 1e-4, "of AdamW")
    weight_decay: float = _option(TRAINING, 0.01, "of AdamW")
    scheduler: str = _option(
        TRAINING, "cosine", "of the learning rate, after its warm-up: constant, linear or cosine"
    )
    warmup: int = _option(TRAINING, 0, "steps over which the learning rate grows to its value")
    clip_norm: float | None = _option(TRAINING, 1.0, "largest norm of a gradient")
    gradient_checkpointing: bool = _option(
        TRAINING, False, "compute activations twice, to save memory"
    )
    mixed_precision: str = _option(TRAINING, "no", "no, bf16 or fp16")
    patience: int | None = _option(
        TRAINING, None, "early stopping: recordings without a smaller test cross-entropy"
    )
    seed: int = _option(TRAINING, 0, "of the order of the data, what is held out, and dropout")
    out: str = _option(
        RUN, "runs/distill", "directory for the student, checkpoints and results", "DIR"
    )
    record_every: int = _option(RUN, 50, "steps between two evaluations on the test data")
    checkpoint_every: int = _option(RUN, 500, "steps between two checkpoints")
    workers: int = _option(RUN, 0, "processes that read the data")
    tensorboard: bool = _option(RUN, True, "write a log for TensorBoard, next to log.csv")

    def __post_init__(self):
        if isinstance(self.hints, tuple):
            object.__setattr__(self, "hints", list(self.hints))
        for name, kind in _kinds().items():
            _check_type(name, kind, getattr(self, name))
        for name in ("student", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given")
        for name in ("length", "batch_size", "accumulate", "record_every", "checkpoint_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("alpha_warmup", "warmup", "workers", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        for name in ("steps", "topk", "patience", "vocab_size"):
            _at_least(name, getattr(self, name), 1, none=True)
        for name in ("learning_rate", "epochs", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 < self.test_share < 1:
            raise ValueError(f"test_share must be in (0, 1), got {self.test_share}")
        _one_of("tail", self.tail, ("bucket", "renormalize"))
        _one_of("scheduler", self.scheduler, ("constant", "linear", "cosine"))
        _one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs must not both be given")

    @classmethod
    def of(cls, options):
        """A mapping of options by name, numbers possibly as text -> `Config`.

        Raises:
            ValueError: a name that is no option; the text lists those that are near.
            TypeError: a value of another type than the option has.
        """
        kinds, found = _kinds(), {}
        for name, value in options.items():
            if name not in kinds:
                near = difflib.get_close_matches(str(name), kinds, n=3)
                hint = f"; near: {', '.join(near)}" if near else ""
                raise ValueError(f"{name!r} is not an option{hint}")
            found[name] = _converted(name, kinds[name], value)
        return cls(**found)

    @classmethod
    def load(cls, path, **overrides):
        """A YAML file of options, some of which are overridden -> `Config`.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not YAML, or no mapping; and as `of`.
        """
        return cls.of({**read(path), **overrides})

    def dump(self, path):
        """Writes all options as YAML, which `load` reads."""
        import yaml

        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        with atomic(path) as file:
            file.write(text.encode())


def read(path):
    """A YAML file of options -> {name: value}, {} where it is empty."""
    import yaml

    try:
        options = yaml.safe_load(Path(path).read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options or {}, dict):
        raise ValueError(
            f"{path} must have a line `option: value` for each, got a {_name(options)}"
        )
    return options or {}


def fields():
    """The options, in order: `dataclasses.Field`s with a group and a text as metadata."""
    return dataclasses.fields(Config)


def add_arguments(parser):
    """Adds every option to an `argparse.ArgumentParser`, those not given being absent."""
    import argparse

    kinds, groups = _kinds(), {}
    for option in fields():
        group = option.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(f"checkpoints: {group}")
        kind, _ = kinds[option.name]
        default = option.default
        how = dict(default=argparse.SUPPRESS, help=option.metadata["help"].replace("%", "%%"))
        if default not in (None, "", ()) and kind is not bool:
            how["help"] += f"; default: {default}"
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            metavars = {int: "N", float: "X", list: "YAML"}
            how["metavar"] = metavars.get(kind, option.metadata["metavar"])
            how["type"] = kind if kind in (int, float) else str
        groups[group].add_argument(f"--{option.name.replace('_', '-')}", **how)


def differences(one, other):
    """Names of the options in which two `Config`s differ."""
    return [each.name for each in fields() if getattr(one, each.name) != getattr(other, each.name)]


def _kinds():
    """{name: (type, whether it may be None)}"""
    found = {}
    for name, hint in typing.get_type_hints(Config).items():
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = kinds[0], type(None) in kinds
    return found


def _converted(name, kind, value):
    """What YAML and the command line leave as text: 1e-4 is one to the former."""
    kind, _ = kind
    if not isinstance(value, str) or kind is str:
        return value
    if kind is list:
        import yaml

        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{name} must be YAML, got {value!r}") from error
    try:
        return value if kind is bool else kind(value)
    except ValueError as error:
        raise TypeError(f"{name} must be {_wanted(kind)}, got {value!r}") from error


def _check_type(name, kind, value):
    kind, optional = kind
    if value is None and optional:
        return
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        none = " or nothing" if optional else ""
        raise TypeError(f"{name} must be {_wanted(kind)}{none}, got {value!r}")


def _at_least(name, value, low, none=False):
    if not (none and value is None) and not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def _one_of(name, value, known):
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _wanted(kind):
    return {int: "an integer", float: "a number", bool: "true or false", list: "a list"}.get(
        kind, "text"
    )


def _name(value):
    return type(value).__name__
