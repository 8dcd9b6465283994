"""`kd_loss` over processes: Gloo, DTensors, and ranks that die.

The processes of a group are started once for all checks of it: `check_…(group)` runs on each.
"""

import json
import os
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import DTYPES, assert_right, assert_same_bits, problem, random_like, run
from oracle import assert_loss_close, reference
from test_linear_head import assert_gradients_close, heads, logits_of

from kdkernels import LinearHead, TopK, kd_loss

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")

TIMEOUT = timedelta(seconds=30)
V = 3001


def own_columns(rank, size, classes=V):
    """Uneven: the first rank has twice the columns of each other."""
    share = classes // (size + 1)
    begin = 0 if rank == 0 else (rank + 1) * share
    end = classes if rank == size - 1 else (rank + 2) * share
    return slice(begin, end)


def gathered(x):
    """x of every rank, in order."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def run_own(group, student, teacher, labels, **options):
    """(loss, the gradient of all columns); the loss has the same bits on every rank."""
    own = own_columns(dist.get_rank(group), dist.get_world_size(group), student.shape[-1])
    x = student[..., own].clone().requires_grad_()
    if isinstance(teacher, torch.Tensor):
        teacher = teacher[..., own]
    loss = kd_loss(x, teacher, labels, group=group, **options)
    (grad,) = torch.autograd.grad(loss, x, random_like(loss))
    losses, grads = zip(*gathered((loss.detach(), grad)), strict=True)
    for other in losses:
        assert_same_bits((other, losses[0]))
    return losses[0], torch.cat(grads, -1)


# ---- Checks --------------------------------------------------------------------------------------


def check_dense_logits_meet_the_bars_of_one_device(group):
    for dtype in DTYPES:
        student, teacher, labels = problem(6, V, dtype=dtype)
        labels[1] = -100
        for divergence in ("forward_kl", "jsd"):
            options = dict(divergence=divergence, temperature=2.0, alpha=0.7)
            inputs = student, teacher, labels
            loss, grad = run_own(group, *inputs, **options)
            assert_right("native", loss, grad, *inputs, **options)


def check_row_losses_are_within_two_ulp_of_one_device(group):
    """hazards.md, N12."""
    student, teacher, labels = problem(40, V)
    for options in (dict(alpha=0.0), dict(alpha=1.0), dict(alpha=1.0, temperature=4.0)):
        loss, _ = run_own(group, student, teacher, labels, reduction="none", **options)
        alone, _ = run(student, teacher, labels, reduction="none", **options)
        scale = options.get("temperature", 1.0) ** 2
        lse = student.logsumexp(-1).clamp(min=1)
        ulp = torch.nextafter(lse, torch.tensor(torch.inf)) - lse
        assert ((loss - alone).abs() <= 2 * scale * ulp).all()


def check_a_head_has_complete_gradients_of_hidden_states(group):
    student, teacher, labels = heads(12, columns=90)
    own = own_columns(dist.get_rank(group), dist.get_world_size(group), 90)
    for chunk_rows in (None, 5):
        leaves = student[0].clone().requires_grad_(), student[1][own].clone().requires_grad_()
        t = LinearHead(teacher[0], teacher[1][own])
        head = LinearHead(*leaves, chunk_rows=chunk_rows)
        loss = kd_loss(head, t, labels, group=group, temperature=2.0)
        found = gathered((loss.detach(), torch.autograd.grad(loss, leaves, random_like(loss))))
        losses, grads = zip(*found, strict=True)
        for other, (hidden, _) in zip(losses, grads, strict=True):
            assert_same_bits((other, losses[0]), (hidden, grads[0][0]))
        logits = (logits_of(*x).float() for x in (student, teacher))
        ref = reference(*logits, labels, upstream=random_like(loss), temperature=2.0)
        assert_loss_close(losses[0], ref, 2e-5)
        whole = [grads[0][0], torch.cat([weight for _, weight in grads])]
        assert_gradients_close(whole, student, ref)


def check_top_k_of_the_whole_vocabulary(group):
    student, teacher, labels = problem(6, V)
    logprobs, ids = teacher.log_softmax(-1).topk(16)
    source = TopK(ids, logprobs)
    loss, grad = run_own(group, student, source, labels)
    alone, alone_grad = run(student, source, labels)
    torch.testing.assert_close(loss, alone, rtol=2e-6, atol=0.0)
    assert ((grad - alone_grad).abs() <= 1e-5 * alone_grad.abs().amax(-1, keepdim=True)).all()


def check_dtensors_need_no_group(group):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    size = dist.get_world_size(group)
    mesh = dist.init_device_mesh("cpu", (size,))
    student, teacher, labels = problem(2, 3, 91)  # no multiple of the ranks
    sharded = [distribute_tensor(x, mesh, [Shard(2)]) for x in (student, teacher)]
    leaf = sharded[0].requires_grad_()
    loss = kd_loss(leaf, sharded[1], labels, temperature=2.0)
    loss.backward(random_like(loss))
    assert isinstance(leaf.grad, DTensor) and leaf.grad.placements == leaf.placements
    grad = leaf.grad.full_tensor()
    assert_right("native", loss.detach(), grad, student, teacher, labels, temperature=2.0)
    with pytest.raises(ValueError, match="teacher must have the columns that the student has"):
        kd_loss(leaf, teacher, labels)


def check_a_head_of_dtensors_keeps_its_rows(group):
    """The group's rows stay where they are; those of data parallel ranks are gathered."""
    from torch.distributed.tensor import Shard, distribute_tensor

    size = dist.get_world_size(group)
    shape, names, placements = (size,), ("tp",), [Shard(0)]
    if size == 4:
        shape, names, placements = (2, 2), ("dp", "tp"), [Shard(0), Shard(0)]
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
    tp, ranks = mesh["tp"].get_group(), mesh.size() // shape[-1]
    (hidden, weight), (t_hidden, t_weight), labels = heads(6, columns=88)
    data = mesh.get_local_rank("dp") if ranks > 1 else 0
    hidden = hidden * (data + 1)  # data parallel ranks have rows of their own
    leaf = distribute_tensor(weight.double(), mesh, placements).requires_grad_()
    whole = weight.double().requires_grad_()
    t = LinearHead(t_hidden.double(), distribute_tensor(t_weight.double(), mesh, placements))
    loss = kd_loss(LinearHead(hidden.double(), leaf), t, labels, group=tp)
    loss.backward()
    alone = [
        kd_loss(
            LinearHead(hidden.double() / (data + 1) * (k + 1), whole),
            LinearHead(t_hidden.double(), t_weight.double()),
            labels,
        )
        for k in range(ranks)
    ]
    torch.testing.assert_close(loss, alone[data].detach(), rtol=1e-12, atol=0.0)
    (sum(alone) / ranks).backward()
    found = leaf.grad.full_tensor()
    assert ((found - whole.grad).abs() <= 1e-12 * whole.grad.abs().max()).all()


