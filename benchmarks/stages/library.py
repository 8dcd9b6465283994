"""The stages: what each is, how it is compiled, and a call of it.

Compiled are the product's own sources with the flags of its own build (stages.cmake), into
build/stages-* at the first use and again where a source has changed. Nothing else uses that.
"""

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from kdkernels.backends import native
from kdkernels.objective import DIVERGENCES, resolve_divergence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
# CMakeLists.txt: KDK_DIVERGENCES, in the order of DIVERGENCES.
CPP_NAMES = ("ForwardKL", "ReverseKL", "JSD", "SkewForwardKL", "SkewReverseKL", "TVD")
SUMS = 6  # call.h: kSums


class Unavailable(Exception):
    """The stages cannot be compiled or run here; the text says why."""


class DoesNotCompile(Unavailable):
    """All that it takes is there, and the compiler refuses; the text has its words."""


@dataclass(frozen=True)
class Stage:
    what: str
    variant: int  # call.h: Variant
    reads: int  # matrices that come from memory
    writes: int  # and go there
    exponentials: bool = True
    devices: tuple = ("cpu", "cuda")


STAGES = {
    "loads": Stage("both rows read and added up", 0, 2, 0),
    "stores": Stage("a gradient written", 1, 0, 1, devices=("cpu",)),
    "copy": Stage("both rows read, their sum written", 2, 2, 1),
    "statistics": Stage("sweep 1: maxima and sums", 3, 2, 0),
    "no-exponentials": Stage("full, each exponential a multiply-add", 5, 2, 1, exponentials=False),
    "loss": Stage("the loss without a gradient", 4, 2, 0),
    "full": Stage("loss and gradient", 5, 2, 1),
}


def stages_of(device):
    return [name for name, stage in STAGES.items() if device in stage.devices]


# ---- Compiling -----------------------------------------------------------------------------------


