"""Where training runs: on one device in one process, or what `accelerate` makes of a job."""

import contextlib
import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..sources import LinearHead


class OneProcess:
    """What the loop asks of an `accelerate.Accelerator`, under its names, for a student that stays
    where it is and trains in its own dtype."""

    num_processes, process_index, is_main_process, scaler = 1, 0, True, None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, *things: Any) -> tuple[Any, ...]:
        return things

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool = True) -> nn.Module:
        return model

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor

    def wait_for_everyone(self) -> None:
        pass


def of(accelerator: Any, student: nn.Module) -> Any:
    """The accelerator, or one process where the student is.

    Raises:
        ValueError: an accelerator that divides the loss, or has several processes for an example.
    """
    parts = getattr(accelerator, "gradient_accumulation_steps", 1)
    if parts != 1:  # its backward divides every loss by them
        raise ValueError(
            f"accelerator must have gradient_accumulation_steps=1, got {parts}: "
            "`accumulate` is what takes a batch in parts"
        )
    config = getattr(accelerator, "parallelism_config", None)
    if config is not None and (ranks := config.non_data_parallel_size) != 1:
        raise ValueError(
            f"accelerator must give each process examples of its own, got {ranks} processes for "
            "the same ones in its parallelism_config"
        )
    device = next(student.parameters(), torch.empty(())).device
    found = OneProcess(device) if accelerator is None else accelerator
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > found.num_processes:
        warnings.warn(
            f"{started} processes were started, the Distiller knows of {found.num_processes}: the "
            "others train by themselves, unless its accelerator is one of all",
            stacklevel=3,
        )
    return found


def prepare(engine: Any, student: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """The student and its optimiser, as the engine trains them: FSDP2 shards the student, while
    other parameters of the optimiser, of hints, stay whole in every process."""
    if not getattr(engine, "is_fsdp2", False):
        student, optimizer = engine.prepare(student, optimizer)
        return student, optimizer
    mine = {id(x) for x in student.parameters()}
    before = [group["params"] for group in optimizer.param_groups]
    for group, parameters in zip(optimizer.param_groups, before, strict=True):
        group["params"] = [x for x in parameters if id(x) in mine]  # accelerate knows no others
    student, optimizer = engine.prepare(student, optimizer)
    for group, parameters in zip(optimizer.param_groups, before, strict=True):
        sharded = iter(group["params"])
        group["params"] = [next(sharded) if id(x) in mine else x for x in parameters]
    show_hidden(student)
    return student, optimizer


def show_hidden(module: nn.Module) -> None:
    """Of a `LinearHead` that a module returns, FSDP2 gets to see the hidden states only.

    It ties what it does before the backward to the tensors that a module returns: it may not find
    them in a source, and to a weight, which stays, it would tie itself anew with every step.
    """
    kept: list[LinearHead] = []

    def apart(module: nn.Module, inputs: Any, output: Any) -> Any:
        kept[:] = [output] if isinstance(output, LinearHead) else []
        return output.hidden if kept else output

    def together(module: nn.Module, inputs: Any, output: Any) -> Any:
        return replace(kept.pop(), hidden=output) if kept else output

    module.register_forward_hook(apart, prepend=True)
    module.register_forward_hook(together)


def is_sharded(x: Any) -> bool:
    """Whether it is a DTensor, as FSDP2 makes of parameters."""
    return hasattr(x, "full_tensor")


def whole(x: Any) -> Any:
    """A tensor, gathered where it is sharded, which takes all processes."""
    return x.full_tensor() if is_sharded(x) else x


def whole_state(engine: Any, state: Any) -> Any:
    """What a `state_dict` returned, with whole tensors: on the CPU of the main process, where they
    were sharded, and None in the others."""
    if isinstance(state, dict):
        return {name: whole_state(engine, x) for name, x in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_state(engine, x) for x in state)
    if not is_sharded(state):
        return state
    state = whole(state)
    return state.cpu() if engine.is_main_process else None


def load(model: nn.Module, state: dict[str, Any]) -> None:
    """Whole tensors into a model, sharded or not.

    Raises:
        RuntimeError: of another model.
    """
    here = model.state_dict()
    model.load_state_dict({name: _like(x, here.get(name)) for name, x in state.items()})


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Whole tensors into an optimiser, of parameters that are sharded or not."""
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    of_parameters = {
        index: {name: _like(x, parameters[index]) for name, x in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_parameters})


def _like(x: Any, other: Any) -> Any:
    """This process's part of a tensor, where the other, of the same shape, is sharded."""
    if not is_sharded(other) or other.shape != getattr(x, "shape", None):
        return x
    from torch.distributed.tensor import distribute_tensor

    # Every process has read all of it: none has to send it.
    mesh, placements = other.device_mesh, other.placements
    return distribute_tensor(x.to(other.device), mesh, placements, src_data_rank=None)


def check_whole(engine: Any) -> None:
    """Checkpoints are written by one process, which must have all of the model and optimiser."""
    kind: Any = getattr(engine, "distributed_type", "NO")
    sharded = kind == "FSDP" and not engine.is_fsdp2
    if sharded or kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"checkpoints must be None with {kind.value}{' 1' * sharded}, where no process has the "
            "whole model: call the accelerator's save_state from on_step, or use FSDP2"
        )


def any_of(engine: Any, flag: bool) -> bool:
    """Whether a process has it, the same in all: one that stops alone leaves the others waiting."""
    if engine.num_processes == 1:
        return flag
    return bool(engine.reduce(torch.tensor(float(flag), device=engine.device)))


def gathered(engine: Any, value: Any) -> list[Any]:
    """What every process has, in a list, in order of the processes."""
    if engine.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    found: list[Any] = gather_object([value])
    return found