def check_replicated_dtensors_are_taken_as_they_are(group):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    size = dist.get_world_size(group)
    mesh = dist.init_device_mesh("cpu", (size,))
    (hidden, weight), (_, teacher), labels = heads(6, columns=88)
    logprobs, ids = (hidden @ teacher.T).log_softmax(-1).topk(5)
    everywhere = [distribute_tensor(x, mesh, [Replicate()]) for x in (hidden, ids, logprobs)]
    leaf = everywhere[0].requires_grad_()
    head = LinearHead(leaf, distribute_tensor(weight, mesh, [Shard(0)]))
    loss = kd_loss(head, TopK(*everywhere[1:]), distribute_tensor(labels, mesh, [Replicate()]))
    loss.backward()
    whole = hidden.clone().requires_grad_()
    alone = kd_loss(LinearHead(whole, weight), TopK(ids, logprobs), labels)
    alone.backward()
    torch.testing.assert_close(loss, alone, rtol=2e-6, atol=0.0)
    assert isinstance(leaf.grad, DTensor)
    error = (leaf.grad.full_tensor() - whole.grad).abs()
    assert (error <= 1e-5 * whole.grad.abs().max()).all()


def check_sequence_shards_are_one_batch_by_num_items(group):
    """Context parallel: every rank has some of the rows, all of the columns, and no group."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    student, teacher, labels = problem(2, 8 * size, 30, dtype=torch.float64)
    labels[0, :9] = -100  # some ranks have fewer
    valid = (labels != -100).sum()
    own = slice(8 * rank, 8 * rank + 8)
    inputs = student[:, own], teacher[:, own], labels[:, own]
    loss, grad = run(*inputs, num_items=valid, upstream=torch.tensor(0.7))
    dist.all_reduce(loss)
    alone, alone_grad = run(student, teacher, labels, upstream=torch.tensor(0.7))
    torch.testing.assert_close(loss, alone, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(grad, alone_grad[:, own], rtol=1e-12, atol=0.0)


def check_a_part_of_the_processes_is_a_group(group):
    """Tensor parallel pairs beside each other, each with rows of its own."""
    size, rank = dist.get_world_size(), dist.get_rank()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    student, teacher, labels = problem(4, 31)
    student = student + rank // 2 * teacher
    own = own_columns(rank % 2, 2, 31)
    loss = kd_loss(student[:, own], teacher[:, own], labels, group=pairs[rank // 2])
    torch.testing.assert_close(loss, kd_loss(student, teacher, labels), rtol=2e-6, atol=0.0)


def check_replicas_are_an_error_on_every_rank(group):
    student, teacher, labels = problem(4, 31)
    with pytest.raises(ValueError, match="as if it were replicated"):
        kd_loss(student, teacher, labels, group=group)


CHECKS = {name: x for name, x in globals().items() if name.startswith("check_")}


def run_checks(results):
    """Each check on every rank; rank 0 writes {check: None or the traceback of a rank}."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    found = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        error = None
        try:
            check(dist.group.WORLD)
        except BaseException:
            error = traceback.format_exc()
        found[name] = next((x for x in gathered(error) if x is not None), None)
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def outcomes(request, tmp_path_factory):
    results = tmp_path_factory.mktemp("checks") / "results.json"
    processes.run(f"test_group_processes.run_checks({str(results)!r})", request.param)
    return json.loads(results.read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_over_processes(outcomes, check):
    if outcomes[check] is not None:
        pytest.fail(outcomes[check], pytrace=False)


def one_dies():
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    torch.manual_seed(0)
    student, teacher, labels = problem(4, 20)
    own = slice(10 * dist.get_rank(), 10 * dist.get_rank() + 10)
    kd_loss(student[:, own], teacher[:, own], labels, group=dist.group.WORLD)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        kd_loss(student[:, own], teacher[:, own], labels, group=dist.group.WORLD)
    except RuntimeError:
        print(f"after {time.monotonic() - begin} s")


def test_a_rank_that_dies_is_an_error_of_the_others_within_the_timeout():
    survivor, killed = processes.ends(processes.start("test_group_processes.one_dies()", 2))
    assert killed[0] == -signal.SIGKILL
    assert float(survivor[1].split()[1]) < 20
