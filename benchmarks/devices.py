"""How long a call takes on a device, how much memory, and what a number measured there depends on.

Both have
    seconds(step, repeat): of one call;
    observed(run): what it returns, and its peak of memory where that can be told in this process;
    release(): give back what nobody holds any more;
    facts(): for the result files.
"""

import gc
import multiprocessing
import os
import re
import subprocess
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import torch

from kdkernels.info import info

from .case import Step
from .peers.base import Missing


class Cpu:
    name = "cpu"
    compiles = False  # whatever is called first: its time says nothing
    # A call that is not timed goes before each one that is, where that takes no more seconds than
    # this: as in training, the memory that is needed is what the last call gave back. Pages that
    # others gave back long ago a virtual machine may have to ask its host for.
    warm = 1.0
    more_rounds = 5  # times as many, of what is short: neighbours show in a median of five

    def seconds(self, step, repeat=1):
        start = time.perf_counter()
        for _ in range(repeat):
            step.run()
        return (time.perf_counter() - start) / repeat

    def release(self):
        gc.collect()

    def observed(self, run):
        """What `run` returns, and its peak of memory: None, that takes a process of its own."""
        return run(), None

    def peak(self, case, name):
        return in_fresh_process(peak_of, case, name)

    def facts(self):
        return {}


class Gpu:
    """The current CUDA device."""

    name = "cuda"
    compiles = True
    warm = float("inf")  # it leaves the allocator as a step of training does
    more_rounds = 1

    def __init__(self):
        if not torch.cuda.is_available():
            raise Missing("torch sees no CUDA device")
        self.properties = torch.cuda.get_device_properties()
        self.ballast = torch.empty(2**30, dtype=torch.uint8, device="cuda")

    def seconds(self, step, repeat=1):
        """What a call takes when it is queued behind other work, as in training.

        The writes before it take the GPU a millisecond. Meanwhile the CPU can queue the call, so
        that what Python takes for that shows only where the GPU would wait for it in training too.
        They also leave nothing of the call before in the L2 cache.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            self.ballast.zero_()
        start.record()
        for _ in range(repeat):
            step.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeat

    def release(self):
        gc.collect()
        torch.cuda.empty_cache()

    def observed(self, run):
        """What `run` returns, and the bytes of tensors at its peak above what there was before.

        torch's allocator counts them from the moment its counter is reset: nothing that was run
        before can hide in it, as it can in a process's resident memory.
        """
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = run()
        return found, torch.cuda.max_memory_allocated() - before

    def facts(self):
        """The clocks are those of this moment."""
        fields = "uuid,driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            answer = ""
        return {
            "gpu": self.properties.name,
            **smi_facts(answer, str(self.properties.uuid)),
            "special_g_per_s": special_rate(answer, self.properties.multi_processor_count),
            "torch built for": info()["torch built for"],
        }


def smi_facts(answer, uuid):
    """The driver and the clocks of a GPU in what nvidia-smi says of all of them."""
    lines = [fields for line in answer.splitlines() if len(fields := line.split(", ")) == 6]
    here = [fields for fields in lines if uuid in fields[0] or len(lines) == 1]
    if not here:
        return {"driver": "unknown", "clocks": "unknown"}
    _, driver, sm, sm_max, memory, memory_max = here[0]
    clocks = f"SM {sm} of {sm_max} MHz, memory {memory} of {memory_max} MHz"
    return {"driver": driver, "clocks": clocks}


def special_rate(answer, multiprocessors):
    """10⁹ exponentials a second at the highest clock, 16 in a clock; None where that is unknown."""
    lines = [fields for line in answer.splitlines() if len(fields := line.split(", ")) == 6]
    return 16 * multiprocessors * float(lines[0][3]) / 1e3 if lines else None


DEVICES = {"cpu": Cpu, "cuda": Gpu}


# The peak of a process


def in_fresh_process(function, *args):
    """What function(*args) returns in a process of its own.

    Its malloc gives freed buffers back to the system, and takes new ones from there: what the
    process was able to keep from before would not show in its peak.
    """
    context = multiprocessing.get_context("spawn")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # read by glibc when a process starts
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *args).result()
    except BrokenExecutor as error:
        raise Missing("the process ended without an answer, perhaps out of memory") from error
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def peak_of(case, name):
    """(bytes at the peak above the inputs, those that are the gradients'), of one variant."""
    torch.set_num_threads(case.threads)
    variant = case.variants[name]
    loss, inputs = variant.make(case), case.draw()
    # Libraries load what they need in the first call. A small one does not fill buffers that the
    # measured one would then find; what is compiled has to see its shape.
    small = case if variant.compiled else case.small()
    warm_up = Step(loss, small, inputs if variant.compiled else small.draw(), variant.overwrites)
    warm_up.prepare()
    warm_up.run()
    warm_up.prepare()

    step = Step(loss, case, inputs, variant.overwrites)
    above = peak_above(step)
    return above, step.gradient_bytes()


def peak_above(step):
    """Bytes of resident memory that `step.run` takes at its peak above what there is before it."""
    step.prepare()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _status("VmRSS")
        step.run()
        return _status("VmHWM") - before
    except OSError as error:
        raise Missing(f"peak memory is read from Linux's /proc: {error}") from error


def _status(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024
