"""A call over a group: what it is given, as this rank has it, and the agreement on it."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import autograd, chunked, ops
from ..kept import Kept, keep
from ..objective import Objective
from ..sources import Dense, Ensemble, LinearHead, Prediction, Sampled, TopK, tensors_of
from . import groups, merge
from .rows import rows_of_chunk

IGNORED, ELSEWHERE, OUT_OF_RANGE = -100, -1, -2  # labels; csrc/common/args.h

COMPILED = (
    "kd_loss(group=...) cannot be compiled: leave it out by torch.compiler.disable, or call it on "
    "what the compiled model returns"
)


class Sharding(NamedTuple):
    """What the vocabulary is sharded over."""

    handle: dist.ProcessGroup
    layout: groups.Layout | None  # where it is certain
    vocab_size: int | None


def distill(
    sharding: Sharding,
    student: Dense,
    teacher: Any,
    labels: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    objective: Objective,
    want_terms: bool,
    *,
    backend: str,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The loss over a group, as `autograd.distill`; labels and ids are of the whole vocabulary.

    Raises:
        LookupError, ValueError: labels and ids, as without a group; and as
            `groups.Group.first_message`.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(COMPILED)
    if ops.transformed():
        raise NotImplementedError("kd_loss over a group has no torch.func transforms")
    if ops.recorded():
        raise NotImplementedError("kd_loss over a group cannot be in a selective checkpoint")
    if not (objective.distill_weight or want_terms):
        teacher = None  # not read
    facts = dict(labels=labels, token_weights=weights, num_items=num_items)
    options = objective, want_terms, backend
    group = _group(sharding, student, teacher, facts, *options)
    chunks = isinstance(student, LinearHead) or chunked.in_chunks(teacher)
    leading = student.hidden if isinstance(student, LinearHead) else student
    if chunks:
        group.agree(leading.device)  # the size of a message depends on the layout
    while True:
        local: Any = None
        error: Exception | None = None
        if not group.mistaken:
            try:
                local = local_arguments(group, teacher, labels, objective)
            except (LookupError, ValueError) as found:
                error = found
        try:
            if isinstance(teacher, Ensemble):  # whose members have messages of their own
                group.first_message(leading.new_empty(0, dtype=torch.float64), error)
            elif local is None:
                count = rows_of_chunk(student, teacher, group) if chunks else None
                group.first_message(_nothing(leading, teacher, count), error)
            x, columns, own = local
            inputs = student, x, columns, weights, num_items, own, want_terms
            return autograd.distill(*inputs, backend=backend, inplace=inplace, group=group)
        except groups.LayoutChangedError as changed:
            group.begin_again(changed)


def _group(
    sharding: Sharding,
    student: Dense,
    teacher: Any,
    told: dict[str, Tensor | None],
    objective: Objective,
    *options: Any,
) -> groups.Group:
    """The ranks of this call, with what they have to agree on."""
    facts = {name: groups.checksum(x) for name, x in told.items() if x is not None}
    handle, layout, vocab_size = sharding
    objective = replace(objective, vocab_size=vocab_size or 0)
    sources: list[groups.Source] = []
    agreed = [objective, *options, sorted(facts)]
    members: list[tuple[str, Any]] = [("student", student), ("teacher", teacher)]
    if isinstance(teacher, Ensemble):
        members[1:] = [(f"teacher.teachers[{k}]", x) for k, x in enumerate(teacher.teachers)]
        agreed += [teacher.shares(), teacher.mean]
    for name, x in members:
        if isinstance(x, LinearHead):
            sources.append(groups.Source(f"{name}.weight", len(x.weight), groups.sample(x.weight)))
            facts[f"{name}.hidden"] = groups.checksum(groups.sample(x.hidden))
            summed = x.hidden.requires_grad and torch.is_grad_enabled()
            agreed.append((x.hidden.dtype, x.logit_scale, x.softcap, x.chunk_rows, summed))
        elif isinstance(x, torch.Tensor):
            sources.append(groups.Source(name, x.shape[-1], groups.sample(x)))
            agreed.append(x.dtype)
        elif x is not None:
            facts |= {name + field: groups.checksum(tensor) for field, tensor in tensors_of(x)}
            agreed.append(getattr(x, "tail", None))
    return groups.Group(handle, sources, repr(agreed), facts, vocab_size, layout)


def _nothing(leading: Tensor, teacher: Any, count: int | None) -> Tensor:
    """As large as the statistics of the first rows."""
    rows = leading.shape[:-1].numel()
    if count is not None:
        rows = next(chunked.steps(leading.shape[:-1], count)).end
    fields = ops.KEPT_SHARD_FIELDS if isinstance(teacher, (TopK, Sampled)) else ops.SHARD_FIELDS
    return leading.new_zeros(len(fields) * rows, dtype=torch.float64)


# ---- A rank's share of the arguments -------------------------------------------------------------


def local_arguments(
    group: groups.Group, teacher: Any, labels: Tensor | None, objective: Objective
) -> tuple[Any, Tensor | None, Objective]:
    """teacher, labels and objective of this rank's columns."""
    layout, rank = group.layout, group.rank
    inputs = labels, objective, layout, rank
    if labels is not None and labels.device.type == "cpu":
        ops.check_labels(labels, objective.ignore_index, layout.classes)
    teacher = local_teacher(teacher, *inputs)
    labels = local_labels(*inputs)
    _, columns = layout.columns(rank)
    return teacher, labels, replace(objective, ignore_index=IGNORED, vocab_size=columns)


