"""`Config`: every option of a distillation of real checkpoints, once.

A YAML file, the command line and Python take the same options, those of this one list. `Options` is
what such lists have in common.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...files import atomic

DATA, LOSS, TRAINING, RUN = "models and data", "loss", "training", "run"


def option(group: str, default: Any, text: str, metavar: str = "NAME") -> Any:
    """A field of `Options`: its group and its text are those of the help on the command line."""
    return field(default=default, metadata={"group": group, "help": text, "metavar": metavar})


@dataclass(frozen=True)
class Options:
    """A list of options, whose types are checked.

    Raises:
        TypeError: a value of another type than annotated.
    """

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            _check_type(name, kind, getattr(self, name))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Any:
        """A mapping of options by name, numbers possibly as text -> the options.

        Raises:
            ValueError: a name that is no option; the text lists those that are near.
            TypeError: a value of another type than the option has.
        """
        kinds, found = _kinds(cls), {}
        for name, value in options.items():
            if name not in kinds:
                near = difflib.get_close_matches(str(name), kinds, n=3)
                hint = f"; near: {', '.join(near)}" if near else ""
                raise ValueError(f"{name!r} is not an option{hint}")
            found[name] = _converted(name, kinds[name], value)
        return cls(**found)


@dataclass(frozen=True)
class Config(Options):
    """The options of a `Job`; the text of each is its help on the command line.

    Raises:
        TypeError: a value of another type than annotated.
        ValueError: numbers outside what is listed, two options that exclude each other.
    """

    student: str = option(
        DATA,
        "",
        "directory of the model to train, as save_pretrained wrote it: a causal language "
        "model, an image classifier, or a PEFT adapter of one; not changed",
        "DIR",
    )
    teacher: str | None = option(
        DATA,
        None,
        "directory of the teacher; without it, teacher_cache and teacher_predictions the "
        "student is trained on labels alone, with alpha 0: a teacher of its own, later",
        "DIR",
    )
    data: str = option(
        DATA,
        "",
        "directory of the training data: text files, or a folder of images for each class",
        "DIR",
    )
    test: str | None = option(
        DATA, None, "directory of the test data; without it test_share of `data` is held out", "DIR"
    )
    test_share: float = option(
        DATA, 0.1, "share of the documents or images that are held out, in (0, 1)"
    )
    length: int = option(DATA, 512, "tokens of a text example")
    teacher_device: str | None = option(
        DATA,
        None,
        "device of the teacher, such as cuda:1; several, with commas between, are those of the "
        "processes of a machine in turn; default: the student's",
        "DEVICE",
    )
    shard_teacher: bool = option(
        DATA, False, "spread the teacher's weights over all processes, with FSDP2"
    )
    teacher_cache: str | None = option(
        DATA,
        None,
        "directory that `cache build` wrote, of which the student learns in place of the teacher; "
        "a teacher beside it gives hints and is compared",
        "DIR",
    )
    teacher_predictions: str | None = option(
        DATA,
        None,
        "file (.npy, .safetensors) of the teacher's logits for all training examples, used in "
        "place of the teacher: for images, of texts a cache is smaller",
        "FILE",
    )
    write_teacher_predictions: bool = option(
        DATA, False, "write the file teacher_predictions with the teacher first"
    )
    tail: str | None = option(
        LOSS,
        None,
        "of the tokens beyond those that a cache has of the most probable: bucket, one more class, "
        "or renormalize, which a temperature other than 1 needs; default: what the cache says",
    )
    temperature: float = option(LOSS, 1.0, "of the teacher's and the student's distributions")
    alpha: float = option(LOSS, 0.5, "weight of the teacher against the labels, in [0, 1]")
    divergence: str = option(LOSS, "forward_kl", "from the teacher, as kd_loss names them")
    beta: float | None = option(LOSS, None, "mixture weight of divergences that have one")
    label_smoothing: float = option(LOSS, 0.0, "of the labels, in [0, 1]")
    vocab_size: int | None = option(
        LOSS,
        None,
        "real tokens of a head, where its last rows are padding; default: all rows, or "
        "the tokenizer's where teacher and student are padded differently",
    )
    hints: list[Any] = option(
        LOSS,
        (),
        "losses inside of the models, a list of {student: MODULE, teacher: MODULE}, "
        "with kind (feature or attention), weight, select, dim, rows",
    )
    alpha_warmup: int = option(LOSS, 0, "steps over which alpha grows to its value")
    backend: str | None = option(LOSS, None, "of the loss; default: the fastest that is usable")
    steps: int | None = option(TRAINING, None, "optimiser steps")
    epochs: float | None = option(
        TRAINING, None, "passes over the data in place of steps; default: 1"
    )
    batch_size: int = option(TRAINING, 8, "examples of a step")
    accumulate: int = option(TRAINING, 1, "parts of a batch, one after the other, to save memory")
    learning_rate: float = option(TRAINING, 1e-4, "of AdamW")
    weight_decay: float = option(TRAINING, 0.01, "of AdamW")
    scheduler: str = option(
        TRAINING, "cosine", "of the learning rate, after its warm-up: constant, linear or cosine"
    )
    warmup: int = option(TRAINING, 0, "steps over which the learning rate grows to its value")
    clip_norm: float | None = option(TRAINING, 1.0, "largest norm of a gradient")
    gradient_checkpointing: bool = option(
        TRAINING, False, "compute activations twice, to save memory"
    )
    shard_student: bool = option(
        TRAINING, False, "spread the student and its optimiser over all processes, with FSDP2"
    )
    mixed_precision: str = option(TRAINING, "no", "no, bf16 or fp16")
    patience: int | None = option(
        TRAINING, None, "early stopping: recordings without a smaller test cross-entropy"
    )
    seed: int = option(TRAINING, 0, "of the order of the data, what is held out, and dropout")
    out: str = option(
        RUN, "runs/distill", "directory for the student, checkpoints and results", "DIR"
    )
    record_every: int = option(RUN, 50, "steps between two evaluations on the test data")
    checkpoint_every: int = option(RUN, 500, "steps between two checkpoints")
    timeout: float = option(
        RUN, 10.0, "minutes after which a process that others wait for ends the run"
    )
    workers: int = option(RUN, 0, "processes that read the data")
    tensorboard: bool = option(RUN, True, "write a log for TensorBoard, next to log.csv")

    def __post_init__(self) -> None:
        if isinstance(self.hints, tuple):
            object.__setattr__(self, "hints", list(self.hints))
        super().__post_init__()
        given(self, "student", "data", "out")
        at_least(1, self, "length", "batch_size", "accumulate", "record_every", "checkpoint_every")
        at_least(1, self, "steps", "patience", "vocab_size")
        at_least(0, self, "alpha_warmup", "warmup", "workers", "weight_decay")
        positive(self, "learning_rate", "epochs", "clip_norm", "timeout")
        check_share(self)
        one_of("tail", self.tail, ("bucket", "renormalize", None))
        one_of("scheduler", self.scheduler, ("constant", "linear", "cosine"))
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        if self.teacher_device is not None and self.shard_teacher:
            raise ValueError("teacher_device and shard_teacher must not both be given")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs must not both be given")

    @classmethod
    def load(cls, path: Path | str, **overrides: Any) -> Any:
        """A YAML file of options, some of which are overridden -> `Config`.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not YAML, or no mapping; and as `of`.
        """
        return cls.of({**read(path), **overrides})

    def dump(self, path: Path | str) -> None:
        """Writes all options as YAML, which `load` reads."""
        import yaml

        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        with atomic(path) as file:
            file.write(text.encode())


def read(path: Path | str) -> dict[str, Any]:
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


def fields() -> tuple[dataclasses.Field[Any], ...]:
    """The options, in order: `dataclasses.Field`s with a group and a text as metadata."""
    return dataclasses.fields(Config)


def add_arguments(
    parser: Any, options: type[Options] = Config, prefix: str = "checkpoints: "
) -> None:
    """Adds every option to an `argparse.ArgumentParser`, those not given being absent.

    prefix: of the groups' titles.
    """
    import argparse

    kinds, groups = _kinds(options), {}
    for each in dataclasses.fields(options):
        group = each.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(f"{prefix}{group}")
        kind, _ = kinds[each.name]
        default = each.default
        how = dict(default=argparse.SUPPRESS, help=each.metadata["help"].replace("%", "%%"))
        if default not in (None, "", ()) and kind is not bool:
            how["help"] += f"; default: {default}"
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            metavars = {int: "N", float: "X", list: "YAML"}
            how["metavar"] = metavars.get(kind, each.metadata["metavar"])
            how["type"] = kind if kind in (int, float) else str
        groups[group].add_argument(f"--{each.name.replace('_', '-')}", **how)


def differences(one: Options, other: Options) -> list[str]:
    """Names of the options in which two `Config`s differ."""
    return [each.name for each in fields() if getattr(one, each.name) != getattr(other, each.name)]


def given(options: Options, *names: str) -> None:
    for name in names:
        if not getattr(options, name):
            raise ValueError(f"{name} must be given")


def at_least(low: float, options: Options, *names: str) -> None:
    """Of those that are not None."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= low:
            raise ValueError(f"{name} must be at least {low}, got {value}")


