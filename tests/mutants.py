"""Does the suite notice when the CUDA kernels are wrong? `make mutants`, most of an hour.

Edits a copy of the tree, one mistake at a time, and runs on it what needs no GPU: test_kernels of
csrc/tests/cuda_on_cpu, then a part of the Python tests on the backend "cuda_on_cpu". At least 95 %
of the mistakes have to be caught. Names, or parts of them, as arguments: only these.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cuda_on_cpu
from mutant_table import MUTANTS

ROOT = cuda_on_cpu.ROOT
BUILD = cuda_on_cpu.BUILD.relative_to(ROOT)
COPIED = ("csrc", "kdkernels", "tests", "CMakeLists.txt", "pyproject.toml")
# Most of the time goes into compiling; what the optimiser makes of a mistake is not the question.
# Of what GPUs do not let pass, x86 does not complain about addresses by itself.
SETTINGS = (
    *cuda_on_cpu.SETTINGS,
    "-DKDK_BUILD_TESTS=ON",
    "-DKDK_SANITIZE=alignment",
    "-DCMAKE_BUILD_TYPE=Debug",
    "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
)
# Those that catch most come first; a survivor costs all of them.
PYTHON_TESTS = (
    "tests/test_hazards_use.py",
    "tests/test_hazards.py",
    "tests/test_padding_and_shift.py",
    "tests/test_functional.py",
    "tests/test_sparse.py",
    "tests/test_autograd.py",
    "tests/test_regressions_objective.py",
    "tests/test_exactness.py::test_n1_a_difference_that_one_float_does_not_hold",
    "tests/test_exactness.py::test_n2_any_width_and_low_temperatures",
    "tests/test_exactness.py::test_n2_n3_n9_near_equal_rows",
    "tests/test_exactness.py::test_n4_of_classes_that_one_side_has_for_itself",
    "tests/test_exactness.py::test_n4_of_a_class_that_the_student_all_but_rules_out",
    "tests/test_exactness.py::test_n4_of_a_jsd_from_half_to_all_of_its_largest",
    "tests/test_exactness.py::test_n7_gradient_row_sum_where_the_slopes_are_large",
    "tests/test_exactness.py::test_n5_float16_mean_under_a_loss_scale[cuda_on_cpu-forward_kl-1000]",
)
SLOW = "h26_large or h27_more or h31 or whole_leading or regression_70 or 128256 or 32000"
BUILD_LIMIT, TEST_LIMIT = 900, 600  # seconds
REQUIRED = 0.95


class Failed(Exception):
    """What a step of a mutant's trial said before it failed."""


def attempt(command, folder, limit):
    """Runs a command in a process group of its own -> its output, or Failed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"no end after {limit} s") from None
        raise
    if process.returncode:
        raise Failed(output or f"exit status {process.returncode}")
    return output


def make_copy(folder):
    """The tree and its built module, ready to be edited and built again and again."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    # Where the tests look for it: they find it configured and up to date.
    attempt(["cmake", "-S", ".", "-B", BUILD, "-G", "Ninja", *SETTINGS], folder, BUILD_LIMIT)
    where = "import kdkernels; print(kdkernels.__file__)"
    origin = attempt([sys.executable, "-c", where], folder, TEST_LIMIT).strip()
    assert Path(origin).is_relative_to(folder), f"the copy's tests would test {origin}"


def build(folder):
    targets = ["test_kernels", "_cuda_on_cpu"]
    attempt(["cmake", "--build", BUILD, "--target", *targets], folder, BUILD_LIMIT)


def failing_test(folder):
    """The first test that fails in the copy as it is built -> its name, or None."""
    try:
        attempt([folder / BUILD / "test_kernels"], folder, TEST_LIMIT)
    except Failed as failed:
        return "test_kernels: " + telling_part(
            str(failed), r"(?:what\(\)|failed|runtime error): *(.*)"
        )
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=no"]
    selection = ["-k", f"cuda_on_cpu and not ({SLOW})", *PYTHON_TESTS]
    try:
        attempt([*command, *selection], folder, TEST_LIMIT)
    except Failed as failed:
        reported, crashed = r"(?:FAILED|ERROR) tests/(.*?)(?: - |$)", r"(test_\w+\.py\", line .*)"
        return telling_part(str(failed), reported, crashed)
    return None


def telling_part(output, *patterns):
    """What the first pattern that is there has in its group; else the last line."""
    for pattern in patterns:
        if match := re.search(pattern, output, re.MULTILINE):
            return match[1][:100]
    return output.strip().splitlines()[-1][:100]


def trial(mutant, folder):
    """The first test that catches the mutant, or None."""
    path = folder / "csrc" / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        build(folder)
        return failing_test(folder)
    finally:
        path.write_text(text)


def main(wanted):
    os.nice(10)
    begin = time.monotonic()
    chosen = [m for m in MUTANTS if not wanted or any(name in m.name for name in wanted)]
    if not chosen:
        return f"none of the mutants is called {' or '.join(wanted)}"
    texts = {m.file: (ROOT / "csrc" / m.file).read_text() for m in chosen}
    stale = [m.name for m in chosen if texts[m.file].count(m.old) != 1 or m.old == m.new]
    if stale:
        return "the old text is not there exactly once: " + "; ".join(stale)

    caught = 0
    with tempfile.TemporaryDirectory(prefix="kdkernels-mutants-") as name:
        folder = Path(name).resolve()
        make_copy(folder)
        build(folder)
        if test := failing_test(folder):
            return f"without any edit: {test}"
        print(f"without any edit: passes, {time.monotonic() - begin:.0f} s", flush=True)
        for mutant in chosen:
            started = time.monotonic()
            try:
                test = trial(mutant, folder)
            except Failed as failed:
                return f"{mutant.name}: does not build\n{failed}"
            caught += test is not None
            verdict = "SURVIVED" if test is None else "caught"
            took = time.monotonic() - started
            what = test or mutant.survives or f"and should not: {mutant.why}"
            print(f"{verdict:8}  {took:4.0f} s  {mutant.name:60}  {what}", flush=True)
    share = caught / len(chosen)
    minutes = (time.monotonic() - begin) / 60
    print(f"{caught} of {len(chosen)} caught, {share:.1%}, in {minutes:.0f} minutes")
    return None if share >= REQUIRED else f"fewer than {REQUIRED:.0%} are caught"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
