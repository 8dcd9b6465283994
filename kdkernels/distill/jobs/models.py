"""Models in directories, as `transformers` and PEFT save them, and whether two of them fit.

Nothing is downloaded.
"""

import json
from pathlib import Path
from typing import Any

from ...integrations.transformers import HiddenStates

TEXT, IMAGES = "text", "images"
ADAPTER = "adapter_config.json"


def config_of(name: str, folder: Path | str) -> Any:
    """A model's configuration; name: of the option that names the directory, for errors.

    Raises:
        NotADirectoryError: there is no such directory.
        ValueError: no model was saved there.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{name} must be a directory, {folder} is none")
    if (folder / ADAPTER).exists():
        return config_of(f"the base model of {name}", _base(folder))
    return _loaded(name, folder, "model", AutoConfig)


def task_of(name: str, config: Any) -> str:
    """TEXT for a causal language model, IMAGES for an image classifier.

    Raises:
        ValueError: it is neither.
    """
    from transformers.models.auto import modeling_auto as auto

    found = (config.architectures or [type(config).__name__])[0]
    for task, known in (
        (TEXT, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (IMAGES, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ):
        classes = known.get(config.model_type, ())
        if found in ([classes] if isinstance(classes, str) else classes):
            return task
    raise ValueError(f"{name} must be a causal language model or an image classifier, got {found}")


def load(
    name: str,
    folder: Path | str,
    task: str,
    *,
    dtype: Any = "auto",
    attention: bool = False,
    trainable: bool = False,
) -> Any:
    """A model, or a PEFT model, of a directory.

    Args:
        task: TEXT or IMAGES.
        dtype: of its parameters; "auto": as they were saved.
        attention: whether its attention has to compute probabilities.
        trainable: whether a PEFT model's adapter is to be trained.

    Raises:
        ValueError: it cannot be loaded, or lacks weights.
    """
    import transformers

    kinds = {TEXT: "AutoModelForCausalLM", IMAGES: "AutoModelForImageClassification"}
    options = {"dtype": dtype, **({"attn_implementation": "eager"} if attention else {})}
    if (Path(folder) / ADAPTER).exists():
        import peft

        name = f"the base model of {name}"
        model = load(name, _base(folder), task, dtype=dtype, attention=attention)
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    kind = getattr(transformers, kinds[task])
    model, facts = _loaded(name, folder, "model", kind, output_loading_info=True, **options)
    for what in ("missing_keys", "mismatched_keys"):
        if wrong := facts.get(what):
            raise ValueError(f"{name} {folder} has {what.replace('_', ' ')}: {sorted(wrong)[:3]}")
    return model


def tokenizer_of(name: str, folder: Path | str) -> Any:
    """A model's tokenizer; of an adapter that was saved without one, its base model's.

    Raises:
        ValueError: there is none in its directory.
    """
    from transformers import AutoTokenizer

    files = "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"
    if not any((Path(folder) / file).exists() for file in files):
        if (Path(folder) / ADAPTER).exists():
            return tokenizer_of(f"the base model of {name}", _base(folder))
        raise ValueError(f"{name} must have a tokenizer in its directory, {folder} has none")
    return _loaded(name, folder, "tokenizer", AutoTokenizer)


def check_tokenizers(student: Any, teacher: Any) -> None:
    """The same tokens by the same ids, whatever the tokenizers are called.

    Raises:
        ValueError: they differ; the text says in what.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = [x for x in ours.keys() | theirs.keys() if ours.get(x) != theirs.get(x)]
    if different:
        token = min(different, key=lambda x: (ours.get(x, theirs.get(x)), x))
        raise ValueError(
            f"the tokenizers of student and teacher must be the same, they differ in "
            f"{len(different):,} of {len(ours.keys() | theirs.keys()):,} tokens: {token!r} is "
            f"{ours.get(token)} to the student's, {theirs.get(token)} to the teacher's"
        )
    if student.eos_token_id != teacher.eos_token_id:
        raise ValueError(
            f"the tokenizers of student and teacher must end a text alike, got {student.eos_token} "
            f"and {teacher.eos_token}"
        )


def vocab_size_of(given: int | None, heads: dict[str, int], tokens: int) -> int | None:
    """How many of the heads' rows are real -> a number, or None for all of them.

    Args:
        given: the option, or None.
        heads: {"student": rows of its head, ...}
        tokens: one more than the largest id of the tokenizer.

    Raises:
        ValueError: heads that have fewer rows, or differ in what is no padding.
    """
    size = given
    if size is None:
        size = tokens if len(set(heads.values())) > 1 else None
    for name, rows in heads.items():
        if rows < (size or tokens):
            what = f"vocab_size={given}" if given else f"the tokenizer's {tokens:,} tokens"
            raise ValueError(f"the {name}'s head must have a row for each of {what}, got {rows:,}")
    return size


def token_count(tokenizer: Any) -> int:
    """One more than the largest id."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_length(name: str, model: Any, length: int) -> None:
    """Whether a model, called name, takes texts of so many tokens."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise ValueError(
            f"length must be at most {limit}, the positions of the {name}, got {length}"
        )


def check_largest(token: int, limit: int) -> None:
    """Whether the largest token id of the data is one of the heads'."""
    if token >= limit:
        raise ValueError(f"token ids must be below {limit}, got {token} in the data")


def head_rows(model: Any) -> int:
    """Rows of a causal language model's output embedding."""
    head = model.get_output_embeddings()
    return int(model.config.get_text_config().vocab_size if head is None else head.weight.shape[0])


def without_logits(name: str, model: Any, notes: list[str]) -> Any:
    """`HiddenStates` of a causal language model, or itself where it cannot be taken apart."""
    try:
        return HiddenStates(model)
    except (TypeError, ValueError) as error:
        notes.append(f"the {name}'s logits are computed in full: {error}")
        return model


def layers_of(model: Any) -> list[Any]:
    """A model's layers, of the classes that `transformers` says are not to be split."""
    names = {x for each in model.modules() for x in getattr(each, "_no_split_modules", None) or ()}
    return [each for each in model.modules() if type(each).__name__ in names]


def shard(model: Any) -> None:
    """A model's weights over all processes, by FSDP2: its layers, which are gathered one at a time,
    and what is left of it, which is gathered once."""
    from torch.distributed.fsdp import fully_shard

    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=False)


def _base(adapter: Path | str) -> str:
    """Of a PEFT adapter's directory."""
    facts: dict[str, str] = json.loads((Path(adapter) / ADAPTER).read_text())
    return facts["base_model_name_or_path"]


def _loaded(name: str, folder: Path | str, what: str, kind: Any, **options: Any) -> Any:
    """Libraries explain at length, in several types."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} must be the directory of a {what}, {folder}: {text}") from error
