"""The ranks that share a vocabulary: where the columns of each lie, and what they tell each other.

A call's first message carries a header: how many columns a rank has, where it takes them to begin,
and what has to be the same on all ranks. All read the same headers and come to the same conclusion:
ranks that were mistaken about each other begin again together, and an error of one is an error of
all, so that nobody waits for somebody who will not come.
"""

import functools
import weakref
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Layout(NamedTuple):
    """Where the columns of each rank begin and end."""

    starts: tuple[int, ...]  # R + 1
    classes: int  # V: columns from there on are padding

    def columns(self, rank: int) -> tuple[int, int]:
        """The rank's first column, and how many it has that are no padding."""
        first = min(self.starts[rank], self.classes)
        return first, min(self.starts[rank + 1], self.classes) - first

    def counts(self) -> list[int]:
        return [self.columns(rank)[1] for rank in range(len(self.starts) - 1)]


def layout_of(widths: Sequence[int], vocab_size: int | None) -> Layout:
    starts = [0]
    for width in widths:
        starts.append(starts[-1] + width)
    return Layout(tuple(starts), starts[-1] if vocab_size is None else vocab_size)


class LayoutChangedError(Exception):
    """What this call took the layout to be is not so: all ranks begin it again with `layout`."""

    def __init__(self, layout: Layout) -> None:
        super().__init__("the columns lie elsewhere")
        self.layout = layout


class Source(NamedTuple):
    """What has a share of the columns on each rank: logits, or the weight of a head."""

    name: str
    width: int
    sample: Tensor  # (SAMPLE_ROWS, SAMPLE_COLUMNS) float64


SAMPLE_ROWS, SAMPLE_COLUMNS = 4, 16


def sample(x: Tensor) -> Tensor:
    """Some numbers of x (…, n), from all over it: (SAMPLE_ROWS, SAMPLE_COLUMNS) float64."""
    shape = SAMPLE_ROWS, SAMPLE_COLUMNS
    if not x.numel():
        return torch.zeros(shape, dtype=torch.float64, device=x.device)
    lead, width = x.shape[:-1], x.shape[-1]
    rows = torch.arange(SAMPLE_ROWS, device=x.device)[:, None] * lead.numel() // SAMPLE_ROWS
    columns = torch.arange(SAMPLE_COLUMNS, device=x.device) * width // SAMPLE_COLUMNS
    # Without a copy of the whole, whatever its strides; torch.unravel_index would wait for a GPU.
    index = [columns]
    for size in reversed(lead):
        index.insert(0, rows % size)
        rows = rows // size
    return x.detach()[tuple(index)].double()


def waits_for(device: torch.device) -> bool:
    """Whether it costs nothing to look at what a message brought."""
    return device.type == "cpu"


@functools.lru_cache(1024)
def constants(values: Any, device: torch.device) -> Tensor:
    """Numbers as a float64 tensor on a device, which no call has to wait for a second time."""
    return torch.tensor(values, dtype=torch.float64).to(device)


def checksum(x: Tensor) -> Tensor:
    """A number () float64 that depends on every bit of x (…), and on their order."""
    bits = x.detach().flatten().double().view(torch.int64)
    places = torch.arange(x.numel(), device=x.device) * 0x9E3779B97F4A7C1 + 1
    bits = (bits ^ (bits >> 29)) * (places | 1)
    total = (bits ^ (bits >> 32)).sum()
    return (total & (2**52 - 1)).double()


class Found(NamedTuple):
    """What all ranks know since they looked at each other's headers."""

    layout: Layout
    widths: list[list[int]]  # of each source, of each rank


# Of process groups: Group.key -> Found.
FOUND: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Any, Found]]
FOUND = weakref.WeakKeyDictionary()


