"""Reads the machine code of compiled CUDA kernels: no GPU and no CUDA toolkit is needed, the triton
wheel has the two programs.

A cubin's listing becomes instructions with the source lines they were compiled from (the module is
built with -lineinfo), these blocks and loops, and of a loop the paths that an iteration can take.
"""

import functools
import importlib.util
import itertools
import os
import re
import shutil
import struct
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Unreadable(Exception):
    """There is no machine code to read here, or nothing to read it with; the text says why."""


# ---- The programs that read it -------------------------------------------------------------------


def tool(name):
    """A program of the CUDA toolkit, from there or from the triton wheel, which carries it."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton else []
    return shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)


def run_tool(name, *arguments, folder=None):
    program = tool(name)
    if program is None:
        raise Unreadable(f"There is no {name}: pip install triton, or have a CUDA toolkit in PATH.")
    beside = os.path.dirname(tool("nvdisasm") or "")  # which cuobjdump calls
    result = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join([beside, os.environ["PATH"]])},
    )
    if result.returncode:
        raise Unreadable(f"{name} failed: {result.stderr.strip()}")
    return result.stdout


def cuobjdump(*arguments):
    return run_tool("cuobjdump", *arguments)


def resources(module):
    """{(architecture, kernel): {"REG": …, "STACK": …, …}} of all machine code in a file."""
    found, arch, kernel = {}, None, None
    for line in cuobjdump("-res-usage", module).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif kernel and "REG:" in line:
            usage = re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", line)
            found[arch, kernel] = {name: int(value) for name, value in usage}
            kernel = None
    return found


def instructions(module, arch):
    """How often each instruction occurs in a file's code for an architecture, per kernel."""
    kernels, kernel = {}, None
    for line in cuobjdump("-sass", "-arch", arch, module).splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            kernel = kernels.setdefault(match[1], Counter())
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line):
            kernel[match[1]] += 1
    return kernels


FATBIN = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes that follow it
MAGIC = 0xBA55ED50


def cubins(module, folder):
    """Writes each cubin of a file into a folder of its own under `folder` -> their paths.

    cuobjdump names them after source and architecture, and distill.cu is compiled once for each
    divergence: taken out together they would overwrite each other, so it is one fat binary at a
    time.
    """
    data = Path(module).read_bytes()
    found, at = [], 0
    while (at := data.find(struct.pack("<I", MAGIC), at)) >= 0:
        _, version, header, payload = FATBIN.unpack_from(data, at)
        if version != 1 or header != FATBIN.size or at + header + payload > len(data):
            at += 4  # these bytes by chance
            continue
        here = Path(folder) / str(len(found))
        here.mkdir()
        (here / "all.fatbin").write_bytes(data[at : at + header + payload])
        run_tool("cuobjdump", "-xelf", "all", "all.fatbin", folder=here)
        found.append(sorted(here.glob("*.cubin")))
        at += header + payload
    return list(itertools.chain(*found))


def arch_of(cubin):
    return re.search(r"\.(sm_\w+)\.cubin$", str(cubin))[1]


def listing(cubin):
    return run_tool("nvdisasm", "-c", "-gi", cubin)


# ---- Instructions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@P0", "@!UP1" or ""
    opcode: str  # with all its suffixes
    operands: str
    frames: tuple = ()  # of (file, line): where it is from, and where that was inlined, and so on


@dataclass
class Code:
    """A kernel: its instructions in order, and what its labels stand before."""

    instructions: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)


LINE = re.compile(
    r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)\s*(.*?)\s*;"
)
SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')


