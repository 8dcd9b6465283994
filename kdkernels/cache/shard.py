"""A shard: a file of blocks, one a sample, that says what it is and checks itself.

    0        8  magic
    8        4  version
    12       4  n, bytes of the header
    16       n  header: canonical JSON
    16 + n      blocks, one after the other, without gaps
    e     48 s  index, an entry for each of s samples, sorted by key
    e + 48 s 56 footer

docs/cache.md has every byte. Nothing lies outside of a checksum: those of blocks are in the index,
that of header, index and footer is the root, which ends the file and which the manifest repeats.
"""

import hashlib
import json
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from ..files import Array
from .errors import CacheCorruptError, CacheError, Malformed
from .samples import KEY

Facts = dict[str, Any]
Bytes = bytes  # also where `Shard` has its own
MAGIC, VERSION = b"KDKCACHE", 1
LARGEST_JSON = 1 << 20
LARGEST_ROWS = 1 << 24  # of a sample
START = struct.Struct("<8sII")
FOOTER = struct.Struct("<QQQ32s")  # where the index begins, samples, rows, root
CHECKSUM = 16  # bytes
ENTRY = np.dtype(
    [("key", "V16"), ("offset", "<u8"), ("size", "<u4"), ("rows", "<u4"), ("checksum", "V16")]
)
NAME = "shard-{:05d}.kdc"


