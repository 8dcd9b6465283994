"""`LinearHead` of weights that lie on several ranks: FSDP2's DTensors."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kdkernels import LinearHead, kd_loss

H, V = 6, 91  # no rank has as many rows as another
RANKS = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")


def head_of(seed, bias):
    torch.manual_seed(seed)
    return nn.Linear(H, V, bias=bias, dtype=torch.float64)


def rows_of(rank):
    torch.manual_seed(10 + rank)
    return torch.randn(5, H, dtype=torch.float64), torch.randint(V, (5,))


def train_step(rank, store):
    """Gradients through LinearHead are those that FSDP2 computes through the module itself."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    heads = [fully_shard(head_of(seed, bias=True), mesh=mesh) for seed in (0, 0, 1)]
    module, ours, teacher = heads
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    assert isinstance(ours.weight, DTensor) and len(ours.weight.to_local()) < V
    hidden, labels = rows_of(rank)
    t = teacher(hidden)

    kd_loss(module(hidden), t, labels, temperature=2.0).backward()
    whole = LinearHead(hidden, teacher.weight, teacher.bias)
    loss = kd_loss(LinearHead(hidden, ours.weight, ours.bias), whole, labels, temperature=2.0)
    loss.backward()
    for actual, expected in ((ours.weight, module.weight), (ours.bias, module.bias)):
        assert actual.grad.placements == actual.placements
        actual, expected = actual.grad.full_tensor(), expected.grad.full_tensor()
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0.0)
    with torch.no_grad():
        head = LinearHead(hidden, ours.weight, ours.bias)
        alone = kd_loss(head, whole, labels, temperature=2.0)
        torch.testing.assert_close(alone, loss.detach(), rtol=1e-9, atol=0.0)
    dist.destroy_process_group()


def test_sharded_weights(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.multiprocessing.spawn(train_step, (store,), nprocs=RANKS)
