"""How many bytes does the dense loss move to and from the memory of a GPU?

The hardware's own count, read by Nsight Compute (`ncu`) of the kernel that does the work: one pass
reads student and teacher and writes the gradient, 3·N·V elements. Caches may make it less, a second
read of a row more.
"""

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from kdkernels import kd_loss

from .peers.base import Missing
from .report import text_table

ROOT = Path(__file__).resolve().parent.parent
ROWS = 1024  # three matrices of 64 MB at the smallest width: more than an L2 cache holds
WIDTHS = (32000, 50257, 128256, 262144)
KERNEL = "distill_kernel"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def call(width):
    """The one call that is counted."""
    student, teacher = (
        torch.randn(ROWS, width, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    labels = torch.randint(width, (ROWS,), device="cuda")
    kd_loss(student.requires_grad_(), teacher, labels, temperature=2.0, backend="native").backward()
    torch.cuda.synchronize()


def parse(text):
    """ncu's CSV -> [(bytes read, bytes written)] of each launch, in their order."""
    start = text.index('"ID"')
    launches = {}
    for line in csv.DictReader(io.StringIO(text[start:])):
        if KERNEL in line["Kernel Name"] and line["Metric Name"] in (READ, WRITTEN):
            value = float(line["Metric Value"].replace(",", "")) * UNITS[line["Metric Unit"]]
            launches.setdefault(line["ID"], {})[line["Metric Name"]] = value
    return [(found[READ], found[WRITTEN]) for found in launches.values()]


def table(counts):
    """Rows for `text_table`: what moved, of what has to."""
    rows = []
    for width, (read, written) in counts.items():
        matrix = 2 * ROWS * width
        rows.append(
            [
                f"{width:,}",
                f"{read / matrix:.3f}",
                f"{written / matrix:.3f}",
                f"{(read + written) / (3 * matrix):.3f}",
            ]
        )
    return rows


def measure(width):
    """(bytes read, bytes written) of one call; Missing where nothing can count them."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise Missing("no ncu on this machine")
    command = [ncu, "--csv", "--clock-control", "none", "--metrics", f"{READ},{WRITTEN}"]
    command += ["--kernel-name", f"regex:{KERNEL}", sys.executable, "-m", "benchmarks.traffic"]
    command += ["--call", str(width)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode or '"ID"' not in result.stdout:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise Missing(f"ncu cannot count: {lines[-1] if lines else 'it says nothing'}")
    return parse(result.stdout)[-1]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--call", type=int, metavar="V", help="only make the call, for ncu")
    options = parser.parse_args(arguments)
    if options.call:
        return call(options.call)
    if not torch.cuda.is_available():
        sys.exit("traffic.py needs a GPU: torch sees no CUDA device")
    try:
        counts = {width: measure(width) for width in WIDTHS}
    except Missing as missing:
        print(f"bytes not counted: {missing}")
        return None
    header = ["V", "read", "written", "of 3 N V"]
    print(f"bytes moved, in matrices of {ROWS:,} x V bfloat16 (one pass: 2 read, 1 written)")
    print(text_table(header, table(counts)))
    return None


if __name__ == "__main__":
    main()
