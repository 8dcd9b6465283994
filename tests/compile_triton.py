"""Compiles the Triton kernels ahead of time for one GPU that need not be there.

`python tests/compile_triton.py sm_90` prints a JSON list: of each kernel what the compiler reports.
A process of its own, because the suite's has kernels made for the interpreter.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings

import triton
from triton.backends.compiler import GPUTarget

from kdkernels.backends import triton as backend
from kdkernels.backends import triton_kernels as kernels

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
ROWS, ALIGNED = 8192, [["tt.divisibility", 16]]


def target(name):
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, DEVICES[name].lanes)


def source(kernel, given, constants):
    """ASTSource of a kernel whose arguments have these types, pointers aligned; None: absent."""
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        type = given.get(name)
        signature[name] = "constexpr" if type is None else type
        if type is None:
            values[(index,)] = constants.get(name)
        elif isinstance(type, str) and type.startswith("*"):
            attributes[(index,)] = ALIGNED
    return triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=values, attrs=attributes
    )


def distill(name, divergence, columns, distill, hard, dtype="bf16"):
    plan = backend.make_plan(DEVICES[name], ROWS, columns, 6 * columns)
    given = dict(
        task=backend.Task(*["fp32"] * len(backend.Task._fields)),
        student=f"*{dtype}",
        teacher=f"*{dtype}",
        grad=f"*{dtype}",
        labels="*i64" if hard else None,
        mean="*fp32",
        row_losses="*fp32",
        unscale="*fp32" if dtype == "fp16" else None,
        bad_label="*i64",
        board="*fp32",
        arrivals="*i32",
        **dict.fromkeys(kernels.distill_rows.do_not_specialize, "i32"),
    )
    constants = dict(
        DIVERGENCE=backend.DIVERGENCES.index(divergence),
        DISTILL=distill,
        HARD=hard,
        ROWS=plan.rows,
        CHUNKS=plan.chunks,
        WHOLE=True,
        HELD=plan.held,
        PROGRAMS=plan.programs,
    )
    options = backend.options_of(DEVICES[name], plan)
    return source(kernels.distill_rows, given, constants), options, plan


def kernels_of(name):
    """(what it is, source, options, plan) of every kernel at the table's settings."""
    for divergence in backend.DIVERGENCES:
        yield f"{divergence} and CE, long rows", *distill(name, divergence, 128256, True, True)
    yield "forward_kl, short rows", *distill(name, "forward_kl", 1000, True, False, "fp16")
    yield "CE, held rows", *distill(name, "forward_kl", 4096, False, True)
    given = dict(
        labels="*i64",
        weights="*fp32",
        mean="*fp32",
        arrivals="*i32",
        rows="i32",
        ignore_index="i32",
    )
    options = dict(num_warps=4)
    yield (
        "prepare",
        source(kernels.prepare, given, dict(MEAN=True, COUNT=2 * backend.MAX_TEAMS)),
        options,
        None,
    )
    given = dict(row_losses="*fp32", mean="*fp32", loss="*fp32", unscale="*fp32", rows="i32")
    yield "finish", source(kernels.finish, given, {}), options, None
    plan = backend.make_plan(DEVICES[name], ROWS, 128256, 0)
    given = dict(
        grad="*bf16",
        grad_b="i32",
        grad_l="i32",
        upstream="*fp32",
        unscale="*fp32",
        labels="*i64",
        rows="i32",
        length="i32",
        columns="i32",
        ignore_index="i32",
    )
    constants = dict(PER_ROW=False, ROWS=plan.rows, CHUNKS=plan.chunks, WHOLE=True)
    options = dict(num_warps=plan.warps)
    yield "scale_rows", source(kernels.scale_rows, given, constants), options, plan


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


def main(name):
    warnings.simplefilter("ignore")
    reports = []
    for what, source_, options, plan in kernels_of(name):
        asm = triton.compile(source_, target=target(name), options=options).asm
        reports.append(dict(kernel=what, plan=plan and plan._asdict(), **report(asm)))
    print(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1])