def local_labels(
    labels: Tensor | None, objective: Objective, layout: groups.Layout, rank: int
) -> Tensor | None:
    """labels (L) or (B, L) of the vocabulary -> columns of this rank, and the codes above."""
    if labels is None:
        return None
    first, count = layout.columns(rank)
    here = (labels >= first) & (labels < first + count)
    local = torch.where(here, labels - first, ELSEWHERE)
    local.masked_fill_((labels < 0) | (labels >= layout.classes), OUT_OF_RANGE)
    return local.masked_fill_(labels == objective.ignore_index, IGNORED)


def local_teacher(
    teacher: Any, labels: Tensor | None, objective: Objective, layout: groups.Layout, rank: int
) -> Any:
    """A teacher, what is sparse in it as the `Kept` of this rank's columns."""
    if isinstance(teacher, Ensemble):
        members = [local_teacher(x, labels, objective, layout, rank) for x in teacher.teachers]
        return Ensemble(members, teacher.weights, teacher.mean)
    if not isinstance(teacher, (TopK, Sampled)):
        return teacher
    kept = keep(teacher, labels, replace(objective, vocab_size=layout.classes))
    first, count = layout.columns(rank)
    here = (kept.ids >= first) & (kept.ids < first + count)
    ids, order = torch.where(here, kept.ids - first, count).sort(dim=-1, stable=True)
    return Kept(ids, kept.log_p.masked_fill(~here, -merge.INF).gather(-1, order), kept.log_rest)


# ---- DTensors ------------------------------------------------------------------------------------


def opened(
    student: Dense,
    teacher: Prediction,
    labels: Tensor | None,
    weights: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
) -> tuple[Sharding | None, Any, Any, Tensor | None, Tensor | None]:
    """`Sharding` or None, and the arguments as this rank has them.

    Raises:
        TypeError: a group that is no process group.
        ValueError: one that this rank is not in; DTensors that are not sharded alike.
    """
    if group is not None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed.ProcessGroup, got "
                f"{type(group).__name__}; of a DeviceMesh pass mesh.get_group()"
            )
        if dist.get_rank(group) < 0:
            raise ValueError("group must have this rank among its own, got one that has not")
    members: list[tuple[str, Any]] = [("student", student), ("teacher", teacher)]
    ensemble = teacher if isinstance(teacher, Ensemble) else None
    if ensemble is not None and not isinstance(ensemble.teachers, (list, tuple)):
        ensemble = None  # an error that is told later
    if ensemble is not None:
        members[1:] = [(f"teacher.teachers[{k}]", x) for k, x in enumerate(ensemble.teachers)]
    layout = None
    for name, x in members:
        for handle, classes in _sharded_over(name, x):
            group = handle if group is None else group
            if dist.get_process_group_ranks(handle) != dist.get_process_group_ranks(group):
                raise ValueError(f"{name} must be sharded over the ranks of group, got other ranks")
            if x is student:
                layout = _even(classes, dist.get_world_size(handle), vocab_size)
    own, *others = (_local(x, group) for _, x in members)
    whole = others[0] if ensemble is None else Ensemble(others, ensemble.weights, ensemble.mean)
    local = own, whole, _plain(labels), _plain(weights)
    if group is None or dist.get_world_size(group) == 1:
        return None, *local
    return Sharding(group, layout, vocab_size), *local


