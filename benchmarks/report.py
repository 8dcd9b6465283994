"""What is shown: tables for a terminal and for a page, all from the records of a run."""

from .targets import by_case

HEADER = (  # (a field, its head, how it is written)
    ("calls", "rounds", "{}"),
    ("ms", "ms", None),
    ("ms_min", "min", None),
    ("ms_max", "max", None),
    ("times_native", "× kdkernels", None),
    ("times_native_min", "min", None),
    ("times_native_max", "max", None),
    ("times_products", "× products", None),
    ("times_products_min", "min", None),
    ("times_products_max", "max", None),
    ("gb_per_s", "GB/s", None),
    ("tflop_per_s", "TFLOP/s", None),
    ("share_of_copy", "% of copy", "{:.0%}"),
    ("share_of_copy_min", "min", "{:.0%}"),
    ("share_of_copy_max", "max", "{:.0%}"),
    ("peak_mb", "extra MB", "{:,.1f}"),
    ("peak_percent", "% of matrix", "{:.1f}"),
    ("gradient_mb", "gradient MB", "{:,.1f}"),
    ("loss_error", "loss error", "{:.1e}"),
    ("gradient_error", "gradient error", "{:.1e}"),
)
TARGET_HEADER = ["target", "", "limit", "measured", "", ""]
NOTES = {
    "dense": "GB/s counts what has to move: student, teacher and, with it, the gradient.",
    "linear": "TFLOP/s counts the products that are needed, whatever a variant computes.",
    "sparse": "GB/s counts the student's logits and their gradient.",
    "loop": "A step is both models, the loss, the backward pass and AdamW.",
}


def number(x):
    """Three digits or so; nothing for what was not measured."""
    if x is None:
        return ""
    size = abs(x)
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 4
    return f"{x:,.{decimals}f}"


def cell(line, field, form):
    value = line[field]
    return "" if value is None else form.format(value) if form else number(value)


def tables(records):
    """(heading, header, rows, what was not timed and why) of every case; no empty columns."""
    for lines in by_case(records).values():
        timed = [line for line in lines if line["status"] == "ok"]
        rows = [[line["title"], *(cell(line, f, form) for f, _, form in HEADER)] for line in timed]
        header = ["", *(head for _, head, _ in HEADER)]
        used = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
        header, *rows = [[row[i] for i in used] for row in (header, *rows)]
        yield lines[0]["case"], header, rows, untimed(lines)


def untimed(lines):
    """What was not timed, by the reason."""
    reasons = {}
    for line in lines:
        if line["status"] != "ok":
            reasons.setdefault(line["status"], []).append(line["title"])
    return [f"{'; '.join(titles)}: {status}" for status, titles in reasons.items()]


def target_rows(judged, records):
    """The targets under TARGET_HEADER."""
    titles = {(line["case"], line["variant"]): line["title"] for line in records}
    cases = {key: lines[0]["case"] for key, lines in by_case(records).items()}
    rows = []
    for target in judged:
        case = cases[next(iter(by_case([target])))]
        limit = f"{target['sign']} {number(target['limit'])}"
        row = [case, target["what"], limit, number(target["measured"]), target["verdict"]]
        rows.append([*row, titles[case, target["by"]]])
    return rows


