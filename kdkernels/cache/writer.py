"""`Writer`: stores predictions as they come, of a teacher that runs here or elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .. import __version__
from ..checks import positive_int
from ..sources import LinearHead, Tail
from . import kinds, manifest
from .build import SHARD_TOKENS, Build
from .errors import CacheError
from .samples import Samples
from .sections import zstd
from .shard import CHECKSUM, Shard, ShardWriter, halves

Teacher: TypeAlias = str | dict[str, Any]  # a name, or what `identity.of_teacher` returns


class Writer:
    """Writes a cache, sample by sample, in order.

    Killed and started again, it is given all samples again, in the same order: those of complete
    shards are there and are skipped, and the cache becomes the same, byte by byte.

    Args:
        path: the directory; made where it is missing.
        kind: "topk:64", "sampled:50", "hidden:bf16", "dense:fp32", ...: `cache.kinds` lists them.
        vocab_size: V, the classes of the teacher.
        teacher: who it is: a name, or a dict, as `identity.of_teacher` makes it. Part of the keys.
        tokenizer: None, or whose ids the samples are, as `identity.of_tokenizer` says it.
        data: None, or a dict that says which data they are.
        head: of "hidden", the teacher's `LinearHead`; its hidden states are not used.
        tail: of "topk", how it is read by default: "bucket" or "renormalize".
        sample: "tokens", or "values" for tensors of any other kind, each with one prediction.
        seed: of what was drawn.
        shard_tokens: a shard ends when it has as many.

    Raises:
        TypeError, ValueError: arguments other than listed.
        CacheMismatchError: the directory has another cache; the text says what differs.
        ImportError: zstandard is missing (the extra `cache`).

    Example:
        with cache.Writer("teacher.cache", "topk:64", vocab_size=151_936, teacher="served") as out:
            for ids in samples:
                out.add(ids, lambda ids=ids: ask(ids))  # a `TopK`: ids, logprobs (n, K)
    """

    def __init__(
        self,
        path: Path | str,
        kind: str,
        *,
        vocab_size: int,
        teacher: Teacher,
        tokenizer: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        head: LinearHead | None = None,
        tail: Tail = "bucket",
        sample: Literal["tokens", "values"] = "tokens",
        seed: int = 0,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        zstd()  # before the first prediction is made for nothing
        positive_int("shard_tokens", shard_tokens)
        if isinstance(teacher, str):
            teacher = {"name": teacher, "weights": None, "dtype": None}
        found = kinds.parse(kind, vocab_size, tail=tail, head=head)
        description = manifest.describe(
            found,
            sample=sample,
            teacher=teacher,
            tokenizer=tokenizer,
            data=data,
            seed=seed,
            library=__version__,
        )
        self.build = Build(Path(path), description)
        self.head, self.shard_tokens = head, shard_tokens
        self.shards: list[Shard] = []  # those that are complete
        self.written: set[int] = set()  # numbers of its own
        self.current: ShardWriter | None = None
        self._take_up()
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            self.stack.__exit__(kind, *error)
        else:
            self.close()

    def add(self, ids: Samples, prediction: Any) -> None:
        """Stores a sample that is not stored yet.

        Args:
            ids: (n,) token ids, any integer dtype.
            prediction: of n rows, what comes after each of them: for topk `TopK` or logits (n, V),
                for sampled `Sampled`, for hidden `LinearHead` or (n, H), for dense logits; or a
                function without arguments that returns it, called only where it is needed.

        Raises:
            TypeError, ValueError: a prediction that the kind does not hold, or another than before
                for the same sample.
            IndexError: ids of classes outside of the vocabulary.
            CacheError: another process writes this cache.
        """
        _, content, _ = self.build.codec.sample.content(ids)
        key = self.build.codec.key(content)
        checksum = self._checksum(key)
        if checksum is not None:
            if not callable(prediction):
                self._check_same(ids, prediction, checksum)
            return
        rows, block = self.build.codec.encode(
            ids, prediction() if callable(prediction) else prediction
        )
        current = self.current or self._begin()
        current.add(key, block, rows)
        if current.rows >= self.shard_tokens:
            self._end()

    def close(self) -> None:
        """Completes the last shard and publishes the cache.

        Raises:
            CacheError: a shard is missing or damaged, whose samples were not given again.
        """
        if self.current is not None:
            self._end()
        folder, count = self.build.folder, len(self.shards)
        if self.build.is_published() and count < len(manifest.load(folder).shards):
            raise CacheError(
                f"{folder} has a damaged shard, number {count}: give all samples again"
            )
        self.build.publish(len(self.shards), self.head)

    def _begin(self) -> ShardWriter:
        self.current = self.stack.enter_context(self.build.shard(len(self.shards)))
        if self.current is None:
            raise CacheError(f"{self.build.folder} is being written by another process")
        return self.current

    def _end(self) -> None:
        self.stack.close()
        self.current = None
        self.written.add(len(self.shards))
        self._take_up()

    def _take_up(self) -> None:
        """The complete shards that come next."""
        while (shard := self.build.stored(len(self.shards))) is not None:
            self.shards.append(shard)

    def _checksum(self, key: bytes) -> bytes | None:
        """Of the block that is stored for a key; b"" where it was before this began; None where
        there is none."""
        if self.current is not None and key in self.current.entries:
            return self.current.entries[key][-1]
        for number, shard in enumerate(self.shards):
            (place,) = shard.find(*halves([key]))
            if place >= 0:
                checksum = shard.index[place]["checksum"].tobytes()
                return checksum if number in self.written else b""
        return None

    def _check_same(self, ids: Any, prediction: Any, checksum: bytes) -> None:
        _, block = self.build.codec.encode(ids, prediction)
        if checksum and hashlib.sha256(block).digest()[:CHECKSUM] != checksum:
            raise ValueError(f"ids {list(ids[:8])}… came before, with another prediction")
