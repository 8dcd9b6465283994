"""What `import kdkernels` takes where torch is imported already: python -m benchmarks.importing

The fastest of some fresh processes, in ms: by the clock, and of the processor alone, which says
more on a busy machine. With the bytecode that an installed package has, and without.
"""

import subprocess
import sys
import tempfile

CODE = """
import sys, time, torch
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], sys.argv[2] == "without"
wall, cpu = time.perf_counter(), time.process_time()
import kdkernels
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def fastest(count, bytecode):
    """(wall, processor) ms, `bytecode` "with" or "without"."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CODE, folder, bytecode]
        runs = []
        for _ in range(count + 1):
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append([1e3 * float(x) for x in result.stdout.split()])
    return tuple(map(min, zip(*runs[1:], strict=True)))  # the first one writes bytecode


def main(count=10):
    for bytecode in ("with", "without"):
        wall, cpu = fastest(count, bytecode)
        print(f"{bytecode} bytecode: {wall:.1f} ms, {cpu:.1f} ms of the processor")


if __name__ == "__main__":
    main()
