"""What a rank communicates, keeps and reads, as formulas.

Student and teacher logits (N, V) are sharded over the vocabulary on R ranks, e bytes a number, and
every rank is to have the loss and its own columns of the gradient. Bytes received are those from
other ranks, with collectives that move the least: an all-gather of b bytes a rank (R − 1) b, an
all-to-all of b bytes (R − 1)/R b, an all-reduce of b bytes 2 (R − 1)/R b. As many are sent.

    statistics   of the columns at hand, 9 float64 a row, all-gathered: `kd_loss(group=...)`
    reductions   all-reduces of maxima, and then of sums
    transposed   all-to-all: N/R whole rows on each rank, and their gradient back
    gathered     all logits on every rank
    heads        statistics of logits that never exist in full: hidden states and weights of H
"""

import math
from dataclasses import dataclass

FLOAT64, FLOAT32, INT64 = 8, 4, 8
FIELDS = 9  # of a row's statistics
SECOND = 3  # of the second pass: what a divergence that needs both normalisers first sums up
# Float64 of a rank, once a call: what all ranks must agree on, and samples that tell shards from
# replicas.
HEADER = 135
HEADER_OF_HEADS = HEADER + 2
# Float64 of a row at once, while all ranks' statistics become those of whole rows: so many for each
# rank besides its statistics, of a block of rows at a time, and so many in all.
MERGING, MERGED = 13, 13
BLOCK = 2**18  # rows of all ranks: kdkernels/parallel/merge.py
ONE_PASS, TWO_PASSES = "statistics", "statistics, JSD"
REDUCTIONS, TRANSPOSED, GATHERED = "reductions", "transposed", "gathered"
HEADS = "heads"
WAYS = ONE_PASS, TWO_PASSES, REDUCTIONS, TRANSPOSED, GATHERED
CHUNK_BYTES, CHUNK, LEAST = 2**27, 128, 512  # kdkernels/chunked.py: on a GPU


@dataclass(frozen=True)
class Sizes:
    """N, V, R and e; V and, for whole rows, N are multiples of R."""

    rows: int
    vocab: int
    ranks: int
    itemsize: int

    @property
    def whole(self):
        """Bytes of all logits of a model."""
        return self.rows * self.vocab * self.itemsize

    @property
    def shard(self):
        return self.whole // self.ranks

    @property
    def others(self):
        """The share of a matrix that other ranks have."""
        return (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Cost:
    """Of a rank.

    Attributes:
        collectives: one after the other.
        received: bytes from other ranks.
        peak: bytes at once beyond the two shards, the gradient's shard among them.
        moved: bytes of logits that are read and written in its memory.
    """

    collectives: int
    received: float
    peak: int
    moved: int


def cost(way, sizes):
    """One of `WAYS`, for a loss with its gradient.

    On one rank all of them are the single device's: nothing is communicated, and its three accesses
    are all.
    """
    if sizes.ranks == 1:
        return Cost(0, 0, sizes.shard, 3 * sizes.shard)
    formulas = {
        ONE_PASS: statistics,
        TWO_PASSES: lambda x: statistics(x, SECOND),
        REDUCTIONS: reductions,
        TRANSPOSED: transposed,
        GATHERED: gathered,
    }
    return formulas[way](sizes)


def statistics(x, second=0):
    """Both shards are read, again where there is a second pass, and again for the gradient."""
    given = FLOAT64 * (x.rows * (FIELDS + second) + HEADER)
    return Cost(
        collectives=1 + bool(second),
        received=(x.ranks - 1) * given,
        peak=x.shard + merging(x, x.rows) + FLOAT64 * HEADER * x.ranks,
        moved=(7 if second else 5) * x.shard,
    )


def merging(x, rows):
    """Bytes of all ranks' statistics of so many rows, and of what is made of them."""
    block = min(rows, BLOCK // x.ranks)
    merged = MERGED * (1 if block == rows else 2)  # put together from blocks
    return FLOAT64 * (rows * (x.ranks * FIELDS + merged) + block * x.ranks * MERGING)


def heads(x, hidden, chunk):
    """Logits in chunks of rows, two at a time of student and teacher, one on a single rank; the
    gradient of the student's hidden states (N, H) is added up over the ranks, a chunk at a time,
    that of its weight (V/R, H) stays; both are float32 until they are done."""
    chunk = min(chunk, x.rows)
    width = x.vocab // x.ranks
    logits = 2 * x.itemsize * chunk * width
    gradients = FLOAT32 * hidden * (x.rows + width)
    if x.ranks == 1:
        return Cost(0, 0, logits + gradients, 5 * x.shard)
    statistics = FLOAT64 * (x.rows * FIELDS + HEADER_OF_HEADS)
    return Cost(
        collectives=2 * -(-x.rows // chunk),
        received=(x.ranks - 1) * statistics + 2 * x.others * FLOAT32 * x.rows * hidden,
        peak=2 * logits + gradients + merging(x, chunk),
        moved=7 * x.shard,
    )


def rows_of_chunk(x):
    """As many as `kd_loss` takes at a time over a group, on a GPU, of heads of both."""
    row = 2 * x.itemsize * x.vocab // x.ranks
    return max(CHUNK_BYTES // (CHUNK * row) * CHUNK, LEAST)


def reductions(x):
    """Two maxima of a row, then four sums: of student, teacher and the divergence, and the label's
    logit. In PyTorch three matrices of float32 are there at once; fused, none would have to be."""
    floats = FLOAT32 * x.rows
    return Cost(
        collectives=2,
        received=2 * x.others * (2 + 4) * floats,
        peak=3 * FLOAT32 * x.rows * x.vocab // x.ranks,
        moved=7 * x.shard,
    )


def transposed(x):
    """Two matrices come as blocks of columns and are put in order, a third goes back: received,
    ordered, read and written by the loss, ordered, sent."""
    return Cost(
        collectives=4,
        received=3 * x.others * x.shard + 2 * x.others * FLOAT32,
        peak=3 * x.shard,
        moved=(2 * 2 + 2 * 2 + 3 + 2 + 2) * x.shard,
    )


def gathered(x):
    """Two matrices come as blocks of columns and are put in order: received, ordered, read and
    written by the loss."""
    return Cost(
        collectives=2,
        received=2 * (x.ranks - 1) * x.shard,
        peak=3 * x.whole,
        moved=(2 + 2 * 2 + 3) * x.whole,
    )


# Where one way becomes the better one


def least_columns(itemsize):
    """V/R from which on statistics are fewer bytes than gathering: 72 (R − 1) = 2 e (R − 1) V/R."""
    return FLOAT64 * FIELDS / (2 * itemsize)


def most_ranks(vocab, itemsize):
    """R up to which statistics are fewer bytes than whole rows: 72 (R − 1) = 3 e V (R − 1)/R²."""
    return math.sqrt(3 * itemsize * vocab / (FLOAT64 * FIELDS))


def ranks_of_equal_time(vocab, itemsize, link, memory):
    """R at which receiving statistics takes as long as reading and writing the shards:
    72 (R − 1)/link = 5 e V/R/memory.

    link, memory: bytes a second.
    """
    product = 5 * itemsize * vocab * link / (FLOAT64 * FIELDS * memory)
    return (1 + math.sqrt(1 + 4 * product)) / 2
