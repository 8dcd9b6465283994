"""What a run reports: tables in the terminal and pictures as PNG files.

rich and matplotlib come with the extra `train` and are imported when something is reported, so
that the loop itself needs neither. Colours are those of Okabe and Ito (2008), which people with
colour-blind vision can tell apart; every series has a marker of its own as well.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CHARACTERS, MARGIN = 11, 8  # of a legend: to an inch, and beside each text
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _style(index: int) -> tuple[str, str]:
    """Colour and marker of the series of this number: 49 that differ."""
    turn = index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], MARKERS[(index + turn) % len(MARKERS)]


@dataclass(frozen=True)
class Group:
    """What `plot_temperatures` draws in one colour: errors of students that share a data set."""

    name: str
    temperatures: list[float]
    means: list[float]  # one a temperature
    standard_errors: list[float]  # of the means
    baseline: float  # the mean without soft targets


def print_table(
    console: Any,
    title: str,
    columns: Sequence[str],
    sections: Sequence[Sequence[Sequence[str]]],
    caption: str | None = None,
) -> None:
    """Prints a table.

    Args:
        console: a `rich.console.Console`.
        title, caption: text above and below the table.
        columns: their headings; the first column is aligned left, the others right.
        sections: lists of rows, with a line between sections; a row is a list of texts.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for rows in sections:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    console.print(table)


@contextlib.contextmanager
def progress(console: Any) -> Iterator[Any]:
    """A `rich.progress.Progress` with steps, time taken and time left, shown while it is open, and
    only in a terminal."""
    from rich import progress as rich

    with rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left:"),
        rich.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        yield bar


def plot_soft_targets(
    path: Path | str, image: Any, logits: Tensor, temperatures: Sequence[float], label: int
) -> None:
    """One example and the teacher's softened probabilities for it: softmax(logits / T).

    Args:
        path: the PNG file to write.
        image: (H, W) array, grey levels, dark is high.
        logits: (V,) tensor, float.
        temperatures: one panel each, in a row.
        label: the example's true class.
    """
    with _figure(path, (2.6 + 2.6 * len(temperatures), 3.0)) as figure:
        widths = [1.0] + [1.3] * len(temperatures)
        grid = figure.add_gridspec(1, 1 + len(temperatures), width_ratios=widths)
        axes = figure.add_subplot(grid[0])
        axes.imshow(image, cmap="gray_r", interpolation="nearest")
        axes.set(xticks=[], yticks=[], title=f"training image, a {label}")
        axes.set_anchor("N")  # its title in line with those of the panels
        classes = range(len(logits))
        first = None  # panel, whose scale the others share
        for column, temperature in enumerate(temperatures, 1):
            axes = figure.add_subplot(grid[column], sharey=first)
            probabilities = (logits / temperature).softmax(-1).tolist()
            colours = [COLOURS[1] if each == label else COLOURS[0] for each in classes]
            bars = axes.bar(classes, probabilities, color=colours)
            texts = [f"{100 * each:.0f}" if each >= 0.005 else "" for each in probabilities]
            axes.bar_label(bars, texts, fontsize=8, padding=1)
            axes.set(title=f"T = {temperature:g}", xticks=classes, ylim=(0, 1.08), xlabel="class")
            axes.yaxis.set_major_formatter("{x:.1f}")
            if first is None:
                first = axes
                axes.set_ylabel("teacher's probability")
            else:
                axes.tick_params(labelleft=False)
        figure.suptitle(
            "A higher temperature shows what the teacher takes the image for besides its answer "
            "(numbers in %)",
            fontsize=11,
        )


def plot_temperatures(
    path: Path | str,
    groups: Sequence[Group],
    reference: tuple[str, float] | None,
    ylabel: str,
    title: str,
) -> None:
    """Errors against the temperature, for each group with a dashed line at its baseline.

    Args:
        path: the PNG file to write.
        groups: a list of `Group`s with the same temperatures.
        reference: None, or (name, errors): one dotted line for all groups.
        ylabel, title: text.
    """
    with _figure(path, (7.5, 4.5)) as figure:
        axes = figure.add_subplot()
        lines = []  # in the order of the legend
        for index, group in enumerate(groups):
            colour, marker = _style(index)
            soft = axes.errorbar(
                group.temperatures,
                group.means,
                yerr=group.standard_errors,
                color=colour,
                marker=marker,
                capsize=3,
                label=f"{group.name}, soft targets",
            )
            hard = axes.axhline(
                group.baseline, color=colour, linestyle="--", label=f"{group.name}, hard targets"
            )
            lines += [soft, hard]
        if reference is not None:
            name, errors = reference
            lines.append(axes.axhline(errors, color="black", linestyle=":", label=name))
        ticks = groups[0].temperatures
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="temperature T of the soft targets", ylabel=ylabel, title=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        figure.legend(handles=lines, loc="outside right center", frameon=False)


