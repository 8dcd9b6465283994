"""`Writer`: stores predictions as they come, of a teacher that runs here or elsewhere."""

import contextlib
import hashlib
from pathlib import Path

from .. import __version__
from ..checks import positive_int
from . import kinds, manifest
from .build import SHARD_TOKENS, Build
from .errors import CacheError
from .sections import zstd
from .shard import CHECKSUM, halves


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
        path,
        kind,
        *,
        vocab_size,
        teacher,
        tokenizer=None,
        data=None,
        head=None,
        tail="bucket",
        sample="tokens",
        seed=0,
        shard_tokens=SHARD_TOKENS,
    ):
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
        self.shards, self.written = [], set()  # those that are complete; numbers of its own
        self.current = None  # `ShardWriter`
        self._take_up()
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        if kind is not None:
            self.stack.__exit__(kind, *error)
        else:
            self.close()

    def add(self, ids, prediction):
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
        if self.current is None:
            self._begin()
        self.current.add(key, block, rows)
        if self.current.rows >= self.shard_tokens:
            self._end()

    def close(self):
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

    def _begin(self):
        self.current = self.stack.enter_context(self.build.shard(len(self.shards)))
        if self.current is None:
            raise CacheError(f"{self.build.folder} is being written by another process")

    def _end(self):
        self.stack.close()
        self.current = None
        self.written.add(len(self.shards))
        self._take_up()

    def _take_up(self):
        """The complete shards that come next."""
        while (shard := self.build.stored(len(self.shards))) is not None:
            self.shards.append(shard)

    def _checksum(self, key):
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

    def _check_same(self, ids, prediction, checksum):
        _, block = self.build.codec.encode(ids, prediction)
        if checksum and hashlib.sha256(block).digest()[:CHECKSUM] != checksum:
            raise ValueError(f"ids {list(ids[:8])}… came before, with another prediction")
