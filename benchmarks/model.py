"""The speed of light: what a pass over dense rows is bound by, next to what was measured.

    memory   bytes that have to move ÷ the bandwidth of a copy
    special  exponentials, logarithms and reciprocals ÷ the rate of the units that compute them
    issue    instructions of the compiled sweeps ÷ the rate at which they can be issued

The largest of them is the least time a pass can take. For GPUs the counts are those of
results/kernel-report.csv, rates those of the data sheets: a prediction; what was measured comes
from result files alone. For CPUs memory and exponentials are the yardsticks of the same run.
`python -m benchmarks.model` writes results/model-gpu.md and results/model-cpu.md.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from .kernel_report import RESULTS, UNITS, WAYS, number_of
from .report import markdown_table, number

ROWS = 8192
COPY_SHARE = 0.9  # of the data sheet's bandwidth that a copy reaches
SPECIAL, ISSUED = 16, 128  # in a clock, of a multiprocessor
CASES = (  # (title, divergence, its kernels' name, temperature)
    ("forward KL and cross-entropy, T = 2", "forward_kl", "ForwardKL", 2.0),
    ("JSD and cross-entropy, T = 1", "jsd", "JSD", 1.0),
)
VOCABS = 32000, 128256, 262144


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    multiprocessors: int
    clock: float  # GHz, boost
    bandwidth: float  # TB/s


GPUS = (
    Gpu("A100 80 GB SXM", "sm_80", 108, 1.41, 2.04),
    Gpu("H100 SXM", "sm_90", 132, 1.98, 3.35),
    Gpu("H200 SXM", "sm_90", 132, 1.98, 4.8),
    Gpu("B200", "sm_100", 148, 1.965, 8.0),
)


def counts(lines, kernel, arch, temperature):
    """{"far", "near": (special functions, instructions) for an element} of the compiled sweeps."""
    whole = "whole" if number_of(arch) >= 90 else "any"
    name = f"{kernel} distill+hard {whole}"
    found = {}
    for line in lines:
        if (line["kernel"], line["arch"], line["dtype"]) != (name, arch, "bfloat16"):
            continue
        if line["temperature"] in ("any", f"{temperature:g}"):
            special = sum(int(line[unit]) for unit in UNITS)
            each = int(line["elements"])
            found[line["sweep"]] = special / each, int(line["instructions"]) / each
    return {
        way: tuple(map(sum, zip(*(found[sweep] for sweep in sweeps), strict=True)))
        for way, sweeps in WAYS[kernel].items()
    }


def bounds(gpu, elements, special, instructions):
    """Milliseconds by memory, special functions and instructions."""
    clocks = gpu.multiprocessors * gpu.clock * 1e9
    return (
        1e3 * 3 * 2 * elements / (COPY_SHARE * gpu.bandwidth * 1e12),
        1e3 * elements * special / (SPECIAL * clocks),
        1e3 * elements * instructions / (ISSUED * clocks),
    )


def measured(documents, gpu, divergence, temperature, vocab):
    """Milliseconds of kdkernels on a GPU of this name, of the result files; None without."""
    for document in documents:
        machine = document["machine"].get("gpu", "")
        if gpu.name.split()[0] not in machine.replace("-", " ").split():
            continue
        for line in document["rows"]:
            objective = line["divergence"], line["temperature"], line["alpha"], line["backward"]
            if objective != (divergence, temperature, 0.5, True) or line["variant"] != "native":
                continue
            if (line["rows"], line["vocab"], line["dtype"]) == (ROWS, vocab, "bfloat16"):
                return line["ms"]
    return None


def gpu_table(lines, documents):
    header = ["bfloat16, 8,192 × V, ms", "V", "memory", "special, far", "near", "issue, far"]
    header += ["near", "least, far", "least, near", "measured"]
    rows = []
    for gpu in GPUS:
        for title, divergence, kernel, temperature in CASES:
            ways = counts(lines, kernel, gpu.arch, temperature)
            for vocab in VOCABS:
                elements = ROWS * vocab
                far, near = (bounds(gpu, elements, *ways[way]) for way in ("far", "near"))
                found = measured(documents, gpu, divergence, temperature, vocab)
                cells = far[0], far[1], near[1], far[2], near[2], max(far), max(near)
                row = [f"{gpu.name}: {title}", f"{vocab:,}", *map(number, cells)]
                rows.append([*row, "not measured" if found is None else number(found)])
    return markdown_table(header, rows)


def cpu_table(documents):
    """Yardsticks and kdkernels of each case where both were measured."""
    header = ["on a CPU, ms", "memory", "exponentials", "least", "kdkernels", "÷ least"]
    header += ["inplace=True", "÷ least"]
    rows = []
    for document in documents:
        cases = {}
        for line in document["rows"]:
            if line["status"] == "ok" and line["device"] == "cpu":
                cases.setdefault(line["case"], {})[line["variant"]] = line["ms"]
        for case, ms in cases.items():
            if {"native", "copy", "exp"} <= ms.keys():
                least = max(ms["copy"], ms["exp"])
                row = [case, *map(number, (ms["copy"], ms["exp"], least))]
                for name in ("native", "inplace"):
                    row += [number(ms[name]), number(ms[name] / least)] if name in ms else ["", ""]
                rows.append(row)
    return markdown_table(header, rows)


def main(folder=RESULTS):
    with (RESULTS / "kernel-report.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("dense-*.json"))]
    documents = [document for document in documents if not document["scale"]]
    for name, table in (
        ("model-gpu", gpu_table(lines, documents)),
        ("model-cpu", cpu_table(documents)),
    ):
        path = Path(folder) / f"{name}.md"
        path.write_text(table + "\n", encoding="utf-8")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
