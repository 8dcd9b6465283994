"""`Codec`: samples and their predictions to blocks of a shard, and back."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..files import Array
from . import manifest, samples
from .errors import Malformed
from .samples import Content
from .sections import Decompressor, number, pack, unpack
from .shard import Facts, Shard


class Codec:
    """What the description of a cache says of its blocks.

    Attributes:
        kind: one of `kinds`.
        sample: one of `samples`.
    """

    def __init__(self, description: Facts) -> None:
        self.kind = manifest.kind_of(description)
        self.sample = samples.kind_of(description["sample"])
        self.columns = self.sample.columns + self.kind.columns
        self.salt = manifest.salt(description)
        self.seed = description["seed"]

    def key(self, content: bytes) -> bytes:
        """Bytes of a sample -> the key under which it is found."""
        return samples.key(self.salt, content)

    def encode(self, ids: Any, prediction: Any) -> tuple[int, bytes]:
        """A sample and a prediction of its n rows -> (n, a block)"""
        rows, content, columns = self.sample.content(ids)
        # Of the sample, so that what is drawn for it does not depend on what came before.
        seed = hashlib.sha256(f"{self.seed} ".encode() + self.key(content)).digest()
        columns.update(self.kind.encode(prediction, int.from_bytes(seed[:8], "little")))
        for column in self.kind.columns:
            if column.per == "row" and columns[column.name].size != rows * column.times:
                got = columns[column.name].size // column.times
                raise ValueError(f"prediction must have {rows} rows, as ids, got {got}")
        return rows, pack(self.columns, columns)

    def decode(
        self, contents: Sequence[Content], shards: Sequence[Shard], places: Array
    ) -> dict[str, Any]:
        """The blocks of samples, at places of the shards' indices -> {name: (rows of all, k)}

        contents: of the samples, `sample.content`.

        Raises:
            CacheCorruptError: a block is damaged, or is not of its sample.
        """
        wanted = zip(shards, places, contents, strict=True)
        unpacked = self._unpacker()
        blocks = [unpacked(shard, place, rows) for shard, place, (rows, _, _) in wanted]
        unchecked = not all(shard.checked[k] for shard, k in zip(shards, places, strict=True))
        try:
            decoded = self._decoded(_joined(blocks), contents, unchecked)
        except Malformed:
            # Which of them it is: only one by one.
            for shard, place, block, content in zip(shards, places, blocks, contents, strict=True):
                try:
                    self._decoded(block, [content], True)
                except Malformed as error:
                    shard.damaged(place, error)
            raise
        for shard, place in zip(shards, places, strict=True):
            shard.checked[place] = True
        return decoded

    def check(self, shard: Shard, place: int) -> Array:
        """The block at a place of a shard's index -> its sample's column, all having been checked.

        Raises:
            CacheCorruptError: it is damaged.
        """
        shard.checked[place] = False
        columns = self._columns(self._unpacker()(shard, place))
        (column,) = self.sample.columns
        sample = columns[column.name]
        try:
            if self.key(sample.astype(column.dtype).tobytes()) != shard.key(place):
                raise Malformed("its key is that of another sample")
            decoded: Any = self.kind.decode(columns)
            self.kind.check(columns, decoded)
        except Malformed as error:
            shard.damaged(place, error)
        shard.checked[place] = True
        return sample

    def _unpacker(self) -> Callable[..., list[bytes]]:
        """-> a function (shard, place, rows that are wanted) -> [bytes of every section]"""
        decompressor = Decompressor()

        def unpacked(shard: Shard, place: int, wanted: int | None = None) -> list[bytes]:
            rows = int(shard.lengths[place])
            if wanted is not None and rows != wanted:
                shard.damaged(place, f"a sample of {rows} rows, {wanted} are wanted")
            try:
                return unpack(self.columns, shard.block(place), rows, decompressor)
            except Malformed as error:
                shard.damaged(place, error)

        return unpacked

    def _decoded(
        self, sections: list[bytes], contents: Sequence[Content], unchecked: bool
    ) -> dict[str, Any]:
        columns = self._columns(sections)
        (column,) = self.sample.columns
        wanted = np.concatenate([arrays[column.name] for _, _, arrays in contents])
        if not np.array_equal(columns[column.name], wanted):
            raise Malformed("it is of another sample")
        kind: Any = self.kind
        decoded: dict[str, Any] = kind.decode(columns)
        if unchecked:
            kind.check(columns, decoded)
        return decoded

    def _columns(self, sections: list[bytes]) -> dict[str, Array]:
        """-> {name: numbers}"""
        found, k = {}, 0
        for column in self.columns:
            found[column.name] = number(column, sections[k : k + column.sections])
            k += column.sections
        return found


def _joined(blocks: list[list[bytes]]) -> list[bytes]:
    """Sections of several blocks -> of all their rows together."""
    return (
        blocks[0] if len(blocks) == 1 else [b"".join(parts) for parts in zip(*blocks, strict=True)]
    )