class Group:
    """The ranks of one call.

    handle: a `torch.distributed.ProcessGroup`. sources: [Source], as many on every rank. options
    (a string) and facts ({name: () float64}): what has to be the same on all ranks. layout: where
    that is certain.
    """

    def __init__(
        self,
        handle: dist.ProcessGroup,
        sources: list[Source],
        options: str,
        facts: dict[str, Tensor],
        vocab_size: int | None,
        layout: Layout | None = None,
    ) -> None:
        self.handle, self.sources, self.facts = handle, sources, facts
        self.options = zlib.crc32(options.encode())
        self.rank, self.size = dist.get_rank(handle), dist.get_world_size(handle)
        self.vocab_size, self.certain = vocab_size, layout is not None
        self.found = FOUND.setdefault(handle, {})
        # Of what all ranks are asked alike: then all have an answer from before, or none.
        self.key = vocab_size, tuple(source.name for source in sources)
        even = layout_of([sources[0].width] * self.size, vocab_size)
        known = self.found.get(self.key)
        self.layout = layout or (known.layout if known else even)
        self.begun = False

    @property
    def mistaken(self) -> bool:
        """Whether the layout cannot be right, by what this rank knows."""
        begin, end = self.layout.starts[self.rank : self.rank + 2]
        _, count = self.layout.columns(self.rank)
        width = self.sources[0].width
        changed = end - begin != width and max(min(begin + width, self.layout.classes) - begin, 0)
        return changed not in (False, count) or any(x.width < count for x in self.sources)

    # ---- Messages ----

    def gather(self, x: Tensor, wait: bool = True) -> Any:
        """x (n) -> (R, n), in the order of the ranks, and without `wait` what to wait for."""
        out = x.new_empty((self.size, x.numel()))
        # Its name up to torch 2.12.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(out.view(-1), x.contiguous(), group=self.handle, async_op=not wait)
        return out if wait else (out, work)

    def add_up(self, x: Tensor) -> Any:
        """Σ x over the ranks, into x once what is returned has been waited for."""
        return dist.all_reduce(x, group=self.handle, async_op=True)

    def first_message(self, x: Tensor, error: Exception | None = None) -> Tensor:
        """x (n) -> (R, n), having made sure that the ranks agree.

        error: why this rank has no x to give; it is raised, on the other ranks as a RuntimeError.

        Raises:
            LayoutChangedError: to begin again with.
            ValueError: ranks that do not agree, replicas instead of shards.
        """
        header = self._header(x.device, error is not None)
        gathered = self.gather(torch.cat([header, x]))
        headers, x = gathered.split([header.numel(), x.numel()], dim=1)
        self.begun = True
        if waits_for(x.device) or self.key not in self.found:
            self._look(headers.cpu(), error)
            return x
        if error is not None:
            raise error
        if self.mistaken:
            raise ValueError(
                "student must have as many columns on each rank of group as in the first call, got "
                f"{self.sources[0].width} on rank {self.rank}; vocab_size tells layouts apart"
            )
        return self._poisoned(headers, x)

    def agree(self, device: torch.device) -> None:
        """Sees to it that all ranks take the layout to be the same."""
        if self.certain or self.key in self.found:
            return
        try:
            self.first_message(torch.empty(0, dtype=torch.float64, device=device))
        except LayoutChangedError as changed:
            self.begin_again(changed)
        self.begun = False

    def begin_again(self, changed: LayoutChangedError) -> None:
        self.layout, self.begun = changed.layout, False

    # ---- The header ----

    def _place(self, rank: int, widths: Sequence[int], status: int = 0) -> tuple[int, ...]:
        """What a rank says of itself before its facts."""
        first, _ = self.layout.columns(rank)
        return status, self.options, first, self.layout.classes, *widths

    def _header(self, device: torch.device, failed: bool) -> Tensor:
        place = self._place(self.rank, [x.width for x in self.sources], int(failed))
        facts = [x[None] for x in self.facts.values()]
        samples = [x.sample.flatten() for x in self.sources]
        return torch.cat([constants(place, device), *facts, *samples])

    def _split(self, headers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """places (R, 4 + sources), facts (R, facts), samples (R, sources, …) of headers (R, …)."""
        places = 4 + len(self.sources)
        sizes = places, len(self.facts), len(self.sources) * SAMPLE_ROWS * SAMPLE_COLUMNS
        places, facts, samples = headers.split(sizes, dim=1)
        return places, facts, samples.view(self.size, -1, SAMPLE_ROWS, SAMPLE_COLUMNS)

    def _look(self, headers: Tensor, error: Exception | None) -> None:
        places, facts, samples = self._split(headers)
        self._check_facts(torch.cat([places[:, 1:2], facts], 1))
        widths = [[int(x) for x in column] for column in places[:, 4:].T]
        layout = self._layout_by(widths)
        self._check_replicas(samples, layout, widths)
        self.found[self.key] = Found(layout, widths)
        guessed = [[int(x) for x in row[2:4]] for row in places]
        if guessed != [[layout.columns(rank)[0], layout.classes] for rank in range(self.size)]:
            raise LayoutChangedError(layout)
        if error is not None:
            raise error
        failed = places[:, 0].nonzero().flatten().tolist()
        if failed:
            raise RuntimeError(f"rank {failed[0]} of group could not go on: its own error says why")

    def _check_facts(self, facts: Tensor) -> None:
        differs = (facts.view(torch.int64) != facts[0].view(torch.int64)).nonzero().tolist()
        if differs:
            rank, number = differs[0]
            name = ["the options of kd_loss", *self.facts][number]
            raise ValueError(
                f"{name} must be the same on every rank of group, but those of ranks 0 and {rank} "
                "differ"
            )

    def _layout_by(self, widths: list[list[int]]) -> Layout:
        """widths: of each source, of each rank."""
        layout = layout_of(widths[0], self.vocab_size)
        if not layout.starts[-1]:
            raise ValueError("logits must have at least one class on a rank of group, got none")
        if layout.classes > layout.starts[-1]:
            raise ValueError(
                f"vocab_size must be in [1, {layout.starts[-1]}], the columns of all ranks of "
                f"group, got {layout.classes}"
            )
        for source, others in zip(self.sources[1:], widths[1:], strict=True):
            other = layout_of(others, layout.classes)
            for rank in range(self.size):
                if layout.columns(rank) != other.columns(rank):
                    raise ValueError(
                        f"{source.name} must have the columns that the student has on each rank of "
                        f"group, got {others} columns on its ranks and the student's {widths[0]}"
                    )
        return layout

    def _check_replicas(self, samples: Tensor, layout: Layout, widths: list[list[int]]) -> None:
        for source, replicated in zip(self.sources, self._replicated(samples, widths), strict=True):
            if replicated:
                raise ValueError(
                    f"{source.name} is the same on every rank of group, as if it were replicated: "
                    "pass the columns that are this rank's share of the vocabulary, or, if the "
                    f"shards are meant to be equal, vocab_size={layout.starts[-1]}"
                )

    def _replicated(self, samples: Tensor, widths: list[list[int]]) -> Tensor:
        """Of samples (R, sources, …), which sources seem to be the same on all ranks: bool
        (sources). Not those of which nothing tells one column from another."""
        samples = _bits(samples)
        shared = samples[0]
        alike = (samples == shared).flatten(2).all(2).all(0)
        told = [
            # Of a weight the rows are the classes.
            (x != (x[:1] if source.name.endswith("weight") else x[:, :1])).any()
            for source, x in zip(self.sources, shared, strict=True)
        ]
        # Where no rank has as many columns as there are classes, they cannot be.
        possible = [
            not self.certain
            and len(set(x)) == 1
            and (self.vocab_size is None or self.vocab_size <= x[0])
            for x in widths
        ]
        return alike & torch.stack(told) & constants(tuple(possible), alike.device).bool()

    def _poisoned(self, headers: Tensor, x: Tensor) -> Tensor:
        """x (R, n), NaN where ranks do not agree any more, without waiting for the device."""
        places, facts, samples = self._split(headers)
        widths = self.found[self.key].widths
        expected = tuple(
            self._place(rank, of_rank) for rank, of_rank in enumerate(zip(*widths, strict=True))
        )
        agree = (places == constants(expected, x.device)).all()
        agree &= (_bits(facts) == _bits(facts[:1])).all()
        agree &= ~self._replicated(samples, widths).any()
        return torch.where(agree, x, float("nan"))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int64)
