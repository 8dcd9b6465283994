import os
import stat

import pytest

from kdkernels.files import atomic, check_writable, sweep


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["results"]


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        check_writable(tmp_path / "file" / "t.npy")
    check_writable(tmp_path / "new" / "t.npy")
    assert os.listdir(tmp_path / "new") == []


def test_a_file_that_is_replaced_passes_on_its_mode(tmp_path):
    path = tmp_path / "results"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with atomic(path) as file:
        file.write(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path):
    for name in ("results.x1.partial", "results", "other.x2.partial"):
        (tmp_path / name).write_bytes(b"")
    sweep(tmp_path / "results")
    assert sorted(os.listdir(tmp_path)) == ["other.x2.partial", "results"]
