"""`TeacherColumns`: what a teacher predicted, in columns of the data set beside the tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import torch


class TeacherColumns:
    """A teacher that is in the data: columns with what it predicted for each token.

    Args:
        source: what makes the prediction of the columns: `TopK`, `Sampled`, or any callable that
            takes tensors by name and returns what `kd_loss` takes for a teacher.
        columns: name in `source` = name of the column. An example has a list or tensor (n, ·) in
            each, a row for each of its n tokens: what the teacher predicts after it.

    Examples shorter than their batch are filled up, where the attention mask is 0, with ids of −1,
    which no loss counts, and zeros.

    Raises:
        TypeError: arguments other than listed.

    Example:
        teacher = TeacherColumns(TopK, ids="teacher_ids", logprobs="teacher_logprobs")
    """

    def __init__(self, source: Callable[..., Any], **columns: str) -> None:
        if not callable(source):
            raise TypeError(f"source must be callable, TopK say, got {type(source).__name__}")
        if not columns or not all(isinstance(name, str) for name in columns.values()):
            raise TypeError(f"columns must be names, one at least, got {columns}")
        self.source, self.columns = source, columns

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """A batch of the collator -> what `kd_loss` takes for a teacher.

        Raises:
            ValueError: a column is missing.
        """
        found = {}
        for name, column in self.columns.items():
            if column not in inputs:
                raise ValueError(
                    f"the batch must have the teacher's column {column!r}, it has {sorted(inputs)}"
                )
            found[name] = inputs[column]
        return self.source(**found)


class Collator:
    """The Trainer's collator for everything else, and beside it the teacher's columns, padded.

    Args:
        collate: examples in a list -> a batch of them.
        columns: {name in the source: name of the column}.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], columns: Mapping[str, str]) -> None:
        self.collate, self.columns = collate, columns
        self.tokenizer = getattr(collate, "tokenizer", None)  # which the Trainer saves

    def __call__(self, examples: list[Mapping[str, Any]]) -> Any:
        apart = set(self.columns.values())
        batch = self.collate([{k: x for k, x in e.items() if k not in apart} for e in examples])
        shape = batch["input_ids"].shape  # (B, L), or (1, Σ n) of a collator that pads nothing
        mask = batch.get("attention_mask")
        counts = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
        for name, column in self.columns.items():
            if not all(column in example for example in examples):
                continue  # which `TeacherColumns` reports, if it is needed
            rows = [torch.as_tensor(example[column]) for example in examples]
            batch[column] = _filled(column, rows, counts, -1 if name == "ids" else 0)
        return batch


def _filled(column: str, rows: list[torch.Tensor], counts: torch.Tensor, fill: int) -> torch.Tensor:
    """rows: (n, ·) each; counts: (B, L) bool, where tokens are -> (B, L, widest)"""
    widest = max(x.shape[-1] for x in rows)
    all_rows = torch.cat(
        [torch.nn.functional.pad(x, (0, widest - x.shape[-1]), value=fill) for x in rows]
    )
    if len(counts) == len(rows):
        given, wanted = [len(x) for x in rows], counts.sum(1).tolist()
    else:
        given, wanted = [len(all_rows)], [int(counts.sum())]
    if given != wanted:
        raise ValueError(
            f"column {column!r} must have a row for each token, {wanted} in this batch, got {given}"
        )
    found = all_rows.new_full((*counts.shape, widest), fill)
    found[counts] = all_rows
    return found
