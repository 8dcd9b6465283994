"""`TeacherCache`: reads what a teacher predicted for the samples of a batch, wherever they lie."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..files import Array
from ..sources import LinearHead, Sampled, Tail, TopK
from . import kinds, manifest, samples
from .codec import Codec
from .errors import CacheCorruptError, CacheMismatchError, CacheMissError, Malformed
from .samples import Content, Integers, Samples
from .sections import zstd
from .shard import Facts, Shard, halves, opened

Stored: TypeAlias = TopK | Sampled | LinearHead | Tensor

ROWS = 2048  # that are decoded at a time, of several samples


class TeacherCache:
    """A teacher's predictions on disk, read through a map.

    Threads, and processes that were forked or started with it, may read at the same time. A block's
    checksum and bounds are checked when it is read for the first time; that its sample is the one
    that was asked for, every time.

    Args:
        path: the directory.
        tail: of "topk", "bucket" or "renormalize"; None: as the cache says.
        device: where predictions are put; the head of hidden states stays there.
        expect: None, or the part of the description that must be so.

    Attributes:
        description: a dict, what the cache is: kind, vocab_size, teacher, tokenizer, data, ...
        kind: one of `cache.kinds`.
        tokens: predictions of all samples together.
        bytes: of its files, but for the manifest.
        checksum: hex, of the manifest and so of everything.

    Raises:
        FileNotFoundError: there is no such directory.
        CacheError: it is no cache, or an unfinished one.
        CacheCorruptError: it is damaged.
        CacheMismatchError: it is not as expected; the text says what differs.
        ImportError: zstandard is missing (the extra `cache`).

    Example:
        teacher = cache.open("teacher.cache")
        loss = kd_loss(student_logits, teacher[input_ids], labels)
    """

    def __init__(
        self,
        path: Path | str,
        *,
        tail: Tail | None = None,
        device: torch.device | str | int = "cpu",
        expect: Facts | None = None,
    ) -> None:
        zstd()  # before the first batch
        if tail is not None and tail not in kinds.TAILS:
            raise ValueError(f"tail must be one of {', '.join(kinds.TAILS)}, got {tail!r}")
        self.path, self.tail, self.device = Path(path), tail, torch.device(device)
        found = manifest.load(self.path)
        self.description, self.checksum = found.description, found.checksum
        manifest.check_same(self.path, self.description, expect or {})
        self.codec = Codec(self.description)
        self.kind = self.codec.kind
        self.shards = [
            _open_shard(self.path, self.description, k, facts)
            for k, facts in enumerate(found.shards)
        ]
        self.head = None
        for facts in found.files:
            self.head = _read_head(self.path, facts, self.kind)
        self.tokens = sum(shard.rows for shard in self.shards)
        self.bytes = sum(facts["bytes"] for facts in found.shards + found.files)
        self.to(device)

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def __getitem__(self, ids: Samples) -> Stored:
        """As `read`, without padding."""
        return self.read(ids)

    def __contains__(self, ids: Any) -> bool:
        """ids: (n,) token ids of a sample."""
        return bool(self.has([ids])[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.path, self.tail, self.device, self.checksum)

    def to(self, device: torch.device | str | int) -> TeacherCache:
        """Puts the head, and from now on predictions, on a device -> itself."""
        self.device = torch.device(device)
        if self.head is not None:
            bias = self.head.bias
            self.head = LinearHead(
                self.head.hidden,
                self.head.weight.to(self.device),
                None if bias is None else bias.to(self.device),
            )
        return self

    def read(self, ids: Samples, mask: Integers | None = None) -> Stored:
        """What the teacher predicted, as `kd_loss` takes it.

        Args:
            ids: token ids (L,) or (B, L), any integer dtype, a row being a sample; or a list of
                samples (n,), which are padded to the longest. Of a cache of values, tensors
                (B, ...).
            mask: None, or (B, L) integers: 0 where a row is padded; neighbours of the same other
                number are a sample: an attention mask, or 1, 2, 3 for samples packed into a row.

        Returns:
            A `TopK`, a `Sampled`, a `LinearHead` or logits, of leading dimensions (L,) or (B, L),
            or (B,) of values. Where a row is padded: no ids, hidden states and logits of 0.

        Raises:
            CacheMissError: a sample is not in the cache.
            CacheCorruptError: a block is damaged, or is not of the sample.
            TypeError, ValueError: ids or a mask other than listed.
        """
        wanted, shape, places = self._wanted(ids, mask)
        if not wanted:
            raise ValueError("ids must have a sample at least, got none")
        contents = [self.codec.sample.content(each) for each in wanted]
        shards, places_in_index = self._find(contents)
        if (shards < 0).any():
            self._missed(contents, shards)
        files = [self.shards[k] for k in shards]
        some = [
            self.codec.decode(contents[here], files[here], places_in_index[here])
            for here in _groups([rows for rows, _, _ in contents])
        ]
        tensors = {}
        for name in some[0]:
            found = _together(
                [torch.as_tensor(each[name]) for each in some], self.kind.padding[name]
            )
            if places is not None:
                everywhere = found.new_full(
                    (math.prod(shape), found.shape[1]), self.kind.padding[name]
                )
                everywhere[torch.from_numpy(places)] = found
                found = everywhere
            tensors[name] = found.view(*shape, found.shape[1]).to(self.device, non_blocking=True)
        return self.kind.source(tensors, self.tail, self.head)

    def has(self, wanted: Samples) -> Array:
        """Samples, as `read` takes them -> (m,) bool: which of them are there."""
        wanted, _, _ = self._wanted(wanted, None)
        contents = [self.codec.sample.content(each) for each in wanted]
        shard, _ = self._find(contents)
        return shard >= 0

    def samples(self) -> Iterator[Tensor]:
        """The token ids (n,) of all samples, in the order in which they were stored; of a cache of
        values the SHA-256 of each."""
        for shard in self.shards:
            for place in shard.in_order():
                yield torch.from_numpy(self.codec.check(shard, place).astype(np.int64))

    def _wanted(self, ids: Any, mask: Any) -> tuple[list[Any], tuple[int, ...], Array | None]:
        """-> samples, leading dimensions, and where in them the samples' rows are, or None where
        they fill them in order."""
        if self.codec.sample is samples.Values:
            if mask is not None:
                raise ValueError("mask goes with token ids, this cache is of values")
            return list(ids), (len(ids),), None
        if isinstance(ids, (list, tuple)) and (not ids or np.ndim(ids[0])):
            wanted = [samples.as_integers("ids", each) for each in ids]
            if mask is not None:
                raise ValueError("mask goes with ids (B, L), got a list of samples")
            length = max(map(len, wanted), default=0)
            places: list[Any] = [k * length + np.arange(len(each)) for k, each in enumerate(wanted)]
            return wanted, (len(wanted), length), np.concatenate(places or [[]]).astype(np.int64)
        ids = samples.as_integers("ids", ids)
        if ids.ndim not in (1, 2):
            raise ValueError(f"ids must be (L,) or (B, L), got shape {ids.shape}")
        rows = np.atleast_2d(ids)
        if mask is None:
            return list(rows), ids.shape, None
        mask = np.atleast_2d(samples.as_integers("mask", mask))
        if mask.shape != rows.shape:
            raise ValueError(f"mask must be {ids.shape}, as ids, got {mask.shape}")
        wanted, places = [], []
        for k, (row, numbers) in enumerate(zip(rows, mask, strict=True)):
            ends = np.flatnonzero(np.diff(numbers)) + 1
            for begin, end in zip([0, *ends], [*ends, len(row)], strict=True):
                if end > begin and numbers[begin]:
                    wanted.append(row[begin:end])
                    places.append(k * len(row) + np.arange(begin, end))
        return wanted, ids.shape, np.concatenate(places or [[]]).astype(np.int64)

    def _find(self, contents: Sequence[Content]) -> tuple[Array, Array]:
        """-> (m,), (m,): the number of the shard, and the place in its index; −1: in none"""
        keys = halves([self.codec.key(content) for _, content, _ in contents])
        found, places = np.full(len(contents), -1), np.full(len(contents), -1)
        for k, shard in enumerate(self.shards):
            (missing,) = np.nonzero(found < 0)
            if not len(missing):
                break
            place = shard.find(*(half[missing] for half in keys))
            here = missing[place >= 0]
            found[here], places[here] = k, place[place >= 0]
        return found, places

    def _missed(self, contents: Sequence[Content], shards: Array) -> None:
        first = int(np.flatnonzero(shards < 0)[0])
        rows, _, arrays = contents[first]
        begins = ", ".join(map(str, arrays[self.codec.sample.columns[0].name][:8].tolist()))
        raise CacheMissError(
            f"{(shards < 0).sum()} of {len(contents)} samples are not in {self.path}: number "
            f"{first} of the batch, {rows} tokens that begin {begins}; it was written for "
            f"{self.description['data']}"
        )


def _groups(lengths: Sequence[int]) -> Iterator[slice]:
    """Samples that are decoded at a time, as slices: what is in between fits into caches, and into
    memory that was used before."""
    begin, rows = 0, 0
    for k, length in enumerate(lengths):
        if rows and rows + length > ROWS:
            yield slice(begin, k)
            begin, rows = k, 0
        rows += length
    yield slice(begin, len(lengths))


def _together(tensors: list[Tensor], padding: int) -> Tensor:
    """(m, ·) each -> (Σ m, widest)"""
    if len(tensors) == 1:
        return tensors[0]
    widest = max(x.shape[1] for x in tensors)
    wide = (torch.nn.functional.pad(x, (0, widest - x.shape[1]), value=padding) for x in tensors)
    return torch.cat([*wide])


def verify(
    path: Path | str, on_sample: Callable[[int], object] | None = None
) -> list[CacheCorruptError]:
    """Reads all of a cache -> a list of `CacheCorruptError`, one for each damaged block or file.

    Args:
        path: the directory.
        on_sample: None, or called after each sample with its number of rows.

    Raises:
        FileNotFoundError, CacheError: as `TeacherCache`, where there is no cache to be read.
    """
    path, errors, shards = Path(path), [], []
    found = manifest.load(path)
    codec = Codec(found.description)
    for k, facts in enumerate(found.shards):
        try:
            shards.append(_open_shard(path, found.description, k, facts))
        except CacheCorruptError as error:
            errors.append(error)
    for facts in found.files:
        try:
            _read_head(path, facts, codec.kind)
        except CacheCorruptError as error:
            errors.append(error)
    for shard in shards:
        for place in shard.in_order():
            try:
                codec.check(shard, place)
            except CacheCorruptError as error:
                errors.append(error)
            if on_sample is not None:
                on_sample(int(shard.index["rows"][place]))
    return errors


def _open_shard(folder: Path, description: Facts, number: int, facts: Facts) -> Shard:
    """A shard as the manifest names it."""
    path = folder / facts["name"]
    try:
        shard = Shard(path)
    except FileNotFoundError as error:
        raise CacheCorruptError.at(path, "file", 0, facts["bytes"], "it is missing") from error
    found = {"bytes": shard.bytes, "samples": len(shard), "rows": shard.rows}
    found.update(name=path.name, root=shard.root.hex())
    same = shard.number == number and shard.description == description
    if not same or any(facts[key] != value for key, value in found.items()):
        raise CacheCorruptError.at(path, "file", 0, shard.bytes, "not what the manifest names")
    return shard


def _read_head(folder: Path, facts: Facts, kind: Any) -> LinearHead:
    """The file of a teacher's head -> a `LinearHead` without hidden states."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / facts["name"]
    try:
        with open(opened(path), "rb") as file:
            content = file.read(facts["bytes"] + 1)  # and no more, whatever is there
    except FileNotFoundError as error:
        raise CacheCorruptError.at(path, "file", 0, facts["bytes"], "it is missing") from error
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise CacheCorruptError.at(path, "file", 0, len(content), "not what was written")
    try:
        tensors = load(content)
        weight, bias = tensors["weight"], tensors.get("bias")
        wrong = weight.dim() != 2 or weight.shape[1] != kind.size
        wrong = wrong or len(weight) < kind.vocab_size or not weight.is_floating_point()
        if wrong or (
            bias is not None and (bias.shape, bias.dtype) != (weight.shape[:1], weight.dtype)
        ):
            raise Malformed("shapes or dtypes that are no head's of this cache")
    except (SafetensorError, Malformed, LookupError) as error:
        raise CacheCorruptError.at(path, "file", 0, len(content), error) from error
    return LinearHead(weight.new_empty(0, kind.size), weight, bias)


def _opened_again(
    path: Path, tail: Tail | None, device: torch.device, checksum: str
) -> TeacherCache:
    """In another process."""
    found = TeacherCache(path, tail=tail, device=device)
    if found.checksum != checksum:
        raise CacheMismatchError(f"{path} was written again since it was opened")
    return found
