"""The programs that share a row: each has its part of the columns, and they meet in memory.

Then R is 1. All of them run at the same time (the launch is cooperative), so that they can wait for
each other.
Sums are taken over all parts in the same order by everyone: no atomic is a float.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import TwoFloats, row_max, row_sum, row_sum_pairs

FIELDS = tl.constexpr(8)  # floats that a program can publish at a time


class Team(NamedTuple):
    board: tl.tensor  # float32 (2, PROGRAMS, FIELDS): what was published, by meetings in turn
    arrivals: tl.tensor  # int32 (): 0 at the launch
    rank: tl.tensor
    meetings: tl.tensor  # held so far


@triton.jit
def publish(team, field: tl.constexpr, value, kind):
    """A number, for everyone to collect after the next `meet`."""
    turn = (team.meetings % 2) * kind.PROGRAMS + team.rank
    tl.store(team.board + turn * FIELDS + field, value)


@triton.jit
def publish_pair(team, field: tl.constexpr, value, kind):
    publish(team, field, value.hi, kind)
    publish(team, field + 1, value.lo, kind)


@triton.jit
def meet(team, kind):
    """-> the team after it, and (1, PROGRAMS, FIELDS): what everyone published before."""
    tl.debug_barrier()
    tl.atomic_add(team.arrivals, 1, sem="acq_rel", scope="gpu")
    meetings = team.meetings + 1
    while tl.atomic_add(team.arrivals, 0, sem="acq_rel", scope="gpu") < meetings * kind.PROGRAMS:
        pass
    tl.debug_barrier()
    turn = (team.meetings % 2) * kind.PROGRAMS + tl.arange(0, kind.PROGRAMS)[None, :, None]
    field = tl.arange(0, FIELDS)[None, None, :]
    # Past the first-level cache, which knows nothing of what others write.
    board = tl.load(team.board + turn * FIELDS + field, cache_modifier=".cg")
    return Team(team.board, team.arrivals, team.rank, meetings), board


@triton.jit
def field_of(board, field: tl.constexpr):
    """(1, PROGRAMS, 1): what everyone published there, as lanes of the row."""
    here = tl.arange(0, FIELDS)[None, None, :] == field
    return tl.sum(tl.where(here, board, 0.0), 2, keep_dims=True)


@triton.jit
def pair_of(board, field: tl.constexpr, kind):
    parts = TwoFloats(field_of(board, field), field_of(board, field + 1))
    return row_sum_pairs(parts, kind.PROGRAMS, 1)


@triton.jit
def team_sum(value, team, kind):
    if kind.PROGRAMS > 1:
        publish(team, 0, value, kind)
        team, board = meet(team, kind)
        value = row_sum(field_of(board, 0), 1)
    return value, team


@triton.jit
def team_max(value, team, kind):
    if kind.PROGRAMS > 1:
        publish(team, 0, value, kind)
        team, board = meet(team, kind)
        value = row_max(field_of(board, 0), 1)
    return value, team


@triton.jit
def team_sums(a, b, c, d, team, kind):
    """Two numbers and two pairs, in one meeting."""
    if kind.PROGRAMS > 1:
        publish(team, 0, a, kind)
        publish(team, 1, b, kind)
        publish_pair(team, 2, c, kind)
        publish_pair(team, 4, d, kind)
        team, board = meet(team, kind)
        a = row_sum(field_of(board, 0), 1)
        b = row_sum(field_of(board, 1), 1)
        c = pair_of(board, 2, kind)
        d = pair_of(board, 4, kind)
    return a, b, c, d, team
