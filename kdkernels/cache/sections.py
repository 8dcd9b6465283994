"""A block: what is stored of one sample, in sections.

A column of integers is split into byte planes, all their lowest bytes first, each plane a section:
the low bytes of ids and log-probabilities are noise, the high ones nearly constant, and apart from
each other they pack well. Floats, of which a row has one, are a section. A section is a frame of
zstd, or its bytes as they are where that is hardly smaller, or nothing where all of them are 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..files import Array
from .errors import Malformed

COMPRESSED = 1 << 31  # in a section's size
WORTH = 24  # bytes that a frame must save: restoring one takes two microseconds
LEVEL = 1  # zstd's: what is left to gain is entropy, not repetition
# Of a block's bytes as they are, to those stored: more is not written and not believed, so that no
# file makes a reader take memory out of proportion.
LARGEST_RATIO, RATIO_FREE = 1024, 1 << 20
GRID_FREE = 1 << 24  # the same of a block's rows times the entries of its widest, to all entries


def zstd() -> Any:
    """The module `zstandard`.

    Raises:
        ImportError: it is missing; the text says what brings it.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'kdkernels[cache]'") from error
    return zstandard


@dataclass(frozen=True)
class Column:
    """Numbers of a sample.

    dtype: little-endian.
    width: bytes of an integer that are stored, the lowest: a section of each.
    per: "row" or "entry", of which a row has as many as the column "counts" says.
    times: numbers for each of them.

    sections: how many it is; unit: bytes of a number in each.
    """

    name: str
    dtype: str
    width: int
    per: str = "row"
    times: int = 1
    sections: int = field(init=False)
    unit: int = field(init=False)

    def __post_init__(self) -> None:
        # Kept, not computed when asked: for a short sample it would be much of the reading.
        object.__setattr__(self, "sections", self.width if self.dtype[1] == "u" else 1)
        object.__setattr__(self, "unit", self.width // self.sections)


def pack(columns: Sequence[Column], arrays: Mapping[str, Any]) -> bytes:
    """arrays: {name: (n,) of the column's dtype, or of more dimensions} -> a block.

    Raises:
        Malformed: `unpack` would not take it.
    """
    if "counts" in arrays:
        _entries(arrays["counts"])
    compressor = zstd().ZstdCompressor(level=LEVEL, write_content_size=True)
    sections = [section for column in columns for section in _split(column, arrays[column.name])]
    packed = [_smallest(section, compressor) for section in sections]
    total = sum(map(len, sections))
    if total > RATIO_FREE + LARGEST_RATIO * sum(len(content) for _, content in packed):
        packed = [(len(section), section) for section in sections]
    sizes = np.array([size for size, _ in packed], "<u4")
    return b"".join([sizes.tobytes(), *(content for _, content in packed)])


class Decompressor:
    """Frames of zstd, for one thread."""

    def __init__(self) -> None:
        package = zstd()
        self.error, self.size_of = package.ZstdError, package.frame_content_size
        self.restore = package.ZstdDecompressor().decompress

    def __call__(self, frame: Any, wanted: int) -> bytes:
        """A frame -> that many bytes."""
        try:
            # Asked first: a frame may claim any size, and decompressing would allocate it.
            if self.size_of(frame) != wanted:
                raise Malformed(f"a section of {self.size_of(frame)} bytes, {wanted} are wanted")
            content: bytes = self.restore(frame, allow_extra_data=False)
        except self.error as error:
            raise Malformed(f"zstd: {error}") from error
        return content


def unpack(
    columns: Sequence[Column], block: Any, rows: int, decompressor: Decompressor
) -> list[bytes]:
    """A block of that many rows -> [bytes of every section].

    Raises:
        Malformed: it is not what `pack` makes of these columns.
    """
    count = sum(column.sections for column in columns)
    if len(block) < 4 * count:
        raise Malformed(f"{len(block)} bytes, less than the sizes of {count} sections")
    sizes = np.frombuffer(block, "<u4", count).tolist()
    place, left = 4 * count, RATIO_FREE + LARGEST_RATIO * len(block)
    entries, found = 0, list[bytes]()
    for column in columns:
        wanted = column.times * (rows if column.per == "row" else entries) * column.unit
        left -= wanted * column.sections
        if left < 0:
            raise Malformed("more than its bytes can hold")
        for size in sizes[len(found) : len(found) + column.sections]:
            stored = size & ~COMPRESSED
            content = block[place : place + stored]
            if size != stored:
                content = decompressor(content, wanted)
            elif not stored:
                content = bytes(wanted)
            if len(content) != wanted:
                raise Malformed(f"a section of {len(content)} bytes, {wanted} are wanted")
            found.append(content)
            place += stored
        if column.name == "counts":
            entries = _entries(number(column, found[-column.sections :]))
    if place != len(block):
        raise Malformed(f"sections of {place} bytes in a block of {len(block)}")
    return found


def number(column: Column, planes: Sequence[Any]) -> Array:
    """Sections of a column -> (n,) of its dtype."""
    if column.sections != column.width:
        return np.frombuffer(planes[0], column.dtype)
    *lower, highest = (np.frombuffer(plane, np.uint8) for plane in planes)
    numbers = highest.astype(column.dtype)
    for plane in reversed(lower):
        numbers <<= 8
        numbers |= plane
    return numbers


def _entries(counts: Array) -> int:
    """Of rows (n,) -> all of them; they are read as a grid (n, widest)."""
    rows, widest, entries = len(counts), counts.max(initial=0), int(counts.sum(dtype=np.int64))
    if rows * int(widest) > GRID_FREE + LARGEST_RATIO * entries:
        raise Malformed(f"{rows} rows of up to {widest} entries, {entries} in all")
    return entries


def _split(column: Column, array: Array) -> list[bytes]:
    array = np.ascontiguousarray(array, column.dtype).reshape(-1)
    if column.sections != column.width:
        return [array.tobytes()]
    planes = array.view(np.uint8).reshape(-1, array.itemsize)
    return [planes[:, k].tobytes() for k in range(column.width)]


def _smallest(section: bytes, compressor: Any) -> tuple[int, bytes]:
    """-> (its size with a flag, its content)"""
    if section.count(0) == len(section):
        return 0, b""
    packed = compressor.compress(section)
    if len(packed) + WORTH < len(section):
        return len(packed) | COMPRESSED, packed
    return len(section), section
