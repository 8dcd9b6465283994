"""The row operators in Triton. Needs `triton`: imported by `backends/triton.py` when first used.

The same mathematics as csrc/common, in the same words, on tiles of rows x chunks x 8 columns.
"""

from .distill import distill_rows
from .kept import distill_kept_rows
from .kept_shards import shard_kept_rows
from .reduce import finish, prepare, scale_rows
from .shards import shard_rows
from .team import FIELDS

__all__ = [
    "FIELDS",
    "distill_kept_rows",
    "distill_rows",
    "finish",
    "prepare",
    "scale_rows",
    "shard_kept_rows",
    "shard_rows",
]
