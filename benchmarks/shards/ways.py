"""The same loss and gradient by other means than `kd_loss(group=...)`, to be compared with it.

Each takes what a rank has, student and teacher (N, V/R) and labels (N,) of all classes, int64, and
returns the loss () and the gradient (N, V/R) of its student. Forward KL and cross-entropy, half and
half, T = 1. N and V are multiples of R, the shards are in the order of the ranks.
"""

import torch
import torch.distributed as dist

import kdkernels as kdk

IGNORED = -100
ALPHA = 0.5


def statistics(student, teacher, labels, group, divergence="forward_kl"):
    leaf = student.detach().requires_grad_()
    options = dict(alpha=ALPHA, divergence=divergence, backend="native")
    loss = kdk.kd_loss(leaf, teacher, labels, group=group, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def heads(hidden, weight, teacher_hidden, teacher_weight, labels, group, chunk_rows):
    """The same of hidden states (N, H) and weights (V/R, H): loss, their gradients."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    student = kdk.LinearHead(*leaves, chunk_rows=chunk_rows)
    teacher = kdk.LinearHead(teacher_hidden, teacher_weight, chunk_rows=chunk_rows)
    loss = kdk.kd_loss(student, teacher, labels, group=group, alpha=ALPHA, backend="native")
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def gathered(student, teacher, labels, group):
    width = student.shape[-1]
    begin = dist.get_rank(group) * width
    loss, grad = _on_rows(_whole_columns(student, group), _whole_columns(teacher, group), labels)
    return loss, grad[:, begin : begin + width].contiguous()


def transposed(student, teacher, labels, group):
    """Ranks have N/R whole rows each, for as long as the loss takes."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = labels.view(ranks, -1)[rank]
    counted = (labels != IGNORED).sum()
    loss, grad = _on_rows(_whole_rows(student, group), _whole_rows(teacher, group), mine, counted)
    dist.all_reduce(loss, group=group)
    blocks = grad.view(len(mine), ranks, -1).transpose(0, 1).contiguous()  # (R, N/R, V/R)
    del grad
    found = torch.empty_like(student)
    dist.all_to_all_single(found, blocks, group=group)
    return loss, found


def reductions(student, teacher, labels, group):
    """In PyTorch's operators, in float32, with as few all-reduces as there can be."""
    rows, width = student.shape
    label = labels - dist.get_rank(group) * width
    counts = labels != IGNORED
    here = ((label >= 0) & (label < width))[:, None]
    label = label.clamp(0, width - 1)[:, None]
    peak = torch.stack([student.amax(-1), teacher.amax(-1)]).float()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    s, t = student - peak[0][:, None], teacher - peak[1][:, None]
    picked = s.gather(1, label).where(here, 0.0)[:, 0]
    p = t.exp()
    t.sub_(s).mul_(p)
    cross = t.sum(-1)
    del t
    q = s.exp_()
    sums = torch.stack([q.sum(-1), p.sum(-1), cross, picked])
    dist.all_reduce(sums, group=group)
    q_sum, p_sum, cross, picked = sums
    kl = cross / p_sum - p_sum.log() + q_sum.log()
    row_loss = ALPHA * kl + (1 - ALPHA) * (q_sum.log() - picked)
    share = counts / counts.sum()
    q.mul_((share / q_sum)[:, None])
    p.mul_((ALPHA * share / p_sum)[:, None])
    q.scatter_add_(1, label, torch.where(here, (ALPHA - 1) * share[:, None], 0.0))
    # q has weight 1: α of the divergence and 1 − α of the cross-entropy.
    q.sub_(p)
    del p
    return (row_loss * share).sum(), q.to(student.dtype)


def _on_rows(student, teacher, labels, counted=None):
    """Loss and gradient of whole rows (n, V) -> (), (n, V)"""
    student.requires_grad_()
    loss = kdk.kd_loss(student, teacher, labels, alpha=ALPHA, num_items=counted, backend="native")
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach(), grad


def _whole_columns(x, group):
    """(N, V/R) -> (N, V)"""
    blocks = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(blocks), x, group=group)
    return blocks.transpose(0, 1).reshape(len(x), -1)


def _whole_rows(x, group):
    """(N, V/R) -> (N/R, V)"""
    ranks = dist.get_world_size(group)
    blocks = x.new_empty(ranks, len(x) // ranks, x.shape[-1])
    dist.all_to_all_single(blocks, x, group=group)
    return blocks.transpose(0, 1).reshape(len(x) // ranks, -1)
