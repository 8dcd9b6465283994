"""Whether a teacher's cache is of this tokenizer, this vocabulary and these training examples."""

from typing import Any

from ... import cache
from ...cache import CacheMismatchError, TeacherCache, identity
from . import folders
from .config import Config
from .folders import TextFolder

CHUNK = 4096  # examples that are looked up at a time
SPARSE = "topk", "sampled"  # kinds whose padded classes nobody can take away


def data_of(options: Any, train: TextFolder) -> dict[str, Any]:
    """Which training examples there are: what chooses them, and a digest of all.

    train: a `TextFolder`. Without a share that is held out, neither it nor the seed matters.
    """
    held_out = options.test is None
    files = folders.find("data", options.data, folders.TEXT, "text files")
    return {
        "data": folders.digest_of(options.data, files),
        "length": options.length,
        "test_share": options.test_share if held_out else None,
        "seed": options.seed if held_out else None,
        "examples": len(train),
        "digest": train.digest(),
    }


def facts_of(found: TeacherCache) -> list[tuple[str, str]]:
    """What a `TeacherCache` is, for people -> [(name, text)]"""
    description = found.description
    blocks = sum(int(shard.index["size"].sum()) for shard in found.shards)
    sizes = [f"{size / found.tokens:,.1f}" for size in (found.bytes, blocks)]
    teacher = description["teacher"]
    who = [teacher.get("dtype"), teacher.get("weights") and f"weights {teacher['weights'][:12]}"]
    tokenizer = description["tokenizer"]
    if tokenizer is not None:
        tokenizer = {"tokens": tokenizer["size"], "digest": tokenizer["digest"]}
    bounds = description["kind"]["bound"].items()
    return [
        ("kind", found.kind.spec),
        ("vocabulary", f"{description['vocab_size']:,}"),
        ("samples", f"{len(found):,}, of {description['sample']}"),
        ("predictions", f"{found.tokens:,}"),
        (
            "bytes",
            f"{found.bytes:,}, of a prediction {sizes[0]}, {sizes[1]} without index and head",
        ),
        ("rounding", "; ".join(f"{name} {_said(bound)}" for name, bound in bounds)),
        ("teacher", ", ".join([teacher["name"], *filter(None, who)])),
        ("tokenizer", _said(tokenizer)),
        ("data", _said(description["data"])),
        ("shards", f"{len(found.shards):,}"),
        ("library", f"kdkernels {description['library']}"),
    ]


def opened(options: Any, tokenizer: Any, notes: list[str]) -> TeacherCache:
    """The cache of the option `teacher_cache` -> `TeacherCache`, of the student's tokenizer.

    Raises:
        OSError, CacheError: there is none, or it is damaged.
        ValueError: a tail for predictions that have none.
        CacheMismatchError: it is of another tokenizer.
    """
    found = cache.open(options.teacher_cache, tail=options.tail)
    if found.description["sample"] != "tokens":
        raise CacheMismatchError(
            f"teacher_cache must be of token ids, {options.teacher_cache} is not"
        )
    if options.tail and found.kind.name != "topk":
        raise ValueError(f"tail goes with a cache of kind topk, got {found.kind.spec}")
    here, there = identity.of_tokenizer(tokenizer), found.description["tokenizer"]
    if there is None:
        notes.append(f"{options.teacher_cache} does not say of which tokenizer it is.")
    else:
        # A student may have a padding token of its own.
        ends = [each["special_tokens"].get("eos_token") for each in (there, here)]
        if here["digest"] != there["digest"] or ends[0] != ends[1]:
            facts = [
                f"{each['size']:,} tokens, {each['digest'][:12]}, of which {end} ends a text"
                for each, end in zip((there, here), ends, strict=True)
            ]
            raise CacheMismatchError(
                f"teacher_cache must be of the student's tokenizer: that of "
                f"{options.teacher_cache} has {facts[0]}; the student's has {facts[1]}"
            )
    name = found.description["teacher"]["name"]
    notes.append(f"The student learns from a cache of {name}: {found.kind.spec}.")
    return found


def dtype_of(found: TeacherCache | None) -> str:
    """In which a teacher beside a cache is loaded: that of the one whose predictions it has."""
    dtype = found and found.description["teacher"].get("dtype")
    return dtype if dtype and "," not in dtype else "auto"


def check_teacher(options: Config, found: TeacherCache, model: Any) -> None:
    """Whether the teacher is the cache's.

    Raises:
        CacheMismatchError: it is another.
    """
    there = found.description["teacher"]
    here = identity.of_teacher(model, there["name"])
    if there.get("weights") and there["weights"] != here["weights"]:
        facts = [f"{each['weights'][:12]}, {each['dtype']}" for each in (there, here)]
        raise CacheMismatchError(
            f"teacher must be {there['name']!r}, of which {options.teacher_cache} is: its weights "
            f"are {facts[0]}, those of {options.teacher} are {facts[1]}"
        )


def check_vocabulary(options: Config, found: TeacherCache, columns: int) -> None:
    """Whether the loss is over the classes of the cache; of logits it may leave some out.

    Raises:
        CacheMismatchError: it is not.
    """
    there = found.description["vocab_size"]
    if there != columns and (found.kind.name in SPARSE or there < columns):
        raise CacheMismatchError(
            f"teacher_cache must be of a vocabulary of {columns}, {options.teacher_cache} is of "
            f"{there}: `cache build --vocab-size {columns}` writes one"
        )


def check_examples(options: Config, found: TeacherCache, train: TextFolder) -> None:
    """Whether a cache has all training examples.

    Raises:
        CacheMismatchError: some are missing; the text says how many, and what of the options that
            choose them differs.
    """
    missing, first = 0, None
    for begin in range(0, len(train), CHUNK):
        known = found.has(train.ids[begin : begin + CHUNK])
        missing += int((~known).sum())
        if first is None and missing:
            first = begin + int(known.argmin())
    if not missing:
        return
    there, differences = found.description["data"] or {}, []
    here = data_of(options, train)
    for name in ("length", "test_share", "seed"):
        if name in there and there[name] != here[name]:
            differences.append(f"{name} was {_text(there[name])} and is {_text(here[name])}")
    if there.get("data", here["data"]) != here["data"]:
        differences.append("the files of data are others")
    unknown = (
        "the same texts became other tokens" if there else "it does not say of which data it is"
    )
    why = "; ".join(differences) or unknown
    raise CacheMismatchError(
        f"teacher_cache must have all training examples, {options.teacher_cache} lacks "
        f"{missing:,} of {len(train):,}, first example {first}: {why}"
    )


def _said(facts: Any) -> str:
    """A dict of what is known -> text"""
    if facts is None:
        return "not said"
    shown = {name: x[:12] if isinstance(x, str) else x for name, x in facts.items()}
    forms = ((name, f"{x:.2g}" if isinstance(x, float) else _text(x)) for name, x in shown.items())
    return ", ".join(f"{name.replace('_', ' ')} {x}" for name, x in forms)


def _text(value: Any) -> Any:
    return "none" if value is None else value
