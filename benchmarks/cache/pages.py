"""What `bench cache` shows: tables and a picture, all from the records of a run."""

import math
import statistics
from pathlib import Path

from .. import plots
from ..report import markdown_table, number, provenance
from . import speed, students

SIGNIFICANT = 2  # standard errors
SCORES = (  # (a field, its head, times, decimals, whether more is better)
    ("perplexity", "perplexity", 1, 1, False),
    ("kl", "KL from the teacher", 1, 3, False),
    ("calibration_error", "calibration error, %", 100, 2, False),
    ("accuracy", "accuracy, %", 100, 2, True),
    ("agreement", "agreement, %", 100, 2, True),
)
STUDENT_HEADER = [
    "α",
    "bytes a token",
    "what students learn from",
    "kind",
    "really",
    "tokens",
    *(head for _, head, *_ in SCORES),
    "kept, %",
    "KL of storing",
]


# Students


def by_method(records):
    """{(α, budget, method): its records, one a seed}, in the order in which they are shown."""
    found = {}
    for line in records:
        found.setdefault((line["alpha"], line["budget"], line["method"]), []).append(line)

    def order(item):
        (alpha, budget, method), _ = item
        return bool(budget), -(alpha or 0), budget or 0, students.METHODS.index(method)

    return dict(sorted(found.items(), key=order))


def student_rows(records):
    """Under STUDENT_HEADER, as text."""
    found, rows = by_method(records), []
    for (alpha, budget, method), lines in found.items():
        rivals = [x for (*others, _), x in found.items() if others == [alpha, budget]]
        rows.append(
            [
                "" if alpha is None else f"{alpha:g}",
                "–" if budget is None else str(budget),
                method,
                ends(lines, "kind", str),
                ends(lines, "bytes_per_token", "{:.1f}".format),
                ends(lines, "tokens", "{:,}".format),
                *(score(lines, budget is not None and rivals, *each) for each in SCORES),
                ends(lines, "kept", lambda x: f"{100 * x:.1f}"),
                ends(lines, "stored_kl", lambda x: f"{x:.1e}" if x else "0"),
            ]
        )
    return rows


def score(lines, rivals, field, _, times, decimals, more):
    """Mean and standard error; bold where nobody of the same α and budget is clearly better."""
    values = [times * line[field] for line in lines]
    cell = f"{statistics.fmean(values):,.{decimals}f}"
    if len(values) > 1:
        cell += f" ± {error_of(values):.{decimals}f}"
    if rivals and len(values) > 1 and is_among_best(lines, rivals, field, more):
        cell = f"**{cell}**"
    return cell


def is_among_best(lines, rivals, field, more):
    """Whether the best mean is this one's, or its differences to the best, seed by seed, are
    nothing within the error."""
    best = (max if more else min)(rivals, key=lambda x: statistics.fmean(y[field] for y in x))
    gaps = [x[field] - y[field] for x, y in zip(lines, best, strict=True)]
    return abs(statistics.fmean(gaps)) <= SIGNIFICANT * error_of(gaps)


