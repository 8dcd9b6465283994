"""A teacher that runs here into a cache: once over the data, by one process or by many."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import __version__
from ..cache import CacheMismatchError, TeacherCache, build, identity, kinds, manifest
from ..cache.codec import Codec
from ..cache.samples import KEY
from ..cache.sections import zstd
from ..cache.shard import NAME
from ..source_rows import flat, map_rows
from ..sources import LinearHead, Tail
from . import checks, failures
from .batches import Streamed
from .engine import is_sharded, whole
from .predictions import inference, predict_with

OnProgress: TypeAlias = Callable[[int], object]

WAIT = 0.2  # seconds between two looks at what other processes have written
KEYS = {"input_ids", "attention_mask", "labels"}  # of examples


def write_cache(
    path: Path | str,
    teacher: nn.Module,
    inputs: Tensor | Dataset[Any],
    kind: str = "topk:64",
    *,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> TeacherCache:
    """Writes what a teacher predicts for all samples of a data set -> `TeacherCache`.

    Killed and started again, it goes on with the shards that are missing; the files are those of a
    run that was not. Several processes, under torchrun or each started by hand, share the work:
    each begins with shards of its own, goes on with those that nobody has, and returns when the
    cache is complete.

    Args:
        path: the directory; made where it is missing.
        teacher: a module that maps token ids (B, L) to logits (B, L, V), a `LinearHead`, or an
            object that has `logits`. It runs where it is. Where `fully_shard` has spread it over
            processes, all of them have to come here, and make as many calls each.
        inputs: token ids (N, L), any integer dtype: a row is a sample. Or a map-style `Dataset`
            whose examples are ids (L,), (ids, label), or dicts that have "input_ids" and may have
            "labels" and an "attention_mask": 0 is padding, tokens with the same number beside each
            other are a sample. The teacher gets samples without padding. Or a float tensor
            (N, ...), images say, for each of which the teacher has one prediction (V,). What comes
            twice is stored once.
        kind: "topk:64", "sampled:50", "hidden:bf16", "dense:fp32", ...: `cache.kinds` lists them.
        on_progress: None, or called from time to time with how many tokens are stored.
        vocab_size: V, the classes that count; None: all columns of the teacher.
        tokenizer: None, or whose ids they are: an object as `identity.of_tokenizer` takes it.
        data: None, or a dict that says which data they are; kept, not looked at.
        name: of the teacher; None: that of its class.
        batch_size: samples of one length, beside each other, that the teacher gets at a time. Its
            rounding may depend on it.
        tail: of "topk", how it is read by default: "bucket" or "renormalize".
        seed: of what is drawn.
        shard_tokens: a shard ends when it has as many.

    Raises:
        TypeError, ValueError: arguments other than listed, predictions that the kind does not hold.
        CacheMismatchError: the directory has another cache; the text says what differs.
        ImportError: zstandard is missing (the extra `cache`).

    Example:
        cache = write_cache("teacher.cache", HiddenStates(model), blocks, "topk:64")
        distiller = Distiller(student, cache, blocks, loss=KDLoss())
    """
    return Capture(path, teacher, inputs, kind, **options).run(on_progress)


class Capture:
    """What `write_cache` does, checked here and done by `run`; the arguments are the same.

    Attributes:
        tokens: how many will be stored.
    """

    def __init__(
        self,
        path: Path | str,
        teacher: nn.Module,
        inputs: Tensor | Dataset[Any],
        kind: str = "topk:64",
        *,
        vocab_size: int | None = None,
        tokenizer: Any = None,
        data: dict[str, Any] | None = None,
        name: str | None = None,
        batch_size: int = 8,
        tail: Tail = "bucket",
        seed: int = 0,
        shard_tokens: int = build.SHARD_TOKENS,
    ) -> None:
        zstd()  # before the first prediction is made for nothing
        checks.instance("teacher", teacher, nn.Module, "a torch.nn.Module")
        checks.data(inputs, None)
        if isinstance(inputs, Streamed):
            raise TypeError("inputs must be token ids or a torch Dataset, got a Streamed")
        for option, value in (("batch_size", batch_size), ("shard_tokens", shard_tokens)):
            checks.integer(option, value, low=1)
        checks.integer("seed", seed)
        self.path, self.teacher, self.batch_size = Path(path), teacher, batch_size
        self.is_sharded = any(is_sharded(x) for x in teacher.parameters())
        self.calls = 0  # of the teacher
        self.device = next((x.device for x in teacher.parameters()), torch.device("cpu"))
        are_values = isinstance(inputs, torch.Tensor) and inputs.is_floating_point()
        self.samples = _Values(inputs) if are_values else _Samples(inputs)
        with inference(teacher):
            first = self._predict([self.samples.content(0)])
        self.head = (
            first if isinstance(first, LinearHead) and str(kind).startswith("hidden") else None
        )
        classes = _classes(first)
        if vocab_size is None:
            if classes is None:
                raise ValueError(
                    f"vocab_size must be given for a teacher that returns {type(first).__name__}"
                )
            vocab_size = classes
        checks.integer("vocab_size", vocab_size)
        if classes is not None and vocab_size > classes:
            raise ValueError(
                f"vocab_size must be at most the teacher's {classes} classes, got {vocab_size}"
            )
        if self.head is not None:
            self.head = _cut(self.head, vocab_size)
            if self.is_sharded:  # its memory is freed when it is sharded again
                bias = self.head.bias
                own: Any = dict(
                    weight=self.head.weight.clone(), bias=bias if bias is None else bias.clone()
                )
                self.head = replace(self.head, **own)
        found = kinds.parse(kind, vocab_size, tail=tail, head=self.head)
        if tokenizer is not None:
            tokenizer = identity.of_tokenizer(tokenizer)
        named: Any = _Whole(teacher)  # as much of a module as is asked for
        self.build = build.Build(
            self.path,
            manifest.describe(
                found,
                sample="values" if are_values else "tokens",
                teacher=identity.of_teacher(named, name or type(teacher).__name__),
                tokenizer=tokenizer,
                data=data,
                seed=seed,
                library=__version__,
            ),
        )
        self.samples.find(self.build.codec)
        self.shards = build.cut(self.samples.lengths, shard_tokens)
        self.tokens = int(self.samples.lengths.sum())

    def run(self, on_progress: OnProgress | None = None) -> TeacherCache:
        """-> the `TeacherCache`, complete"""
        on_progress = on_progress or (lambda done: None)
        with failures.shared():
            (self._run_together if self.is_sharded else self._run_apart)(on_progress)
        # What is published may be of fewer inputs, full shards being the same, or of more; and a
        # shard that was written again may have other bytes, on another machine.
        published = manifest.load(self.path).shards if self.build.is_published() else ()
        self.build.publish(max(len(published), len(self.shards)), self.head)
        for lock in self.path.glob("shard-*.lock"):  # of shards that were damaged
            lock.unlink(missing_ok=True)
        return TeacherCache(self.path)

    def _run_apart(self, on_progress: OnProgress) -> None:
        rank, world = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
        left = sorted(range(len(self.shards)), key=lambda number: number % world != rank)
        while left:
            on_progress(self.stored())
            left = [number for number in left if not self._write(number, on_progress)]
            if left:
                time.sleep(WAIT)

    def _run_together(self, on_progress: OnProgress) -> None:
        """In rounds, of a shard for each process: every call gathers the teacher's weights, so that
        those with fewer batches, or none, ask for some once more."""
        rank, world = dist.get_rank(), dist.get_world_size()
        left = list(range(len(self.shards)))
        while left := self._left(left):
            on_progress(self.stored())
            now, before = left[:world], self.calls
            if rank < len(now) and not self._write(now[rank], on_progress):
                time.sleep(WAIT)  # somebody else is writing it
            most = before + max(sum(1 for _ in self._batches(number)) for number in now)
            with inference(self.teacher):
                while self.calls < most:
                    self._predict([self.samples.content(*self.samples.places[0])])

    def _left(self, numbers: Sequence[int]) -> list[int]:
        """Those of shards that are not there when all have come here, as process 0 sees it."""
        dist.barrier()
        found = [[number for number in numbers if not self._is_stored(number)]]
        dist.broadcast_object_list(found)
        return found[0]

    def stored(self) -> int:
        """Tokens of the shards that somebody has written."""
        paths = (self.path / NAME.format(number) for number in range(len(self.shards)))
        there = (x for x, path in zip(self.shards, paths, strict=True) if path.exists())
        return int(sum(self.samples.lengths[begin:end].sum() for begin, end in there))

    def _write(self, number: int, on_progress: OnProgress) -> bool:
        """A shard -> whether it is there: another process may be writing it."""
        with self.build.shard(number) as writer:
            if writer is None:
                return self._is_stored(number)
            done = self.stored()
            with inference(self.teacher):
                for batch in self._batches(number):
                    contents = [self.samples.content(*self.samples.places[k]) for k in batch]
                    prediction = self._predict(contents)
                    for place, k in enumerate(batch):
                        mine = map_rows(prediction, partial(_row, place))
                        rows, block = self.build.codec.encode(contents[place], mine)
                        writer.add(self.samples.keys[k].tobytes(), block, rows)
                    on_progress(done + writer.rows)
        return True

    def _is_stored(self, number: int) -> bool:
        """Raises CacheMismatchError: a shard is there, of other samples."""
        shard = self.build.stored(number)
        if shard is None:
            return False
        begin, end = self.shards[number]
        if not np.array_equal(np.sort(self.samples.keys[begin:end]), shard.index["key"]):
            raise CacheMismatchError(
                f"{shard.path} must have samples {begin} to {end} of the inputs, it has others: "
                "choose another path for other inputs, or another shard_tokens"
            )
        return True

    def _batches(self, number: int) -> Iterator[range]:
        """Samples of a shard, by number: of one length, in order, from its first on."""
        begin, end = self.shards[number]
        lengths = self.samples.lengths[begin:end]
        ends = [*np.flatnonzero(np.diff(lengths)) + begin + 1, end]
        for last in ends:
            while begin < last:
                yield range(begin, min(begin + self.batch_size, last))
                begin = min(begin + self.batch_size, last)

    def _predict(self, contents: list[Tensor]) -> Any:
        """A list of ids (n,) -> what the teacher says of them: (B, n, ...); of values (B, ...)"""
        self.calls += 1
        batch = torch.stack(contents).to(self.device)
        inputs = {"input_ids": batch} if self.samples.named else batch
        return predict_with(self.teacher, inputs)


class _Whole(Mapping[str, Tensor]):
    """A model whose state dict has a sharded tensor gathered when it is looked at, by all."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters, self.state = model.parameters, model.state_dict()

    def state_dict(self) -> _Whole:
        return self

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = whole(self.state[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


class _Samples:
    """The samples of a data set, each once: where they are, how long, and their keys.

    places: (M, 3): example, first token, last token + 1; lengths: (M,); keys: (M,), of 16 bytes.
    """

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        self.named = not isinstance(inputs, torch.Tensor) and isinstance(inputs[0], Mapping)

    def find(self, codec: Codec) -> None:
        """codec: of the cache, which says what a key is."""
        places, keys = array("q"), bytearray()
        for example in range(len(self.inputs)):
            for begin, end in self._cut(example):
                places.extend((example, begin, end))
                _, content, _ = codec.sample.content(self.content(example, begin, end))
                keys += codec.key(content)
        found = np.frombuffer(bytes(keys), f"V{KEY}")
        if not len(found):
            raise ValueError("inputs must have a token that counts, all are masked")
        first = np.sort(np.unique(found, return_index=True)[1])
        self.places = np.array(places).reshape(-1, 3)[first]
        self.keys, self.lengths = found[first], np.diff(self.places[:, 1:])[:, 0]

    def content(self, example: int, begin: int = 0, end: int | None = None) -> Tensor:
        """-> (n,)"""
        return self._example(example)[0][begin:end]

    def _cut(self, example: int) -> list[tuple[int, int]]:
        return _runs(*self._example(example))

    def _example(self, number: int) -> tuple[Tensor, Tensor | None]:
        """-> its ids (L,) and its mask (L,) or None"""
        found: Any = self.inputs[int(number)]
        mask: Any = None
        if isinstance(found, Mapping):
            if unknown := sorted(found.keys() - KEYS):
                raise ValueError(
                    f"inputs must be found by their input_ids alone, the examples have {unknown}"
                )
            found, mask = found.get("input_ids"), found.get("attention_mask")
        elif isinstance(found, (tuple, list)):
            found = found[0]
        ids = torch.as_tensor(found)
        if ids.is_floating_point() or ids.dim() != 1:
            raise TypeError(
                f"inputs must be token ids, (L,) an example, got {ids.dtype} of shape "
                f"{tuple(ids.shape)}"
            )
        if mask is not None:
            mask = torch.as_tensor(mask)
            if mask.shape != ids.shape or mask.is_floating_point() or mask.dtype == torch.bool:
                raise ValueError(
                    f"attention_mask must be integers, of the shape {tuple(ids.shape)} of "
                    f"input_ids, got {mask.dtype} of shape {tuple(mask.shape)}"
                )
        return ids, mask


class _Values(_Samples):
    """Tensors that are a sample each."""

    def content(self, example: int, begin: int = 0, end: int | None = None) -> Tensor:
        """-> (...)"""
        found: Tensor = self.inputs[int(example)]
        return found

    def _cut(self, example: int) -> list[tuple[int, int]]:
        return [(0, 1)]


def _runs(ids: Tensor, mask: Tensor | None) -> list[tuple[int, int]]:
    """(begin, end) of tokens beside each other that have the same number in the mask, not 0."""
    if mask is None:
        return [(0, len(ids))]
    numbers = mask.numpy()
    ends = [*np.flatnonzero(np.diff(numbers)) + 1, len(numbers)]
    pairs = zip([0, *ends], ends, strict=False)
    return [(begin, end) for begin, end in pairs if begin < end and numbers[begin]]


def _row(place: int, x: Tensor) -> Tensor:
    """Of x (B, n, ·) or (B, ·), the rows of one sample: (n, ·) or (1, ·)."""
    return flat(x[place : place + 1])


def _cut(head: LinearHead, classes: int) -> LinearHead:
    """A `LinearHead` without the rows that are padding."""
    bias = None if head.bias is None else head.bias[:classes]
    return replace(head, weight=head.weight[:classes], bias=bias)


def _classes(prediction: Any) -> int | None:
    """Of logits and heads; None of what does not say it."""
    if isinstance(prediction, LinearHead):
        return len(prediction.weight)
    return prediction.shape[-1] if isinstance(prediction, torch.Tensor) else None
