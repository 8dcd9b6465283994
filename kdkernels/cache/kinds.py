"""The kinds of predictions that a cache holds: what is stored of a row, and what is read from it.

topk:K                         the K most probable classes and the mass of the others
sampled:N                      N draws from the teacher, counted
hidden:fp32|bf16|fp16|fp8      the last hidden states, for the teacher's head
dense:fp32|bf16|fp16           all logits
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch

from ..source_rows import logit_chunks
from ..sources import LinearHead, Sampled, TopK
from .errors import Malformed
from .sections import Column
from .shard import canonical

MOST_CLASSES = 2**32
MOST_ENTRIES = 2**16 - 1  # of a row
# How far log-probabilities may be below the largest of their row, in nats: a step of 2⁻⁶ up to 8,
# then 256 steps to each octave: as exact as matters for what is as improbable.
DEPTHS = np.concatenate(
    [np.arange(512) / 64, *(2.0 ** (3 + k) * (1 + np.arange(256) / 256) for k in range(8))]
)
HALFWAY = (DEPTHS[1:] + DEPTHS[:-1]) / 2
OVER = 1e-2  # what probabilities that came rounded may sum to beyond 1
NOISE = 1e-4  # the same of those read
TAILS = "bucket", "renormalize"
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Half a unit in the last place, relative to a number that is not subnormal.
ROUNDING = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0


class TopKKind:
    """The K most probable classes, ascending, as gaps; each log-probability as the number of its
    depth below the largest, in `DEPTHS`; the largest, and the log of the mass of all other classes,
    as float32.

    The largest is stored such that all probabilities and the tail sum to 1. A log-probability is
    off by up to half a step of its depth, and by a shift of all of its row, as much at most as the
    largest of these errors: by 2⁻⁶ in all, or 2⁻⁸ of the row's depth where that is more.
    """

    name = "topk"

    def __init__(self, vocab_size, k, tail="bucket"):
        self.vocab_size, self.k, self.tail = vocab_size, k, tail
        self.spec = f"topk:{k}"
        width = _width(vocab_size - 1)
        self.columns = (
            Column("counts", "<u2", 2),
            Column("gaps", "<u4", width, "entry"),
            Column("below", "<u2", 2, "entry"),
            Column("peak", "<f4", 4),
            Column("tail", "<f4", 4),
        )

    def describe(self):
        # With room for the rounding of float32.
        bound = {"logprobs": {"absolute": 2.0**-6 * (1 + 2.0**-8), "of_depth": 2.0**-8}}
        return {"name": "topk", "k": self.k, "tail": self.tail, "bound": bound}

    def encode(self, prediction, seed):
        """`TopK`, or logits or a `LinearHead` whose most probable classes are taken: n rows."""
        _one_of(prediction, TopK, torch.Tensor, LinearHead)
        if not isinstance(prediction, TopK):
            _check_logits(prediction, self.vocab_size)
            prediction = TopK(**most_probable(prediction, self.k, self.vocab_size))
        ids = _entries("ids", prediction.ids, self.vocab_size)  # (n, k)
        logprobs = prediction.logprobs.detach().cpu().double().numpy()
        if logprobs.shape != ids.shape:
            raise ValueError(f"logprobs must be {ids.shape}, as ids, got {logprobs.shape}")
        kept = ids >= 0
        if (np.isnan(logprobs) | (logprobs > OVER))[kept].any():
            raise ValueError("logprobs must not be above 0, and not NaN")
        peak = np.where(kept, logprobs, -np.inf).max(1, initial=-np.inf)
        peak = np.where(np.isfinite(peak), peak, 0.0)
        # What is further below has no probability in any precision.
        kept &= peak[:, None] - logprobs <= DEPTHS[-1]
        counts = kept.sum(1)
        if counts.max(initial=0) > self.k:
            raise ValueError(f"ids must be at most {self.k} of a row, got {counts.max()}")
        row, ids, logprobs = _sorted(kept, ids, logprobs)
        gaps = _gaps(row, ids)
        if (gaps < 0).any():
            wrong = ids[np.flatnonzero(gaps < 0)[0]]
            raise ValueError(f"ids must be different in a row, got {wrong} twice")
        below = np.searchsorted(HALFWAY, peak[row] - logprobs)
        with np.errstate(divide="ignore"):  # rows without classes
            mass = peak + np.log(np.bincount(row, np.exp(logprobs - peak[row]), len(counts)))
            stored = np.log(np.bincount(row, np.exp(-DEPTHS[below]), len(counts)))
            if mass.max(initial=0) > np.log1p(OVER):
                total = np.exp(mass.max())
                raise ValueError(f"probabilities must sum to 1 at most, got {total:.4g}")
            mass = np.minimum(mass, 0.0)
            tail = np.log1p(-np.exp(mass))
        peak = np.where(counts, np.minimum(mass - np.where(counts, stored, 0), 0), 0)
        return {"counts": counts, "gaps": gaps, "below": below, "peak": peak, "tail": tail}

    def decode(self, columns):
        """{column: numbers of n rows} -> {"ids": (n, k), "logprobs": (n, k) float32}"""
        counts = columns["counts"]
        here = _grid_of(counts)
        gaps = here(columns["gaps"], 0)
        ids = _ids(gaps, counts, self.vocab_size)
        below = here(columns["below"], 0)
        if below.max(initial=0) >= len(DEPTHS):
            raise Malformed(f"a depth of number {below.max()}")
        logprobs = _NEGATED[below]
        logprobs += columns["peak"][:, None]
        _blank(counts, ids, logprobs)
        return {"ids": ids, "logprobs": logprobs}

    def check(self, columns, decoded):
        counts, peak, tail = columns["counts"], columns["peak"], columns["tail"]
        if counts.max(initial=0) > self.k:
            raise Malformed(f"{counts.max()} classes in a row of a cache of {self.k}")
        if not ((peak <= 0) & np.isfinite(peak) & (tail <= 0)).all():
            raise Malformed("log-probabilities that are above 0 or not numbers")
        # In float64, for what is filled up counts exp(0): a float32 sum of 65,535 is off by 2⁻⁸.
        kept = np.exp(decoded["logprobs"]).sum(1, dtype=np.float64)
        kept -= decoded["ids"].shape[1] - counts.astype(np.float64)
        if not (np.abs(kept + np.exp(tail) - 1) <= NOISE).all():
            raise Malformed("probabilities that do not sum to 1")

    def source(self, decoded, tail=None, head=None):
        return TopK(decoded["ids"], decoded["logprobs"], tail or self.tail)

    padding = {"ids": -1, "logprobs": 0}


class SampledKind:
    """Classes drawn from the teacher, N times a row, and how often each: exact."""

    name = "sampled"

    def __init__(self, vocab_size, draws):
        self.vocab_size, self.draws = vocab_size, draws
        self.spec = f"sampled:{draws}"
        self.columns = (
            Column("counts", "<u2", 2),
            Column("gaps", "<u4", _width(vocab_size - 1), "entry"),
            Column("draws", "<u2", _width(draws - 1), "entry"),
        )

    def describe(self):
        return {"name": "sampled", "draws": self.draws, "bound": {"counts": {"absolute": 0}}}

    def encode(self, prediction, seed):
        """`Sampled`, or logits or a `LinearHead` that are drawn from: n rows; seed: below 2⁶⁴."""
        _one_of(prediction, Sampled, torch.Tensor, LinearHead)
        if not isinstance(prediction, Sampled):
            _check_logits(prediction, self.vocab_size)
            prediction = self.draw(prediction, seed)
        ids = _entries("ids", prediction.ids, self.vocab_size)  # (n, k)
        draws = prediction.counts.detach().cpu().double().numpy()
        if draws.shape != ids.shape:
            raise ValueError(f"counts must be {ids.shape}, as ids, got {draws.shape}")
        kept = (ids >= 0) & (draws != 0)
        if not (draws == np.floor(draws))[kept].all() or (draws < 0)[kept].any():
            raise ValueError("counts must be whole numbers and not negative")
        rows = len(ids)
        row, ids, draws = _sorted(kept, ids, draws)
        first = np.flatnonzero(_gaps(row, ids) >= 0)
        row, ids = row[first], ids[first]
        draws = np.add.reduceat(draws, first).astype(np.int64) if len(first) else draws[:0]
        sums = np.bincount(row, draws, rows)
        if not np.isin(sums, (0, self.draws)).all():
            wrong = sums[~np.isin(sums, (0, self.draws))][0]
            raise ValueError(f"counts of a row must sum to {self.draws}, got {wrong:g}")
        counts = np.bincount(row, minlength=rows)
        return {"counts": counts, "gaps": _gaps(row, ids), "draws": draws - 1}

    def decode(self, columns):
        """{column: numbers of n rows} -> {"ids": (n, k), "counts": (n, k) int32}"""
        counts = columns["counts"]
        here = _grid_of(counts)
        ids = _ids(here(columns["gaps"], 0), counts, self.vocab_size)
        draws = here(columns["draws"], 0).astype(np.int32)
        draws += 1
        _blank(counts, ids, draws)
        return {"ids": ids, "counts": draws}

    def check(self, columns, decoded):
        if not np.isin(decoded["counts"].sum(1), (0, self.draws)).all():
            raise Malformed(f"counts of a row that do not sum to {self.draws}")

    def source(self, decoded, tail=None, head=None):
        return Sampled(decoded["ids"], decoded["counts"])

    padding = {"ids": -1, "counts": 0}

    def draw(self, prediction, seed):
        """Draws of rows of logits or a `LinearHead` -> `Sampled`, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _, logits in logit_chunks(prediction, self.vocab_size):
            # In float64: a sum of 100,000 probabilities in float32 favours some classes.
            sums = logits.double().softmax(-1).cumsum(-1)
            if not sums[:, -1].isfinite().all():
                raise ValueError("teacher's predictions must be finite or −inf, got NaN or +inf")
            shape = len(sums), self.draws
            # Of the CPU, so that it is the same whatever the teacher runs on.
            uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
            uniform = uniform.to(sums.device) * sums[:, -1:]
            drawn = torch.searchsorted(sums, uniform, right=True)
            found.append(drawn.clamp_(max=sums.shape[-1] - 1).cpu())
        ids = torch.cat(found)
        return Sampled(ids, torch.ones_like(ids))


