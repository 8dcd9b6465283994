"""Data sets in directories: text files, and images in a folder for each class.

Nothing but the names, and of text the token ids, is kept: files are read when they are needed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...files import Array
from .. import checks

TEXT = ".txt", ".md", ".rst", ".tex", ".html", ".py"
IMAGES = ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"


def find(name: str, folder: Path | str, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """All files under a directory with one of the suffixes, sorted -> a list of `Path`.

    Raises:
        NotADirectoryError: it is no directory.
        ValueError: there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{name} must be a directory, {folder} is none")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    found = sorted(path for path in files if path.is_file())
    if not found:
        raise ValueError(f"{name} must have {what} ({', '.join(suffixes)}), {folder} has none")
    return found


def held_out(files: Sequence[Path], share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Splits files at random -> (those to train on, those held out: the share, one at least).

    Raises:
        ValueError: there is a single one.
    """
    if len(files) < 2:
        raise ValueError(
            f"data must have two files or more to hold some out, got {files[0]} alone: name "
            "other data for the test"
        )
    count = min(max(round(share * len(files)), 1), len(files) - 1)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    return [files[k] for k in sorted(order[count:])], [files[k] for k in sorted(order[:count])]


def digest_of(folder: Path | str, files: Iterable[Path]) -> str:
    """Another one for other files under a directory: names or contents -> hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{content} {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


class TextFolder(Dataset[dict[str, Tensor]]):
    """Text files as blocks of tokens, for causal language models.

    The files' tokens follow each other, an end-of-text token after each file, and are cut into
    blocks of length + 1 tokens, of which neighbours share one: every token but the first is
    predicted once. What is left at the end is not used. The ids lie in a temporary file, mapped.

    An example is {"input_ids": (length,) int64, "labels": (length,) int64}, the labels being the
    tokens that follow: they go with a loss that does not shift.

    Args:
        files: paths of text files, UTF-8, or what `find` found.
        tokenizer: of `transformers`, with an end-of-text token.
        length: tokens of an example, at least 1.

    Raises:
        ValueError: a file that is no UTF-8, a tokenizer without an end-of-text token, fewer than
            length + 1 tokens in all.
    """

    def __init__(self, files: Sequence[Path], tokenizer: Any, length: int) -> None:
        checks.integer("length", length, low=1)
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an eos_token, to go between documents")
        self.length = length
        # Without a name: it is gone with the data set.
        with tempfile.TemporaryFile() as file:
            self.largest = -1  # token id
            for path in files:
                ids = np.array([*_token_ids(path, tokenizer), tokenizer.eos_token_id], np.int32)
                self.largest = max(self.largest, int(ids.max()))
                file.write(ids.tobytes())
            count = file.tell() // 4
            if count <= length:
                raise ValueError(
                    f"length must be less than the {count} tokens of {_some(files)}, got {length}"
                )
            self.tokens = np.memmap(file, np.int32, "r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {row}")
        begin = row * self.length
        block = torch.from_numpy(self.tokens[begin : begin + self.length + 1].astype(np.int64))
        return {"input_ids": block[:-1], "labels": block[1:]}

    @property
    def ids(self) -> Array:
        """The token ids of all examples, (N, length) int32, mapped."""
        return self.tokens[: len(self) * self.length].reshape(-1, self.length)

    def digest(self) -> str:
        """Another one for other examples, or another order of them."""
        return hashlib.sha256(f"{self.length} ".encode() + self.tokens.tobytes()).hexdigest()


def _token_ids(path: Path, tokenizer: Any) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    # Not a document of its own to the tokenizer: that would add what begins and ends one, and warn
    # of its length.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


class ImageFolder(Dataset[dict[str, Any]]):
    """Images in a folder for each class, for image classifiers.

    An example is {"pixel_values": (C, H, W) float32, "labels": () int64}.

    Args:
        files: paths of images, FOLDER/CLASS/NAME.png; the name of the directory is the class.
        labels: {class: label id}, of every class there is.
        transform: maps a `PIL.Image.Image` to pixels (C, H, W).

    Raises:
        ValueError: a directory whose name is no class.
    """

    def __init__(
        self, files: Sequence[Path], labels: dict[str, int], transform: Callable[[Any], Tensor]
    ) -> None:
        for path in files:
            if path.parent.name not in labels:
                raise ValueError(
                    f"{path.parent.name!r} must be one of the classes {', '.join(labels)}: {path}"
                )
        self.files, self.labels, self.transform = list(files), labels, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        from PIL import Image

        path = self.files[row]
        try:
            with Image.open(path) as image:
                pixels = self.transform(image.convert("RGB"))
        except OSError as error:
            raise ValueError(f"{path} must be an image: {error}") from error
        return {"pixel_values": pixels, "labels": self.labels[path.parent.name]}

    def digest(self) -> str:
        """Another one for other files, another order of them, or other label ids."""
        facts = [
            (path.parent.name, path.name, path.stat().st_size, self.labels[path.parent.name])
            for path in self.files
        ]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def label_ids(names: Sequence[str], config: Any, *others: Any) -> dict[str, int]:
    """Classes (a list of names) and classifiers' configurations -> {class: label id}.

    Where a model names its labels, they are matched by name, and a class may be missing; where none
    does (LABEL_0, ...), sorted classes are 0, 1, ..., one for each label; where all are numbers,
    "10" comes after "2". Of several models, which `check_labels` has compared, the first that names
    them counts.

    Raises:
        ValueError: a class that the model does not have, another number of them.
    """
    for each in (config, *others):
        known = {str(name): int(k) for k, name in each.id2label.items()}
        if all(name == f"LABEL_{k}" for name, k in known.items()):
            continue
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"classes must be among the model's labels {_some(known)}, got {_some(unknown)}"
            )
        return {name: known[name] for name in names}
    if len(names) != config.num_labels:
        raise ValueError(
            f"data must have a folder for each of the model's {config.num_labels} labels, got "
            f"{len(names)}: {_some(names)}"
        )
    numbers = all(name.isdecimal() for name in names)
    return {name: k for k, name in enumerate(sorted(names, key=int if numbers else None))}


def check_labels(student: Any, teacher: Any) -> None:
    """Two classifiers' configurations name the same labels by the same ids.

    Raises:
        ValueError: they do not.
    """
    if student.num_labels != teacher.num_labels:
        raise ValueError(
            f"student and teacher must have the same labels, got {student.num_labels} and "
            f"{teacher.num_labels}"
        )
    for k in range(student.num_labels):
        pair = student.id2label[k], teacher.id2label[k]
        if pair[0] != pair[1] and f"LABEL_{k}" not in pair:
            raise ValueError(f"student and teacher must have the same labels, {k} is {pair}")


def transform_of(folder: Path | str, config: Any) -> Any:
    """What makes pixels of an image for the model in a directory: its image processor, or, without
    one, a resize to config.image_size and values in [−1, 1]."""
    if (Path(folder) / "preprocessor_config.json").exists():
        from transformers import AutoImageProcessor

        return _Processor(AutoImageProcessor.from_pretrained(folder, local_files_only=True))
    size = getattr(config, "image_size", None)
    if not size:
        raise ValueError(f"{folder} must have a preprocessor_config.json, or image_size in config")
    return _Resize(size, getattr(config, "num_channels", 3))


class _Processor:
    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def kept(self) -> list[Any]:
        """What is saved with the model."""
        return [self.processor]

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Processor) and _facts(self) == _facts(other)


class _Resize:
    def __init__(self, size: Any, channels: int) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.channels = channels

    def kept(self) -> list[Any]:
        return []

    def __call__(self, image: Any) -> Tensor:
        height, width = self.size
        image = image.convert("L") if self.channels == 1 else image
        pixels = np.asarray(image.resize((width, height)), np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).view(height, width, self.channels).permute(2, 0, 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Resize) and vars(self) == vars(other)


def _facts(transform: _Processor) -> dict[str, Any]:
    return {k: x for k, x in transform.processor.to_dict().items() if "type" not in k}


def _some(names: Iterable[object]) -> str:
    texts = list(map(str, names))
    return ", ".join(texts[:5]) + (f", … ({len(texts)})" if len(texts) > 5 else "")
