"""The kinds of predictions that a cache holds: what is stored of a row, and what is read from it.

topk:K                         the K most probable classes and the mass of the others
sampled:N                      N draws from the teacher, counted
hidden:fp32|bf16|fp16|fp8      the last hidden states, for the teacher's head
dense:fp32|bf16|fp16           all logits
"""

import hashlib
from collections.abc import Mapping
from typing import Any, TypeAlias

from ...sources import LinearHead, Tail
from ..errors import Malformed
from ..shard import canonical
from . import entries, floats
from .dense import DenseKind
from .hidden import HiddenKind, check_head, head_file
from .sampled import SampledKind
from .topk import TAILS, TopKKind, most_probable

Kind: TypeAlias = TopKKind | SampledKind | HiddenKind | DenseKind

__all__ = [
    "TAILS",
    "HiddenKind",
    "Kind",
    "SampledKind",
    "head_file",
    "most_probable",
    "of",
    "parse",
]

MOST_ENTRIES = 2**16 - 1  # of a row


def parse(
    spec: str, vocab_size: int, *, tail: Tail = "bucket", head: LinearHead | None = None
) -> Kind:
    """A kind as people write it, "topk:64", for V classes.

    Args:
        head: of "hidden", a `LinearHead` of the teacher; its hidden states are not used.

    Raises:
        TypeError, ValueError: it is none; numbers outside of what is listed; a head that is
            missing, or goes with nothing.
    """
    _check_classes(vocab_size)
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if not isinstance(spec, str):
        raise TypeError(f"kind must be text, got {type(spec).__name__}")
    name, _, option = spec.partition(":")
    if (head is None) == (name == "hidden"):
        wanted, got = ("a LinearHead", None) if head is None else ("None", "one")
        raise ValueError(f"head must be {wanted} for kind {spec!r}, got {got}")
    if name == "topk" and _is_count(option, min(vocab_size, MOST_ENTRIES)):
        return TopKKind(vocab_size, int(option), tail)
    if name == "sampled" and _is_count(option, MOST_ENTRIES):
        return SampledKind(vocab_size, int(option))
    if head is not None and option in (*floats.FLOATS, "fp8"):
        size, scale, softcap = head.weight.shape[1], float(head.logit_scale), head.softcap
        check_head(size, scale, softcap)
        digest = hashlib.sha256()
        for piece in head_file(head):
            digest.update(piece)
        return HiddenKind(vocab_size, option, size, digest.hexdigest(), scale, softcap)
    if name == "dense" and option in floats.FLOATS:
        return DenseKind(vocab_size, option)
    raise ValueError(
        f"kind must be topk:K with K in [1, {min(vocab_size, MOST_ENTRIES)}], sampled:N with N in "
        f"[1, {MOST_ENTRIES}], hidden:fp32, bf16, fp16 or fp8, or dense:fp32, bf16 or fp16, "
        f"got {spec!r}"
    )


def of(facts: Any, vocab_size: int) -> Kind:
    """A kind as `describe` says it.

    Raises:
        Malformed: no kind says so.
    """
    try:
        kind = _of(facts, vocab_size)
    except (TypeError, ValueError, LookupError) as error:
        raise Malformed(f"kind {facts!r:.200}: {error}") from error
    if canonical(kind.describe()) != canonical(facts):  # 1, 1.0 and True are equal
        raise Malformed(f"kind {facts!r:.200}")
    return kind


def _of(facts: Any, vocab_size: int) -> Kind:
    if not isinstance(facts, Mapping):
        raise Malformed("no kind")
    name = facts["name"]
    if name == "topk":
        return parse(f"topk:{facts['k']}", vocab_size, tail=facts["tail"])
    if name == "hidden":
        _check_classes(vocab_size)
        names = "size", "head", "logit_scale", "softcap"
        size, head, scale, softcap = (facts[name] for name in names)
        if facts["dtype"] not in (*floats.FLOATS, "fp8") or (type(size), type(head)) != (int, str):
            raise Malformed("its dtype, its size or its head")
        check_head(size, scale, softcap)
        return HiddenKind(vocab_size, facts["dtype"], size, head, float(scale), softcap)
    return parse(f"{name}:{facts['draws' if name == 'sampled' else 'dtype']}", vocab_size)


def _check_classes(vocab_size: object) -> None:
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= entries.MOST_CLASSES:
        raise ValueError(f"vocab_size must be in [1, {entries.MOST_CLASSES}], got {vocab_size}")


def _is_count(text: str, most: int) -> bool:
    return text.isdecimal() and text.isascii() and 1 <= int(text) <= most and text == str(int(text))
