"""All ways on processes of this machine: what they hand to collectives, and what they keep.

Over gloo on the CPU; over NCCL where there is a GPU for each rank.
"""

import datetime
import json
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdkernels as kdk

from . import model, ways

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RUNS = {
    model.ONE_PASS: ("forward_kl", ways.statistics),
    model.TWO_PASSES: ("jsd", partial(ways.statistics, divergence="jsd")),
    model.REDUCTIONS: ("forward_kl", ways.reductions),
    model.TRANSPOSED: ("forward_kl", ways.transposed),
    model.GATHERED: ("forward_kl", ways.gathered),
}
IGNORED_ROWS = 3
HIDDEN = 64  # H, of heads, whose rows come in so many chunks
CHUNKS = 4
CALLS = 3  # of which the least peak counts: gloo's thread may hold what it sent a moment longer
INPUTS = "inputs.pt"


class Failed(RuntimeError):
    """A process of the simulation ended otherwise than it should."""


@dataclass(frozen=True)
class Settings:
    """rows and vocab are multiples of all numbers of ranks; seconds until it is given up."""

    device: str = "cpu"
    rows: int = 256
    vocab: int = 8192
    ranks: tuple = (1, 2, 4, 8)
    dtypes: tuple = ("float32", "bfloat16")
    seconds: int = 120

    def small(self):
        return replace(self, rows=64, vocab=1024, ranks=(1, 2))


