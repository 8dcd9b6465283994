"""Ranks that are threads of one process: what `kdkernels.parallel` asks of torch.distributed.

    results = over_ranks(4, function)   # function(group) on each rank

One thread runs at a time, until it waits for the others: Triton's interpreter knows no threads.
"""

import threading
import types
from unittest import mock

import torch
from conftest import random_like

from kdkernels import Ensemble, kd_loss
from kdkernels.parallel import call, groups


class ThreadGroup:
    def __init__(self, rank, shared):
        self.rank, self.shared = rank, shared


class Shared:
    def __init__(self, size):
        self.size, self.slots = size, [None] * size
        self.barrier, self.baton = threading.Barrier(size, timeout=60), threading.Lock()
        self.messages = []  # (what, bytes) of every collective, as rank 0 sends it

    def exchange(self, rank, what, x):
        if rank == 0:
            self.messages.append((what, x.numel() * x.element_size()))
        self.slots[rank] = x
        self._meet()
        found = [y.clone() for y in self.slots]
        self._meet()
        return found

    def _meet(self):
        self.baton.release()
        try:
            self.barrier.wait()
        finally:
            self.baton.acquire()


def _all_gather(out, x, group, async_op=False):
    out.copy_(torch.cat(group.shared.exchange(group.rank, "all_gather", x)))
    return types.SimpleNamespace(wait=lambda: None) if async_op else None


def _all_reduce(x, group, async_op=False):
    x.copy_(torch.stack(group.shared.exchange(group.rank, "all_reduce", x)).sum(0))
    return types.SimpleNamespace(wait=lambda: None) if async_op else None


DIST = types.SimpleNamespace(
    ProcessGroup=ThreadGroup,
    get_rank=lambda group: group.rank,
    get_world_size=lambda group: group.shared.size,
    get_process_group_ranks=lambda group: list(range(group.shared.size)),
    all_gather_single=_all_gather,
    all_reduce=_all_reduce,
)


def over_ranks(size, function, shared=None):
    """function(group) on each of `size` ranks -> their results, in order; the error of one that
    did not merely wait for another."""
    shared = shared or Shared(size)
    results, errors = [None] * size, []

    def run(rank):
        try:
            with shared.baton:
                results[rank] = function(ThreadGroup(rank, shared))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append((rank, error))
            shared.barrier.abort()

    with mock.patch.object(call, "dist", DIST), mock.patch.object(groups, "dist", DIST):
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise min(errors, key=lambda item: item[0])[1]
    return results


def columns_of(source, begin, end):
    """A source as the rank has it whose columns are begin to end."""
    if isinstance(source, torch.Tensor):
        return source[..., begin:end]
    if isinstance(source, Ensemble):
        members = [columns_of(x, begin, end) for x in source.teachers]
        return Ensemble(members, source.weights, source.mean)
    return source


def run_sharded(student, teacher, labels, splits, *, upstream=None, shared=None, **options):
    """(loss, gradient) of `kd_loss` over ranks with `splits` columns each, as `conftest.run`.

    Every rank has the same loss, bit for bit.
    """
    begins = [sum(splits[:rank]) for rank in range(len(splits))]

    def on_rank(group):
        begin = begins[group.rank]
        own = slice(begin, begin + splits[group.rank])
        x = student.detach()[..., own].clone().requires_grad_()
        loss = kd_loss(x, columns_of(teacher, own.start, own.stop), labels, group=group, **options)
        grads = random_like(loss) if upstream is None else upstream
        (grad,) = torch.autograd.grad(loss, x, grads)
        return loss.detach(), grad

    losses, grads = zip(*over_ranks(len(splits), on_rank, shared), strict=True)
    for loss in losses:
        assert torch.equal(loss.nan_to_num(12345.0), losses[0].nan_to_num(12345.0))
    return losses[0], torch.cat(grads, -1)
