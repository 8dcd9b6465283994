"""The stages of a pass that developers time: each does what it says, the product's own way.

On the CPU, and on the GPU that the tests emulate, whose times mean nothing. Nothing here is about
speed.
"""

import shutil

import pytest
import torch
from conftest import DTYPES, NAN, UNAVAILABLE, assert_same_bits, problem, run
from test_cuda_code import check_resources

from benchmarks.machine_code import instructions, resources, tool
from benchmarks.stages import command, library
from benchmarks.stages.library import STAGES, Passes
from kdkernels import kd_loss

BACKENDS = {"cpu": "native", "cuda_on_cpu": "cuda_on_cpu"}  # that a device's `full` is
# Whole tiles; a part of one, and rows that begin anywhere. On the emulated GPU two rows, one row or
# none fit into shared memory, aligned or not.
COLUMNS = 777, 2048, 4003
TEMPERATURE = 2.0


def libraries_for(device, **options):
    try:
        return library.build(device, **options)
    except library.DoesNotCompile:
        raise
    except library.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=BACKENDS)
def device(request):
    return request.param


@pytest.fixture(scope="session")
def libraries(device):
    return libraries_for(device)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=COLUMNS)
def columns(request):
    return request.param


@pytest.fixture
def logits(device, dtype, columns):
    """Enough rows of them that two threads share the work on a CPU."""
    return problem(2**16 // columns if device == "cpu" else 5, columns, dtype=dtype)


@pytest.fixture
def passes(libraries, logits):
    """Its outputs are NaN until a stage writes them."""
    passes = Passes(libraries, *logits, temperature=TEMPERATURE, threads=2, seed=1)
    for x in (passes.grad, passes.loss, passes.sums):
        x.fill_(NAN)
    return passes


def test_full_is_the_product(device, passes, logits):
    if UNAVAILABLE[BACKENDS[device]]:
        pytest.skip(UNAVAILABLE[BACKENDS[device]])
    options = dict(temperature=TEMPERATURE, backend=BACKENDS[device])
    loss, grad = run(*logits, upstream=torch.ones(()), **options)
    passes.run("full")
    if grad.dtype == torch.float16:
        passes.grad.copy_(passes.grad.float() * passes.unscale[:, None])
    assert_same_bits((passes.loss, loss), (passes.grad, grad))


def test_loss_is_the_product_and_writes_no_gradient(device, passes, logits):
    if UNAVAILABLE[BACKENDS[device]]:
        pytest.skip(UNAVAILABLE[BACKENDS[device]])
    with torch.no_grad():
        loss = kd_loss(*logits, temperature=TEMPERATURE, backend=BACKENDS[device])
    passes.run("loss")
    assert_same_bits((passes.loss, loss))
    assert passes.grad.isnan().all()


def test_statistics_are_those_of_the_definition(passes, logits):
    passes.run("statistics")
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in logits)
    max_s, max_t = student.amax(-1), teacher.amax(-1)
    x, y = student - max_s[:, None], teacher - max_t[:, None]
    e_t = (y / TEMPERATURE).exp()
    rest = x.exp().scatter(-1, labels[:, None], 0.0)
    gaps = e_t * (x - y)
    exact = [max_s, max_t, (x / TEMPERATURE).exp().sum(-1), e_t.sum(-1), gaps.sum(-1), rest.sum(-1)]
    sizes = [*exact[:4], gaps.abs().sum(-1), exact[5]]
    for i, (value, size) in enumerate(zip(exact, sizes, strict=True)):
        error = (passes.sums[:, i] - value).abs() / size.abs()
        assert error.max() < (1e-12 if i < 2 else 1e-6), (i, error.max())
    assert passes.grad.isnan().all()


def test_loads_read_every_element(passes, logits):
    passes.run("loads")
    for i, x in enumerate(logits[:2]):
        x = x.double()
        error = (passes.sums[:, i] - x.sum(-1)).abs() / x.abs().sum(-1)
        assert error.max() < 1e-6, (i, error.max())
    assert passes.grad.isnan().all()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("column", [0, -1])
def test_loads_show_a_nan_where_it_is(passes, logits, side, column):
    logits[side][-1, column] = NAN
    passes.run("loads")
    expected = torch.zeros_like(passes.sums[:, :2], dtype=torch.bool)
    expected[-1, side] = True
    assert torch.equal(passes.sums[:, :2].isnan(), expected)


def test_copy_writes_the_sum_of_both_rows(passes, logits):
    student, teacher, _ = logits
    passes.run("copy")
    assert_same_bits((passes.grad, (student.float() + teacher.float()).to(student.dtype)))


