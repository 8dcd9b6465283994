"""Does the cost grow as it should? One size is varied, and an exponent fitted to time and memory.

Time ~ size^e: e = 1 is linear, -1 for threads. A cost per call makes small sizes look flat, so that
the exponent is fitted to the larger half of the sizes.
"""

import math
import os
from dataclasses import replace

from .report import markdown_table, number, provenance, text_table

LIMIT = 1.1  # what is above grows faster than what is computed
THREADS_LIMIT = -0.5
SOME_MB = 1.0  # a peak below is as large as its noise


def axes(suite, device, threads):
    """{axis: (the field of a case, its sizes, the other sizes)} of a suite."""
    big = device == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fixed = {"hidden": 1024 if big else 128} if suite in ("linear", "loop") else {}
    found = {
        "rows": (
            "rows",
            [2**i for i in range(8, 16)],
            {**fixed, "vocab": 32000 if big else 2048},
        ),
        "vocab": (
            "vocab",
            [1024, 4096, 16384, 32768, 65536, 131072, 262144],
            {**fixed, "rows": 4096 if big else 128},
        ),
    }
    if suite == "sparse":
        found["k"] = ("k", [2**i for i in range(3, 11)], {"rows": 2048 if big else 256})
    if device == "cpu":
        found["threads"] = ("threads", sorted({1, *powers(cores), cores}), {})
    return found


def powers(most):
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def series(case, axis, threads):
    """Cases along an axis of the suite's.

    Raises:
        ValueError: the suite has no such axis; the text lists those it has.
    """
    known = axes(case.suite, case.device, threads)
    if axis not in known:
        raise ValueError(f"--scale {axis}: {case.suite} has {', '.join(known)}")
    field, sizes, others = known[axis]
    return field, [replace(case, **others, **{field: size}) for size in sizes]


def exponent(sizes, values):
    """The slope of a line through (log size, log value): value ~ size^slope. None of one point."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True)]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    square = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / square


def fits(records, field):
    """How each variant's time and memory grow, as dicts."""
    groups = {}
    for line in records:
        if line["status"] == "ok" and line["ms"] is not None:
            groups.setdefault(line["variant"], []).append(line)
    found = []
    for name, lines in groups.items():
        lines.sort(key=lambda line: line[field])
        half = lines[len(lines) // 2 if len(lines) > 3 else 0 :]
        for what in ("ms", "peak_mb"):
            least = SOME_MB if what == "peak_mb" else 0.0
            known = [line for line in half if line[what] is not None and line[what] > least]
            slope = exponent([x[field] for x in known], [x[what] for x in known])
            if slope is None:
                continue
            found.append(
                dict(
                    variant=name,
                    title=lines[0]["title"],
                    over=field,
                    of=what,
                    sizes=[line[field] for line in known],
                    exponent=slope,
                    verdict=verdict(field, what, slope),
                )
            )
    return found


def verdict(field, what, slope):
    if field == "threads" and what == "ms":
        return "ok" if slope < THREADS_LIMIT else "does not scale"
    return "grows faster" if slope > LIMIT else "ok"


def rows(records, field):
    """Sizes down, variants across: milliseconds, and MB where they were measured."""
    names = {line["variant"]: line["title"] for line in records}
    found = {}
    for line in records:
        found.setdefault(line[field], {})[line["variant"]] = line
    memory = [name for name in names if any(x["variant"] == name and x["peak_mb"] for x in records)]
    header = [field, *(f"{names[name]}, ms" for name in names)]
    header += [f"{names[name]}, extra MB" for name in memory]
    table = []
    for size, lines in found.items():
        row = [f"{size:,}"]
        for name in names:
            line = lines.get(name)
            row.append(number(line["ms"]) or line["status"] if line else "")
        row += [number(lines[name]["peak_mb"]) if name in lines else "" for name in memory]
        table.append(row)
    return header, table


FIT_HEADER = ["fitted to the larger half", "of", "exponent", ""]


def fit_rows(found):
    names = {"ms": "time", "peak_mb": "extra memory"}
    return [
        [
            fit["title"],
            f"{names[fit['of']]} over {fit['over']}",
            f"{fit['exponent']:.2f}",
            fit["verdict"],
        ]
        for fit in found
    ]


def terminal(records, field, found):
    return "\n\n".join([text_table(*rows(records, field)), text_table(FIT_HEADER, fit_rows(found))])


def page(records, field, found, machine):
    """The same as Markdown."""
    some = records[0]
    about = f"{some['suite']}, {some['dtype']}, {some['objective']}, over {field}"
    fixed = [
        f"{name} = {some[name]:,}"
        for name in ("rows", "vocab", "hidden", "k", "threads")
        if some[name] is not None and name != field
    ]
    note = f"{about}; {', '.join(fixed)}; on {provenance(machine)}"
    tables = markdown_table(*rows(records, field)), markdown_table(FIT_HEADER, fit_rows(found))
    return "\n\n".join([note, *tables])
