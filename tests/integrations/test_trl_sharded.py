"""TRL's chunked loss by kd_loss, of heads that FSDP2 shards: without TRL, slow for ranks to import.

TRL's own gives the shard of each rank its gradient by that rank's tokens alone.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kdkernels.integrations.trl import chunked_divergence_loss

H, V = 6, 91  # no rank has as many rows as another
RANKS = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")


def train_step(rank, store):
    """The head's gradient is the mean over ranks, as FSDP2 leaves it of the module itself."""
    from torch.distributed.fsdp import fully_shard

    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(fully_shard(nn.Linear(H, V), mesh=mesh))
    module, student, teacher = heads
    torch.manual_seed(10 + rank)
    hidden, mask = torch.randn(1, 5, H), torch.ones(1, 5)

    log_q, log_p = module(hidden).log_softmax(-1), teacher(hidden).detach().log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected.backward()
    weights = student.weight, teacher.weight
    biases = dict(student_lm_head_bias=student.bias, teacher_lm_head_bias=teacher.bias)
    loss, entropy, _ = chunked_divergence_loss(hidden, hidden, *weights, mask, 1.0, **biases)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(entropy, -(log_q.exp() * log_q).sum().detach(), rtol=1e-5, atol=0.0)
    for actual, wanted in ((student.weight, module.weight), (student.bias, module.bias)):
        assert actual.grad.placements == actual.placements
        actual, wanted = actual.grad.full_tensor(), wanted.grad.full_tensor()
        assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert teacher.weight.grad is None
    dist.destroy_process_group()


def test_the_gradient_of_a_sharded_head_is_the_mean_over_ranks(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.multiprocessing.spawn(train_step, (store,), nprocs=RANKS)