class Watch(TorchDispatchMode):
    """Collectives, and the bytes of tensors that are there at once beyond those before.

    Attributes:
        calls: (name, bytes of the tensors that a rank gives) of every collective.
        peak: bytes. What an operator allocates and frees inside of itself is not in it.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.known = [], set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        if "c10d" in function.namespace:
            self._collective(function.__name__.partition(".")[0].strip("_"), args)
        for x in _tensors(result):
            self._take(x.untyped_storage(), given)
        return result

    def _collective(self, name, args):
        if name in NO_BYTES:
            return
        if name not in RECEIVED:
            raise Failed(f"{name} is a collective whose bytes nobody counts")
        # Where two arguments have tensors, the first are what comes.
        *_, given = [tensors for tensors in map(_tensors, args) if tensors]
        self.calls.append((name, sum(x.nbytes for x in given)))

    def _take(self, storage, given):
        key = id(storage)
        if key in self.known or key in given:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key, size):
        self.known.discard(key)
        self.now -= size


# Bytes that a rank receives from others of R, of those it gives.
RECEIVED = {
    "allgather": lambda x, ranks: x * (ranks - 1),
    "allgather_base": lambda x, ranks: x * (ranks - 1),
    "alltoall_base": lambda x, ranks: x * (ranks - 1) / ranks,
    "allreduce": lambda x, ranks: 2 * x * (ranks - 1) / ranks,
}
NO_BYTES = "barrier", "wait_tensor"


def run(settings):
    """-> records: of every way, R and dtype what was counted, and what the model says.

    Raises:
        Failed: a process did.
    """
    most = max(settings.ranks)
    # Forked from a process that has imported it all, torch._dynamo too, which dispatch modes want.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        inputs = {name: drawn(settings, DTYPES[name]) for name in settings.dtypes}
        torch.save(inputs, Path(folder, INPUTS))
        processes = [
            context.Process(target=_process, args=(rank, most, settings, folder), daemon=True)
            for rank in range(most)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, settings.seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(most)]
    return [_worst([lines[k] for lines in ranks if k < len(lines)]) for k in range(len(ranks[0]))]


def _wait(processes, seconds):
    deadline = time.monotonic() + seconds
    while any(process.exitcode is None for process in processes):
        codes = [process.exitcode for process in processes]
        if any(codes) or time.monotonic() > deadline:
            raise Failed(f"processes of the simulation ended with {codes}")
        time.sleep(0.02)
    if any(process.exitcode for process in processes):
        raise Failed(f"processes ended with {[process.exitcode for process in processes]}")


def _worst(lines):
    """Of all ranks of a case: the largest of what was measured."""
    same = {name for name in lines[0] if name not in MEASURED}
    if any(line[name] != lines[0][name] for line in lines for name in same):
        raise Failed("ranks measured different cases")
    return {**lines[0], **{name: max(line[name] for line in lines) for name in MEASURED}}


MEASURED = "collectives", "received", "peak", "loss_error", "gradient_error"


def _process(rank, most, settings, folder):
    torch.set_num_threads(1)
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        {"cpu": "gloo", "cuda": "nccl"}[settings.device],
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=most,
        timeout=datetime.timedelta(seconds=settings.seconds),
    )
    lines, inputs = [], torch.load(Path(folder, INPUTS), mmap=True)
    for ranks in sorted(settings.ranks, reverse=True):  # those with all processes first
        group = dist.new_group(range(ranks))
        if rank < ranks:
            for name in settings.dtypes:
                lines += _measured(rank, ranks, group, name, inputs[name], settings)
    Path(folder, f"{rank}.json").write_text(json.dumps(lines))
    dist.barrier()
    dist.destroy_process_group()


def _measured(rank, ranks, group, name, inputs, settings):
    """inputs: of `drawn` -> records of all ways"""
    labels = inputs["labels"].to(settings.device)
    sizes = model.Sizes(settings.rows, settings.vocab, ranks, DTYPES[name].itemsize)
    about = {"ranks": ranks, "dtype": name, "rows": sizes.rows, "vocab": sizes.vocab}
    width = sizes.vocab // ranks

    def mine(x, dim):
        return x.narrow(dim, rank * width, width)

    local = [mine(inputs[x], 1).clone().to(settings.device) for x in ("student", "teacher")]
    for way, (divergence, function) in RUNS.items():
        if ranks == 1 and function in (ways.reductions, ways.transposed, ways.gathered):
            continue
        loss, grad = inputs[divergence]
        run = partial(function, *local, labels, group)
        found = _counted(run, loss, (grad.abs().max(),), (mine(grad, 1),), ranks)
        yield {"way": way, **about, **found, **_of_model(model.cost(way, sizes))}
    if name != "float32":  # the logits of halves are rounded, or not: that depends on the processor
        return
    chunk = sizes.rows // CHUNKS
    heads = [x.to(settings.device) for x in inputs["heads"]]
    heads[1], heads[3] = (mine(x, 0).clone() for x in (heads[1], heads[3]))
    loss, hidden, weight = inputs["of heads"]
    run = partial(ways.heads, *heads, labels, group, chunk)
    largest = hidden.abs().max(), weight.abs().max()
    found = _counted(run, loss, largest, (hidden, mine(weight, 0)), ranks)
    cost = model.heads(sizes, HIDDEN, chunk)
    yield {"way": model.HEADS, **about, **found, **_of_model(cost)}


def _counted(run, exact, largest, wanted, ranks):
    """What a call of `run` hands to collectives, keeps, and is wrong by.

    exact: the loss. wanted: this rank's part of gradients. largest: entries of the whole of these.
    """
    run()  # what is made once for a group is not counted
    peaks = []
    for _ in range(CALLS):
        with Watch() as watch:
            loss, *found = run()
        peaks.append(watch.peak)
    errors = [
        ((x.cpu() - y).abs().max() / z).item()
        for x, y, z in zip(found, wanted, largest, strict=True)
    ]
    return {
        "collectives": len(watch.calls),
        "received": sum(RECEIVED[what](size, ranks) for what, size in watch.calls),
        "peak": min(peaks),
        "loss_error": abs(loss.item() / exact - 1),
        "gradient_error": max(errors),
    }


def _of_model(cost):
    return {f"{name}_model": x for name, x in asdict(cost).items()}


def drawn(settings, dtype):
    """{name: what all ranks share}: student and teacher (N, V), labels (N,), some of them ignored;
    hidden states (N, H) and weights (V, H) of both; and what `definition` says of these."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    shape = settings.rows, settings.vocab
    teacher = 3 * normal(*shape)
    student, teacher = (teacher + normal(*shape)).to(dtype), teacher.to(dtype)
    labels = torch.randint(settings.vocab, shape[:1], generator=generator)
    labels[:IGNORED_ROWS] = ways.IGNORED
    hidden, weight = normal(settings.rows, HIDDEN), normal(settings.vocab, HIDDEN) / HIDDEN**0.5
    heads = hidden, weight, 3 * normal(*hidden.shape), weight
    found = dict(student=student, teacher=teacher, labels=labels, heads=heads)
    for divergence in dict.fromkeys(divergence for divergence, _ in RUNS.values()):
        leaf = student.double().requires_grad_()
        found[divergence] = definition(leaf, teacher.double(), labels, divergence, leaf)
    hidden, weight, *others = (x.double() for x in heads)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    head, other = kdk.LinearHead(*leaves), kdk.LinearHead(*others)
    return found | {"of heads": definition(head, other, labels, "forward_kl", *leaves)}


def definition(student, teacher, labels, divergence, *leaves):
    """In float64, of one device: the loss, its gradients by the leaves."""
    options = dict(alpha=ways.ALPHA, divergence=divergence, backend="eager")
    loss = kdk.kd_loss(student, teacher, labels, **options)
    return loss.item(), *torch.autograd.grad(loss, leaves)


def _tensors(x):
    return [each for each in tree_leaves(x) if isinstance(each, torch.Tensor)]
