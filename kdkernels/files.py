"""Files that are there whole or not at all, whatever happens to the process or the machine."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

PARTIAL = ".partial"

Array = np.ndarray[Any, np.dtype[Any]]


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file to write; it becomes `path` at the end, or not at all after an error.

    Makes the directory when it is missing. A reader sees the old file or the whole new one, and so
    does whoever comes after a power cut. A file that is replaced passes on its mode.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=PARTIAL)
    os.close(handle)
    try:
        with open(partial, "wb") as file:
            yield file
        os.chmod(partial, _mode(path))
        to_disk(partial)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    to_disk(path.parent)


def sweep(path: Path | str) -> None:
    """Deletes what processes that were killed while they wrote `path` left of it."""
    path = Path(path)
    for partial in path.parent.glob(f"{path.name}*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def check_writable(path: Path | str) -> None:
    """Raises OSError where `atomic` will, before the work whose result it is to hold."""
    with contextlib.suppress(_Unwritten), atomic(path):
        raise _Unwritten


def to_disk(path: Path | str) -> None:
    """A file or a directory, synchronised.

    A rename may reach the disk before what was written, and a power cut come between.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mapped_array(name: str, path: Path | str) -> np.memmap[Any, np.dtype[Any]]:
    """The array of a .npy file, mapped; name: what it is called in errors.

    Raises:
        OSError: the file cannot be read.
        ValueError: no .npy file, or a pickled one.
    """
    # Mapped, so that a header which claims more than there is allocates nothing; NumPy parses a
    # damaged one with Python's own parser, and passes on whatever that or the dtype's finds.
    try:
        array: np.memmap[Any, np.dtype[Any]] = np.lib.format.open_memmap(
            path, mode="c"
        )  # writable, which torch wants, in private
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{name} must be a .npy file, got {path}: {error}") from error
    if array.offset + array.nbytes != os.path.getsize(path):
        raise ValueError(f"{name} must be a .npy file, got {path} with more after the array")
    return array


def begin_array(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Writes the header of a .npy file; its numbers, row by row, come next.

    Args:
        file: binary, as of `atomic`.
        dtype: of NumPy.
        shape: of the whole array.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)


def _mode(path: Path) -> int:
    """That of the file, or what an ordinary new one has: `mkstemp` makes one for its owner only."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


class _Unwritten(Exception):
    pass
