"""What is read is what was written, within the bound that the cache declares, whatever it was."""

import itertools
import math
from collections import Counter

import forge
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kdkernels import LinearHead, Sampled, TopK, cache

zstandard = pytest.importorskip("zstandard")

DEEPEST = 2044.0  # nats below the largest: docs/cache.md
CLASSES = st.one_of(
    st.sampled_from([1, 2, 3, 255, 256, 257, 2**16, 2**16 + 1, 2**24, 2**24 + 1]),
    st.sampled_from([2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32]),
    st.integers(1, 2**32),
)
LOGPROB = st.one_of(
    st.floats(-30, 0),
    st.floats(-3, 0),
    st.sampled_from([0.0, -0.0, -1e-8, -100.0, -700.0, -2043.0, -2045.0, -1e4, -math.inf]),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def checked(examples):
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, print_blob=False
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("round")
    return (parent / str(k) for k in itertools.count())


def written(folder, kind, classes, prediction, head=None):
    """-> the cache, of one sample, and its ids"""
    n = len(getattr(prediction, "ids", prediction))
    ids = torch.arange(n) * 2**31 // max(n - 1, 1)
    with cache.Writer(folder, kind, vocab_size=classes, teacher="t", head=head) as writer:
        writer.add(ids, prediction)
    assert cache.verify(folder) == []
    return cache.open(folder), ids


def last_column(folder, count):
    """The last of a block's sections -> float32, read without the core."""
    (block,) = forge.read_shard(folder / "shard-00000.kdc").blocks
    inflate = zstandard.ZstdDecompressor().decompress
    flag, content = forge.unpacked(block.content, count)[-1]
    return np.frombuffer(inflate(content) if flag else content or bytes(4 * block.rows), "<f4")


@st.composite
def rows_of_top(draw):
    """(classes, k, rows): a row is [(class or -1, log-probability)], in any order, summing to at
    most 1."""
    classes = draw(CLASSES)
    k = draw(st.integers(1, min(classes, 12)))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(0, k))
        ends = st.one_of(st.integers(0, classes - 1), st.sampled_from([0, classes - 1]))
        ids = draw(st.lists(ends, min_size=count, max_size=count, unique=True))
        logprobs = draw(st.lists(LOGPROB, min_size=count, max_size=count))
        mass = math.fsum(map(math.exp, logprobs))
        if mass > 1:
            logprobs = [x - math.log(mass) for x in logprobs]
        rows.append(draw(st.permutations([*zip(ids, logprobs, strict=True), *[(-1, 0.5)] * 2])))
    return classes, k, rows


def grid(rows):
    width = max(map(len, rows))
    filled = [[*row, *[(-1, math.nan)] * (width - len(row))] for row in rows]
    ids = torch.tensor([[x for x, _ in row] for row in filled])
    return ids, torch.tensor([[y for _, y in row] for row in filled], dtype=torch.float64)


@checked(120)
@given(top=rows_of_top())
@example(top=(5, 2, [[(-1, 0.0)], [(0, -math.inf), (3, -math.inf)]]))
@example(top=(5, 2, [[(4, -1e4)], [(0, -1e4), (3, -1e4 - 2000)]]))
def test_top_k(folders, top):
    classes, k, rows = top
    folder = next(folders)
    teacher, ids = written(folder, f"topk:{k}", classes, TopK(*grid(rows)))
    bound = teacher.description["kind"]["bound"]["logprobs"]
    found = teacher[ids]
    tail = last_column(folder, teacher.codec.columns[2].width + 10)
    for row, got, logprobs, rest in zip(rows, found.ids, found.logprobs, tail, strict=True):
        wanted = {c: x for c, x in row if c >= 0 and x > -math.inf}
        largest = max(wanted.values(), default=0)
        wanted = {c: x for c, x in wanted.items() if largest - x <= DEEPEST}
        kept = [c for c in got.tolist() if c >= 0]
        assert kept == sorted(wanted)
        depth = largest - min(wanted.values(), default=0)
        limit = max(bound["absolute"], bound["of_depth"] * depth)
        for c, x in zip(kept, logprobs.tolist(), strict=False):
            # A number of float32 that is as large is not known any better.
            assert abs(x - wanted[c]) <= limit + 2.0**-23 * abs(wanted[c]), (c, x, wanted[c])
        assert abs(logprobs[: len(kept)].double().exp().sum() + math.exp(rest) - 1) <= 1e-6


@checked(25)
@given(top=rows_of_top(), at=st.integers(0, 4))
def test_a_class_twice_in_a_row_is_refused(folders, top, at):
    classes, k, rows = top
    rows = [list(row) for row in rows]
    twice = [(c, x) for c, x in rows[at % len(rows)] if c >= 0 and x > -600]
    assume(twice and k >= 2 and len(rows[at % len(rows)]) < k + 2)
    rows[at % len(rows)] = [(-1, 0.0), (twice[0][0], -9.0), (twice[0][0], -9.0)]
    with pytest.raises(ValueError, match="ids must be different in a row"):
        written(next(folders), f"topk:{k}", classes, TopK(*grid(rows)))


