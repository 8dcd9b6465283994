"""The manifest: what a cache is and which files it is made of. It is published last, and what it
does not name is not there."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .. import files as storage
from . import kinds, samples
from .errors import CacheCorruptError, CacheError, CacheMismatchError, Malformed
from .shard import LARGEST_JSON, Facts, canonical, opened, parsed

FILE = "manifest.json"
HEAD = "head.safetensors"
SHARD = re.compile(r"shard-[0-9]{5,9}\.kdc")
FORMAT = 1
DESCRIBED = (
    *("format", "kind", "vocab_size", "sample", "temperature", "teacher", "tokenizer", "data"),
    *("seed", "library"),
)
# What of it is to be said of whom, where it is said.
IDENTITIES: dict[str, dict[str, type]] = {
    "teacher": {"name": str},
    "tokenizer": {"digest": str, "size": int, "special_tokens": dict},
    "data": {},
}
SHARD_FACTS = {"name": str, "bytes": int, "samples": int, "rows": int, "root": str}
FILE_FACTS = {"name": str, "bytes": int, "sha256": str}


class Manifest(NamedTuple):
    """description: dict; shards: [{"name", "bytes", "samples", "rows", "root"}]; files: [{"name",
    "bytes", "sha256"}]; checksum: hex, of all of it."""

    description: Facts
    shards: list[Facts]
    files: list[Facts]
    checksum: str


def describe(
    kind: kinds.Kind,
    *,
    sample: str = "tokens",
    teacher: object,
    tokenizer: object = None,
    data: object = None,
    seed: int = 0,
    library: str,
) -> Facts:
    """What a cache is: which predictions, of whom, for what, as it is read again.

    Raises:
        TypeError: what it says is not JSON, or a teacher, tokenizer or data that do not say what
            is needed.
    """
    named = {"teacher": teacher, "tokenizer": tokenizer, "data": data, "seed": seed}
    for name, value in named.items():
        try:
            named[name] = json.loads(canonical(value))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be what JSON can say, got {value!r:.100}") from error
    if wrong := _unidentified(named):
        raise TypeError(wrong)
    return {
        "format": FORMAT,
        "kind": kind.describe(),
        "vocab_size": kind.vocab_size,
        "sample": sample,
        "temperature": 1.0,
        **named,
        "library": library,
    }


def publish(folder: Path, description: Facts, shards: list[Facts], files: list[Facts]) -> None:
    """Writes the manifest: from then on the cache exists."""
    facts = {"description": description, "shards": shards, "files": files}
    content = canonical({**facts, "checksum": _checksum(facts)})
    if len(content) > LARGEST_JSON:
        raise CacheError(f"a manifest must fit into {LARGEST_JSON} bytes, got {len(content)}")
    with storage.atomic(folder / FILE) as file:
        file.write(content)


def load(folder: Path) -> Manifest:
    """The manifest of a directory.

    Raises:
        FileNotFoundError: there is no such directory.
        CacheError: there is no manifest, or one of another format.
        CacheCorruptError: it is damaged.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise FileNotFoundError(f"a cache must be a directory, {folder} is none")
    if not path.exists():
        raise CacheError(
            f"{folder} has no {FILE}: it is no cache, or one whose writing was interrupted; "
            "write it again, and it goes on where it was"
        )
    with open(opened(path), "rb") as file:
        content = file.read(LARGEST_JSON + 1)
    try:
        facts = parsed(content)
        checksum = facts.pop("checksum")
        if checksum != _checksum(facts):
            raise Malformed("not what was written")
        found = Manifest(facts["description"], facts["shards"], facts["files"], checksum)
        _check(found)
    except (Malformed, TypeError, LookupError, AttributeError) as error:
        raise CacheCorruptError.at(path, "file", 0, len(content), error) from error
    return found


def kind_of(description: Facts) -> kinds.Kind:
    """-> its `Kind`"""
    return kinds.of(description["kind"], description["vocab_size"])


def salt(description: Facts) -> bytes:
    """What keys begin with: the teacher's identity."""
    return hashlib.sha256(canonical(description["teacher"])).digest()


def check_same(path: Path, found: Facts, wanted: Facts) -> None:
    """found: a description; wanted: the part of it that matters.

    Raises:
        CacheMismatchError: they differ; the text says in what.
    """
    wrong = list(_differences("", found, wanted))
    if wrong:
        raise CacheMismatchError(f"{path} is not the cache that is wanted: {'; '.join(wrong)}")


def _differences(name: str, found: object, wanted: object) -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key, value in wanted.items():
            yield from _differences(f"{name}.{key}".lstrip("."), found.get(key), value)
    elif found != wanted:
        yield f"{name} is {found!r:.100}, wanted {wanted!r:.100}"


def _check(manifest: Manifest) -> None:
    description = manifest.description
    if type(description["format"]) is not int or description["format"] != FORMAT:
        raise CacheError(f"a cache must be of format {FORMAT}, got {description['format']!r:.100}")
    for fact in DESCRIBED:
        if fact not in description:
            raise Malformed(f"its description does not say its {fact}")
    if description["temperature"] != 1:
        raise Malformed(f"temperature must be 1, got {description['temperature']!r:.100}")
    if wrong := _unidentified(description):
        raise Malformed(wrong)
    kind = kind_of(description)
    samples.kind_of(description["sample"])
    _check_files("shards", manifest.shards, SHARD_FACTS)
    _check_files("files", manifest.files, FILE_FACTS)
    for facts in manifest.shards:
        if not SHARD.fullmatch(facts["name"]):
            raise Malformed(f"no shard is called {facts['name']!r:.100}")
    names = [facts["name"] for facts in manifest.shards]
    if len(set(names)) != len(names):
        raise Malformed("a shard twice")
    heads = [(HEAD, kind.head)] if isinstance(kind, kinds.HiddenKind) else []
    if [(facts["name"], facts["sha256"]) for facts in manifest.files] != heads:
        raise Malformed(f"files must be {heads}")


def _unidentified(description: Facts) -> str | None:
    """What is wrong with its teacher, tokenizer or data, or None."""
    for name, wanted in IDENTITIES.items():
        facts = description[name]
        if facts is None and name != "teacher":
            continue
        right = isinstance(facts, dict)
        if not (right and all(type(facts.get(key)) is kind for key, kind in wanted.items())):
            what = f" that says its {', '.join(wanted)}" if wanted else ""
            return f"{name} must be a dict{what}, got {facts!r:.100}"
    return None


def _check_files(name: str, files: list[Facts], wanted: dict[str, type]) -> None:
    if type(files) is not list:
        raise Malformed(f"{name} must be a list")
    for facts in files:
        if {each: type(value) for each, value in facts.items()} != wanted:
            raise Malformed(f"{name} must say {', '.join(wanted)}, got {facts!r:.200}")


def _checksum(facts: Facts) -> str:
    return hashlib.sha256(canonical(facts)).hexdigest()