def parse(text):
    """The listing of a cubin -> {kernel: Code}."""
    kernels, code = {}, None
    frames, complete = [], False
    shared = {}  # one tuple for all instructions of a place
    for line in text.splitlines():
        if line.startswith("\t//##"):
            if complete:
                frames, complete = [], False
            frames.append(line)
        elif match := LINE.match(line):
            complete = True
            key = tuple(frames)
            if key not in shared:
                places = (SOURCE.match(frame).groups() for frame in key)
                shared[key] = tuple((file, int(number)) for file, number in places)
            code.instructions.append(
                Instruction(int(match[1], 16), match[2] or "", match[3], match[4], shared[key])
            )
        elif match := re.match(r"\.text\.(\S+):$", line):
            code = kernels.setdefault(match[1], Code())
            frames = []
        elif code and (match := re.match(r"(\.L_\w+):$", line)):
            code.labels[match[1]] = len(code.instructions)
    return kernels


# By the name before the first dot. What has a letter U in front works for a warp as a whole.
CLASSES = {
    "float": "FADD FMUL FFMA FMNMX FMNMX3 FSEL FSETP FSET FCHK UFFMA UFMUL UFADD UFSETP",
    "double": "DADD DMUL DFMA DSETP DMNMX",
    "half": "HADD2 HMUL2 HSETP2 HMNMX2",
    "convert": "F2F F2FP F2I I2F I2FP UI2F UF2I",
    "integer": "IMAD IADD3 IADD ISETP LOP3 SHF LEA IABS PRMT VIADD VIMNMX VIADDMNMX IMNMX SEL PLOP3"
    " POPC FLO BREV UIADD3 UISETP ULOP3 USHF ULEA UIMAD USEL UPLOP3 UFLO UPOPC UPRMT",
    # HFMA2 is how ptxas writes a constant into a register.
    "move": "MOV UMOV HFMA2 R2UR S2R S2UR CS2R P2R R2P UP2UR LEPC LDC LDCU ULDC VOTE VOTEU",
    "load": "LDS LDG LD LDL LDSM",
    "store": "STS STG ST STL",
    "atomic": "RED REDG REDUX ATOM ATOMS ATOMG CREDUX",
    "shuffle": "SHFL",
    "bulk": "UBLKCP UTMACMDFLUSH UTMALDG UTMASTG DEPBAR",
    "sync": "BAR MEMBAR ERRBAR CGAERRBAR CCTL FENCE UCGABAR_ARV UCGABAR_WAIT SYNCS WARPSYNC ELECT"
    " ENDCOLLECTIVE NANOSLEEP",
    "control": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BMOV YIELD NOP KILL BPT",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}


def class_of(opcode):
    """One of CLASSES; of the multifunction unit "ex2", "lg2", "rcp", …; "?" of one not known."""
    name, *suffixes = opcode.split(".")
    if name == "MUFU":
        return suffixes[0].lower()
    if name == "HFMA2" and suffixes not in ([], ["MMA"]):
        return "half"
    return CLASS_OF.get(name, "?")


def width_of(opcode):
    """Bytes of a load or store, of one thread."""
    for suffix, width in {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}.items():
        if suffix in opcode.split(".")[1:]:
            return width
    return 4


# ---- Loops ---------------------------------------------------------------------------------------


@dataclass
class Graph:
    """Blocks are ranges of instructions, numbered in their order; 0 is the entry."""

    code: Code
    ranges: list
    successors: list

    def instructions(self, block):
        return self.code.instructions[slice(*self.ranges[block])]

    @functools.cached_property
    def above(self):
        """Of each block that is reached: the last one through which every way to it leads (Cooper,
        Harvey and Kennedy, A simple, fast dominance algorithm)."""
        order, seen, stack = [], {0}, [(0, iter(self.successors[0]))]
        while stack:
            block, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                order.append(block)
                stack.pop()
            elif following not in seen:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        place = {block: i for i, block in enumerate(order)}
        before = defaultdict(list)
        for block in order:
            for following in self.successors[block]:
                before[following].append(block)
        above = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in reversed(order[:-1]):
                new, *others = (b for b in before[block] if b in above)
                for other in others:
                    while new != other:
                        while place[new] < place[other]:
                            new = above[new]
                        while place[other] < place[new]:
                            other = above[other]
                if above.get(block) != new:
                    above[block], changed = new, True
        return above

    def dominates(self, block, other):
        """Whether every way to the other block leads through this one."""
        while other not in (block, 0):
            other = self.above[other]
        return other == block


def is_call(instruction):
    """Of a function. For sm_80 a loop is also left by a CALL, of a label in the kernel."""
    return instruction.opcode.startswith("CALL") and "`(.L_x_" not in instruction.operands


def branch_of(code, instruction):
    """(target or None, whether what follows runs too). A call of a function comes back, and where
    threads meet after a branch (BSYNC) stands right before where they go on."""
    name = instruction.opcode.split(".")[0]
    if name in ("EXIT", "RET", "KILL"):
        return None, bool(instruction.guard)
    if name in ("BRX", "JMP", "JMX"):
        raise Unreadable(f"{instruction.opcode} at {instruction.address:#x}: goes anywhere")
    if name not in ("BRA", "CALL") or is_call(instruction):
        return None, True
    target = code.labels[re.search(r"`\((\.L_x_\w+)\)", instruction.operands)[1]]
    # BRA.U UP0, …, BRA.DIV UR4, … and BRA P1, … have a condition among their operands.
    conditional = instruction.guard or not instruction.operands.startswith("`")
    return target, bool(conditional)


def graph_of(code):
    ends = {}
    starts = {0, len(code.instructions)}
    for i, instruction in enumerate(code.instructions):
        target, goes_on = branch_of(code, instruction)
        if target is not None or not goes_on:
            ends[i] = target, goes_on
            starts |= {i + 1} if target is None else {i + 1, target}
    bounds = sorted(starts)
    ranges = list(itertools.pairwise(bounds))
    block_at = {start: block for block, (start, _) in enumerate(ranges)}
    successors = []
    for _, end in ranges:
        target, goes_on = ends.get(end - 1, (None, True))
        following = [block_at[target]] if target in block_at else []
        if goes_on and end in block_at and block_at[end] not in following:
            following.append(block_at[end])
        successors.append(following)
    return Graph(code, ranges, successors)


@dataclass
class Loop:
    header: int
    blocks: frozenset
    latches: frozenset  # blocks that go back to the header


def loops_of(graph):
    """The natural loops: blocks from which a branch goes back to one that dominates it."""
    before = defaultdict(list)
    latches = defaultdict(set)
    for block in graph.above:
        for following in graph.successors[block]:
            before[following].append(block)
            if graph.dominates(following, block):
                latches[following].add(block)
    loops = []
    for header, ends in latches.items():
        blocks, waiting = {header}, list(ends)
        while waiting:
            block = waiting.pop()
            if block not in blocks:
                blocks.add(block)
                waiting.extend(before[block])
        loops.append(Loop(header, frozenset(blocks), frozenset(ends)))
    return sorted(loops, key=lambda loop: graph.ranges[loop.header])


def shortest_paths(graph, loop, facts, forbidden):
    """The paths of one iteration that no inner loop repeats, -> {facts on the way: Counter}.

    `facts(instruction)` is a Counter of what tells one path from another, or None. Of the paths
    with the same facts it is the one of fewest instructions, counted by class.
    """
    own = {}
    for block in loop.blocks:
        of_block = graph.instructions(block)
        if not any(map(forbidden, of_block)):
            marks = sum((found for found in map(facts, of_block) if found), Counter())
            own[block] = marks, Counter(class_of(one.opcode) for one in of_block)
    inside = {
        block: [
            to
            for to in graph.successors[block]
            if to in loop.blocks and not graph.dominates(to, block)
        ]
        for block in loop.blocks
    }

    @functools.cache
    def onward(block):
        """{facts from here to the loop's end: Counter}"""
        if block not in own:
            return {}
        marks, counts = own[block]
        ways = [{frozenset(): Counter()}] if block in loop.latches else []
        ways += [onward(to) for to in inside[block]]
        best = {}
        for way in ways:
            for key, rest in way.items():
                total = frozenset((Counter(dict(key)) + marks).items())
                path = rest + counts
                if total not in best or path.total() < best[total].total():
                    best[total] = path
        return best

    return onward(loop.header)
