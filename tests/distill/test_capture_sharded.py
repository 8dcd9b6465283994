"""A teacher that FSDP2 spreads over processes into a cache: the files of one process."""

import pytest
import torch
from processes import ends, run, start
from test_capture import Head, Model, N, files, tokens, write_cache

pytest.importorskip("zstandard", reason="the extra `cache` is not installed")

KINDS = {"topk:5": Model, "hidden:bf16": Head}
# 7 shards for 2 processes, whose batches are one or two.
OPTIONS = dict(name="t", shard_tokens=18, batch_size=2)


def inputs():
    return tokens(N, 6)


class Failing(Model):
    """In one process, in the middle of its second shard."""

    def forward(self, input_ids):
        if torch.distributed.get_rank() == 1 and len(self.shapes) == 4:
            raise ArithmeticError("no answer")
        return super().forward(input_ids)


def write(folder, fails):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    for kind, model in KINDS.items():
        teacher = Failing() if fails else model()
        fully_shard(teacher.embedding)
        fully_shard(teacher)
        write_cache(f"{folder}/{kind}", teacher, inputs(), kind, **OPTIONS)
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_thread():
    """As the processes have: matrix products round by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_sharded_teacher_writes_the_same_files(tmp_path, one_thread):
    """Also after a process has failed, which the other says; and another may be without work."""
    for kind, model in KINDS.items():
        write_cache(tmp_path / "one" / kind, model(), inputs(), kind, **OPTIONS)
    call = f"test_capture_sharded.write({str(tmp_path / 'two')!r}, {{}})"
    found = ends(start(call.format(True), 2))
    assert "ArithmeticError: no answer" in found[1][2]
    assert "ProcessError: process 1 failed: ArithmeticError: no answer" in found[0][2]
    assert all(code for code, *_ in found)
    left = {path.name for path in (tmp_path / "two" / "topk:5").glob("*.kdc")}
    assert left == {"shard-00000.kdc", "shard-00001.kdc"}
    run(call.format(False), 2)
    for kind in KINDS:
        assert files(tmp_path / "two" / kind) == files(tmp_path / "one" / kind)
