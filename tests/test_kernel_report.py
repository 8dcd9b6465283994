"""The report on the CUDA kernels' machine code: what it makes of listings whose truth is known, and
of the kernels that are built."""

import csv
from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks import kernel_report, machine_code
from benchmarks.kernel_report import Found, Kernel, Sweep
from kdkernels.backends import native

# Two loops, one in the other, as nvdisasm prints them. The outer one is left by a call, as for
# sm_80; what stands behind the end is never reached.
TOY = """
.text.toy:
        .type           toy,@function
toy:
	//## File "/there/csrc/cuda/row.h", line 7 inlined at "/there/csrc/cuda/row.h", line 20
	//## File "/there/csrc/cuda/row.h", line 20
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
.L_x_2:
	//## File "/there/csrc/cuda/row.h", line 9
        /*0020*/                   LDS.128 R8, [R84+UR15] ;
        /*0030*/              @!P3 BRA `(.L_x_3) ;
        /*0040*/                   HADD2.F32 R95, -RZ, R32.reuse.H0_H0 ;
        /*0050*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0060*/                   IMAD.U32 R28, R34, 0x10000, RZ ;
.L_x_4:
        /*0070*/                   MUFU.EX2 R37, R92 ;
        /*0080*/                   BSSY B0, `(.L_x_5) ;
        /*0090*/               @P0 BRA P4, `(.L_x_6) ;
        /*00a0*/                   MUFU.LG2 R37, R37 ;
        /*00b0*/                   FFMA R104, R83.reuse, R37, R104 ;
.L_x_6:
        /*00c0*/                   BSYNC B0 ;
.L_x_5:
        /*00d0*/                   STS.128 [R84+UR15], R32 ;
        /*00e0*/               @P2 BRA `(.L_x_2) ;
        /*00f0*/              @!P4 CALL.REL.NOINC `(.L_x_7) ;
        /*0100*/                   BRA `(.L_x_1) ;
.L_x_7:
        /*0110*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*0120*/               @P0 EXIT ;
        /*0130*/                   EXIT ;
.L_x_8:
        /*0140*/                   BRA `(.L_x_8);
.text.other:
other:
        /*0000*/                   EXIT ;
"""


def toy():
    return machine_code.graph_of(machine_code.parse(TOY)["toy"])


def addresses(graph, blocks):
    return [one.address for block in sorted(blocks) for one in graph.instructions(block)]


def test_parse():
    kernels = machine_code.parse(TOY)
    assert list(kernels) == ["toy", "other"]
    code = kernels["toy"].instructions
    assert [one.address for one in code] == list(range(0, 0x150, 16))
    assert (code[3].guard, code[3].opcode, code[3].operands) == ("@!P3", "BRA", "`(.L_x_3)")
    inlined = (("/there/csrc/cuda/row.h", 7), ("/there/csrc/cuda/row.h", 20))
    assert code[0].frames == code[1].frames == inlined
    assert code[2].frames == code[-1].frames == (("/there/csrc/cuda/row.h", 9),)
    assert kernels["toy"].labels[".L_x_4"] == 7
    assert kernels["other"].instructions[0].frames == ()


def test_loops():
    graph = toy()
    outer, inner = machine_code.loops_of(graph)
    assert addresses(graph, outer.blocks) == list(range(0x10, 0x110, 16))
    assert addresses(graph, inner.blocks) == list(range(0x20, 0xF0, 16))
    assert [graph.instructions(block)[-1].address for block in inner.latches] == [0xE0]
    assert graph.dominates(outer.header, inner.header)
    assert not graph.dominates(inner.header, outer.header)


@pytest.mark.parametrize(
    "line, target, goes_on",
    [
        ("BRA `(.L_x_1)", True, False),
        ("@!UP0 BRA `(.L_x_1)", True, True),
        ("BRA.U UP0, `(.L_x_1)", True, True),
        ("BRA.DIV UR4, `(.L_x_1)", True, True),
        ("CALL.REL.NOINC `(.L_x_1)", True, False),
        ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)", False, True),
        ("BSYNC B0", False, True),
        ("EXIT", False, False),
        ("@P1 EXIT", False, True),
        ("RET.REL.NODEC R28 `(toy)", False, False),
    ],
)
def test_where_it_goes_on(line, target, goes_on):
    code = machine_code.parse(f".text.one:\n.L_x_1:\n        /*0000*/   {line} ;\n")["one"]
    there, here = machine_code.branch_of(code, code.instructions[0])
    assert (there is not None, here) == (target, goes_on)