@pytest.mark.parametrize(("k", "rows"), [(2000, 3), (65_535, 2)])
def test_a_row_of_many_classes_among_rows_of_few(folders, k, rows):
    """The sums of their probabilities are checked, whatever is filled up beside them."""
    ids = torch.full((rows, k), -1)
    ids[0], ids[1:, 0] = torch.arange(k), 7
    logprobs = torch.full((rows, k), -math.log(k))
    logprobs[1:] = math.log(0.3)
    teacher, tokens = written(next(folders), f"topk:{k}", 65_536, TopK(ids, logprobs))
    found = teacher[tokens]
    assert torch.equal(found.ids.long(), ids)
    kept = ids >= 0
    assert ((found.logprobs - logprobs)[kept].abs() <= 2.0**-6 * (1 + 2.0**-8)).all()


@checked(80)
@given(
    classes=CLASSES,
    draws=st.one_of(st.integers(1, 60), st.sampled_from([255, 256, 257, 65_535])),
    data=st.data(),
)
def test_draws(folders, classes, draws, data):
    """Exactly; where a class comes twice its counts add up, where a count is 0 it is not there."""
    rows = []
    for _ in range(data.draw(st.integers(1, 5))):
        cuts = sorted(data.draw(st.lists(st.integers(0, draws), max_size=8)))
        counts = np.diff([0, *cuts, draws]).tolist()
        ids = st.one_of(st.integers(0, classes - 1), st.sampled_from([0, classes - 1]))
        drawn = data.draw(st.lists(ids, min_size=len(counts), max_size=len(counts)))
        row = [] if data.draw(st.booleans()) and len(rows) else zip(drawn, counts, strict=True)
        rows.append([*row, (-1, 3)])
    ids, counts = grid(rows)
    counts = counts.nan_to_num(9).to(data.draw(st.sampled_from([torch.int64, torch.float32])))
    teacher, tokens = written(next(folders), f"sampled:{draws}", classes, Sampled(ids, counts))
    found = teacher[tokens]
    for row, got, times in zip(rows, found.ids, found.counts, strict=True):
        wanted = Counter()
        for c, count in row:
            wanted[c] += count if c >= 0 else 0
        kept = got[got >= 0].tolist()
        assert kept == sorted(+wanted)
        assert dict(zip(kept, times.tolist(), strict=False)) == +wanted


@st.composite
def numbers(draw, dtype, infinite):
    """(n, size) of a range that the dtype has, large and subnormal ones too."""
    n, size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    largest = 60_000.0 if dtype == "fp16" else 2.0**127
    some = [0.0, -0.0, 1e-40, -1e-7, 2.0**-24, largest, -largest, 1.0 + 2.0**-8, 448.0]
    value = st.one_of(
        st.floats(-largest, largest, width=32),
        st.floats(-10, 10, width=32),
        st.sampled_from(some + [-math.inf] * infinite),
    )
    rows = draw(st.lists(value, min_size=n * size, max_size=n * size))
    return torch.tensor(rows, dtype=torch.float64).float().view(n, size)


def assert_bounded(found, wanted, bound):
    finite = wanted.isfinite()
    assert torch.equal(found[~finite].double(), wanted[~finite].double())
    largest = wanted.where(finite, 0).abs().amax(-1, keepdim=True).double()
    limit = bound["relative"] * wanted.double().abs() + bound.get("absolute", 0)
    limit = limit + bound.get("of_largest_in_row", 0) * largest
    error = (found.double() - wanted.double()).abs()
    assert (error <= limit)[finite].all(), (found, wanted)


@pytest.mark.parametrize("given_as", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [*DTYPES, "fp8"])
def test_hidden_states(folders, dtype, given_as):
    @checked(15)
    @given(hidden=numbers("fp16" if given_as == "fp16" else dtype, False))
    def check(hidden):
        hidden = hidden.to(DTYPES[given_as])
        assume(hidden.float().isfinite().all())
        head = LinearHead(torch.zeros(0, hidden.shape[1]), torch.ones(3, hidden.shape[1]))
        teacher, ids = written(next(folders), f"hidden:{dtype}", 3, hidden, head)
        found = teacher[ids]
        assert torch.equal(found.weight, head.weight) and found.bias is None
        assert_bounded(found.hidden, hidden, teacher.description["kind"]["bound"]["hidden"])

    check()


@pytest.mark.parametrize("given_as", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(folders, dtype, given_as):
    @checked(15)
    @given(logits=numbers("fp16" if given_as == "fp16" else dtype, True))
    def check(logits):
        logits = logits.to(DTYPES[given_as])
        assume(not (logits == math.inf).any() and not (logits == -math.inf).all(-1).any())
        assume(torch.equal(logits.isinf(), logits.to(DTYPES[dtype]).isinf()))
        teacher, ids = written(next(folders), f"dense:{dtype}", logits.shape[1], logits)
        assert teacher[ids].dtype == DTYPES[dtype]
        assert_bounded(teacher[ids], logits, teacher.description["kind"]["bound"]["logits"])

    check()
