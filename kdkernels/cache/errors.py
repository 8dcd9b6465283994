"""What can be wrong with a cache."""


class CacheError(ValueError):
    """A cache that cannot be used, written or read; the text names it and says why."""


class CacheCorruptError(CacheError):
    """Bytes of a cache that are not what was written.

    Attributes:
        shard: the file's name.
        block: the number of its sample, or "header", "index", "footer", "file".
        begin, end: the range of bytes in the file.
    """

    def __init__(self, text, shard=None, block=None, begin=None, end=None):
        super().__init__(text)
        self.shard, self.block, self.begin, self.end = shard, block, begin, end

    @classmethod
    def at(cls, path, block, begin, end, what):
        """what: is wrong there."""
        where = f"block {block}" if isinstance(block, int) else block
        text = f"{path} is damaged: {where}, bytes {begin} to {end}: {what}"
        return cls(text, path.name, block, begin, end)

    def __reduce__(self):
        return type(self), (str(self), self.shard, self.block, self.begin, self.end)


class CacheMismatchError(CacheError):
    """A cache of another teacher, tokenizer, vocabulary or other data than wanted."""


class CacheMissError(CacheError, LookupError):
    """A sample that is not in a cache."""


class Malformed(ValueError):
    """Inside of this package: bytes that make no sense; their place is added where it is known."""
