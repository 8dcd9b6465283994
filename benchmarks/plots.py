"""Pictures of a run: a roofline of the cases, time and memory over one of the sizes."""

from pathlib import Path

from .peers.base import Missing
from .targets import by_case

COLOURS = ("#1b6ca8", "#d1495b", "#3c8d5a", "#e3a33b", "#6f4e9c", "#7a7a7a", "#1f9e9e", "#9c5b2e")
MARKERS = "osD^vP*X<>phd8H"


def pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise Missing(f"no pictures: {error}; pip install kdkernels[bench]") from error
    # Text stays text, and the same run gives the same file.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kdkernels", "font.size": 9})
    return plt


def save(figure, path):
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    # Trailing blanks would be rewritten by whoever commits the file.
    if path.suffix == ".svg":
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
    pyplot().close(figure)


def roofline(records, path, ceiling=None):
    """Exponentials that are needed a second, over those for a byte that has to move, below what the
    machine can do: a copy's bandwidth, the multiply-adds of a matrix product.

    What a case needs does not depend on who computes it, so that variants of a case stand above one
    another: the distance to the roof is what is lost.

    Args:
        ceiling: 10⁹ exponentials a second that the device can do, where that was not measured.

    Returns:
        Whether there was anything to show.
    """
    plt = pyplot()
    right = [line for line in records if line["status"] == "ok"]
    rates = [line["gexp_per_s"] for line in right if line["variant"] == "exp"]
    ceiling = max(rates, default=ceiling)
    with_copy = {line["case"] for line in right if line["variant"] == "copy"}
    cases = [lines for lines in by_case(right).values() if lines[0]["case"] in with_copy]
    cases = [lines for lines in cases if lines[0]["exponentials"]]
    if not cases or ceiling is None:
        return False
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    memory = max(x["gb_per_s"] for lines in cases for x in lines if x["variant"] == "copy")
    shown = {}
    lowest, highest = 1e9, 0.0
    for index, lines in enumerate(cases):
        for line in lines:
            if line["variant"] in ("exp", "copy"):
                continue
            intensity = line["exponentials"] / line["bytes"]
            lowest, highest = min(lowest, intensity), max(highest, intensity)
            colour = shown.setdefault(line["variant"], (len(shown), line["title"]))[0]
            axes.loglog(
                intensity,
                line["gexp_per_s"],
                MARKERS[index % len(MARKERS)],
                color=COLOURS[colour % len(COLOURS)],
                markersize=6,
            )
    lowest, highest = lowest / 2, max(2 * highest, 2 * ceiling / memory)
    grid = [lowest * (highest / lowest) ** (i / 50) for i in range(51)]
    axes.loglog(grid, [min(memory * x, ceiling) for x in grid], "k-", linewidth=1)
    axes.annotate(f"copy, {memory:.3g} GB/s", (grid[4], memory * grid[4]), ha="left", va="bottom")
    axes.annotate(
        f"arithmetic: {ceiling:.3g} G exponentials/s",
        (grid[-1], ceiling),
        ha="right",
        va="bottom",
    )
    for colour, title in shown.values():
        axes.plot([], [], "o", color=COLOURS[colour % len(COLOURS)], label=title)
    for index, lines in enumerate(cases):
        label = lines[0]["case"].partition(": ")[2]
        axes.plot([], [], MARKERS[index % len(MARKERS)], color="k", fillstyle="none", label=label)
    axes.set_xlabel("exponentials needed / bytes that have to move")
    axes.set_ylabel("needed exponentials, 10⁹ / s")
    figure.legend(loc="outside right upper", fontsize=7)
    figure.set_size_inches(11, 5)
    save(figure, Path(path))
    return True


def over(records, field, what, path):
    """Milliseconds or MB (`what`) over a size (`field`) -> whether there was anything to show."""
    plt = pyplot()
    groups = {}
    for line in records:
        if line["status"] == "ok" and line[what] is not None and line[what] > 0:
            groups.setdefault(line["title"], []).append(line)
    if not groups:
        return False
    names = {"ms": "ms", "peak_mb": "MB beyond inputs and gradients"}
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for index, (title, lines) in enumerate(groups.items()):
        lines.sort(key=lambda line: line[field])
        sizes = [line[field] for line in lines]
        colour = COLOURS[index % len(COLOURS)]
        axes.loglog(sizes, [line[what] for line in lines], "o-", color=colour, label=title)
        if what == "ms":
            low, high = ([line[f"ms_{end}"] for line in lines] for end in ("min", "max"))
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15)
    axes.set_xlabel(field)
    axes.set_ylabel(names[what])
    some = records[0]
    axes.set_title(f"{some['suite']}, {some['dtype']}, {some['objective']}", fontsize=9)
    axes.legend(fontsize=8)
    save(figure, Path(path))
    return True