def test_jumps_that_are_not_followed():
    code = machine_code.parse(".text.one:\n        /*0000*/   BRX R2 -0x80 ;\n")["one"]
    with pytest.raises(machine_code.Unreadable, match="BRX at 0x0"):
        machine_code.graph_of(code)


@pytest.mark.parametrize(
    "opcode, kind, width",
    [
        ("MUFU.EX2", "ex2", None),
        ("MUFU.RCP", "rcp", None),
        ("FFMA.FTZ", "float", None),
        ("DFMA", "double", None),
        ("IMAD.MOV.U32", "integer", None),
        ("HADD2.F32", "half", None),
        ("HFMA2.MMA", "move", None),
        ("HFMA2.BF16_V2", "half", None),
        ("F2FP.BF16.F32.PACK_AB", "convert", None),
        ("LDC.64", "move", None),
        ("LDS.128", "load", 16),
        ("LD.E.128", "load", 16),
        ("LDG.E.64", "load", 8),
        ("LDG.E.STRONG.GPU", "load", 4),
        ("LD.E.U16", "load", 2),
        ("LDS.U8", "load", 1),
        ("STS", "store", 4),
        ("UBLKCP.S.G", "bulk", None),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT", "sync", None),
        ("FROBNICATE.128", "?", None),
    ],
)
def test_classes(opcode, kind, width):
    assert machine_code.class_of(opcode) == kind
    assert width in (None, machine_code.width_of(opcode))


def test_shortest_paths():
    graph = toy()
    outer, inner = machine_code.loops_of(graph)

    def facts(instruction):
        names = {"HADD2": "half", "MUFU.LG2": "logs"}
        return Counter(found for key, found in names.items() if instruction.opcode.startswith(key))

    def lengths(loop, forbidden):
        paths = machine_code.shortest_paths(graph, loop, facts, forbidden)
        return {tuple(sorted(dict(key))): counts.total() for key, counts in paths.items()}

    anything = lengths(inner, lambda one: False)
    assert anything == {(): 9, ("half",): 10, ("logs",): 11, ("half", "logs"): 12}
    no_half = lengths(inner, lambda one: one.opcode.startswith("HADD2"))
    assert no_half == {(): 9, ("logs",): 11}
    assert lengths(outer, lambda one: False)[()] == 12  # the inner loop once
    alike = machine_code.shortest_paths(graph, inner, lambda one: None, lambda one: False)
    assert [counts.total() for counts in alike.values()] == [9]
    paths = machine_code.shortest_paths(graph, inner, facts, lambda one: False)
    assert paths[frozenset({("logs", 1)})] == Counter(
        load=1, store=1, control=5, integer=1, ex2=1, lg2=1, float=1
    )


CHUNK = 8


def path(length, **marks):
    return frozenset(marks.items()), Counter(integer=length)


def test_ways_through():
    """Of all paths of a sweep the shortest one for a dtype and a temperature."""
    bfloat16 = dict(read=32, written=16, to_bfloat16=4)
    paths = dict(
        [
            path(100, read=32),  # writes nothing
            path(110, **bfloat16),
            path(105, read=48, written=16, to_bfloat16=4),  # the teacher in float32
            path(104, read=32, written=16, to_bfloat16=4, from_float16=16),
            path(103, read=32, written=16, to_float16=4),
            path(102, **bfloat16, pieces=16),  # not whole
            path(120, **bfloat16, powers=8, pieces=3),
            path(125, **bfloat16, powers=8, pieces=4),
            path(130, **bfloat16, exponentials=8),
            path(90, read=64, written=32),
        ]
    )
    found = [(*way[:2], way[3].total()) for way in kernel_report.ways_through(paths, 2)]
    assert kernel_report.chunk() == CHUNK
    assert found == [
        ("bfloat16", "1", 110),
        ("bfloat16", "2", 120),
        ("bfloat16", "other", 130),
        ("float32", "1", 90),
    ]
    near = dict([path(7, read=16), path(9, read=32), path(11, read=16, near=40)])
    found = [(*way[:2], way[3].total()) for way in kernel_report.ways_through(near, 1)]
    assert found == [("bfloat16", "any", 11), ("float32", "any", 9)]


def sweep(name, temperature, written=0, dtype="bfloat16", **counts):
    return Sweep(name, 0x10, dtype, temperature, CHUNK, 32, written, Counter(counts), 500)


