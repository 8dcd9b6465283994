"""The suites: what is computed, on what, what is right, and who can compute it."""

from . import dense, linear, loop, sparse
from .dense import Dense
from .linear import Linear
from .loop import Loop
from .sparse import Sparse

SUITES = {suite.suite: suite for suite in (Dense, Linear, Sparse, Loop)}
# (device, threads) -> what a run without options measures.
PUBLISHED = {
    "dense": dense.published,
    "linear": linear.published,
    "sparse": sparse.published,
    "loop": loop.published,
}
