"""Logits the numerical tests run on: shaped like a model's, not like noise.

A language model's logits have a Zipfian bulk, a few peaks far above it, and a student close to its
teacher. On independent Gaussian rows of 100,000 classes every probability is tiny, and errors
that matter in training are not seen.
"""

import math

import torch

VOCABULARIES = (
    *range(1, 18),  # every tail of a 16-lane vector, alone and after one full vector
    *(31, 32, 33),  # around two vectors
    *(63, 64, 65),  # around the lanes that the native CPU backend sums in
    *(511, 512, 513),  # around the native CPU backend's tile
    1000,  # the smallest V of the KL bars, no multiple of 16
    *(1023, 1024, 1025),  # around two tiles
    4097,  # one past eight tiles
    32000,  # Llama 2
    50257,  # GPT-2: odd, so that every second row is unaligned
    65537,  # 2^16 + 1 (pytorch#36485: wrong tail at this width)
    128256,  # Llama 3
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def realistic(n, v, *, dtype=torch.float32, teacher_dtype=None, seed=0, alike=0.8):
    """(student, teacher, labels): logits (n, v), labels (n,), half of them the teacher's choice."""
    g = generator(seed)
    rank = torch.rand(n, v, generator=g).argsort(-1) + 1.0
    teacher = 0.8 * torch.randn(n, v, generator=g) - 1.1 * rank.log()
    peaks = torch.randint(v, (n, 4), generator=g)
    heights = torch.rand(n, 4, generator=g) * 8
    teacher = teacher.scatter_add(-1, peaks, heights)
    student = alike * teacher + 1.2 * torch.randn(n, v, generator=g)
    guess = torch.randint(v, (n,), generator=g)
    labels = torch.where(torch.arange(n) % 2 == 0, teacher.argmax(-1), guess)
    return student.to(dtype), teacher.to(teacher_dtype or dtype), labels


def flat(n, v, *, seed=0):
    """(n, v) float32 logits in [0, 2): no class is negligible."""
    return torch.rand(n, v, generator=generator(seed)) * 2


def on_grid(x, step):
    """x rounded to multiples of a power of 2: adding c to it is exact while both fit 24 bits."""
    return (x / step).round() * step


def moved(x, kl, temperature=1.0, seed=1):
    """x moved so that KL(softmax(x / T) ‖ softmax(moved / T)) is about `kl` in every row.

    It is less where one class has all the probability. No class is moved by nearly nothing: its
    gradient would vanish in any bound.
    """
    g = generator(seed)
    noise = 0.5 + torch.rand(x.shape, generator=g, dtype=torch.float64)
    noise = noise * (torch.randint(2, x.shape, generator=g) * 2 - 1)
    p = (x.double() / temperature).softmax(-1)
    centred = noise - (p * noise).sum(-1, keepdim=True)
    size = (p * centred**2).sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
    return (x.double() + temperature * math.sqrt(2 * kl) * noise / size).to(x.dtype)


def nudged(x, kl, step, temperature=1.0, seed=1):
    """x with some classes moved by ± `step`, as many as `kl` allows: stays on a grid of `step`.

    For logits too coarse for `moved`: classes are taken in random order until their
    p (step / T)² / 2 reaches `kl`, each too improbable to exceed it alone.
    """
    g = generator(seed)
    cost = (x.double() / temperature).softmax(-1) * (step / temperature) ** 2 / 2
    order = torch.rand(x.shape, generator=g).argsort(-1)
    cost = torch.where(cost < kl / 4, cost, 0.0)
    taken = (cost.gather(-1, order).cumsum(-1) <= kl).gather(-1, order.argsort(-1))
    sign = torch.randint(2, x.shape, generator=g) * 2 - 1
    return torch.where(taken & (cost > 0), x + sign * step, x).to(x.dtype)


def confident(v, *, dtype=torch.float32, seed=0, margins=range(5, 70, 4)):
    """(logits, labels): the label leads all others together by each margin, loss about e^-margin.

    The losses go down to 1e-30, where logsumexp(s) − s_y has lost every digit.
    """
    g = generator(seed)
    margins = torch.tensor(list(margins), dtype=torch.float32)
    logits = torch.randn(len(margins), v, generator=g)
    labels = torch.randint(v, (len(margins),), generator=g)
    others = logits.scatter(-1, labels[:, None], -math.inf).logsumexp(-1)
    logits.scatter_(-1, labels[:, None], (others + margins)[:, None])
    return logits.to(dtype), labels


def at_offset(x, offset):
    """A copy of x whose storage begins `offset` elements before it."""
    storage = torch.empty(x.numel() + offset, dtype=x.dtype)
    copy = storage[offset:].view(x.shape)
    return copy.copy_(x)