def test_stores_read_nothing_and_write_everywhere(device, passes, logits):
    if device not in STAGES["stores"].devices:
        pytest.skip("a stage of CPUs")
    for x in logits[:2]:
        x.fill_(NAN)
    passes.run("stores")
    assert_same_bits((passes.grad, torch.ones_like(passes.grad)))


def test_without_exponentials_it_is_wrong_but_takes_the_same_way(passes):
    passes.run("full")
    loss, grad = passes.loss.clone(), passes.grad.double()
    passes.run("no-exponentials")
    assert passes.loss != loss
    assert 0.5 < passes.loss / loss < 2
    off = (passes.grad.double() - grad).abs().mean() / grad.abs().mean()
    assert 0.01 < off < 1, off


# ---- The compiled code for GPUs ------------------------------------------------------------------


def test_the_stages_compile_for_gpus():
    found = libraries_for("cuda", archs="90")
    if tool("cuobjdump") is None:
        pytest.skip("compiled; no cuobjdump to look at the code: pip install triton")
    for exponentials, path in found.items():
        check_resources(resources(path))
        code = instructions(path, "sm_90")
        kernels = {name: counts for name, counts in code.items() if "stage_kernel" in name}
        # For aligned rows and for others: loads, copy, statistics, full; or full alone.
        assert len(kernels) == (8 if exponentials else 2)
        for name, counts in kernels.items():
            if not exponentials or f"VariantE{STAGES['full'].variant}" in name:
                assert (counts["MUFU.EX2"] > 0) == exponentials, name


# ---- The command ---------------------------------------------------------------------------------


def test_the_command_times_what_was_asked_for_in_turns(monkeypatch, capsys):
    libraries_for("cpu")
    order = []

    def seconds(device, step):
        (name,) = step.run.args
        order.append(name)
        step.run()
        return {"copy": 0.001, "loss": 0.004, "full": 0.008}[name]

    monkeypatch.setattr(command.Cpu, "seconds", seconds)
    names = ["copy", "loss", "full"]
    arguments = "--rows 4 --vocabs 1000 2000 --dtypes bfloat16 --rounds 2 --stages".split()
    assert command.main([*arguments, *names]) == 0
    assert order == 2 * 3 * names  # a warm-up and two rounds, of both shapes
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.split(", ")[0] for block in blocks] == ["4 × 1,000", "4 × 2,000"]
    # 4 · 1000 elements of 2 bytes, in three matrices or two.
    assert [line.split() for line in blocks[0].splitlines()[2:]] == [
        ["copy", "1.000", "1.000", "1.000", "250.0000", "0.02", "12.5", "100.0"],
        ["loss", "4.000", "4.000", "4.000", "1000.0000", "0.00", "50.0", "16.7"],
        ["full", "8.000", "8.000", "8.000", "2000.0000", "0.00", "100.0", "12.5"],
    ]


def test_every_stage_of_the_cpu_runs_by_default(capsys):
    libraries_for("cpu")
    assert command.main("--rows 4 --vocabs 1000 --rounds 1 --threads 1".split()) == 0
    for block in capsys.readouterr().out.strip().split("\n\n"):
        assert [line.split()[0] for line in block.splitlines()[2:]] == list(STAGES)


@pytest.mark.parametrize(
    "arguments", [["--stages", "sweep"], ["--device", "cuda", "--stages", "full", "stores"]]
)
def test_an_unknown_stage_is_an_error_that_names_the_known(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(arguments)
    assert raised.value.code == 2
    message = capsys.readouterr().err
    assert f"unknown stage '{arguments[-1]}'" in message
    known = [name for name in STAGES if "cuda" not in arguments or name != "stores"]
    assert f"known: {', '.join(known)}" in message


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(library, "PATH", str(tmp_path))
    assert command.main([]) == 2
    assert "no cmake, no ninja, no" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_without_nvcc_it_says_so(monkeypatch, tmp_path):
    if shutil.which("cmake", path=library.PATH) is None:
        pytest.skip("no cmake")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(library.Unavailable, match="CUDA_HOME=.* has no bin/nvcc"):
        library.build("cuda", archs="90")


def test_what_does_not_compile_is_an_error_with_the_compilers_words(monkeypatch, tmp_path):
    libraries_for("cpu")
    monkeypatch.setenv("CXXFLAGS", "-fno-such-flag")
    with pytest.raises(library.DoesNotCompile, match="-fno-such-flag"):
        library.build("cpu", root=tmp_path)