def text_table(header, rows):
    """Aligned columns, the first to the left and the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for first, *others in cells:
        right = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)


def markdown_table(header, rows):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def terminal(records, judged):
    """Everything, for a terminal."""
    blocks = [
        "\n".join([heading, text_table(header, rows), *others])
        for heading, header, rows, others in tables(records)
    ]
    if judged:
        blocks.append(text_table(TARGET_HEADER, target_rows(judged, records)))
    return "\n\n".join(blocks)


def page(records, judged, machine, rounds):
    """The same as Markdown, with what has to be known to read it."""
    blocks = [
        f"{provenance(machine)} Medians and extremes of {rounds} rounds or more, in turns; ratios "
        "are taken within each round. Extra MB is the peak beyond inputs and gradients, also in % "
        "of one float32 matrix of logits.",
        *(NOTES[suite] for suite in suites_of(records)),
    ]
    if judged:
        blocks.append(markdown_table(TARGET_HEADER, target_rows(judged, records)))
    for heading, header, rows, others in tables(records):
        blocks.append(f"### {heading}")
        if rows:
            blocks.append(markdown_table(header, rows))
        blocks.append("\n".join(f"- {other}" for other in others))
    return "\n\n".join(block for block in blocks if block)


def suites_of(records):
    return list(dict.fromkeys(line["suite"] for line in records))


def provenance(machine):
    """On what, with what and when it was measured."""
    on = machine.get("gpu") or f"{machine['cpu']} ({machine['instruction set']})"
    if "gpu" in machine:
        on += f" (driver {machine['driver']}, {machine['clocks']} after the last round)"
    found = [on, *(f"{name} {version}" for name, version in machine["packages"].items() if version)]
    found.append(f"kdkernels {machine['kdkernels']} ({machine['commit']})")
    return f"{', '.join(found)}, {machine['date']}."


# The table that README.md and docs/ include


def summary(records, machine, rounds):
    """Of a suite: the first case of each dtype side by side, and what has to be known of it."""
    first = {}
    for lines in by_case(records).values():
        first.setdefault(lines[0]["dtype"], {line["variant"]: line for line in lines})
    every = [line for lines in first.values() for line in lines.values()]
    some = every[0]
    base = "times_products" if some["suite"] == "linear" else "times_native"
    header, rows = [some["shape"]], []
    for dtype in first:
        header += [f"{dtype}, ms", "× products" if base == "times_products" else "× kdkernels"]
        header.append("extra MB")
    for name in dict.fromkeys(line["variant"] for line in every):
        found = [lines.get(name) for lines in first.values()]
        if all(line is None or absent(line) for line in found):
            continue
        row = [next(line["title"] for line in found if line)]
        for line in found:
            row += summary_cells(line, base)
        rows.append(row)
    return "\n\n".join(
        [markdown_table(header, rows), "\n".join(notes(some, every, first, machine, rounds))]
    )


def absent(line):
    return line["status"].startswith(("missing", "lacks"))


def summary_cells(line, base):
    if line is None or absent(line):
        return ["–", "", ""]
    if line["status"] != "ok":
        return [line["status"].partition(":")[0], "", ""]
    peak = line["peak_mb"]
    ms = number(line["ms"]) + ("¹" if line["calls"] == 1 else "")
    return [ms, number(line[base]), "" if peak is None else f"{peak:,.0f}"]


def notes(some, every, first, machine, rounds):
    """What has to be known to read a summary."""
    passes = "forward and backward" if some["backward"] else "without the gradient"
    yield (
        f"{capital(some['objective'])}, {passes}, on {provenance(machine)} Medians of {rounds} "
        "rounds or more in turns; extra MB is the peak beyond inputs and gradients."
    )
    if any(line["calls"] == 1 for line in every):
        yield "¹ Called once, for want of patience."
    for dtype, lines in first.items():
        ours = lines.get("native")
        if ours and ours["status"] == "ok" and ours["share_of_copy"] is not None:
            yield (
                f"{dtype}: {number(ours['gb_per_s'])} GB/s of what has to move, "
                f"{ours['share_of_copy']:.0%} of a copy."
            )
    for kind, words in (("missing", "Not here"), ("lacks", "Without this formula")):
        titles = {}
        for line in every:
            titles.setdefault(line["title"], []).append(line["status"].startswith(kind))
        of_all = [title for title, there in titles.items() if all(there)]
        if of_all:
            yield f"{words}: {', '.join(of_all)}."


def capital(text):
    return text[:1].upper() + text[1:]