class HiddenKind:
    """The teacher's last hidden states, for its head, which lies beside the shards.

    head: SHA-256, hex, of its file: other weights would make other predictions of them.
    """

    name = "hidden"

    def __init__(self, vocab_size, dtype, size, head, logit_scale=1.0, softcap=None):
        self.vocab_size, self.dtype, self.size, self.head = vocab_size, dtype, size, head
        self.logit_scale, self.softcap = logit_scale, softcap
        self.spec = f"hidden:{dtype}"
        self.columns = _floats("hidden", dtype, size)
        if dtype == "fp8":
            self.columns += (Column("scale", "<f4", 4),)

    def describe(self):
        return {
            "name": "hidden",
            "dtype": self.dtype,
            "size": self.size,
            "head": self.head,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "bound": _bound("hidden", self.dtype),
        }

    def encode(self, prediction, seed):
        """A `LinearHead` of n rows, or their hidden states (n, H)."""
        _one_of(prediction, LinearHead, torch.Tensor)
        hidden = prediction.hidden if isinstance(prediction, LinearHead) else prediction
        _finite("hidden", hidden, self.size, infinite=False)
        if self.dtype != "fp8":
            return {"hidden": _rounded("hidden", hidden, self.dtype)}
        hidden = _cast("hidden", hidden, "fp32")
        largest = hidden.abs().amax(-1, keepdim=True)
        # A power of 2, so that it rounds nothing.
        scale = torch.exp2(torch.ceil(torch.log2(largest / FP8_LARGEST)).clamp(-126, 127))
        return {
            "hidden": (hidden / scale).to(FP8).view(torch.uint8).numpy(),
            "scale": scale.numpy(),
        }

    def decode(self, columns):
        """{column: numbers of n rows} -> {"hidden": (n, H)}, a float tensor"""
        bits = columns["hidden"].reshape(-1, self.size)
        if self.dtype != "fp8":
            return {"hidden": _as_floats(bits, self.dtype)}
        hidden = torch.from_numpy(_FP8_VALUES[bits])
        return {"hidden": hidden.mul_(torch.from_numpy(columns["scale"].copy())[:, None])}

    def check(self, columns, decoded):
        if not decoded["hidden"].isfinite().all():
            raise Malformed("hidden states that are not finite")

    def source(self, decoded, tail=None, head=None):
        """head: of the cache, a `LinearHead` whose hidden states these take the place of."""
        return LinearHead(
            decoded["hidden"].to(head.weight.dtype),
            head.weight,
            head.bias,
            self.logit_scale,
            self.softcap,
        )

    padding = {"hidden": 0}


