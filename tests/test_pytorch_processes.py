"""docs/pytorch.md: DDP with `torch.compile`, FSDP2 with checkpoints, on two processes."""

import pytest
import torch
import torch.distributed as dist
from feature_table import assert_near
from processes import ends, run, start
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdkernels import KDLoss, LinearHead

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")

H, V, N = 6, 11, 10


class Model(nn.Module):
    """Ends in the loss of logits, or of a head whose rows exist a chunk at a time."""

    def __init__(self, seed, has_logits, checkpointed=False):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(H, H), nn.Linear(H, V)
        self.criterion = KDLoss(temperature=2.0)
        self.has_logits, self.checkpointed = has_logits, checkpointed

    def loss(self, x, teacher, labels, num_items):
        hidden = self.body(x).tanh()
        if self.has_logits:
            student = self.head(hidden)
        else:
            student = LinearHead(hidden, self.head.weight, self.head.bias, chunk_rows=2)
        return self.criterion(student, teacher, labels, num_items=num_items)

    def forward(self, *batch):
        if self.checkpointed:
            return checkpoint(self.loss, *batch, use_reentrant=False)
        return self.loss(*batch)


def batch():
    generator = torch.Generator().manual_seed(3)
    x, teacher = (torch.randn(N, width, generator=generator) for width in (H, V))
    labels = torch.randint(V, (N,), generator=generator)
    labels[:4] = -100  # most of the first process's
    return x, teacher, labels


def expected(has_logits):
    """The gradients of one process, whose batch is both."""
    model = Model(0, has_logits)
    model(*batch(), (batch()[2] != -100).sum()).backward()
    return [x.grad for x in model.parameters()]


def part():
    """This process's rows, and the share of the whole batch's count that DDP and FSDP average."""
    rows = slice(dist.get_rank() * N // 2, (dist.get_rank() + 1) * N // 2)
    count = (batch()[2] != -100).sum() / dist.get_world_size()
    return *(x[rows] for x in batch()), count


def of_ddp():
    dist.init_process_group("gloo")
    for has_logits in (True, False):
        model = nn.parallel.DistributedDataParallel(Model(0, has_logits))
        torch.compile(model, backend="aot_eager")(*part()).backward()
        for x, grad in zip(model.parameters(), expected(has_logits), strict=True):
            assert_near([x.grad], [grad])
    dist.destroy_process_group()


def of_fsdp():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,))
    for has_logits in (True, False):
        model = Model(0, has_logits, checkpointed=True)
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(*part()).backward()
        for x, grad in zip(model.parameters(), expected(has_logits), strict=True):
            assert_near([x.grad.full_tensor()], [grad])
    dist.destroy_process_group()


def test_ddp_and_its_graph():
    # In interpreters of their own: a compiler is no guest in a process that was forked.
    for code, _, errors in ends(start("test_pytorch_processes.of_ddp()", 2, apart=True)):
        assert code == 0, errors


def test_fsdp2_and_checkpoints():
    run("test_pytorch_processes.of_fsdp()", 2)