def kernels(arch, divergence, whole):
    sweeps = (
        sweep("add_chunks<false>", "1", ex2=16, float=50),
        sweep("add_chunks<false>", "2", ex2=16, float=64),
        sweep("add_chunks<false>", "2", dtype="float32", float=1),
        sweep("gradient_sweep<Care::kFar>", "2", 16, ex2=16, lg2=8, float=24),
        sweep("gradient_sweep<Care::kNear>", "any", 16, ex2=24, rcp=8, float=128),
    )
    return Found(Kernel(divergence, True, True, whole), arch, 99, 0, 0, 1234, sweeps)


def test_table():
    found = [
        kernels(arch, divergence, whole)
        for arch in ("sm_80", "sm_90", "sm_120")
        for divergence in ("ForwardKL", "JSD")
        for whole in (False, True)
    ]
    found.append(Found(Kernel("scale_kernel"), "sm_90", 31, 0, 0, 632, ()))
    lines = kernel_report.table(found).splitlines()
    cells = {line.split(" | ")[0]: line.rstrip(" |").split(" | ")[1:] for line in lines}
    assert cells["| bfloat16, T = 2, for an element"][5:] == [
        f"{arch}, instructions" for arch in ("sm_80", "sm_90", "sm_120")
    ]
    assert cells["| ForwardKL: `add_chunks<false>`"] == ["2", "–", "–", "4", "–", *["10.0"] * 3]
    assert cells["| ForwardKL: `gradient_sweep<Care::kNear>`"][:5] == ["3", "–", "1", "4", "2"]
    far = cells["| ForwardKL, a row that is far: 2 sweeps"]
    assert far == ["4", "1", "–", "8", "2", *["16.0"] * 3]
    assert cells["| JSD: `far_mean_slope`"] == ["?"] * 8  # it is not there
    assert "in all | | | | | | 1,234 | 1,234 | 1,234 |" in "\n".join(lines)
    assert [str(one.kernel) for one in found[:2]] == [
        "ForwardKL distill+hard any",
        "ForwardKL distill+hard whole",
    ]


@pytest.mark.parametrize(
    "mangled, kernel",
    [
        (
            "_ZN3kdk3gpu45_GLOBAL__N__8543_12_operators_cu_9280dc12scale_kernelENS_9ScaleArgsE",
            Kernel("scale_kernel"),
        ),
        (
            "_ZN3kdk14distill_kernelINS0_4KindILNS_10DivergenceE2ELb1ELb0ELb1EEEEEvNS0_7RowTaskE",
            Kernel("JSD", distill=True, hard=False, whole=True),
        ),
    ],
)
def test_names(mangled, kernel):
    assert kernel_report.kernel_of(mangled) == kernel


def test_what_is_not_in_the_loop():
    calls = "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)", "CALL.REL.NOINC `(.L_x_9)"
    text = "".join(f"        /*00{i}0*/   {call} ;\n" for i, call in enumerate(calls))
    function, loop_end = machine_code.parse(f".text.one:\n{text}")["one"].instructions
    assert kernel_report.forbidden(function) and not kernel_report.forbidden(loop_end)


def test_which_kernel_is_the_main_one():
    """Whole rows from 9.0 on; before that the one that runs there."""
    found = [kernels(arch, "JSD", whole) for arch in ("sm_80", "sm_90") for whole in (False, True)]
    chosen = kernel_report.main_kernels(found, "JSD")
    assert {arch: one.kernel.whole for arch, one in chosen.items()} == {
        "sm_80": False,
        "sm_90": True,
    }


def test_without_a_program(monkeypatch, capsys):
    monkeypatch.setattr(machine_code, "tool", lambda name: None)
    assert kernel_report.main(["--module", __file__]) == 2
    assert "There is no cuobjdump: pip install triton" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, reason",
    [
        (None, "not built"),
        (SimpleNamespace(build_info=lambda: {"cuda_version": ""}), "was built without CUDA"),
    ],
)
def test_without_cuda(monkeypatch, capsys, module, reason):
    monkeypatch.setattr(native, "_C", module)
    assert kernel_report.main([]) == 2
    assert reason in capsys.readouterr().err


