"""The speed-of-light model: its arithmetic, and that nothing measured is made up."""

import pytest

from benchmarks import model

SWEEPS = {"add_chunks<false>": (16, 184), "gradient_sweep<Care::kFar>": (16, 152)}
SWEEPS["gradient_sweep<Care::kNear>"] = (24, 800)


def lines(arch, whole):
    """As kernel-report.csv has them: two dtypes, and a temperature that is not asked for."""
    found = []
    for dtype in ("bfloat16", "float32"):
        for sweep, (special, instructions) in SWEEPS.items():
            for temperature in ("2", "other"):
                extra = 8 if temperature == "other" else 0
                counts = dict(ex2=str(special + extra), lg2="0", rcp="0")
                counts.update(elements="8", instructions=str(instructions + extra))
                name = f"ForwardKL distill+hard {whole}"
                found.append(dict(kernel=name, arch=arch, dtype=dtype, sweep=sweep, **counts))
                found[-1]["temperature"] = temperature
    return found


@pytest.mark.parametrize("arch, whole", [("sm_90", "whole"), ("sm_80", "any")])
def test_counts_of_the_sweeps_that_a_row_takes(arch, whole):
    both = [*lines("sm_90", "any"), *lines("sm_80", "whole"), *lines(arch, whole)]
    ways = model.counts(both, "ForwardKL", arch, 2.0)
    assert ways == {"far": (4.0, 42.0), "near": (5.0, 123.0)}


def test_bounds():
    gpu = model.Gpu("any", "sm_90", 100, 2.0, 5.0)
    memory, special, issue = model.bounds(gpu, 2**30, 4.0, 42.0)
    assert memory == pytest.approx(1e3 * 6 * 2**30 / (model.COPY_SHARE * 5e12))
    assert special == pytest.approx(1e3 * 4 * 2**30 / (16 * 100 * 2e9))
    assert issue == pytest.approx(1e3 * 42 * 2**30 / (128 * 100 * 2e9))


def document(gpu, **line):
    row = dict(divergence="forward_kl", temperature=2.0, alpha=0.5, backward=True, ms=1.6)
    row.update(variant="native", rows=8192, vocab=32000, dtype="bfloat16", status="ok", **line)
    return {"machine": {"gpu": gpu}, "rows": [row], "scale": None}


@pytest.mark.parametrize(
    "gpu, change, found",
    [
        ("NVIDIA H200", {}, 1.6),
        ("NVIDIA H100 80GB HBM3", {}, None),
        ("NVIDIA H200", {"variant": "pytorch"}, None),
        ("NVIDIA H200", {"vocab": 128256}, None),
        ("NVIDIA H200", {"backward": False}, None),
    ],
)
def test_only_result_files_are_measurements(gpu, change, found):
    documents = [document(gpu)]
    documents[0]["rows"][0].update(change)
    h200 = next(each for each in model.GPUS if each.name.startswith("H200"))
    assert model.measured(documents, h200, "forward_kl", 2.0, 32000) == found


def test_no_gpu_has_no_measurement():
    every = [
        line
        for gpu in model.GPUS
        for line in lines(gpu.arch, "whole" if gpu.arch != "sm_80" else "any")
    ]
    every += [{**line, "kernel": line["kernel"].replace("ForwardKL", "JSD")} for line in every]
    jsd = [
        {**line, "sweep": sweep, "temperature": "any"}
        for line in every
        if line["kernel"].startswith("JSD") and line["sweep"] == "add_chunks<false>"
        for sweep in (*SWEEPS, "far_mean_slope", "mean_slope")
    ]
    table = model.gpu_table([line for line in every if "JSD" not in line["kernel"]] + jsd, [])
    body = table.splitlines()[2:]
    assert len(body) == len(model.GPUS) * len(model.CASES) * len(model.VOCABS)
    assert all(line.endswith("| not measured |") for line in body)


def test_cpu_table():
    ms = dict(native=20.0, inplace=12.0, copy=6.0, exp=8.0, pytorch=500.0)
    rows = [dict(case="a case", device="cpu", status="ok", variant=v, ms=t) for v, t in ms.items()]
    rows += [dict(case="no yardstick", device="cpu", status="ok", variant="native", ms=1.0)]
    table = model.cpu_table([{"rows": rows, "scale": None}])
    assert table.splitlines()[2:] == ["| a case | 6.00 | 8.00 | 8.00 | 20.0 | 2.50 | 12.0 | 1.50 |"]
