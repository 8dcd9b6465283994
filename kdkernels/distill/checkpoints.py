"""Checkpoints: a directory for each, complete or absent, and checked before it is believed.

    FOLDER/step-00000100/tensors.safetensors   every tensor of the state
                         state.json            the rest of it
                         manifest.json         sizes and SHA-256 of both; written last

A checkpoint is written under another name and renamed, so that a process which is killed at any
moment leaves the ones before. What a damaged one holds is never used: its name and what is wrong
with it are reported, and the newest that is whole takes its place.
"""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from ..files import to_disk

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
NAME = "step-{:08d}"
PATTERN = re.compile(r"step-(\d{8,})")
PARTIAL = ".partial-"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or of another format; the text names it."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: the directory they are in; made when the first is saved.
        keep: how many of the newest stay, at least 1.
    """

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the checkpoint of a step -> its path. Then older ones than `keep` are deleted, and
        those of later steps.

        state: dicts (their keys text or integers), lists, tuples, tensors, numbers, text, None.

        Raises:
            TypeError: anything else in the state.
            OSError: it cannot be written.
        """
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        packed = json.dumps(_pack(state, tensors)).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        final = self.folder / NAME.format(step)
        partial = self.folder / f"{PARTIAL}{final.name}"
        partial.mkdir()
        save_file(tensors, partial / TENSORS)
        (partial / STATE).write_bytes(packed)
        files = {name: _facts(partial / name) for name in (TENSORS, STATE)}
        manifest = {"format": FORMAT, "step": step, "files": files}
        manifest["checksum"] = _checksum(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.iterdir(), partial):
            to_disk(path)
        before = self.folder / f"{PARTIAL}before-{final.name}"
        if final.exists():  # a damaged one, or the same step of a run that was resumed before it
            final.rename(before)
        partial.rename(final)
        to_disk(self.folder)
        self._sweep()
        # Of later steps there are damaged ones, or those of a run that was taken up before them:
        # to keep them would be to go on from them.
        paths = self.paths()
        place = paths.index(final)
        for old in (*paths[:place], *paths[place + self.keep :]):
            shutil.rmtree(old)
        return final

    def paths(self) -> list[Path]:
        """The directories of all checkpoints, the newest first; none is opened."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if match := PATTERN.fullmatch(path.name):
                found.append((int(match[1]), path))
        return [path for _, path in sorted(found, reverse=True)]

    def load(self) -> tuple[int, Any] | None:
        """The newest checkpoint that is whole -> (step, state), or None where there is none at all.

        Warns of every newer one that is not. Tensors are on the CPU.

        Raises:
            CheckpointError: there are some, and none is whole.
        """
        wrong = []
        for path in self.paths():
            try:
                found = load(path)
            except CheckpointError as error:
                wrong.append(str(error))
                continue
            for text in wrong:
                warnings.warn(f"{text}; going on from {path.name}", stacklevel=2)
            return found
        if wrong:
            raise CheckpointError("no checkpoint can be used: " + "; ".join(wrong))
        return None

    def _sweep(self) -> None:
        """Deletes what processes that were killed left half written."""
        for path in self.folder.iterdir():
            if path.name.startswith(PARTIAL):
                shutil.rmtree(path)


def load(path: Path | str) -> tuple[int, Any]:
    """A checkpoint's directory -> (step, state).

    Raises:
        CheckpointError: it is not whole.
    """
    from safetensors.torch import load as load_tensors

    path = Path(path)
    manifest = _manifest(path)
    content = {}
    for name, facts in manifest["files"].items():
        try:
            content[name] = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: {name} cannot be read: {error}") from error
        if len(content[name]) != facts["bytes"]:
            raise CheckpointError(
                f"checkpoint {path}: {name} has {len(content[name])} bytes, its manifest says "
                f"{facts['bytes']}"
            )
        if hashlib.sha256(content[name]).hexdigest() != facts["sha256"]:
            raise CheckpointError(f"checkpoint {path}: {name} is not what its manifest says")
    tensors = load_tensors(content[TENSORS])
    return manifest["step"], _unpack(json.loads(content[STATE]), tensors)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        checksum = manifest.pop("checksum")
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} cannot be read: {error}") from error
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is no manifest: {error}") from error
    if checksum != _checksum(manifest):
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is not what was written")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: format must be {FORMAT}, got {manifest['format']}"
        )
    if path.name != NAME.format(manifest["step"]):
        raise CheckpointError(f"checkpoint {path}: it is that of step {manifest['step']}")
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _facts(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _pack(value: object, tensors: dict[str, torch.Tensor]) -> Any:
    """What JSON can hold; tensors go to `tensors`, by name."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A copy of its own: the format has no shared memory, and no strides.
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"a state's keys must be text or integers, got {key!r}")
        return {"dict": [[key, _pack(each, tensors)] for key, each in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(each, tensors) for each in value]}
    if isinstance(value, list):
        return [_pack(each, tensors) for each in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, float):  # NumPy's, of a learning rate
        return float(value)
    raise TypeError(
        f"a state holds tensors, numbers, text, None, and dicts, lists and tuples of them, got "
        f"{type(value).__name__}"
    )


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_unpack(each, tensors) for each in inner)
    return {key: _unpack(each, tensors) for key, each in inner}