def find_nvcc():
    """As setup.py does: if CUDA_HOME has none, another would be a surprise."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if nvcc is None:
        where = f"CUDA_HOME={home} has no bin/nvcc" if home else "none on PATH, no CUDA_HOME"
        raise Unavailable(f"the stages on a GPU need nvcc: {where}")
    return nvcc


def gpu_archs():
    """Of this GPU alone what the product has for it; for newer ones that is part of its list."""
    known = {8: "80", 9: "90"}
    return os.environ.get("KDKERNELS_CUDA_ARCHS") or known.get(
        torch.cuda.get_device_capability()[0], ""
    )


def settings_of(device, divergence, archs=None):
    """CMake's arguments for the libraries of a device: "cpu", "cuda" or "cuda_on_cpu"."""
    cpp_name = CPP_NAMES[DIVERGENCES.index(resolve_divergence(divergence, None)[0])]
    settings = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DKDK_BUILD_PYTHON=OFF",
        f"-DCMAKE_PROJECT_kdkernels_INCLUDE={HERE / 'stages.cmake'}",
    ]
    if device == "cpu":  # one library has all divergences
        if reason := native.unavailable("cpu"):
            raise Unavailable(f"the stages on a CPU are compiled as kdkernels is: {reason}")
        settings.append(f"-DKDK_STAGES_LEVEL={native._C.isa_level()}")
    else:
        settings.append(f"-DKDK_STAGES_DIVERGENCE={cpp_name}")
    if device == "cuda":
        archs = gpu_archs() if archs is None else archs
        settings += ["-DKDK_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        settings.append(f"-DKDK_CUDA_ARCHS={archs}")
    return settings + shlex.split(os.environ.get("CMAKE_ARGS", ""))


def build(device, divergence="forward_kl", archs=None, root=ROOT / "build"):
    """{whether it has exponentials: the library's path}, compiled where they are not up to date."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    missing = [tool for tool in ("cmake", "ninja", compiler) if not shutil.which(tool, path=PATH)]
    if missing:
        raise Unavailable(f"the stages have to be compiled, and here is no {', no '.join(missing)}")
    settings = settings_of(device, divergence, archs)
    # As in setup.py: CMake reads some of these only once per folder.
    names = ("CC", "CXX", "CXXFLAGS", "CUDA_HOME", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")
    key = repr([settings, [os.environ.get(name) for name in names]])
    folder = Path(root) / f"stages-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    targets = {True: f"stages_{device}", False: f"stages_{device}_no_exponentials"}
    with open(folder / "lock", "w") as lock:  # another process may build it too
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Configured once; from then on the build sees by itself whether that has to happen again.
        if not (folder / "build.ninja").exists():
            run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *settings])
        run(["cmake", "--build", folder, "--target", *targets.values()])
    return {exponentials: folder / f"lib{name}.so" for exponentials, name in targets.items()}


def run(command):
    environment = {**os.environ, "PATH": PATH}
    program = shutil.which(command[0], path=PATH)
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, env=environment)
    if done.returncode:
        output = (done.stdout + done.stderr).strip().splitlines()
        raise DoesNotCompile("the stages do not compile:\n" + "\n".join(output[-40:]))


# ---- Calling -------------------------------------------------------------------------------------


class StageCall(ctypes.Structure):
    """The twin of StageCall in call.h."""

    _fields_ = [
        ("variant", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("unscale", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("divergence", ctypes.c_int64),
        ("beta", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("threads", ctypes.c_int64),
        ("device", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("bad_label", ctypes.c_void_p),
    ]


class Passes:
    """The stages of a pass over one problem's rows.

    Nothing is allocated in a call: `grad`, `loss`, `unscale` and `sums` are overwritten by it.
    `libraries` are those of `build`; `seed` is the schedule's on the emulated GPU.
    """

    def __init__(
        self,
        libraries,
        student,  # (N, V)
        teacher,  # (N, V)
        labels,  # (N,) int64
        *,
        divergence="forward_kl",
        temperature=1.0,
        threads=1,
        seed=0,
    ):
        rows, columns = student.shape
        assert student.is_contiguous() and teacher.is_contiguous()
        assert student.dtype == teacher.dtype and teacher.shape == student.shape
        floats = dict(dtype=torch.float32, device=student.device)
        self.grad = torch.zeros_like(student)
        self.loss = torch.zeros((), **floats)
        self.unscale = torch.zeros(rows, **floats)
        self.numbers = torch.zeros((3 + SUMS) * rows, **floats)
        self.sums = self.numbers[3 * rows :].view(rows, SUMS)  # as call.h has them
        self.kept = student, teacher, labels
        name, beta = resolve_divergence(divergence, None)
        self.call = StageCall(
            rows=rows,
            columns=columns,
            dtype=native.DTYPES[student.dtype],
            student=student.data_ptr(),
            teacher=teacher.data_ptr(),
            grad=self.grad.data_ptr(),
            labels=labels.data_ptr(),
            loss=self.loss.data_ptr(),
            unscale=self.unscale.data_ptr(),
            numbers=self.numbers.data_ptr(),
            divergence=DIVERGENCES.index(name),
            beta=beta,
            temperature=temperature,
            threads=threads,
            device=seed,
        )
        self.libraries = {key: ctypes.CDLL(str(path)) for key, path in libraries.items()}
        for library in self.libraries.values():
            library.run_stage.restype = ctypes.c_char_p
            library.run_stage.argtypes = [ctypes.POINTER(StageCall)]
        if student.is_cuda:
            self._prepare_gpu(student.device)

    def _prepare_gpu(self, device):
        scratch_bytes = self.libraries[True].scratch_bytes
        scratch_bytes.restype = ctypes.c_size_t
        self.scratch = torch.empty(scratch_bytes(), dtype=torch.uint8, device=device)
        self.bad_label = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self.call.device = device.index or 0
        self.call.stream = torch.cuda.current_stream(device).cuda_stream
        self.call.scratch = self.scratch.data_ptr()
        self.call.bad_label = self.bad_label.data_ptr()

    def run(self, name):
        """Makes the pass, or what of it the stage is; on a GPU it is only put on the stream."""
        stage = STAGES[name]
        self.call.variant = stage.variant
        error = self.libraries[stage.exponentials].run_stage(ctypes.byref(self.call))
        if error is not None:
            raise RuntimeError(f"stage {name}: {error.decode()}")
