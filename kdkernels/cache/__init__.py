"""A teacher's predictions on disk: written once, read for as many students as you like.

docs/cache.md says what is in the files, byte by byte.

Example:
    with cache.Writer("teacher.cache", "topk:64", vocab_size=151_936, teacher="a name") as writer:
        for ids in samples:  # (n,) each
            writer.add(ids, predictions_for(ids))  # a `TopK`, logits, ... of n rows

    teacher = cache.open("teacher.cache")
    loss = kd_loss(student_logits, teacher[input_ids], labels)  # input_ids (B, L)
"""

from . import identity
from .errors import CacheCorruptError, CacheError, CacheMismatchError, CacheMissError
from .exchange import export_npy, import_jsonl, import_npy
from .reader import TeacherCache, verify
from .writer import Writer

open = TeacherCache

__all__ = [
    "CacheCorruptError",
    "CacheError",
    "CacheMismatchError",
    "CacheMissError",
    "TeacherCache",
    "Writer",
    "export_npy",
    "identity",
    "import_jsonl",
    "import_npy",
    "open",
    "verify",
]
