"""`CacheJob`: writes a teacher's predictions for the training examples that a `Job` will have."""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...cache import TeacherCache
from ...cache.build import SHARD_TOKENS
from .. import checks, report
from ..capture import Capture
from . import caches, config, folders, models, parts

TEACHER, WRITTEN = "teacher and data, as in `distill`", "what is written"


@dataclass(frozen=True)
class CacheConfig(config.Options):
    """The options of a `CacheJob`; the text of each is its help on the command line.

    Raises:
        TypeError: a value of another type than annotated.
        ValueError: numbers outside what is listed.
    """

    teacher: str = config.option(
        TEACHER,
        "",
        "directory of the teacher, as save_pretrained wrote it: a causal language model or a PEFT "
        "adapter of one, with its tokenizer",
        "DIR",
    )
    data: str = config.option(TEACHER, "", "directory of the training data: text files", "DIR")
    test: str | None = config.option(
        TEACHER,
        None,
        "directory of the test data; without it test_share of `data` is held out",
        "DIR",
    )
    test_share: float = config.option(
        TEACHER, 0.1, "share of the documents that are held out, in (0, 1)"
    )
    length: int = config.option(TEACHER, 512, "tokens of an example")
    seed: int = config.option(TEACHER, 0, "of what is held out, and of what is drawn")
    shard_teacher: bool = config.option(
        TEACHER, False, "spread the teacher's weights over all processes, with FSDP2"
    )
    kind: str = config.option(
        WRITTEN,
        "topk:64",
        "topk:K, the K most probable tokens; sampled:N, N draws; hidden:bf16 or fp8, the last "
        "hidden states, and with them everything; dense:fp16, all logits, for small vocabularies",
        "KIND",
    )
    out: str = config.option(WRITTEN, "runs/cache", "directory of the cache", "DIR")
    vocab_size: int | None = config.option(
        WRITTEN, None, "real tokens of the teacher's head; default: the tokenizer's"
    )
    batch_size: int = config.option(WRITTEN, 8, "examples that the teacher gets at a time")
    dtype: str = config.option(
        WRITTEN, "auto", "of the teacher: auto, as it was saved, float32, bfloat16 or float16"
    )
    shard_tokens: int = config.option(
        WRITTEN, SHARD_TOKENS, "tokens of a file: what is done again after an interruption, at most"
    )
    timeout: float = config.option(
        WRITTEN, 10.0, "minutes after which a process that others wait for ends a sharded teacher"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        config.given(self, "teacher", "data", "out")
        config.at_least(1, self, "length", "vocab_size", "batch_size", "shard_tokens")
        config.positive(self, "timeout")
        config.check_share(self)
        config.one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


class CacheJob:
    """Writes a cache, all of which is checked here, before the first batch.

    Under torchrun every process writes shards of its own, on the GPU of its local rank; they need
    nothing of each other, unless the teacher is sharded.

    Args:
        options: a `CacheConfig`.

    Raises:
        TypeError, ValueError: options, models or data that do not go together.
        CacheMismatchError: `out` has another cache; the text says what differs.
        OSError: a directory or file that is not there.
        ImportError: a package is missing (the extras `train` and `cache`).
    """

    def __init__(self, options: CacheConfig) -> None:
        checks.instance("options", options, CacheConfig, "a CacheConfig")
        checks.installed("rich")
        self.options = options
        self.notes: list[str] = []
        task = models.task_of("teacher", models.config_of("teacher", options.teacher))
        if task != models.TEXT:
            raise ValueError(
                f"teacher must be a causal language model, got one for {task}: of an image "
                "classifier, `distill --write-teacher-predictions` writes the logits"
            )
        found, _ = parts.files_of(options, folders.TEXT, "text files")
        tokenizer = models.tokenizer_of("teacher", options.teacher)
        teacher = models.load("teacher", options.teacher, task, dtype=options.dtype)
        tokens = models.token_count(tokenizer)
        heads = {"teacher": models.head_rows(teacher)}
        size = models.vocab_size_of(options.vocab_size, heads, tokens) or tokens
        models.check_length("teacher", teacher, options.length)
        train = folders.TextFolder(found, tokenizer, options.length)
        models.check_largest(train.largest, size)
        teacher = models.without_logits("teacher", teacher, self.notes)
        if self.notes and options.kind.startswith("hidden"):
            raise ValueError(f"kind must not be {options.kind}, {self.notes[0]}")
        if options.shard_teacher:
            _shard(teacher, options.timeout)
        else:
            teacher.to(_device())
        self.capture = Capture(
            options.out,
            teacher,
            train,
            options.kind,
            vocab_size=size,
            tokenizer=tokenizer,
            data=caches.data_of(options, train),
            name=Path(options.teacher).resolve().name,
            batch_size=options.batch_size,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
        )

    def run(self) -> TeacherCache:
        """Writes what is not there yet -> the `TeacherCache`.

        Raises:
            KeyboardInterrupt: the same job goes on from there.
        """
        from rich.console import Console

        console = Console(quiet=bool(_rank("RANK")), markup=False, highlight=False)
        for note in self.notes:
            console.print(f"Note: {note}", soft_wrap=True)
        started, there = time.perf_counter(), self.capture.stored()
        with _told(), report.progress(console) as bar:
            task = bar.add_task("", total=self.capture.tokens)

            def show(done: int) -> None:
                rate = (done - there) / (time.perf_counter() - started)
                bar.update(task, completed=done, description=f"{rate:,.0f} tokens/s")

            cache = self.capture.run(show)
        each = f"{cache.bytes / cache.tokens:,.1f} bytes each"
        seconds = time.perf_counter() - started
        console.print(
            f"{cache.tokens:,} tokens of {len(cache):,} examples, {each}, "
            f"{cache.tokens - there:,} of them written in {seconds:,.0f} s: {self.options.out}",
            soft_wrap=True,
        )
        return cache


def _shard(teacher: Any, minutes: float) -> None:
    """Over all processes, which wait for each other from here on."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        raise ValueError("shard_teacher goes with several processes")
    if torch.cuda.is_available():
        torch.cuda.set_device(_device())
    if not dist.is_initialized():
        dist.init_process_group(timeout=datetime.timedelta(minutes=minutes))
    models.shard(teacher)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _rank("LOCAL_RANK"))


def _rank(name: str) -> int:
    """As torchrun says it; 0 without it."""
    return int(os.environ.get(name) or 0)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if not _rank("RANK"):
            print("interrupted: the same command goes on from there", file=sys.stderr)
        raise
