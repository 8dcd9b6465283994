"""Who a cache's predictions are of: digests of a teacher's weights and of a tokenizer."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 2**24  # numbers that are hashed at a time


def of_teacher(model: nn.Module, name: str) -> dict[str, str]:
    """A model's weights, as a cache's description has them.

    The digest is the SHA-256 over the state dict, sorted by name: of every tensor a line of JSON,
    [name, dtype, shape], and its numbers, little-endian and row by row. It depends neither on the
    device, nor on the order of the dict, nor on modules around the model: a prefix that all names
    share is left out.

    Args:
        model: a `torch.nn.Module` whose parameters are in memory; of any dtype.
        name: what it is called.

    Returns:
        {"name": name, "weights": 64 hexadecimal digits, "dtype": of its parameters, such as
        "bfloat16", or several of them with commas between}

    Raises:
        TypeError: the state dict has something else than tensors.
    """
    state = model.state_dict()
    prefix = _shared_prefix(state)
    digest = hashlib.sha256()
    for key in sorted(state):
        x = state[key]
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"teacher must have a state dict of tensors, {key!r} is a {type(x).__name__}"
            )
        facts = key[prefix:], _dtype(x), list(x.shape)
        digest.update(json.dumps(facts).encode() + b"\n")
        for piece in pieces(x):
            digest.update(piece)
    dtypes = sorted({_dtype(x) for x in model.parameters()})
    return {"name": name, "weights": digest.hexdigest(), "dtype": ", ".join(dtypes)}


def of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's vocabulary, as a cache's description has it.

    The digest is the SHA-256 of the JSON list of [id, token], sorted. How a text is split is not
    in it: samples are found by their token ids.

    Args:
        tokenizer: of `transformers`; or of mistral-common, whose `vocab()` lists all tokens.

    Returns:
        {"digest": 64 hexadecimal digits, "size": one more than the largest id,
        "special_tokens": {name: id}}, the names being those of `transformers`, or the token itself
        where that has none; the id None where the vocabulary lacks the token.
    """
    if hasattr(tokenizer, "get_vocab"):
        pairs = [(k, token) for token, k in tokenizer.get_vocab().items()]
        roles = dict(tokenizer.special_tokens_map)
        named = {token: k for k, token in pairs}
        special = {name: named.get(str(token)) for name, token in roles.items()}
        others = set(map(str, tokenizer.all_special_tokens)) - set(map(str, roles.values()))
        special.update((token, named.get(token)) for token in others)
    else:
        pairs = list(enumerate(tokenizer.vocab()))
        names = ("bos", "eos", "pad", "unk")
        special = {f"{name}_token": getattr(tokenizer, f"{name}_id") for name in names}
    text = json.dumps(sorted(pairs), separators=(",", ":"))
    return {
        "digest": hashlib.sha256(text.encode()).hexdigest(),
        "size": max(k for k, _ in pairs) + 1,
        "special_tokens": dict(sorted(special.items())),
    }


def pieces(x: Tensor) -> Iterator[Any]:
    """A tensor's bytes, little-endian and row by row, of `PIECE` numbers at a time."""
    for piece in x.detach().reshape(-1).split(PIECE):
        yield piece.cpu().contiguous().view(torch.uint8).numpy()


def _shared_prefix(state: Iterable[str]) -> int:
    """Characters of the dotted prefix that all names have."""
    parts = [name.split(".")[:-1] for name in state]
    count = 0
    for each in zip(*parts, strict=False):
        if len(set(each)) > 1:
            break
        count += len(each[0]) + 1
    return count


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