def plot_curves(
    path: Path | str, panels: Sequence[tuple[str, Any]], ylabel: str, title: str
) -> None:
    """Learning curves, one panel a group, on one scale: logarithmic where the values ask for it.

    Args:
        path: the PNG file to write.
        panels: a list of (name, curves); curves a list of (name, steps, values), drawn in the same
            colours in every panel.
        ylabel, title: text.
    """
    from matplotlib.ticker import LogLocator

    found = [x for _, curves in panels for *_, values in curves for x in values if isfinite(x)]
    wide = bool(found) and min(found) > 0 and max(found) >= 5 * min(found)
    width = 1.2 + 3.3 * max(len(panels), 2)  # inches
    with _figure(path, (width, 4.2)) as figure:
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, curves) in zip(row, panels, strict=True):
            for index, (label, steps, values) in enumerate(curves):
                colour, marker = _style(index)
                every = max(1, len(steps) // 6)
                axes.plot(
                    steps,
                    values,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    markevery=((len(steps) - 1) % every, every),  # the last one is marked
                    label=f" {label}",  # one that begins with "_" has no place in a legend
                )
            axes.set(title=name, xlabel="optimiser steps")
            if wide:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
                axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25)
        row[0].set_ylabel(ylabel)
        handles, labels = row[0].get_legend_handles_labels()
        longest = max(map(len, labels), default=0) + MARGIN
        columns = max(1, min(len(labels), int(width * CHARACTERS / longest)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        figure.suptitle(title)


def plot_sweep(
    path: Path | str, points: Sequence[tuple[float, float, float]], score: str, title: str
) -> None:
    """What students at each temperature and alpha were scored, the best of them framed.

    A heat map with numbers where the points are a grid, else dots in the plane.

    Args:
        path: the PNG file to write.
        points: a list of (temperature, alpha, score), the smaller the better; NaN: no score.
        score, title: text: what is scored, and what is shown.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator

    temperatures = sorted({t for t, _, _ in points})
    alphas = sorted({alpha for _, alpha, _ in points})
    found = [x for *_, x in points if isfinite(x)]
    best = [point for point in points if found and point[2] == min(found)][:1]
    frame: dict[str, Any] = dict(facecolor="none", edgecolor=COLOURS[1], linewidth=3)
    with _figure(path, (7.5, 4.5)) as figure:
        axes = figure.add_subplot()
        if len(points) == len(temperatures) * len(alphas):
            places = {
                (t, alpha): (x, y)
                for x, t in enumerate(temperatures)
                for y, alpha in enumerate(alphas)
            }
            cells = [[nan] * len(temperatures) for _ in alphas]
            for t, alpha, value in points:
                x, y = places[t, alpha]
                cells[y][x] = value
                dark = bool(found) and value > (min(found) + max(found)) / 2
                text = f"{value:.3g}" if isfinite(value) else "–"
                axes.text(x, y, text, ha="center", va="center", color="w" if dark else "k")
            colours = axes.imshow(cells, cmap="cividis_r", aspect="auto", origin="lower")
            axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
            axes.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
            for t, alpha, _ in best:
                x, y = places[t, alpha]
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **frame))
        else:
            colours = axes.scatter(
                [t for t, *_ in points],
                [alpha for _, alpha, _ in points],
                c=[value for *_, value in points],
                cmap="cividis_r",
            )
            for t, alpha, _ in best:
                axes.scatter(t, alpha, s=250, **frame)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.set(xlabel="temperature T of the soft targets", ylabel="alpha", title=title)
        figure.colorbar(colours, label=score)


@contextlib.contextmanager
def _figure(path: Path | str, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure of `size` inches; written to `path` as a PNG at the end."""
    # Not pyplot: a figure of its own canvas needs no display and leaves no global state.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # a name may have dollars in it
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic(path) as file:
            figure.savefig(file, dpi=150, format="png")
