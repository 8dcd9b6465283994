"""What is promised of a case, and whether it was kept."""

from .case import WORK

# What a case is told by, in a record.
CASE = "suite device dtype rows hidden vocab k tail divergence temperature alpha backward threads"
CASE = tuple(CASE.split())
SMALL_MB = 1.0  # a few numbers for each row; the smallest gradient has 524 MB
OVERHEAD = {"cpu": 1.35, "cuda": 1.15}  # of a head's matrix products
# The formula in PyTorch that is exact: DESIGN.md, section 5.
EAGER = {"float32": ("pytorch", 15.0), "bfloat16": ("pytorch-float32", 20.0)}
H200_MS = {  # (suite, divergence, temperature, alpha, V): milliseconds, at N = 8,192
    ("dense", "forward_kl", 2.0, 0.5, 32000): {"native": 0.45, "triton": 0.45},
    ("dense", "forward_kl", 2.0, 0.5, 128256): {"native": 1.75, "triton": 2.7},
    ("dense", "forward_kl", 2.0, 0.5, 262144): {"native": 3.6},
    ("dense", "jsd", 1.0, 0.5, 128256): {"native": 2.2},
    ("linear", "forward_kl", 1.0, 1.0, 128256): {"native": 56.35},
    ("linear", "jsd", 1.0, 1.0, 128256): {"native": 56.35},
    ("sparse", "forward_kl", 1.0, 0.5, 151936): {"native": 1.4},
}


def case_key(line):
    return tuple(line[name] for name in CASE)


def by_case(records):
    """{what tells a case: its records}, in their order."""
    groups = {}
    for line in records:
        groups.setdefault(case_key(line), []).append(line)
    return groups


def judge(records, gpu=""):
    """What was promised of every case that was measured, with what came out, as dicts.

    Args:
        gpu: the device's name, for what is promised of one kind.
    """
    judged = []
    for key, lines in by_case(records).items():
        right = {line["variant"]: line for line in lines if line["status"] == "ok"}
        if "native" not in right:
            continue
        case = dict(zip(CASE, key, strict=True))
        for what, sign, limit, measured, by in promised(case, right, gpu):
            met = measured >= limit if sign == "≥" else measured <= limit
            target = dict(what=what, sign=sign, limit=limit, measured=measured, by=by)
            judged.append({**case, **target, "verdict": "met" if met else "not met"})
    return judged


def promised(case, lines, gpu):
    """(what, sign, limit, what was measured, of which variant) of each target that applies."""
    if not case["backward"] or case["rows"] * case["vocab"] < WORK:
        return
    kinds = {"dense": of_dense, "linear": of_linear, "sparse": of_sparse}
    if case["suite"] in kinds:
        yield from kinds[case["suite"]](case, lines)
    named = "suite divergence temperature alpha vocab".split()
    if "H200" in gpu and case["rows"] == 8192 and case["dtype"] == "bfloat16":
        for name, limit in H200_MS.get(tuple(case[each] for each in named), {}).items():
            if name in lines:
                yield "ms", "≤", limit, lines[name]["ms"], name


def of_dense(case, lines):
    ours = lines["native"]
    if case["device"] == "cuda":
        if ours["share_of_copy"] is not None and case["divergence"] == "forward_kl":
            yield "share of copy", "≥", 0.85, ours["share_of_copy"], "native"
        yield "MB beyond the gradient", "≤", SMALL_MB, ours["peak_mb"], "native"
        if inplace := lines.get("inplace"):
            whole = inplace["peak_mb"] + inplace["gradient_mb"]
            yield "MB in all", "≤", SMALL_MB, whole, "inplace"
        return
    objective = case["divergence"], case["temperature"], case["alpha"]
    if objective != ("forward_kl", 2.0, 0.5) or case["dtype"] not in EAGER:
        return
    name, limit = EAGER[case["dtype"]]
    for peer, least in ((name, limit), ("compiled", 6.0)):
        if peer in lines:
            yield "time ÷ kdkernels'", "≥", least, lines[peer]["times_native"], peer


def others(lines):
    """Those with the same work as kdkernels: not its own, not the yardsticks."""
    own = ("native", "triton", "eager", "inplace", "products", "copy", "order", "models")
    return {name: line for name, line in lines.items() if name not in own}


def of_linear(case, lines):
    ours, peers = lines["native"], others(lines)
    if peers:
        name = min(peers, key=lambda each: peers[each]["times_native"])
        yield "time of the fastest other ÷ kdkernels'", "≥", 1.0, peers[name]["times_native"], name
    if ours["times_products"] is not None and case["alpha"] > 0:
        limit = OVERHEAD[case["device"]]
        yield "time ÷ the products'", "≤", limit, ours["times_products"], "native"
    peaks = {name: line["peak_mb"] for name, line in peers.items() if line["peak_mb"] is not None}
    if peaks and ours["peak_mb"] is not None:
        name = min(peaks, key=peaks.get)
        ratio = peaks[name] / ours["peak_mb"]
        yield "extra memory of the leanest other ÷ kdkernels'", "≥", 1.0, ratio, name
    if case["device"] == "cuda" and case["hidden"] == 4096 and ours["peak_mb"] is not None:
        yield "MB beyond the gradients", "≤", 2000.0, ours["peak_mb"], "native"


def of_sparse(case, lines):
    ours = lines["native"]
    if case["device"] == "cuda":
        if ours["share_of_copy"] is not None:
            yield "share of copy", "≥", 0.8, ours["share_of_copy"], "native"
    elif "pytorch" in lines:
        yield "time ÷ kdkernels'", "≥", 10.0, lines["pytorch"]["times_native"], "pytorch"
