"""What the benchmark says of its records: targets, exponents, tables, pages, pictures, files."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lines_of(bench, case, **variants):
    """Records of a case: {variant: fields that were measured}, all right unless they say else."""
    found = []
    for name, fields in variants.items():
        line = bench.measure.record(case, name, f"the {name} one")
        found.append({**line, "status": "ok", **fields})
    return found


def judged(bench, case, gpu="", **variants):
    found = bench.targets.judge(lines_of(bench, case, **variants), gpu)
    return {
        (target["what"], target["by"]): (target["limit"], target["verdict"]) for target in found
    }


# Targets


@pytest.mark.parametrize("times, verdict", ((1.001, "met"), (0.999, "not met")))
@pytest.mark.parametrize(
    "dtype, peer, limit",
    [("float32", "pytorch", 15.0), ("bfloat16", "pytorch-float32", 20.0)],
)
def test_targets_of_logits_on_a_cpu(bench, times, verdict, dtype, peer, limit):
    case = bench.suites.Dense("cpu", dtype, 256, 128256, temperature=2.0)
    ours = dict(times_native=1.0, share_of_copy=0.4, peak_mb=0.1)
    peers = {peer: dict(times_native=limit * times), "compiled": dict(times_native=6.0 * times)}
    peers["trl"] = dict(times_native=0.1)
    assert judged(bench, case, native=ours, **peers) == {
        ("time ÷ kdkernels'", peer): (limit, verdict),
        ("time ÷ kdkernels'", "compiled"): (6.0, verdict),
    }
    assert not judged(bench, case.loss_only(), native=ours, **peers)
    tiny = bench.suites.Dense("cpu", dtype, 4, 16, temperature=2.0)
    assert not judged(bench, tiny, native=ours, **peers)


@pytest.mark.parametrize("times, verdict", ((1.1, "met"), (0.9, "not met")))
def test_targets_of_heads_on_a_cpu(bench, times, verdict):
    case = bench.suites.Linear("cpu", "float32", 2048, 65536, "jsd", 1.0, 1.0)
    ours = dict(times_native=1.0, times_products=1.35 / times, peak_mb=10.0)
    right = dict(times_native=times, peak_mb=times * 10.0)
    slower = dict(times_native=9.0, peak_mb=99.0)
    wrong = dict(status="wrong: loss", times_native=0.5, peak_mb=5.0)
    eager = dict(times_native=0.5, peak_mb=5.0)
    products = dict(times_native=None, times_products=1.0)
    variants = dict(native=ours, pytorch=slower, liger=right, trl=wrong, eager=eager)
    found = judged(bench, case, **variants, products=products)
    assert found == {
        ("time of the fastest other ÷ kdkernels'", "liger"): (1.0, verdict),
        ("time ÷ the products'", "native"): (1.35, verdict),
        ("extra memory of the leanest other ÷ kdkernels'", "liger"): (1.0, verdict),
    }


@pytest.mark.parametrize("times, verdict", ((10.1, "met"), (9.9, "not met")))
def test_targets_of_kept_classes_on_a_cpu(bench, times, verdict):
    case = bench.suites.Sparse("cpu", "float32", 1024, 32000)
    peers = {"pytorch": dict(times_native=times), "pytorch-shared": dict(times_native=1.0)}
    found = judged(bench, case, native=dict(times_native=1.0), **peers)
    assert found == {("time ÷ kdkernels'", "pytorch"): (10.0, verdict)}


@pytest.mark.parametrize("gpu", ("NVIDIA H200", "NVIDIA H100 80GB HBM3"))
@pytest.mark.parametrize("times, verdict", ((0.99, "met"), (1.01, "not met")))
def test_targets_on_a_gpu(bench, gpu, times, verdict):
    """Milliseconds are promised for one kind of GPU, the rest for all."""
    dense = bench.suites.Dense("cuda", "bfloat16", 8192, 128256, temperature=2.0)
    ours = dict(ms=1.75 * times, share_of_copy=0.85 / times, peak_mb=times)
    inplace = dict(ms=1.0, peak_mb=0.6 * times, gradient_mb=0.4 * times)
    triton = dict(ms=2.7 * times)
    found = judged(bench, dense, gpu, native=ours, inplace=inplace, triton=triton)
    expected = {
        ("share of copy", "native"): (0.85, verdict),
        ("MB beyond the gradient", "native"): (1.0, verdict),
        ("MB in all", "inplace"): (1.0, verdict),
    }
    if "H200" in gpu:
        expected["ms", "native"], expected["ms", "triton"] = (1.75, verdict), (2.7, verdict)
    assert found == expected

    linear = bench.suites.Linear("cuda", "bfloat16", 8192, 128256, "jsd", 1.0, 1.0, hidden=4096)
    ours = dict(ms=56.35 * times, times_native=1.0, times_products=1.15 * times)
    found = judged(bench, linear, gpu, native={**ours, "peak_mb": 2000.0 * times})
    assert set(found.values()) >= {(1.15, verdict), (2000.0, verdict)}
    assert (("ms", "native") in found) == ("H200" in gpu)

    sparse = bench.suites.Sparse("cuda", "bfloat16", 8192, 151936)
    ours = dict(ms=1.4 * times, share_of_copy=0.8 / times)
    found = judged(bench, sparse, gpu, native=ours)
    assert found[("share of copy", "native")] == (0.8, verdict)
    assert (("ms", "native") in found) == ("H200" in gpu)


def test_nothing_is_promised_of_what_was_not_right(bench):
    case = bench.suites.Dense("cpu", "float32", 256, 128256, temperature=2.0)
    wrong = dict(status="wrong: loss", times_native=1.0)
    assert not judged(bench, case, native=wrong, pytorch=dict(times_native=99.0))


# Scaling


@pytest.mark.parametrize("slope", (0.5, 1.0, 2.0, -1.0))
def test_exponent(bench, slope):
    sizes = [256, 1024, 4096, 10000]
    found = bench.scaling.exponent(sizes, [3.0 * size**slope for size in sizes])
    assert found == pytest.approx(slope)
    assert bench.scaling.exponent([5], [1.0]) is None


def test_a_cost_that_grows_faster_is_said_to(bench):
    records = []
    for size in (1024, 2048, 4096, 8192, 16384, 32768):
        case = bench.suites.Dense("cpu", "float32", 64, size)
        native = dict(ms=5.0 + size * 1e-3, peak_mb=0.0)
        square = dict(ms=5.0 + size**2 * 1e-3, peak_mb=size * 1e-3)
        broken = dict(status="failed: X", ms=None)
        records += lines_of(bench, case, native=native, square=square, broken=broken)
    fits = bench.scaling.fits(records, "vocab")
    found = {(fit["variant"], fit["of"]): fit for fit in fits}
    assert found.keys() == {("native", "ms"), ("square", "ms"), ("square", "peak_mb")}
    assert found["native", "ms"]["verdict"] == "ok" and found["native", "ms"]["exponent"] < 1
    assert found["square", "ms"]["verdict"] == "grows faster"
    assert found["square", "ms"]["exponent"] == pytest.approx(2.0, abs=0.01)
    assert found["square", "peak_mb"]["exponent"] == pytest.approx(1.0)
    assert found["native", "ms"]["sizes"] == [8192, 16384, 32768]
    text = bench.scaling.terminal(records, "vocab", fits)
    assert "grows faster" in text and "32,768" in text and "failed: X" in text


def test_scaled_sizes(bench):
    """Tokens from 2⁸ to 2¹⁵, classes from 1k to 262k, K from 8 to 1,024, threads from 1 on."""
    first = {name: published("cpu", 2)[0][0] for name, published in bench.suites.PUBLISHED.items()}
    sizes = {
        (name, axis): [getattr(each, field) for each in cases]
        for name, case in first.items()
        for axis in bench.scaling.axes(name, "cpu", 2)
        for field, cases in [bench.scaling.series(case, axis, 2)]
    }
    for name in first:
        assert sizes[name, "rows"] == [2**i for i in range(8, 16)]
        assert sizes[name, "vocab"][0] == 1024 and sizes[name, "vocab"][-1] == 262144
        assert sizes[name, "threads"][0] == 1
    assert sizes["sparse", "k"] == [8, 16, 32, 64, 128, 256, 512, 1024]
    with pytest.raises(ValueError, match="--scale k: dense has rows, vocab, threads"):
        bench.scaling.series(first["dense"], "k", 2)


def test_scale_run(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    options = ["dense", "--scale", "vocab", "--rows", "8", "--vocab", "600", "900"]
    options += ["--variants", "eager", "pytorch", "--rounds", "1", "--no-memory", "--device", "cpu"]
    assert bench.command.main([*options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "exponent" in printed and "fitted" in printed
    (path,) = tmp_path.glob("dense-vocab-some-*.json")
    document = json.loads(path.read_text())
    assert {row["variant"] for row in document["rows"]} >= {"eager", "pytorch"}
    assert path.with_suffix(".csv").is_file() and path.with_suffix(".summary.md").is_file()
    time = path.with_suffix(".time.svg").read_text()
    assert "PyTorch" in time and not re.search(r"[ \t]$", time, re.MULTILINE)
    assert not path.with_suffix(".memory.svg").exists()


# Tables and pictures


def some_records(bench):
    case = bench.suites.Dense("cpu", "float32", 256, 128256, temperature=2.0)
    ours = dict(ms=51.0, ms_min=50.0, ms_max=60.0, times_native=1.0, peak_mb=0.2, bytes=394002432)
    ours.update(share_of_copy=0.42, gb_per_s=6.9, exponentials=65667072, gexp_per_s=1.28, calls=5)
    other = {**ours, "ms": 1117.0, "times_native": 20.4, "peak_mb": 525.3, "gexp_per_s": 0.058}
    copy = {**ours, "ms": 24.0, "gb_per_s": 16.5, "share_of_copy": 1.0}
    exp = dict(ms=30.0, ms_min=29.0, ms_max=31.0, gexp_per_s=2.2, exponentials=65667072)
    absent = dict(status="missing: trl: ModuleNotFoundError: No module named 'trl'")
    lines = lines_of(
        bench, case, native=ours, pytorch=other, trl=absent, gkd=absent, copy=copy, exp=exp
    )
    half = bench.suites.Dense("cpu", "bfloat16", 256, 128256, temperature=2.0)
    return lines + lines_of(bench, half, native=ours, pytorch=other)


def test_tables(bench):
    records = some_records(bench)
    (heading, header, rows, others), _ = bench.report.tables(records)
    assert heading.startswith("dense: 256 × 128,256, float32, forward KL and cross-entropy, T = 2")
    shown = dict(zip(header, rows[0], strict=True))
    assert shown[""] == "the native one" and shown["ms"] == "51.0" and shown["% of copy"] == "42%"
    assert "loss error" not in header, "no empty columns"
    assert others == ["the trl one; the gkd one: " + records[2]["status"]]


def test_summary_has_the_types_side_by_side(bench):
    machine = bench.results.machine()
    text = bench.report.summary(some_records(bench), machine, 5)
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert head == (
        "| 256 × 128,256 | float32, ms | × kdkernels | extra MB | bfloat16, ms | × kdkernels "
        "| extra MB |"
    )
    assert rows[1] == "| the pytorch one | 1,117 | 20.4 | 525 | 1,117 | 20.4 | 525 |"
    assert "Not here: the trl one, the gkd one." in text and "the pytorch one." not in text
    assert machine["commit"] in text and "42% of a copy" in text and "Called once" not in text
    records = some_records(bench)
    records[0]["status"], records[1]["calls"] = "wrong: loss off by 1", 1
    records[6]["status"] = "lacks: a temperature"
    text = bench.report.summary(records, machine, 5)
    assert "| the native one | wrong |  |  | – |  |  |" in text, "what is wrong is marked"
    assert "| the pytorch one | 1,117¹ |" in text and "¹ Called once" in text


def test_pictures(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    records = some_records(bench)
    assert bench.plots.roofline(records, tmp_path / "roofline.svg")
    text = (tmp_path / "roofline.svg").read_text()
    assert (
        "copy, 16.5 GB/s" in text and "2.2 G exponentials/s" in text and "the pytorch one" in text
    )
    assert bench.plots.over(records, "vocab", "ms", tmp_path / "time.png")
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.svg"
    bench.plots.roofline(records, again)
    assert again.read_text() == text, "the same records give the same picture"
    nothing = [line for line in records if line["variant"] == "trl"]
    assert not bench.plots.roofline(nothing, tmp_path / "none.svg")
    assert not bench.plots.over(nothing, "vocab", "ms", tmp_path / "none.svg")


def test_no_pictures_without_matplotlib(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench.command.picture(bench.plots.roofline, some_records(bench), tmp_path / "x.svg")
    assert "pip install kdkernels[bench]" in capsys.readouterr().err


# Pages that include tables


def test_pages_include_files_word_for_word(bench, tmp_path):
    (tmp_path / "table.md").write_text("| a |\n| --- |\n| 1 |\n")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- from table.md -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    text = bench.results.include(page, tmp_path)
    begin = "before\n<!-- from table.md -->\n| a |\n"
    assert text == begin + "| --- |\n| 1 |\n<!-- end -->\nafter <!-- end -->\n"
    page.write_text(text)
    assert bench.results.include(page, tmp_path) == text
    page.write_text("<!-- from none.md -->\n<!-- end -->\n")
    with pytest.raises(FileNotFoundError, match="includes none.md, which is not there"):
        bench.results.include(page, tmp_path)


@pytest.mark.parametrize("page", ("README.md", "docs/performance.md", "docs/scaling.md"))
def test_published_tables_are_those_of_the_result_files(bench, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- from benchmarks/results/" in text
    assert bench.results.include(ROOT / page) == text, "run make pages"
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(name).exists(), name


def test_result_files_say_where_they_come_from(bench):
    files = sorted(bench.results.FOLDER.glob("*.json"))
    assert files
    for path in files:
        machine = json.loads(path.read_text())["machine"]
        assert re.fullmatch("[0-9a-f]{7,40}", machine["commit"]) and machine["date"], path.name
        assert machine["packages"]["torch"] and machine["cpu"], path.name
        assert "out" not in json.loads(path.read_text())["settings"], "a folder of that machine"


# The command


def test_what_was_measured_is_kept_when_a_run_is_ended(bench, monkeypatch, tmp_path, capsys):
    measured = bench.measure.Run.measure

    def measure(self, case, names):
        if case.alpha == 1:
            raise KeyboardInterrupt
        return measured(self, case, names)

    monkeypatch.setattr(bench.measure.Run, "measure", measure)
    options = ["dense", "--quick", "--alphas", "0.5", "1", "--dtypes", "float32", "--rounds", "1"]
    options += ["--divergences", "tvd", "--temperatures", "2", "--variants", "pytorch"]
    with pytest.raises(KeyboardInterrupt):
        bench.command.main([*options, "--device", "cpu", "--out", str(tmp_path)])
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {row["alpha"] for row in document["rows"]} == {
        0.5
    } and "PyTorch" in capsys.readouterr().out


def test_listing(bench, capsys):
    assert bench.command.main(["dense", "--list", "--device", "cpu", "--threads", "2"]) == 0
    printed = capsys.readouterr().out
    assert "dense: 256 × 128,256, bfloat16, forward KL" in printed and "liger" in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["dens"], "unknown suite dens: expected dense, linear, sparse, loop, stages, cache or "),
        (["dense", "--variants", "nobody"], "--variants nobody: expected some of compiled"),
        (["dense", "--dtypes", "int8"], "invalid choice: 'int8'"),
        (["dense", "--rows", "0"], "0: expected at least 1"),
        (["dense", "--scale", "k"], "--scale k: dense has rows, vocab, threads"),
        (["dense", "--scale", "rows", "--alphas", "0", "1"], "--scale rows varies one size"),
        (["dense", "--scale", "rows", "--quick"], "--scale rows: one size alone has no exponent"),
        (["loop", "--rows", "100", "--rounds", "1"], "rows=100: loop takes sequences of 128"),
        (["sparse", "--k", "99999999", "--quick"], "k=99999999: V is 4096"),
        (["--include", "nowhere.md"], "nowhere.md"),
    ],
)
def test_wrong_arguments_are_named(bench, capsys, arguments, said):
    with pytest.raises(SystemExit) as status:
        bench.command.main([*arguments, "--device", "cpu"])
    assert status.value.code == 2
    assert said in capsys.readouterr().err


def test_published_files_are_replaced_by_a_whole_run_alone(bench):
    parse = bench.command.parser().parse_args
    assert not bench.command.narrowed(parse(["dense", "--rounds", "9", "--out", "x"]))
    narrow = (["--quick"], ["--rows", "8"], ["--variants", "native"], ["--dtypes", "float32"])
    for option in (*narrow, ["--loss-only"], ["--alphas", "0"], ["--threads", "1"]):
        assert bench.command.narrowed(parse(["dense", *option])), option


def test_files_hold_no_nan(bench, tmp_path):
    document = {"machine": bench.results.machine(), "rows": [{"a": float("nan"), "b": [1.5]}]}
    bench.results.write(tmp_path, "x", document, {"all": "page"})
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert read["rows"] == [{"a": None, "b": [1.5]}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.all.md", "x.csv", "x.json"]
    bench.results.remove(tmp_path, "x")
    assert not list(tmp_path.iterdir())


def test_variants_of_the_loop_by_either_name(bench):
    parse = bench.command.parser().parse_args
    options = ["loop", "--device", "cpu", "--variants", "native", "pytorch-heads"]
    (names,) = bench.command.planned(parse(options))["loop"].values()
    assert names == ["native-heads", "pytorch-heads", "native-logits"]
    options = ["loop", "--device", "cpu", "--scale", "rows"]
    for names in bench.command.planned(parse(options))["loop"].values():
        assert names == ["native-heads", "pytorch-heads"]


def test_options_change_what_is_measured(bench):
    parse = bench.command.parser().parse_args
    common = ["--device", "cpu", "--threads", "1"]
    plan = bench.command.planned(parse(["dense", "--dtypes", "float32", *common]))["dense"]
    assert {case.dtype for case in plan} == {"float32"} and len(plan) > 5
    options = ["--rows", "8", "16", "--vocab", "100", "--divergences", "tvd", "--alphas", "0.25"]
    plan = bench.command.planned(parse(["dense", *options, "--loss-only", *common]))["dense"]
    assert {(case.rows, case.vocab, case.divergence, case.alpha) for case in plan} == {
        (rows, 100, "tvd", 0.25) for rows in (8, 16)
    }
    assert not any(case.backward for case in plan)
    options = ["dense", "--scale", "vocab", "--vocab", "500", "700", *common]
    plan = bench.command.planned(parse(options))["dense"]
    assert [case.vocab for case in plan] == [500, 700], "sizes that are named are those"
    plan = bench.command.planned(parse(["linear", "--hidden", "64", *common]))["linear"]
    assert {case.hidden for case in plan} == {64}
    assert set(bench.command.planned(parse(common))) == {"dense", "linear", "sparse", "loop"}


def test_command_line(tmp_path):
    """As users start it, from wherever they are."""
    command = [sys.executable, "-m", "kdkernels", "bench", "dense", "--list", "--device", "cpu"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "kdkernels, inplace=True" in found.stdout
    found = subprocess.run([*command[:4], "--rows"], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 2 and "python -m kdkernels bench: error:" in found.stderr


def test_command_line_without_the_benchmarks(monkeypatch, tmp_path, capsys):
    cli = importlib.import_module("kdkernels.cli")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "kdkernels" / "cli.py"))
    assert cli.main(["bench", "dense"]) == 2
    assert "come with the source, not with the installed package" in capsys.readouterr().err