def positive(options: Options, *names: str) -> None:
    """Of those that are not None."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_share(options: Any) -> None:
    if not 0 < options.test_share < 1:
        raise ValueError(f"test_share must be in (0, 1), got {options.test_share}")


def one_of(name: str, value: object, known: Collection[str | None]) -> None:
    if value not in known:
        names = ", ".join(each for each in known if each)
        raise ValueError(f"{name} must be one of {names}, got {value!r}")


def _kinds(options: type[Options]) -> dict[str, tuple[Any, bool]]:
    """{name: (type, whether it may be None)}"""
    found = {}
    for name, hint in typing.get_type_hints(options).items():
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = typing.get_origin(kinds[0]) or kinds[0], type(None) in kinds
    return found


def _converted(name: str, kind: tuple[Any, bool], value: Any) -> Any:
    """What YAML and the command line leave as text: 1e-4 is one to the former."""
    wanted, _ = kind
    if not isinstance(value, str) or wanted is str:
        return value
    if wanted is list:
        import yaml

        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{name} must be YAML, got {value!r}") from error
    try:
        return value if wanted is bool else wanted(value)
    except ValueError as error:
        raise TypeError(f"{name} must be {_wanted(wanted)}, got {value!r}") from error


def _check_type(name: str, kind: tuple[Any, bool], value: object) -> None:
    wanted, optional = kind
    if value is None and optional:
        return
    right = isinstance(value, (int, float) if wanted is float else wanted)
    if not right or (isinstance(value, bool) and wanted is not bool):
        none = " or nothing" if optional else ""
        raise TypeError(f"{name} must be {_wanted(wanted)}{none}, got {value!r}")


def _wanted(kind: Any) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", list: "a list"}.get(
        kind, "text"
    )


def _name(value: object) -> str:
    return type(value).__name__
