"""What `kd_loss` must return for a teacher that knows some classes, in float64: as oracle.py.

Such a teacher's divergence is a dense one over its classes and one more that holds the rest, with
student logits s at the kept ids and T · log Σ e^{s/T} over the others. Its gradient by the logits
is that one's by the chain rule.
"""

import torch
from oracle import FLOAT32, FLOAT64, Reference, reference

INF = float("inf")


def probabilities(ids, values, kind, columns, temperature=1.0):
    """ids, values (N, K) of `TopK` or `Sampled` -> p (N, V + 1) float64; the last: the rest."""
    p = torch.zeros(len(ids), columns + 1, dtype=torch.float64)
    for row, (known, value) in enumerate(zip(ids, values.double(), strict=True)):
        at, of = known[known >= 0].long(), value[known >= 0]
        if kind == "counts" and of.sum() > 0:
            p[row].index_add_(0, at, of / of.sum())
        elif kind == "renormalize":
            p[row, at] = (of / temperature).softmax(0)
        elif kind == "bucket":
            p[row, at] = of.exp()
            p[row, -1] = 0 if len(at) == columns else 1 - of.exp().sum()
    p[p.sum(1) == 0, -1] = 1.0  # a row without classes
    return p


def sparse_reference(student, ids, p, labels=None, *, alpha=0.5, upstream=None, **options):
    """student (N, V), ids (N, K), p (N, V + 1) as above -> `Reference` of the whole loss."""
    temperature = options.get("temperature", 1.0)
    unit = (FLOAT64 if student.dtype == torch.float64 else FLOAT32).unit
    s, columns = student.double(), student.shape[1]
    kept = torch.zeros(len(s), columns + 1, dtype=torch.bool)
    kept = kept.scatter(1, ids.long() % (columns + 1), True)[:, :columns]
    others = s.masked_fill(kept, -INF) / temperature
    rest = temperature * others.logsumexp(1, keepdim=True)
    share = others.softmax(1).nan_to_num(nan=0.0)
    classes = torch.cat([s.masked_fill(~kept, -INF), rest], 1)
    common = dict(options, upstream=upstream)
    hard_options = dict(common, alpha=0.0)
    ref = reference(
        classes, p.log() * temperature, labels, alpha=1.0, **dict(common, label_smoothing=0.0)
    )

    def spread(x):
        """What classes (N, V + 1) have, to columns."""
        return torch.where(kept, x[:, :columns], x[:, columns:] * share)

    log_p = p.log().clamp(min=-1e3)
    q = (s / temperature).softmax(1)
    far = (s - s.amax(1, keepdim=True)) / temperature
    bound = (1 + far.abs()) * q + spread((1 + log_p.abs()) * p) + share * far.abs() * p[:, -1:]
    bound = 8 * unit * ref.scale[:, None] * bound.nan_to_num(nan=0.0)
    grad = spread(ref.grad)
    loss, rows, hard, scale = ref.loss, ref.rows, torch.zeros_like(ref.rows), ref.scale
    if labels is not None:
        logits = student if student.dtype == torch.float64 else student.float()
        of_hard = reference(logits, logits, labels, **hard_options)
        loss, rows, grad, bound, scale = (
            alpha * x + (1 - alpha) * y
            for x, y in zip((loss, rows, grad, bound, scale), mixed_fields(of_hard), strict=True)
        )
        hard = of_hard.hard
    return ref._replace(
        loss=loss,
        rows=rows,
        hard=hard,
        grad=grad,
        bound=bound,
        flush=torch.full_like(grad, 2.0**-124) * scale[:, None],
        scale=scale,
        dtype=student.dtype,
    )


def mixed_fields(ref: Reference):
    """What the two terms of a loss are added up in."""
    return ref.loss, ref.rows, ref.grad, ref.bound, ref.scale
