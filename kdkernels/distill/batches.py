"""Examples in batches, in an order that depends on a seed and on the step alone.

So that a run that is resumed at a step sees what it would have seen: nothing has to be remembered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate


def of(inputs: Inputs, labels: Tensor | None, workers: int) -> InMemory | Streamed:
    """Tensors in memory, or a `Dataset`."""
    if isinstance(inputs, torch.Tensor):
        return InMemory(inputs, labels)
    return inputs if isinstance(inputs, Streamed) else Streamed(inputs, workers)


class Batch(NamedTuple):
    """Examples of a step, or a part of them."""

    rows: Tensor  # (B,) int64, on the CPU: which examples of the data set
    inputs: Any  # (B, ...), or a dict of such tensors: what the models are called with
    labels: Tensor | None  # (B, ...)

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, parts: int) -> list[Batch]:
        """Up to `parts` batches of as equal a length as can be; none is empty."""
        if parts == 1:
            return [self]
        sizes = [len(rows) for rows in self.rows.tensor_split(parts) if len(rows)]
        pieces = zip(*(_split(x, sizes) for x in self), strict=True)
        return [Batch(*piece) for piece in pieces]

    def to(self, device: torch.device | str) -> Batch:
        def move(x: Any) -> Any:  # what is no tensor, a longest length say, goes along
            return x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x

        return Batch(self.rows, *(_map(x, move) for x in self[1:]))


def steps_per_epoch(count: int, batch_size: int, least: int = 1) -> int:
    """Batches of an epoch; one of fewer than `least` rows at its end is left out."""
    return count // batch_size + (count % batch_size >= least)


def rows_from(
    step: int, count: int, batch_size: int, seed: int, processes: int = 1, process: int = 0
) -> Iterator[Tensor]:
    """Rows (B,) of step after step, from one on: every epoch has every row once, in a new order.

    The last batch of an epoch may be smaller. Each of several processes gets its part of a batch;
    one that does not suffice for all is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = steps_per_epoch(count, batch_size, processes)
    for epoch in itertools.count():
        order = torch.randperm(count, generator=generator)
        if epoch >= step // steps:
            for rows in order.split(batch_size)[max(step - epoch * steps, 0) : steps]:
                yield rows.tensor_split(processes)[process]


def least_rows(step: int, count: int, batch_size: int, processes: int = 1) -> int:
    """How many rows of a step's batch each of several processes has, or one more."""
    place = step % steps_per_epoch(count, batch_size, processes)
    return min(batch_size, count - place * batch_size) // processes


class InMemory:
    """Tensors: inputs (N, ...) and labels (N, ...) or None."""

    def __init__(self, inputs: Tensor, labels: Tensor | None) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, all_rows: Iterator[Tensor]) -> Iterator[Batch]:
        """all_rows: an iterator of (B,) -> an iterator of `Batch`."""
        for rows in all_rows:
            here = rows.to(self.inputs.device)
            yield Batch(rows, self.inputs[here], None if self.labels is None else self.labels[here])


class Streamed:
    """A map-style `Dataset`, whose examples are read as they are needed, by worker processes.

    What an example is must depend on its number alone for a run to be repeatable: one that draws
    random crops takes their seed from it.

    Args:
        dataset: an example is (input, label), or an input alone; or a dict of a model's keyword
            arguments, whose "labels" are the labels.
        workers: processes that read ahead; 0 reads in this one.
        collate: examples in a list -> a batch of them; default: PyTorch's, which stacks.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        workers: int = 0,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.dataset, self.workers, self.collate = dataset, workers, collate

    def __len__(self) -> int:
        dataset: Any = self.dataset  # which has a length, being map-style
        return len(dataset)

    def batches(self, all_rows: Iterator[Tensor]) -> Iterator[Batch]:
        """all_rows: an iterator of (B,) -> an iterator of `Batch`."""
        loader = DataLoader(
            _Numbered(self.dataset),
            batch_sampler=(rows.tolist() for rows in all_rows),
            num_workers=self.workers,
            collate_fn=self._collate,
            generator=torch.Generator(),  # or it would draw from the one that dropout draws from
        )
        yield from loader

    def _collate(self, numbered: Any) -> Batch:
        rows, examples = zip(*numbered, strict=True)
        batch, labels = self.collate(list(examples)), None
        if isinstance(batch, Mapping):
            batch = dict(batch)
            labels = batch.pop("labels", None)
        elif isinstance(batch, (tuple, list)):
            if len(batch) != 2:
                raise ValueError(
                    f"an example must be (input, label), an input or a dict, got {len(batch)} parts"
                )
            batch, labels = batch
        return Batch(torch.tensor(rows), batch, labels)


Inputs: TypeAlias = Tensor | Dataset[Any] | Streamed  # as `of` takes them


class _Numbered(Dataset[Any]):
    """Examples together with their numbers, for reports."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, row: int) -> tuple[int, Any]:
        return row, self.dataset[row]


def _split(x: Any, sizes: list[int]) -> list[Any]:
    if isinstance(x, Mapping):
        split = {key: each.split(sizes) for key, each in x.items()}
        return [{key: each[k] for key, each in split.items()} for k in range(len(sizes))]
    return [None] * len(sizes) if x is None else x.split(sizes)


def _map(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Mapping):
        return {key: function(each) for key, each in x.items()}
    return None if x is None else function(x)