class DenseKind:
    """All logits of a row, those of padded classes left out."""

    name = "dense"

    def __init__(self, vocab_size, dtype):
        self.vocab_size, self.dtype = vocab_size, dtype
        self.spec = f"dense:{dtype}"
        self.columns = _floats("logits", dtype, vocab_size)

    def describe(self):
        return {"name": "dense", "dtype": self.dtype, "bound": _bound("logits", self.dtype)}

    def encode(self, prediction, seed):
        """Logits (n, V), or a `LinearHead` of n rows."""
        _one_of(prediction, torch.Tensor, LinearHead)
        _check_logits(prediction, self.vocab_size)
        if isinstance(prediction, LinearHead):
            chunks = [x.cpu() for _, x in logit_chunks(prediction, self.vocab_size)]
            prediction = torch.cat(chunks)
        logits = prediction[:, : self.vocab_size]
        _finite("logits", logits, self.vocab_size, infinite=True)
        if (logits == -math.inf).all(-1).any():
            raise ValueError("logits must have a finite one in each row, got −inf only")
        return {"logits": _rounded("logits", logits, self.dtype)}

    def decode(self, columns):
        """{column: numbers of n rows} -> {"logits": (n, V)}, a float tensor"""
        bits = columns["logits"].reshape(-1, self.vocab_size)
        return {"logits": _as_floats(bits, self.dtype)}

    def check(self, columns, decoded):
        logits = decoded["logits"]
        if (logits.isnan() | (logits == math.inf)).any():
            raise Malformed("logits that are NaN or infinite")

    def source(self, decoded, tail=None, head=None):
        return decoded["logits"]

    padding = {"logits": 0}


