"""What can be wrong with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class CacheError(ValueError):
    """A cache that cannot be used, written or read; the text names it and says why."""


class CacheCorruptError(CacheError):
    """Bytes of a cache that are not what was written.

    Attributes:
        shard: the file's name.
        block: the number of its sample, or "header", "index", "footer", "file".
        begin: where the range of bytes begins in the file.
        end: where it ends.
    """

    def __init__(
        self,
        text: str,
        shard: str | None = None,
        block: int | str | None = None,
        begin: int | None = None,
        end: int | None = None,
    ) -> None:
        super().__init__(text)
        self.shard, self.block, self.begin, self.end = shard, block, begin, end

    @classmethod
    def at(
        cls, path: Path, block: int | str, begin: int, end: int, what: object
    ) -> CacheCorruptError:
        """what: is wrong there."""
        where = f"block {block}" if isinstance(block, int) else block
        text = f"{path} is damaged: {where}, bytes {begin} to {end}: {what}"
        return cls(text, path.name, block, begin, end)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.shard, self.block, self.begin, self.end)


class CacheMismatchError(CacheError):
    """A cache of another teacher, tokenizer, vocabulary or other data than wanted."""


class CacheMissError(CacheError, LookupError):
    """A sample that is not in a cache."""


class Malformed(ValueError):
    """Inside of this package: bytes that make no sense; their place is added where it is known."""
