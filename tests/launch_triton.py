"""Launches the Triton kernels on a GPU that is not there: everything but the launch itself.

`python tests/launch_triton.py` prints two JSON lists of launches, of calls that differ in values
and in widths: (kernel, hash of its code, programs, cooperative). A process of its own, as
compile_triton.py.
"""

import dataclasses
import json
import warnings
from types import SimpleNamespace

import compile_triton
import torch
from triton.runtime import driver

from kdkernels import kd_loss
from kdkernels.backends import triton as backend
from kdkernels.backends.registry import BACKENDS

GPU = "sm_90"


class Driver:
    """What Triton asks of a driver."""

    def __init__(self):
        self.launched = []
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (None, None, 0, 0, 1024),
            get_device_properties=lambda device: dict(max_shared_mem=227 << 10),
        )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return compile_triton.target(GPU)

    def launcher_cls(self, source, metadata):
        def launch(programs, *rest):
            cooperative = bool(metadata.launch_cooperative_grid)
            self.launched.append((metadata.name, metadata.hash, programs, cooperative))

        return launch


# What a value of an argument may not compile anew; 40,000 columns are shared by 4 programs.
CALLS = (
    dict(),
    dict(temperature=1.0),
    dict(temperature=2.5, alpha=0.1, label_smoothing=0.1),
    dict(alpha=0.9, t_squared=False, ignore_index=1),
    dict(rows=1),
    dict(rows=16),
    dict(rows=1000),
)


WIDTHS = (1, 7, 1000)


def call(rows=3, columns=40000, temperature=2.0, **options):
    student, teacher = (torch.zeros(rows, columns) for _ in range(2))
    labels = torch.zeros(rows, dtype=torch.int64)
    options = dict(options, temperature=temperature, backend="triton")
    kd_loss(student.requires_grad_(), teacher, labels, **options).backward()


def main():
    warnings.simplefilter("ignore")
    here = Driver()
    driver.set_active(here)
    there = dataclasses.replace(BACKENDS["triton"], unavailable=lambda device_type: None)
    BACKENDS["triton"] = there
    backend.device_of = lambda device: compile_triton.DEVICES[GPU]
    for options in CALLS:
        call(**options)
    launched, here.launched = here.launched, []
    for columns in WIDTHS:
        call(columns=columns)
    print(json.dumps([launched, here.launched]))


if __name__ == "__main__":
    main()