def test_of_what_has_no_machine_code(monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    monkeypatch.setattr(machine_code, "cuobjdump", lambda *arguments: "")
    assert kernel_report.main(["--module", str(tmp_path / "empty")]) == 2
    assert "without -lineinfo?" in capsys.readouterr().err
    assert kernel_report.main(["--module", str(tmp_path / "none")]) == 2


# ---- The kernels that are built ------------------------------------------------------------------

WITHOUT_CUDA = native._C is None or not native._C.build_info()["cuda_version"]
of_the_module = [
    pytest.mark.skipif(WITHOUT_CUDA, reason="kdkernels._C was built without CUDA"),
    pytest.mark.skipif(
        not (machine_code.tool("cuobjdump") and machine_code.tool("nvdisasm")),
        reason="no cuobjdump or no nvdisasm: pip install triton",
    ),
]


@pytest.fixture(scope="module")
def forward_kl(tmp_path_factory):
    """The file with the forward KL's kernels for one of the architectures."""
    cubins = machine_code.cubins(native._C.__file__, tmp_path_factory.mktemp("cubins"))
    archs = {arch for arch in native._C.build_info()["cuda_archs"] if not arch.endswith("PTX")}
    assert {machine_code.arch_of(cubin).removeprefix("sm_") for cubin in cubins} == archs
    found = [
        cubin
        for cubin in cubins
        if any(
            "distill_kernel" in name and "DivergenceE0E" in name
            for _, name in machine_code.resources(cubin)
        )
    ]
    assert len(found) == len(archs)
    return found[-1]


class TestForwardKL:
    pytestmark = of_the_module

    def test_every_instruction_is_known(self, forward_kl):
        kernels = machine_code.parse(machine_code.listing(forward_kl))
        opcodes = {one.opcode for code in kernels.values() for one in code.instructions}
        assert {opcode for opcode in opcodes if machine_code.class_of(opcode) == "?"} == set()

    def test_sweeps(self, forward_kl, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(machine_code, "cubins", lambda module, folder: [forward_kl])
        monkeypatch.setattr(kernel_report, "WAYS", {"ForwardKL": kernel_report.WAYS["ForwardKL"]})
        assert kernel_report.main(["--output", str(tmp_path)]) == 0
        report = (tmp_path / "kernel-report.md").read_text()
        assert capsys.readouterr().out.strip() == report.strip()
        assert "ForwardKL, a row that is near" in report and "| ? " not in report
        with (tmp_path / "kernel-report.csv").open() as file:
            rows = list(csv.DictReader(file))
        found = {}
        for row in rows:
            numbers = {key: int(row[key]) for key in ("elements", "bytes_read", "bytes_written")}
            counted = sum(int(row[kind]) for kind in kernel_report.KINDS)
            assert counted == int(row["instructions"]) < int(row["loop_instructions"])
            assert int(row["stack_bytes"]) == 0 and int(row["?"]) == 0
            assert numbers["elements"] == CHUNK
            size = {"bfloat16": 2, "float32": 4}[row["dtype"]]
            sides = 1 if "sum_of_offsets" in row["sweep"] or " hard " in row["kernel"] else 2
            assert numbers["bytes_read"] == sides * CHUNK * size
            writes = row["sweep"].startswith("gradient_sweep")
            assert numbers["bytes_written"] == (CHUNK * size if writes else 0)
            assert row["lg2"] == row["rcp"] == "0"
            key = row["kernel"], row["sweep"], row["dtype"], row["temperature"]
            assert key not in found
            found[key] = int(row["ex2"])
        # An exponential of student and teacher each; e^s is a power of e^{s/T}, or one more.
        two, three = 2 * CHUNK, 3 * CHUNK
        for rows_in in ("whole", "any"):
            for dtype in ("bfloat16", "float32"):
                both = f"ForwardKL distill+hard {rows_in}"
                for name in ("add_chunks<false>", "add_chunks<true>", "gradient_sweep<Care::kFar>"):
                    assert found[both, name, dtype, "1"] == two
                    assert found[both, name, dtype, "2"] == two
                    assert found[both, name, dtype, "other"] == three
                assert found[both, "gradient_sweep<Care::kNear>", dtype, "any"] == three
                assert found[both, "normaliser_difference", dtype, "any"] == two
                assert found[both, "sum_of_offsets", dtype, "any"] == 0
                for care in ("Far", "Near"):
                    name = f"gradient_sweep<Care::k{care}>"
                    assert found[f"ForwardKL distill {rows_in}", name, dtype, "any"] == two
                    assert found[f"ForwardKL hard {rows_in}", name, dtype, "any"] == CHUNK
