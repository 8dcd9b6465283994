"""Where training runs: on one device in one process, or what `accelerate` makes of a job."""

import contextlib

import torch


class OneProcess:
    """What the loop asks of an `accelerate.Accelerator`, under its names, for a student that stays
    where it is and trains in its own dtype."""

    num_processes, process_index, is_main_process, scaler = 1, 0, True, None

    def __init__(self, device):
        self.device = device

    def prepare(self, *things):
        return things

    def unwrap_model(self, model, keep_fp32_wrapper=True):
        return model

    def get_state_dict(self, model):
        return model.state_dict()

    def autocast(self):
        return contextlib.nullcontext()

    def no_sync(self, model):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, max_norm):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, tensor, reduction="sum"):
        return tensor

    def wait_for_everyone(self):
        pass


def of(accelerator, student):
    """The accelerator, or one process where the student is.

    Raises:
        ValueError: an accelerator that divides the loss.
    """
    if accelerator is not None:
        parts = getattr(accelerator, "gradient_accumulation_steps", 1)
        if parts != 1:  # its backward divides every loss by them
            raise ValueError(
                f"accelerator must have gradient_accumulation_steps=1, got {parts}: "
                "`accumulate` is what takes a batch in parts"
            )
        return accelerator
    parameter = next(student.parameters(), torch.empty(()))
    return OneProcess(parameter.device)


def check_whole(engine):
    """Checkpoints are written by one process, which must have all of the model and optimiser."""
    kind = getattr(engine, "distributed_type", "NO")
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"checkpoints must be None with {kind.value}, where no process has the whole model: "
            "call the accelerator's save_state from on_step"
        )


def any_of(engine, flag):
    """Whether a process has it, the same in all: one that stops alone leaves the others waiting."""
    if engine.num_processes == 1:
        return flag
    return bool(engine.reduce(torch.tensor(float(flag), device=engine.device)))


def gathered(engine, value):
    """What every process has, in a list, in order of the processes."""
    if engine.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