def canonical(facts: Any) -> bytes:
    """The one way to write these facts as JSON."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def parsed(content: bytes) -> Any:
    """Canonical JSON -> facts.

    Raises:
        Malformed: it is longer than a mebibyte, no JSON, or not canonical.
    """
    if len(content) > LARGEST_JSON:
        raise Malformed(f"JSON of {len(content)} bytes, more than {LARGEST_JSON}")
    try:
        facts = json.loads(content)
        same = canonical(facts) == content
    except (ValueError, RecursionError) as error:
        raise Malformed(f"no JSON: {error}") from error
    if not same:
        raise Malformed("JSON that is not canonical")
    return facts


class ShardWriter:
    """Writes a shard to a binary file, block by block.

    Args:
        file: opened for writing, empty.
        description: of the cache; JSON.
        number: of the shard.
    """

    def __init__(self, file: IO[bytes], description: Facts, number: int) -> None:
        header = canonical({"description": description, "shard": number})
        if len(header) > LARGEST_JSON:
            raise CacheError(
                f"the description of a cache must fit into {LARGEST_JSON} bytes, got {len(header)}"
            )
        self.file, self.rows = file, 0
        self.entries: dict[bytes, tuple[bytes, int, int, int, bytes]] = {}
        self.root = hashlib.sha256()
        self._write(START.pack(MAGIC, VERSION, len(header)) + header)

    def add(self, key: bytes, block: bytes, rows: int) -> None:
        """key: 16 bytes of which none was added before; block: bytes; rows: of the sample."""
        checksum = hashlib.sha256(block).digest()[:CHECKSUM]
        self.entries[key] = (key, self.file.tell(), len(block), rows, checksum)
        self.rows += rows
        self.file.write(block)

    def finish(self) -> None:
        """Writes what comes after the blocks."""
        begin = self.file.tell()
        entries = np.array([self.entries[key] for key in sorted(self.entries)], ENTRY)
        self._write(entries.tobytes())
        self._write(FOOTER.pack(begin, len(entries), self.rows, b"")[:-32])
        self.file.write(self.root.digest())

    def _write(self, content: bytes) -> None:
        self.root.update(content)
        self.file.write(content)


class Shard:
    """A shard that can be read: mapped, and checked but for its blocks, which are when they are
    read for the first time.

    Raises:
        CacheCorruptError: it is not what was written, or of another version.
        CacheError: it is no ordinary file.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.map = _mapped(path)
        size = len(self.map)
        if size < START.size + FOOTER.size:
            self._damaged("file", 0, size, "too short for a shard")
        magic, version, length = START.unpack_from(self.map)
        if magic != MAGIC:
            self._damaged("header", 0, len(MAGIC), "no shard begins like this")
        if version != VERSION:
            self._damaged("header", 8, 12, f"its version is {version}, not {VERSION}")
        self.first = START.size + length
        footer = size - FOOTER.size
        begin, count, self.rows, self.root = FOOTER.unpack_from(self.map, footer)
        if begin < self.first or begin + count * ENTRY.itemsize != footer:
            self._damaged("header or footer", 0, size, "not of a file of this size")
        root = hashlib.sha256()
        with memoryview(self.map) as content:
            root.update(content[: self.first])
            root.update(content[begin:-32])
        if root.digest() != self.root:
            self._damaged("header, index or footer", 0, size, "not what was written")
        try:
            facts = parsed(self.map[START.size : self.first])
            self.description, self.number = facts["description"], facts["shard"]
        except (Malformed, TypeError, LookupError) as error:
            self._damaged("header", START.size, self.first, error)
        # Copied: mapped bytes that a file no longer has would end the process.
        self.index = np.frombuffer(self.map[begin:footer], ENTRY)
        keys = np.frombuffer(np.ascontiguousarray(self.index["key"]).data, ">u8").reshape(-1, 2)
        self.high, self.low = np.ascontiguousarray(keys.T).astype("=u8")
        # Apart from each other: a record's field takes a microsecond to read.
        self.offsets, self.sizes, self.lengths = (
            self.index[name].astype(np.int64) for name in ("offset", "size", "rows")
        )
        self.checked = np.zeros(count, bool)
        self._check_index(begin, footer)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def bytes(self) -> int:
        return len(self.map)

    def find(self, high: Array, low: Array) -> Array:
        """The halves (m,) of keys -> (m,) where they are in the index, −1: nowhere."""
        place = np.searchsorted(self.high, high)
        found = np.full(len(high), -1)
        pending = np.arange(len(high))
        while True:  # once, but for keys whose first halves are the same
            pending = pending[place[pending] < len(self.high)]
            pending = pending[self.high[place[pending]] == high[pending]]
            if not len(pending):
                return found
            same = self.low[place[pending]] == low[pending]
            found[pending[same]] = place[pending[same]]
            pending = pending[~same]
            place[pending] += 1

    def block(self, place: int) -> memoryview:
        """Where it is in the index -> its bytes; their checksum counts until `checked` says so."""
        begin = int(self.offsets[place])
        end = begin + int(self.sizes[place])
        if self.map.size() < end:
            self.damaged(place, f"the file has {self.map.size()} bytes left")
        content = memoryview(self.map)[begin:end]
        if not self.checked[place]:
            if (
                hashlib.sha256(content).digest()[:CHECKSUM]
                != self.index["checksum"][place].tobytes()
            ):
                self.damaged(place, "not what was written")
        return content

    def key(self, place: int) -> Bytes:
        key: Bytes = self.index["key"][place].tobytes()
        return key

    def in_order(self) -> Array:
        """Places in the index, in the order in which samples were written."""
        return np.argsort(self.index["offset"], kind="stable")

    def damaged(self, place: int, what: object) -> NoReturn:
        """Raises CacheCorruptError for the block of an entry."""
        begin, size = int(self.index[place]["offset"]), int(self.index[place]["size"])
        number = int((self.index["offset"] < begin).sum())
        self._damaged(number, begin, begin + size, what)

    def _damaged(self, block: int | str, begin: int, end: int, what: object) -> NoReturn:
        raise CacheCorruptError.at(self.path, block, begin, end, what)

    def _check_index(self, begin: int, end: int) -> None:
        """Of a file whose checksums are right, but which somebody else made."""
        order = self.in_order()
        offsets, sizes = self.index["offset"][order], self.index["size"][order].astype(np.uint64)
        expected = self.first + np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
        if expected[-1] != begin or (offsets != expected[:-1]).any():
            self._damaged("index", begin, end, "blocks that do not follow each other")
        rows = self.index["rows"]
        if rows.astype(np.uint64).sum() != self.rows or rows.max(initial=0) > LARGEST_ROWS:
            self._damaged("index", begin, end, "rows that do not add up")
        ascending = (self.high[1:] > self.high[:-1]) | (
            (self.high[1:] == self.high[:-1]) & (self.low[1:] > self.low[:-1])
        )
        if not ascending.all():
            self._damaged("index", begin, end, "keys that are not sorted")


def halves(keys: Sequence[bytes]) -> tuple[Array, Array]:
    """A list of keys -> (m,), (m,) uint64: they compare as the keys do."""
    pairs = np.frombuffer(b"".join(keys), ">u8").reshape(-1, KEY // 8)
    return pairs[:, 0].astype("=u8"), pairs[:, 1].astype("=u8")


def opened(path: Path) -> int:
    """A file of a cache, opened for reading -> its descriptor.

    Raises:
        CacheError: no ordinary file: a link would lead out of the cache.
        OSError: it cannot be opened.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise CacheError(f"{path} must be a file, not a link or a directory")
    return os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))


def _mapped(path: Path) -> mmap.mmap:
    handle = opened(path)
    try:
        if not os.fstat(handle).st_size:
            raise CacheCorruptError.at(path, "file", 0, 0, "it is empty")
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(handle)
