"""The package as a user gets it: sdist, wheels, and what a build does when it cannot compile.

Every build starts from the unpacked sdist, so a file missing there fails all of them, and runs with
a torch that cannot be imported, so a setup.py that needs one fails all of them too.
"""

import email
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import kdkernels

ROOT = Path(__file__).resolve().parent.parent
FALSE = shutil.which("false")
NOT_SOURCES = shutil.ignore_patterns(
    ".git",
    ".venv*",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "_C.*",
    "_build.py",
    ".*_cache",
    ".hypothesis",
)

pytest.importorskip("setuptools", "77", reason="builds need setuptools")
pytest.importorskip("pybind11", reason="builds need pybind11")


def python(*command, cwd, **environment):
    """Runs Python without the variables that steer a build, except those given."""
    steering = ("KDKERNELS_", "CUDA", "CMAKE_", "CXX", "CC", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory):
    """A folder for PYTHONPATH in which torch is an error."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise RuntimeError('the build imported torch')")
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory, no_torch):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCES)
    result = python(
        "-c",
        "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])",
        folder,
        cwd=folder / "checkout",
        PYTHONPATH=no_torch,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def build(source, no_torch, tmp_path_factory):
    """build(**environment) -> (process, unpacked wheel, wheel's name); no wheel if it failed."""

    def build(**environment):
        out = tmp_path_factory.mktemp("wheel")
        result = python(
            "-c",
            "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])",
            out,
            cwd=source,
            PYTHONPATH=no_torch,
            **environment,
        )
        if result.returncode:
            return result, None, None
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(out / "site")
        return result, out / "site", wheel.name

    return build


@pytest.fixture(scope="module")
def native(build):
    result, site, name = build(
        KDKERNELS_BUILD_CUDA="0", CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return site, name


def files(root, pattern):
    return {
        str(p.relative_to(root))
        for p in root.glob(pattern)
        if p.is_file() and "__pycache__" not in p.parts
    }


def installed(site, *command):
    """The output of Python with the package in site.

    -S keeps out the editable install of this checkout, whose import hook would serve the modules
    that site lacks.
    """
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    result = python("-S", *command, cwd=site, PYTHONPATH=path)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def info(site):
    output = installed(site, "-m", "kdkernels.info")
    assert str(site) in output
    return output


def test_sdist_is_complete(source):
    for folder in ("csrc", "examples", "kdkernels", "tests"):
        expected = files(ROOT / folder, "**/*") - files(ROOT / folder, "_C.*") - {"_build.py"}
        assert files(source / folder, "**/*") == expected
    for name in (
        "CMakeLists.txt",
        "LICENSE",
        "Makefile",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
    ):
        assert (source / name).is_file(), name


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout of git")
def test_every_file_in_git_is_in_the_sdist(source):
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = [name for name in git.stdout.splitlines() if (ROOT / name).exists()]
    assert "setup.py" in tracked
    assert [name for name in tracked if not (source / name).is_file()] == []


def test_native_wheel(native):
    site, name = native
    if not list((site / "kdkernels").glob("_C.*")):
        pytest.skip(f"nothing was compiled here: {info(site)}")
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in name
    facts = info(site)
    assert "built and loaded" in facts
    assert "KDKERNELS_BUILD_CUDA=0 when it was built" in facts


def test_wheel_content(native):
    site, _ = native
    (dist_info,) = site.glob("*.dist-info")
    assert {p.name for p in site.iterdir()} == {"kdkernels", dist_info.name}
    assert dist_info.name == f"kdkernels-{kdkernels.__version__}.dist-info"
    assert (dist_info / "licenses" / "LICENSE").is_file()

    shipped = files(site / "kdkernels", "**/*")
    python_files = files(ROOT / "kdkernels", "**/*.py") | {"_build.py", "py.typed"}
    folders = "distill/presets/data", "distill/templates"
    data = {f"{each}/{p}" for each in folders for p in files(ROOT / "kdkernels" / each, "*")}
    module = {p for p in shipped if p.startswith("_C.")}
    assert shipped == python_files | data | module
    assert len(module) <= 1


def test_metadata(native):
    site, _ = native
    (path,) = site.glob("*.dist-info/METADATA")
    found = email.message_from_string(path.read_text())
    assert found["Name"] == "kdkernels"
    assert found["Version"] == kdkernels.__version__
    assert 20 < len(found["Summary"]) < 100
    assert found["License-Expression"] == "Apache-2.0"
    assert found["License-File"] == "LICENSE"
    assert found["Requires-Python"] == ">=3.10"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert "Typing :: Typed" in found.get_all("Classifier")
    assert found["Keywords"]
    needed = [x for x in found.get_all("Requires-Dist") if "extra ==" not in x]
    assert sorted(needed) == ["numpy", "torch>=2.9"]


@pytest.mark.skipif(platform.system() != "Linux", reason="auditwheel is for Linux")
def test_native_wheel_needs_nothing_that_a_linux_lacks(native):
    pytest.importorskip("auditwheel")
    site, name = native
    if not list((site / "kdkernels").glob("_C.*")):
        pytest.skip("nothing was compiled here")
    result = python("-m", "auditwheel", "show", site.parent / name, cwd=site)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r'platform tag:\s+"manylinux_2_\d+_', result.stdout), result.stdout


def test_pure_wheel(build, native):
    # After a native build in the same tree, whose leftovers must not get in.
    result, site, name = build(KDKERNELS_BUILD_NATIVE="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert name.endswith("-py3-none-any.whl")
    assert not list(site.glob("**/*.so"))
    assert "not built: KDKERNELS_BUILD_NATIVE=0 when it was built" in info(site)

    output = installed(
        site,
        "-c",
        "import torch, kdkernels as kdk\n"
        "student = torch.randn(3, 5, requires_grad=True)\n"
        "kdk.kd_loss(student, torch.randn(3, 5), torch.tensor([0, 4, 2])).backward()\n"
        "print(kdk.__file__, student.grad.isfinite().all().item())",
    )
    assert output.split() == [str(site / "kdkernels" / "__init__.py"), "True"]


@pytest.mark.skipif(FALSE is None, reason="no program that always fails")
def test_broken_compiler(build):
    result, site, name = build(CXX=FALSE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert name.endswith("-py3-none-any.whl")
    facts = info(site)
    assert "not built: " in facts
    assert FALSE in facts  # CMake's own words name the compiler that failed

    result, site, _ = build(CXX=FALSE, KDKERNELS_BUILD_NATIVE="1", KDKERNELS_BUILD_CUDA="0")
    assert result.returncode != 0
    assert "KDKERNELS_BUILD_NATIVE=1, but " in result.stderr


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"KDKERNELS_BUILD_CUDA": "1", "PATH": ""},
            "KDKERNELS_BUILD_CUDA=1, but nvcc was not found: no nvcc on PATH, CUDA_HOME is not set",
        ),
        (
            {"KDKERNELS_BUILD_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "KDKERNELS_BUILD_CUDA=1, but nvcc was not found: CUDA_HOME=/nowhere has no bin/nvcc",
        ),
        (
            {"KDKERNELS_BUILD_CUDA": "1", "KDKERNELS_BUILD_NATIVE": "0"},
            "KDKERNELS_BUILD_CUDA=1 contradicts KDKERNELS_BUILD_NATIVE=0",
        ),
        (
            {"KDKERNELS_BUILD_NATIVE": "yes"},
            "KDKERNELS_BUILD_NATIVE=yes: expected auto, 1 or 0",
        ),
    ],
)
def test_one_clear_error(build, environment, message):
    result, _, _ = build(**environment)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == message
    assert "Traceback" not in result.stderr


def test_csrc_includes_no_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)\b", path.read_text()), path