def parse(spec, vocab_size, *, tail="bucket", head=None):
    """A kind as people write it, "topk:64", for V classes.

    Args:
        head: of "hidden", a `LinearHead` of the teacher; its hidden states are not used.

    Raises:
        TypeError, ValueError: it is none; numbers outside of what is listed; a head that is
            missing, or goes with nothing.
    """
    _check_classes(vocab_size)
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if not isinstance(spec, str):
        raise TypeError(f"kind must be text, got {type(spec).__name__}")
    name, _, option = spec.partition(":")
    if (head is None) == (name == "hidden"):
        wanted, got = ("a LinearHead", None) if head is None else ("None", "one")
        raise ValueError(f"head must be {wanted} for kind {spec!r}, got {got}")
    if name == "topk" and _is_count(option, min(vocab_size, MOST_ENTRIES)):
        return TopKKind(vocab_size, int(option), tail)
    if name == "sampled" and _is_count(option, MOST_ENTRIES):
        return SampledKind(vocab_size, int(option))
    if name == "hidden" and option in (*FLOATS, "fp8"):
        size, scale, softcap = head.weight.shape[1], float(head.logit_scale), head.softcap
        _check_head(size, scale, softcap)
        digest = hashlib.sha256(head_file(head)).hexdigest()
        return HiddenKind(vocab_size, option, size, digest, scale, softcap)
    if name == "dense" and option in FLOATS:
        return DenseKind(vocab_size, option)
    raise ValueError(
        f"kind must be topk:K with K in [1, {min(vocab_size, MOST_ENTRIES)}], sampled:N with N in "
        f"[1, {MOST_ENTRIES}], hidden:fp32, bf16, fp16 or fp8, or dense:fp32, bf16 or fp16, "
        f"got {spec!r}"
    )


def of(facts, vocab_size):
    """A kind as `describe` says it.

    Raises:
        Malformed: no kind says so.
    """
    try:
        kind = _of(facts, vocab_size)
    except (TypeError, ValueError, LookupError) as error:
        raise Malformed(f"kind {facts!r:.200}: {error}") from error
    if canonical(kind.describe()) != canonical(facts):  # 1, 1.0 and True are equal
        raise Malformed(f"kind {facts!r:.200}")
    return kind


def head_file(head):
    """A `LinearHead` -> the bytes of head.safetensors: its weight (V, H), its bias (V,)."""
    from safetensors.torch import save

    named = {"weight": head.weight, "bias": head.bias}
    return save({name: x.detach().cpu().contiguous() for name, x in named.items() if x is not None})