def error_of(values):
    """Standard error of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def ends(lines, field, shown):
    """What there is of a field among seeds: one value, or the smallest and the largest."""
    values = {line[field] for line in lines if line[field] is not None}
    by_size = sorted(values, key=lambda x: (len(x), x) if isinstance(x, str) else x)
    return " to ".join(dict.fromkeys(shown(x) for x in by_size[:1] + by_size[-1:]))


def student_page(document):
    """As Markdown, with what has to be known to read it."""
    table = markdown_table(STUDENT_HEADER, student_rows(document["rows"]))
    return "\n\n".join([table, " ".join(student_notes(document))])


def student_notes(document):
    run, facts = document["settings"], document["facts"]
    seeds = run["seeds"]
    yield (
        f"The preset `text`: one teacher, students of half its width, {run['steps']} steps at "
        f"T = 1, {run['blocks']:,} blocks of {facts['length']} tokens of the training text, judged "
        f"on {facts['test_tokens']:,} tokens of documents that nobody trained on."
    )
    if seeds > 1:
        yield (
            f"Means of {seeds} seeds ± their standard error; a seed is a student's initial "
            "weights, its blocks and their order, and what is drawn. The teacher is always the "
            "same: what another would change is not in the errors. Bold: the best of an α and a "
            "budget, and all whose mean difference to it, seed by seed, is within "
            f"{SIGNIFICANT} standard errors; with {seeds} seeds that is no proof of anything."
        )
    else:
        yield "One seed: differences mean little."
    yield (
        "A budget is bytes on disk for each token of the students' text, all of them counted: of "
        "top-K and of draws as many are kept as fit; predictions that are kept whole are those of "
        "fewer tokens (blocks of one length, or a part of one). Of hidden states the head is not "
        f"counted: {facts['head_mb']:,.1f} MB for any amount of text, "
        f"{1e6 * facts['head_mb'] / facts['text_tokens']:,.0f} bytes a token of this one. Theirs "
        f"are of {facts['hidden']} dimensions; with 4,096 they take 64 times as many bytes."
    )
    yield (
        "α is how much of the loss soft targets are, the rest is labels: at 1 nothing tells "
        "students of the classes that a top-K leaves out, but how probable they are together. "
        "Kept: the teacher's probability of the K classes. KL of storing: nats from the "
        "predictions as computed to those read back, renormalised where students get them so."
    )
    yield (
        "Rate and blocks are the preset's, whose rate was chosen for hard labels, on these same "
        "held-out documents; steps are fewer, one for every two blocks. α = 0.9, the preset's, was "
        "added after a first run at 1, for what top-K has of the labels; no score of a student "
        "with a cache chose anything else. Students are far from having learned all they could. "
        "The teacher is weak, and its predictions are flat: "
        f"{facts['distinct']:.0f} different classes in {students.DRAWS} draws. Of a large language "
        "model's, more fits into as many bytes."
    )
    yield f"On {provenance(document['machine'])}"


def student_picture(records, path):
    """Scores over bytes a token: a row of panels for an α, a panel a score, a line a method."""
    plt = plots.pyplot()
    found = by_method(records)
    alphas = list(dict.fromkeys(alpha for alpha, budget, _ in found if budget))
    budgets = sorted({budget for _, budget, _ in found if budget})
    scores = [each for each in SCORES if each[0] != "accuracy"]
    size = dict(figsize=(13, 1 + 3 * len(alphas)), layout="constrained")
    figure, grid = plt.subplots(len(alphas), len(scores), squeeze=False, sharey="col", **size)
    for alpha, panels in zip(alphas, grid, strict=True):
        for axes, (field, head, times, *_) in zip(panels, scores, strict=True):
            axes.set(xscale="log", title=f"{head}, α = {alpha:g}")
            if field in ("perplexity", "kl"):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}")
                axes.tick_params(axis="y", which="minor", labelsize=7)
            _draw_score(axes, found, alpha, field, times)
            axes.set_xticks(budgets, map(str, budgets))
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    for axes in grid[-1]:
        axes.set_xlabel("bytes on disk for a token of text")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    plots.save(figure, Path(path))


def _draw_score(axes, found, alpha, field, times):
    for index, method in enumerate(students.METHODS):
        lines = [x for (a, b, name), x in found.items() if b and (a, name) == (alpha, method)]
        if lines:
            values = [[times * x[field] for x in each] for each in lines]
            axes.errorbar(
                [statistics.fmean(x["bytes_per_token"] for x in each) for each in lines],
                [statistics.fmean(x) for x in values],
                [error_of(x) if len(x) > 1 else 0 for x in values],
                color=plots.COLOURS[index],
                marker=plots.MARKERS[index],
                capsize=2,
                label=method,
            )
    for key, style in (((0.0, None, students.HARD), ":"), ((alpha, None, students.LIVE), "--")):
        mean = statistics.fmean(times * x[field] for x in found[key])
        axes.axhline(mean, color="k", linestyle=style, linewidth=1, label=key[-1])


# Sizes and speeds


SIZE_HEADER = ["bytes a token", "teacher", "tokens a sample", "all", *speed.PARTS]
SPEEDS = (
    ("write", "written"),
    ("first", "read, first time"),
    ("again", "read again"),
    ("workers_1", "by a worker"),
    ("workers_2", "by 2 workers"),
)
SPEED_HEADER = ["10⁶ tokens/s", "teacher", "tokens a sample", *(head for _, head in SPEEDS)]
TARGET_HEADER = ["target", "tokens a sample", "", "limit", "measured", ""]


def size_rows(records):
    for x in records:
        parts = (number(x[f"bytes_{part}"]) if x[f"bytes_{part}"] else "" for part in speed.PARTS)
        yield [*case(x), number(x["bytes"]), *parts]


def speed_rows(records):
    for x in records:
        yield [*case(x), *(megas(x, field) for field, _ in SPEEDS)]


def megas(line, field):
    if line[field] is None:
        return ""
    text = number(line[field] / 1e6)
    if f"{field}_min" in line:
        low, high = (number(line[f"{field}_{end}"] / 1e6) for end in ("min", "max"))
        text += f" ({low} to {high})"
    return text


def case(line):
    teacher = line["teacher"] if line["kind"].startswith(("topk", "sampled")) else "–"
    return [line["kind"], teacher, f"{line['length']:,}"]


def target_rows(records):
    """Under TARGET_HEADER."""
    for kind, field, sign, limit in speed.TARGETS:
        what = "tokens/s of a core, read again" if field == "again" else "bytes a token"
        for x in records:
            if x["kind"] == kind and x["teacher"] == speed.REALISTIC:
                met = x[field] >= limit if sign == "≥" else x[field] <= limit
                verdict = "met" if met else "missed"
                measured = f"{x[field]:,.0f}"
                yield [kind, f"{x['length']:,}", what, f"{sign} {limit:,.0f}", measured, verdict]


def speed_tables(document):
    records = document["rows"]
    if document["settings"]["vocab"] == speed.VOCAB:  # what was promised was promised for that
        yield TARGET_HEADER, list(target_rows(records))
    yield SIZE_HEADER, list(size_rows(records))
    yield SPEED_HEADER, list(speed_rows(records))


def speed_page(document):
    """As Markdown, with what has to be known to read it."""
    tables = [markdown_table(*each) for each in speed_tables(document)]
    return "\n\n".join([*tables, " ".join(speed_notes(document))])


def speed_notes(document):
    run, rows = document["settings"], document["rows"]
    yield (
        f"{run['vocab']:,} classes ({speed.FEW:,} for dense; H = {run['hidden']:,}), caches of "
        f"{run['tokens']:,} tokens, read {speed.BATCH:,} at a time into tensors, the file in the "
        f"page cache. Tokens for each second of a core: of the process's own time, one thread; "
        f"medians of {run['rounds']} rounds (and extremes). What is read for the first time is "
        "checked as well. Written is from predictions that are in memory: without the teacher, "
        "its top-K, the drawing, and the wait for the disk. By workers, in one round and by the "
        "clock: processes of a DataLoader, whole batches through shared memory."
    )
    yield (
        "Values: log-probabilities, counts, hidden states or logits. Index: keys, checksums, "
        "headers, sizes. The head of hidden states is not counted."
    )
    drawn = {x["teacher"]: x["distinct"] for x in rows}
    said = ", ".join(f"{count:.1f} ({name})" for name, count in drawn.items())
    bits = math.log2(math.comb(run["vocab"], speed.DRAWS))
    yield (
        f"Teachers are synthetic (benchmarks/cache/speed.py). Different classes among "
        f"{speed.DRAWS} draws: {said}; {speed.DRAWS} different ones of {run['vocab']:,} are "
        f"{bits / 8:.0f} bytes by counting, so that no format keeps draws of an even teacher in 40."
    )
    yield f"On {provenance(document['machine'])}"
