"""Launches the Triton kernels on a GPU that is not there: all of a call but the launch itself.

`python tests/launch_triton.py sm_90 '[{"rows": 3}, …]'` prints a JSON list for each call of
`kd_loss` and its backward, or of the operators for shards: the launches, and what the compiler
reports of their machine code.
A process of its own, because the suite's has kernels made for the interpreter.
"""

import dataclasses
import functools
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kdkernels import LinearHead, TopK, kd_loss, ops
from kdkernels.backends import triton_kernels as kernels
from kdkernels.backends import triton_launch as backend
from kdkernels.backends.registry import BACKENDS
from kdkernels.objective import make_objective

# What the plans are made for: an A100, H100, B200, RTX 5090, MI250X, MI300X and RX 7900.
DEVICES = {
    "sm_80": backend.Device(32, 108, 40 << 20, nvidia=True),
    "sm_90": backend.Device(32, 132, 50 << 20, nvidia=True),
    "sm_100": backend.Device(32, 148, 126 << 20, nvidia=True),
    "sm_120": backend.Device(32, 170, 96 << 20, nvidia=True),
    "gfx90a": backend.Device(64, 104, 8 << 20),
    "gfx942": backend.Device(64, 304, 4 << 20),
    "gfx1100": backend.Device(32, 96, 6 << 20),
}


def target(name):
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, DEVICES[name].lanes)


class Driver:
    """What Triton asks of a driver."""

    def __init__(self, name):
        self.name = name
        self.launched = []
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (None, None, 0, 0, 1024),
            get_device_properties=lambda device: dict(max_shared_mem=64 << 10),
        )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return target(self.name)

    def launcher_cls(self, source, metadata):
        def launch(programs, *rest):
            self.launched.append(
                dict(
                    kernel=metadata.name,
                    code=metadata.hash,
                    programs=programs,
                    threads=metadata.num_warps * DEVICES[self.name].lanes,
                    cooperative=bool(metadata.launch_cooperative_grid),
                )
            )

        return launch


def call(
    rows=3,
    columns=40000,
    dtype="float32",
    has_labels=True,
    has_weights=False,
    kept=None,
    softcap=None,
    **options,
):
    """`kept`: K of a sparse teacher. `softcap`: of a teacher's head, beside a student's logits."""
    dtype = getattr(torch, dtype)
    # Memory that nobody touches.
    student, teacher = (torch.empty(rows, columns, dtype=dtype) for _ in range(2))
    if kept is not None:
        ids = torch.arange(kept).expand(rows, -1)
        teacher = TopK(ids, torch.full(ids.shape, -20.0))
    elif softcap is not None:
        teacher = LinearHead(torch.ones(rows, 1), torch.ones(columns, 1), softcap=softcap)
    labels = torch.zeros(rows, dtype=torch.int64) if has_labels else None
    weights = torch.ones(rows) if has_weights else None
    options = dict(options, token_weights=weights, backend="triton")
    loss = kd_loss(student.requires_grad_(), teacher, labels, **options)
    torch.autograd.grad(loss, student)


def call_shards(rows, columns, dtype="bfloat16", has_labels=True, kept=None, **options):
    """The three operators, of a shard of these columns."""
    student, teacher = (torch.empty(rows, columns, dtype=getattr(torch, dtype)) for _ in range(2))
    labels = torch.zeros(rows, dtype=torch.int64) if has_labels else None
    defaults = dict(divergence="jsd", beta=None, temperature=2.0, alpha=0.5, t_squared=True)
    defaults |= dict(label_smoothing=0.0, ignore_index=-100, reduction="mean")
    options = defaults | dict(vocab_size=columns, has_labels=has_labels) | options
    options = make_objective(**options).options()
    teacher = [teacher]
    if kept is not None:
        ids = torch.arange(kept).repeat(rows, 1)
        teacher = [ids, torch.zeros(ids.shape).double(), torch.zeros(rows).double()]
    inputs = student, teacher, labels, None
    fields = ops.shard_fields(teacher)
    merged = torch.empty(len(fields) + 1, rows, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    ops.get("shard_statistics", "triton")(*inputs, False, *options)
    ops.get("shard_terms", "triton")(*inputs, merged, False, True, *options)
    gradient = ops.get("shard_gradient_", "triton")
    gradient(*inputs, one, merged, student, 8 * columns, *options)


@functools.cache
def reports():
    """{hash: what the compiler reports} of all that has been compiled."""
    of_rows = kernels.distill_rows, kernels.distill_kept_rows, kernels.scale_rows
    of_shards = kernels.shard_rows, kernels.shard_kept_rows
    launched = (kernels.prepare, *of_rows, *of_shards, kernels.finish)
    compiled = (x for kernel in launched for x in kernel.device_caches[0][0].values())
    return {x.metadata.hash: report(x.asm) for x in compiled}


def report(asm):
    """Spilled registers, bytes of local memory, registers, doubles, 16-byte loads."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", text))
        return dict(
            spills=int(found["vgpr_spill_count"]),
            local=int(found["private_segment_fixed_size"]),
            registers=int(found["vgpr_count"]),
            doubles=len(re.findall(r"_f64", text)),
            wide=len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", text)),
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        output = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", output)}
    return dict(
        spills=0,
        local=usage["STACK"] + usage["LOCAL"],
        registers=usage["REG"],
        doubles=asm["ptx"].count(".f64"),
        wide=asm["ptx"].count("ld.global.v4.b32"),
    )


def main(name, calls):
    warnings.simplefilter("ignore")
    gc.disable()  # a short process, whose compiler makes objects by the million
    here = Driver(name)
    driver.set_active(here)
    there = dataclasses.replace(BACKENDS["triton"], unavailable=lambda device_type: None)
    BACKENDS["triton"] = there
    backend.device_of = lambda device: DEVICES[name]
    launches = []
    for options in json.loads(calls):
        here.launched = []
        (call_shards if options.pop("shards", False) else call)(**options)
        launches.append(here.launched)
    print(json.dumps([[dict(x, **reports()[x["code"]]) for x in of] for of in launches]))


if __name__ == "__main__":
    main(*sys.argv[1:])