def _is_dtensor(x: Any) -> bool:
    return hasattr(x, "device_mesh")


def _plain(x: Any) -> Any:
    return x.to_local() if _is_dtensor(x) else x


def _even(classes: int, ranks: int, vocab_size: int | None) -> groups.Layout:
    """As DTensor's Shard cuts them."""
    chunk = -(-classes // ranks)
    starts = tuple(min(rank * chunk, classes) for rank in range(ranks + 1))
    return groups.Layout(starts, classes if vocab_size is None else vocab_size)


def _sharded_over(name: str, x: Any) -> list[tuple[dist.ProcessGroup, int]]:
    """[(process group, V)] of a source whose columns are sharded DTensors; [] of others.

    A weight alone does not say: FSDP2 shards those too, of hidden states that differ.
    """
    leading, of_columns, dim = x, x, -1
    if isinstance(x, LinearHead):
        leading, of_columns, dim = x.hidden, x.weight, 0
    if not (_is_dtensor(leading) and _is_dtensor(of_columns)):
        return []
    mesh, placements = of_columns.device_mesh, of_columns.placements
    sharded = [k for k, p in enumerate(placements) if p.is_shard(dim % of_columns.dim())]
    if leading is not of_columns:
        same = leading.device_mesh == mesh
        sharded = [k for k in sharded if same and leading.placements[k].is_replicate()]
    if len(sharded) > 1 or any(p.is_partial() for p in (*placements, *leading.placements)):
        raise ValueError(
            f"{name} must be sharded on the vocabulary over one dimension of its mesh, got "
            f"placements {placements}"
        )
    return [(mesh.get_group(k), of_columns.shape[dim]) for k in sharded]


def _local(x: Any, group: dist.ProcessGroup | None) -> Any:
    """A source as this rank has it."""
    if isinstance(x, LinearHead):
        if group is None:
            return replace(x, hidden=_plain(x.hidden))
        weight, bias = (_own_rows(y, group) for y in (x.weight, x.bias))
        return replace(x, hidden=_plain(x.hidden), weight=weight, bias=bias)
    if isinstance(x, TopK):
        return TopK(_plain(x.ids), _plain(x.logprobs), x.tail)
    if isinstance(x, Sampled):
        return Sampled(_plain(x.ids), _plain(x.counts))
    return _plain(x)


def _own_rows(x: Any, group: dist.ProcessGroup) -> Any:
    """A weight (V, H) or bias (V): this rank's rows, where they are sharded over the group.

    Where they are sharded over other ranks too (FSDP2), those have gradients of their own, of which
    the mean is left in the parameter, as in every other one.
    """
    if x is None or not _is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial, Replicate

    mesh, ranks = x.device_mesh, dist.get_process_group_ranks(group)
    meshes = [dist.get_process_group_ranks(mesh.get_group(k)) for k in range(mesh.ndim)]
    own = [k for k, p in enumerate(x.placements) if p.is_shard(0) and meshes[k] == ranks]
    if len(own) != 1:
        return x
    placements = [p if k in own else Replicate() for k, p in enumerate(x.placements)]
    grads = [p if k in own else Partial() for k, p in enumerate(x.placements)]
    local = x.redistribute(placements=placements).to_local(grad_placements=grads)
    if local.requires_grad:
        others = mesh.size() // dist.get_world_size(group)
        local.register_hook(lambda grad: grad / others)
    return local