def most_probable(prediction, k, vocab_size=None):
    """Of the rows of logits or a `LinearHead` (..., V), the most probable classes, in that order.

    Returns:
        {"ids": int64, "logprobs": at least float32}, each (rows, k), on the CPU.

    Raises:
        ValueError: k is more than there are classes, or a row is not finite.
    """
    ids, logprobs = [], []
    for _, logits in logit_chunks(prediction, vocab_size):
        if k > logits.shape[-1]:
            raise ValueError(f"k must be in [1, {logits.shape[-1]}], got {k}")
        top, which = logits.topk(k, -1)  # (n, k)
        # Below the largest, so that nothing is lost where all of them are large.
        peak = top[:, :1]
        total = (logits - peak).logsumexp(-1, keepdim=True)
        if not total.isfinite().all():
            raise ValueError("teacher's predictions must be finite or −inf, got NaN or +inf")
        logprobs.append((top - peak - total).clamp_(max=0).cpu())  # rounding
        ids.append(which.cpu())
    return {"ids": torch.cat(ids), "logprobs": torch.cat(logprobs)}


def _of(facts, vocab_size):
    if not isinstance(facts, Mapping):
        raise Malformed("no kind")
    name = facts["name"]
    if name == "topk":
        return parse(f"topk:{facts['k']}", vocab_size, tail=facts["tail"])
    if name == "hidden":
        _check_classes(vocab_size)
        names = "size", "head", "logit_scale", "softcap"
        size, head, scale, softcap = (facts[name] for name in names)
        if facts["dtype"] not in (*FLOATS, "fp8") or (type(size), type(head)) != (int, str):
            raise Malformed("its dtype, its size or its head")
        _check_head(size, scale, softcap)
        return HiddenKind(vocab_size, facts["dtype"], size, head, float(scale), softcap)
    return parse(f"{name}:{facts['draws' if name == 'sampled' else 'dtype']}", vocab_size)


def _check_classes(vocab_size):
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= MOST_CLASSES:
        raise ValueError(f"vocab_size must be in [1, {MOST_CLASSES}], got {vocab_size}")


def _check_head(size, scale, softcap):
    numbers = {"hidden size": size, "logit_scale": abs(scale)}
    if softcap is not None:
        numbers["softcap"] = softcap
    for name, number in numbers.items():
        if isinstance(number, bool) or not 0 < number < 2**31:
            raise ValueError(f"the head's {name} must be in (0, 2³¹), got {number}")


def _is_count(text, most):
    return text.isdecimal() and text.isascii() and 1 <= int(text) <= most and text == str(int(text))


def _width(largest):
    """Bytes that hold the numbers up to it."""
    return max(1, (largest.bit_length() + 7) // 8)


def _one_of(prediction, *kinds):
    if not isinstance(prediction, kinds):
        wanted = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"prediction must be one of {wanted}, got {type(prediction).__name__}")


def _check_logits(prediction, vocab_size):
    """Logits or a `LinearHead` of n rows: of that many classes at least."""
    is_head = isinstance(prediction, LinearHead)
    rows = prediction.hidden if is_head else prediction
    classes = len(prediction.weight) if is_head else rows.shape[-1]
    if not rows.is_floating_point() or rows.dim() != 2 or classes < vocab_size:
        raise ValueError(
            f"prediction must be floating point of n rows and {vocab_size} classes or more, got "
            f"{rows.dtype} of shape {tuple(rows.shape)} and {classes} classes"
        )


