"""Specialists: models for classes that are easily confused, whose knowledge goes into one student.

Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 5. A generalist
knows all classes. Those that it predicts together are clustered; each specialist learns one cluster
and, as a single class, the dustbin, all others; what they say together is a teacher.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks

TINY = torch.finfo(torch.float64).tiny


def confusable_classes(logits: Tensor, clusters: int, seed: int = 0) -> list[Tensor]:
    """Classes that a generalist predicts together: K-means on the columns of the covariance matrix
    of its predictions (section 5.3).

    Args:
        logits: (N, V), of the generalist at T = 1, N ≥ 2.
        clusters: how many, in [2, V].
        seed: of the first centres.

    Returns:
        A list of class ids (S,) int64, sorted; every class is in one of them, and none is empty:
        there may be fewer than `clusters`.
    """
    from scipy.cluster.vq import kmeans2

    classes = logits.shape[-1]
    checks.integer("clusters", clusters, low=2, high=classes)
    covariance = logits.double().softmax(-1).T.cov()  # (V, V)
    scale = covariance.abs().amax().clamp_min(TINY)
    _, cluster = kmeans2((covariance / scale).numpy(), clusters, minit="++", rng=seed)
    found = [torch.from_numpy(cluster == k).nonzero()[:, 0] for k in range(clusters)]
    return [ids for ids in found if len(ids)]


def specialist_labels(labels: Tensor, classes: Tensor) -> Tensor:
    """labels (N,) as a specialist of `classes` (S,) has them: 0 to S − 1, and S, the dustbin."""
    position = (labels[:, None] == classes).int()  # (N, S)
    return torch.where(position.any(-1), position.argmax(-1), len(classes))


def specialist_rows(
    labels: Tensor, classes: Tensor, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Examples to train a specialist on: all of its classes, and as many others (section 5.2).

    labels (N,). Returns rows (M,) int64, and the dustbin's correction: what to add to its logit
    because the others are fewer than they are: log of how many times.
    """
    special = torch.isin(labels, classes)
    mine, others = special.nonzero()[:, 0], (~special).nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), generator=generator)[: len(mine)]]
    correction = math.log(len(others) / len(drawn)) if len(drawn) else 0.0
    return torch.cat([mine, drawn]), correction


def combine(
    generalist: Tensor,
    specialists: Sequence[tuple[Tensor, Tensor]],
    active: int = 1,
    steps: int = 100,
) -> Tensor:
    """What a generalist and its specialists say together -> log-probabilities (N, V).

    For every example the q that minimises KL(p_g ‖ q) + Σ KL(p_m ‖ q_m) over those specialists m
    that have one of the generalist's `active` most probable classes; q_m is q on the classes of m,
    and one sum on all others, its dustbin (section 5.4, eq. 5).

    The paper descends the gradient. But this is the maximum likelihood of counts p_g and p_m some
    of which are of groups, and EM (Dempster, Laird, Rubin 1977) has it without a step size: every
    dustbin's share is dealt out as q is among its classes, then q is the mean of all. With A
    specialists called the error shrinks to A / (A + 1) or less a step.

    Args:
        generalist: logits (N, V), float.
        specialists: pairs of class ids (S,), 0 < S < V, and logits (N, S + 1), the last one the
            dustbin's, with its correction.
        active: the generalist's classes that call a specialist, in [1, V].
        steps: of EM.
    """
    classes = generalist.shape[-1]
    checks.integer("active", active, low=1, high=classes)
    checks.integer("steps", steps, low=1)
    p = generalist.double().softmax(-1).clamp_min(TINY)  # (N, V)
    top = p.topk(active).indices  # (N, active)
    known, dustbins = p, []
    called = torch.zeros(len(p), 1, dtype=p.dtype)
    for ids, answer in specialists:
        if answer.shape != (len(p), len(ids) + 1) or not 0 < len(ids) < classes:
            raise ValueError(
                f"specialists must be class ids (S,), 0 < S < {classes}, with logits "
                f"({len(p)}, S + 1), got {len(ids)} and {tuple(answer.shape)}"
            )
        calls = torch.isin(top, ids).any(-1, keepdim=True).double()  # (N, 1)
        mine = calls * answer.double().softmax(-1)  # (N, S + 1), 0 where it is not called
        known = known.index_add(-1, ids, mine[:, :-1])
        others = torch.ones(classes, dtype=torch.bool).index_fill(0, ids, False)
        dustbins.append((others, mine[:, -1:]))
        called = called + calls

    q = p
    for _ in range(steps if dustbins else 0):
        total = known
        for others, share in dustbins:
            rest = q * others  # (N, V)
            total = total + share * rest / rest.sum(-1, keepdim=True)
        q = (total / (1 + called)).clamp_min(TINY)
    return q.log().to(generalist.dtype)
