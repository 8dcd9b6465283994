"""Building a cache, shard by shard: by one process or by many, killed and started again.

A shard is written under another name and renamed when it is complete; the manifest comes last. A
process locks the shard it writes and nothing else: processes need not know of each other.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from .. import files as storage
from ..files import Array
from ..sources import LinearHead
from . import kinds, manifest
from .codec import Codec
from .errors import CacheCorruptError, CacheMismatchError
from .shard import NAME, Facts, Shard, ShardWriter

SHARD_TOKENS = 2**22  # what a process that is killed loses is less than a shard


class Build:
    """A cache that is being written to a directory, which is made where it is missing.

    Args:
        folder: a `Path`.
        description: of `manifest.describe`.

    Raises:
        CacheMismatchError: the directory has another cache, or shards of another; the text says
            what differs.
    """

    def __init__(self, folder: Path, description: Facts) -> None:
        self.folder, self.description = folder, description
        self.codec = Codec(description)
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_published():
            self._check(folder / manifest.FILE, manifest.load(folder).description)
        self.stored(0)

    def is_published(self) -> bool:
        return (self.folder / manifest.FILE).exists()

    def stored(self, number: int) -> Shard | None:
        """The `Shard` of a number, or None where it is yet to be written, or damaged.

        Raises:
            CacheMismatchError: it is of another cache.
        """
        path = self.folder / NAME.format(number)
        try:
            shard = Shard(path)
        except (FileNotFoundError, CacheCorruptError):
            return None
        self._check(path, shard.description)
        return shard if shard.number == number else None

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[ShardWriter | None]:
        """-> a `ShardWriter`, or None where the shard is there or another process writes it."""
        path = self.folder / NAME.format(number)
        if self.stored(number) is not None:
            yield None
            return
        try:
            held = self._lock(number).acquire(timeout=0)
        except Timeout:
            yield None
            return
        with held:
            if self.stored(number) is not None:  # meanwhile
                yield None
                return
            storage.sweep(path)
            with storage.atomic(path) as file:
                writer = ShardWriter(file, self.description, number)
                yield writer
                writer.finish()

    def publish(self, count: int, head: LinearHead | None = None) -> bool:
        """Writes the manifest of `count` shards -> whether all of them are there.

        Args:
            head: of a cache of hidden states, a `LinearHead`.
        """
        shards = []
        for number in range(count):
            if (shard := self.stored(number)) is None:
                return False
            facts = {"bytes": shard.bytes, "samples": len(shard), "rows": shard.rows}
            shards.append({"name": shard.path.name, **facts, "root": shard.root.hex()})
        # All who find the last shard there come here; what they write is the same.
        with self._lock(0):
            files = [] if head is None else [_write_head(self.folder / manifest.HEAD, head)]
            storage.sweep(self.folder / manifest.FILE)
            manifest.publish(self.folder, self.description, shards, files)
            for number in range(max(count, 1)):
                self._lock_path(number).unlink(missing_ok=True)
        return True

    def _lock(self, number: int) -> FileLock:
        return FileLock(self._lock_path(number))

    def _lock_path(self, number: int) -> Path:
        return (self.folder / NAME.format(number)).with_suffix(".lock")

    def _check(self, path: Path, description: Facts) -> None:
        if description != self.description:
            manifest.check_same(path, description, self.description)
            raise CacheMismatchError(f"{path} is of another cache, which says more of itself")


def cut(lengths: Sequence[int] | Array, tokens: int) -> list[tuple[int, int]]:
    """Samples in order, as shards: one ends where it has `tokens` or more.

    lengths: of the samples -> [(begin, end), ...]
    """
    shards, begin, size = [], 0, 0
    for k, length in enumerate(lengths, 1):
        size += length
        if size >= tokens:
            shards.append((begin, k))
            begin, size = k, 0
    return shards + [(begin, len(lengths))] * (begin < len(lengths))


def _write_head(path: Path, head: LinearHead) -> Facts:
    storage.sweep(path)
    digest = hashlib.sha256()
    with storage.atomic(path) as file:
        for piece in kinds.head_file(head):
            digest.update(piece)
            file.write(piece)
        size = file.tell()
    return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}