def _entries(name, ids, vocab_size):
    """(n, k), −1 pads -> int64"""
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 2:
        raise TypeError(
            f"{name} must be integers of shape (n, k), got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    ids = ids.detach().cpu().numpy().astype(np.int64)
    if ids.size and not -1 <= ids.min() <= ids.max() < vocab_size:
        raise IndexError(f"{name} must be in [-1, {vocab_size}), got {ids.min()} to {ids.max()}")
    return ids


def _sorted(kept, ids, *others):
    """(n, k) each -> row (m,), ids (m,) and others (m,) where kept, by row and id"""
    order = np.argsort(np.where(kept, ids, MOST_CLASSES), 1, kind="stable")
    kept = np.take_along_axis(kept, order, 1)
    return np.nonzero(kept)[0], *(np.take_along_axis(x, order, 1)[kept] for x in (ids, *others))


def _gaps(row, ids):
    """row, ids: (m,), sorted -> (m,): how many classes lie between an id and the one before it in
    its row; −1 for the same id again."""
    before = np.concatenate([[-1], ids[:-1]])
    starts = np.concatenate([[True], row[1:] != row[:-1]])[: len(row)]
    return ids - np.where(starts, -1, before[: len(ids)]) - 1


def _grid_of(counts):
    """counts (n,) -> a function: (Σ counts,) -> (n, largest count, at least 1), filled up."""
    shape = len(counts), max(1, int(counts.max(initial=0)))
    if (counts == shape[1]).all():
        return lambda numbers, fill: numbers.reshape(shape)
    here = np.arange(shape[1]) < counts[:, None]

    def grid(numbers, fill):
        found = np.full(shape, fill, numbers.dtype)
        found[here] = numbers
        return found

    return grid


def _ids(gaps, counts, vocab_size):
    """gaps (n, k) -> ids (n, k), int32 where that suffices.

    Raises:
        Malformed: one is outside of the vocabulary.
    """
    k = gaps.shape[1]
    # The sums are exact: bounded by the bytes of a gap, or, of 64 bits, by those and K.
    small = k << 8 * _width(vocab_size - 1) < 2**32
    ids = np.cumsum(gaps, 1, dtype=np.uint32 if small else np.uint64)
    ids += np.arange(k, dtype=ids.dtype)
    last = ids[np.arange(len(ids)), np.maximum(counts.astype(np.int64), 1) - 1]
    if (last[counts > 0] >= vocab_size).any():
        raise Malformed(f"ids must be below {vocab_size}, got {last[counts > 0].max()}")
    return ids.astype(np.int32 if vocab_size <= 2**31 else np.int64, copy=False)


def _blank(counts, ids, values):
    """Fills what is beyond the entries of a row, in place."""
    if not (counts == ids.shape[1]).all():
        beyond = np.arange(ids.shape[1]) >= counts[:, None]
        ids[beyond], values[beyond] = -1, 0


def _floats(name, dtype, times):
    bytes_each = {"fp32": 4, "fp8": 1}.get(dtype, 2)
    return (Column(name, f"<u{bytes_each}", bytes_each, times=times),)


def _bound(name, dtype):
    if dtype == "fp8":
        # The scale is 2⁻¹²⁶ at least: then of what is as small as that.
        return {name: {"relative": 2.0**-4, "of_largest_in_row": 2.0**-17, "absolute": 2.0**-136}}
    # Of what is subnormal, half of the smallest number there is.
    smallest = torch.finfo(FLOATS[dtype]).smallest_normal * ROUNDING[dtype]
    return {name: {"relative": ROUNDING[dtype], "absolute": smallest}}


def _finite(name, x, size, infinite):
    if not x.is_floating_point() or x.dim() != 2 or x.shape[1] != size:
        raise ValueError(
            f"{name} must be floating point of shape (n, {size}), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    wrong = x.isnan() | (x == math.inf) if infinite else ~x.isfinite()
    if wrong.any():
        raise ValueError(f"{name} must be finite{' or −inf' * infinite}, got {x[wrong][0]}")


def _rounded(name, x, dtype):
    """(n, size) -> the bits of its numbers in the dtype."""
    rounded = _cast(name, x, dtype).contiguous()
    bits = {4: torch.int32, 2: torch.int16}[rounded.itemsize]
    return rounded.view(bits).numpy().view(f"<u{rounded.itemsize}")


def _cast(name, x, dtype):
    x = x.detach().cpu()
    rounded = x.to(FLOATS[dtype])
    if (rounded.isinf() & ~x.isinf()).any():
        raise ValueError(f"{name} must be in the range of {dtype}, got {x.abs().max():.4g}")
    return rounded


def _as_floats(bits, dtype):
    """(n, size) -> a tensor"""
    signed = {4: np.int32, 2: np.int16}[bits.itemsize]
    return torch.from_numpy(bits.view(signed)).view(FLOATS[dtype])


_NEGATED = (-DEPTHS).astype(np.float32)
_FP8_VALUES = torch.arange(256).to(torch.uint8).view(FP8).float().numpy()
