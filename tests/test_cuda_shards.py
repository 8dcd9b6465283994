"""The kernels for shards on imaginary devices, their threads in several orders: as in
csrc/tests/cuda_on_cpu/test_kernels.cpp."""

from dataclasses import replace

import cuda_on_cpu
import pytest
import torch
from conftest import DTYPES, assert_same_bits, problem

from kdkernels import TopK, ops
from kdkernels.backends import eager_shards, native
from kdkernels.kept import keep
from kdkernels.objective import make_objective

MODULE, REASON = cuda_on_cpu.build()
pytestmark = pytest.mark.skipif(MODULE is None, reason=str(REASON))

# csrc/cuda/plan.h: Limits. Two rows in a cluster's shared memory, one, none, and blocks that meet
# in memory.
DEVICES = ((8192, 4096, 4, 8, 65536), (3072, 0, 4, 4, 65536), (1024, 0, 2, 4, 65536))
DEVICES += ((65536, 32768, 0, 8, 4096),)
SEEDS = range(5)  # csrc/tests/cuda_on_cpu/runtime.h: set_schedule


def operators_on(device, seed):
    return native.operators(
        None, None, lambda _, *arguments: MODULE.shard_rows(*arguments, device, seed)
    )


def phases(operators, student, teacher, labels, objective):
    """Statistics (F, N), terms (3, N) and gradient (N, V) of a shard that has most columns."""
    options, inputs = objective.options(), (student, teacher, labels, None)
    statistics = operators["shard_statistics"](*inputs, True, *options)
    merged = eager_shards.shard_statistics(*inputs, True, *options)
    merged = torch.cat([merged, torch.zeros_like(merged[:1])])
    merged[3, labels == -1] = 1.5  # the label of another shard
    terms = torch.zeros(3, len(student), dtype=torch.float64)
    if objective.divergence != "forward_kl":
        terms = operators["shard_terms"](*inputs, merged, True, True, *options)
        merged[-1] = terms[2] / terms[1]
    grad = torch.empty_like(student)
    unscale = operators["shard_gradient_"](
        *inputs, None, merged, grad, objective.vocab_size + 9, *options
    )
    return statistics, terms, grad.double() * unscale.double().reshape(-1, 1)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "bucket"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_order_of_the_threads_changes_no_bit(device, kind, divergence):
    torch.default_generator.manual_seed(0)
    objective = make_objective(
        divergence=divergence,
        beta=None,
        temperature=2.0,
        alpha=0.4,
        t_squared=False,
        label_smoothing=0.1,
        ignore_index=-100,
        reduction="sum",
        vocab_size=0,
        has_labels=True,
    )
    for dtype, columns in zip(DTYPES, (33, 256, 777), strict=True):
        objective = replace(objective, vocab_size=columns)
        student, teacher, labels = problem(7, columns, dtype=dtype)
        student[5:] = teacher[5:]  # a near row
        labels[1], labels[2], labels[3] = -100, -1, student[3].argmax()
        sources = [teacher]
        if kind == "bucket":
            logprobs, ids = (teacher.double() / 2).log_softmax(-1).topk(9, -1)
            sources = keep(TopK(ids, logprobs), labels, objective).fields()
        inputs = student, sources, labels, objective
        found = [phases(operators_on(device, seed), *inputs) for seed in SEEDS]
        for others in found[1:]:
            assert_same_bits(*zip(found[0], others, strict=True))
        exact = phases(eager_shards.OPERATORS, *inputs)
        fields = ops.shard_fields(sources)
        for name, x, y in zip(fields, found[0][0], exact[0], strict=True):
            if divergence == "forward_kl" or name != "kl":
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=name)
        scale = exact[2].abs().amax(-1, keepdim=True)
        unit = max(torch.finfo(dtype).eps, 1e-5)
        assert ((found[0][2] - exact[2]).abs() <= unit * scale).all()
