"""Functions of test modules in several processes, as torchrun starts them, with gloo."""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
FOLDERS = "distill", "distill/jobs", "integrations", "parallel"
PATHS = HERE.parent, HERE, *(HERE / folder for folder in FOLDERS)
# What is slow to import, once for all processes of a session: they are forked from one that has.
IMPORTED = (
    "torch._dynamo torch.distributed.fsdp accelerate transformers kdkernels.cli "
    "transformers.models.llama.modeling_llama kdkernels.distill.jobs.job"
).split()


def start(call, count, apart=False):
    """call: "module.function(arguments)", or what follows `python` in a list -> the processes.

    apart: in interpreters of their own, where it matters how one ends.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    address["LOCAL_WORLD_SIZE"] = address["WORLD_SIZE"]
    paths = dict(PYTHONPATH=os.pathsep.join(map(str, PATHS)))
    address["OMP_NUM_THREADS"] = "1"
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    if isinstance(call, str) and not apart:
        return [_Forked(call, {**address, **place}) for place in places]
    if isinstance(call, str):
        module = call.partition(".")[0]
        call = ["-c", f"import torch; torch.set_num_threads(1); import {module}; {call}"]
    return [
        subprocess.Popen(
            [sys.executable, *call],
            env={**os.environ, **address, **paths, **place},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places
    ]


class _Forked:
    """What `ends` asks of a `Popen`."""

    def __init__(self, call, environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # stdout, stderr
        names = [file.name for file in self.files]
        self.process = context.Process(target=_forked, args=(call, environment, names))
        self.process.start()

    def communicate(self, timeout):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a process", timeout)
        return [file.read() for file in self.files]

    def kill(self):
        self.process.kill()

    @property
    def returncode(self):
        return self.process.exitcode


def _forked(call, environment, names):
    import torch

    for place, name in enumerate(names, start=1):
        os.dup2(os.open(name, os.O_WRONLY), place)
    os.environ.update(environment)
    sys.path[:0] = map(str, PATHS)
    torch.set_num_threads(1)
    module = call.partition(".")[0]
    code = 1
    try:
        exec(call, {module: importlib.import_module(module)})
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ends(processes, seconds=300):
    """-> [(exit code, what it wrote to stdout, and to stderr), ...]; none is left behind."""
    end = time.monotonic() + seconds
    try:
        texts = [each.communicate(timeout=max(end - time.monotonic(), 1)) for each in processes]
    finally:
        for each in processes:
            each.kill()
    return [(each.returncode, *text) for each, text in zip(processes, texts, strict=True)]


def run(call, count):
    """As `start`, to an end without errors."""
    for code, _, errors in ends(start(call, count)):
        assert code == 0, errors


def accelerator(kind, plugin=None):
    """An `Accelerator` on CPUs for "ddp" or "fsdp": accelerate itself makes one for FSDP on GPUs
    alone, and trains with DDP on CPUs whatever the plugin says. What it does from there on is the
    same."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    found = Accelerator(cpu=True)
    if kind == "fsdp":
        found.state.distributed_type = DistributedType.FSDP
        found.state.fsdp_plugin = plugin or FullyShardedDataParallelPlugin(fsdp_version=2)
    return found
