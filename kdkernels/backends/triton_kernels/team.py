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
def meet(team, kind):
    tl.debug_barrier()
    tl.atomic_add(team.arrivals, 1, sem="acq_rel", scope="gpu")
    meetings = team.meetings + 1
    while tl.atomic_add(team.arrivals, 0, sem="acq_rel", scope="gpu") < meetings * kind.PROGRAMS:
        pass
    tl.debug_barrier()
    return Team(team.board, team.arrivals, team.rank, meetings)


@triton.jit
def collect(team, field: tl.constexpr, kind):
    """(1, PROGRAMS, 1): what everyone published before the last `meet`, as lanes of the row."""
    turn = ((team.meetings + 1) % 2) * kind.PROGRAMS + tl.arange(0, kind.PROGRAMS)
    # Past the first-level cache, which knows nothing of what others write.
    return tl.load(team.board + turn * FIELDS + field, cache_modifier=".cg")[None, :, None]


@triton.jit
def team_sum(value, team, kind):
    if kind.PROGRAMS > 1:
        publish(team, 0, value, kind)
        team = meet(team, kind)
        value = row_sum(collect(team, 0, kind), 1)
    return value, team


@triton.jit
def team_max(value, team, kind):
    if kind.PROGRAMS > 1:
        publish(team, 0, value, kind)
        team = meet(team, kind)
        value = row_max(collect(team, 0, kind), 1)
    return value, team


@triton.jit
def team_sum_pairs(value, team, kind):
    if kind.PROGRAMS > 1:
        publish(team, 0, value.hi, kind)
        publish(team, 1, value.lo, kind)
        team = meet(team, kind)
        parts = TwoFloats(collect(team, 0, kind), collect(team, 1, kind))
        value = row_sum_pairs(parts, kind.PROGRAMS, 1)
    return value, team
