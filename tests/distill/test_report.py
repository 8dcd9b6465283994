"""Pictures and tables: that they are drawn from whatever comes, and what they show."""

import io
import math

import pytest

pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
pytest.importorskip("rich", reason="the extra `train` is not installed")

from matplotlib import image  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from kdkernels.distill import report  # noqa: E402

NAN = math.nan
GRID = [(t, alpha, 10 * t + alpha) for t in (4.0, 1.0, 20.0) for alpha in (0.5, 1.0)]


@pytest.fixture
def axes(monkeypatch):
    """The axes that are drawn on, as they were when the picture was written."""
    seen = []
    original = Axes.draw
    monkeypatch.setattr(Axes, "draw", lambda self, *x: seen.append(self) or original(self, *x))
    return seen


def drawn(path):
    height, width, _ = image.imread(path).shape
    return height > 300 and width > 600


def test_styles_differ():
    styles = [report._style(index) for index in range(49)]
    assert len(set(styles)) == 49
    assert (
        len({colour for colour, _ in styles[:7]}) == len({marker for _, marker in styles[:7]}) == 7
    )


def test_a_grid_is_a_map_of_numbers(tmp_path, axes):
    report.plot_sweep(tmp_path / "a.png", GRID, "errors", "title")
    assert drawn(tmp_path / "a.png")
    table = axes[0].images[0].get_array()
    assert table.shape == (2, 3) and table.tolist() == [[10.5, 40.5, 200.5], [11, 41, 201]]
    assert [x.get_text() for x in axes[0].get_xticklabels()] == ["1", "4", "20"]
    assert {x.get_text(): x.get_position() for x in axes[0].texts}["40.5"] == (1, 0)
    (frame,) = axes[0].patches
    assert frame.get_xy() == (-0.5, -0.5)


def test_points_are_dots(tmp_path, axes):
    points = [(1.5, 0.3, 3.0), (10.0, 0.9, 1.0), (4.0, 0.5, 2.0)]
    report.plot_sweep(tmp_path / "a.png", points, "errors", "title")
    dots, ring = axes[0].collections
    assert dots.get_offsets().tolist() == [[t, alpha] for t, alpha, _ in points]
    assert dots.get_array().tolist() == [3, 1, 2] and ring.get_offsets().tolist() == [[10.0, 0.9]]


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 0.5, 3.0)],
        [(1.0, 0.5, NAN)],
        [(t, alpha, NAN if t == 4 else x) for t, alpha, x in GRID],
        [(1.0, 0.5, NAN), (2.0, 0.7, 1.0), (2.0, 0.6, 1.0)],
        [(1.0, 0.5, NAN), (2.0, 0.7, NAN), (2.0, 0.6, NAN)],
    ],
)
def test_scores_that_are_missing_are_left_out(tmp_path, points, axes):
    report.plot_sweep(tmp_path / "a.png", points, "errors", "title")
    assert drawn(tmp_path / "a.png")
    finite = any(math.isfinite(x) for *_, x in points)
    assert len(axes[0].patches) + len(axes[0].collections[1:]) == finite


def curves(*values):
    return [("one", [(str(k), [50, 100], list(each)) for k, each in enumerate(values)])]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([(100.0, 10.0)], "log"),
        ([(6.2, 5.1)], "linear"),
        ([(1.0, 0.0)], "linear"),
        ([(-1.0, 1.0)], "linear"),
        ([(NAN, 3.0)], "linear"),
        ([(NAN, NAN)], "linear"),
        ([], "linear"),
    ],
)
def test_curves_have_the_scale_that_suits_them(tmp_path, axes, values, scale):
    report.plot_curves(tmp_path / "a.png", curves(*values), "loss", "title")
    assert drawn(tmp_path / "a.png") and axes[0].get_yscale() == scale


def test_every_curve_is_drawn_and_named(tmp_path, axes):
    names = ["$a_b", "_hidden", *map(str, range(9))]
    lines = [(name, [1], [1.0 + k]) for k, name in enumerate(names)]
    report.plot_curves(tmp_path / "a.png", [("$x$", lines)], "$", "$\\frac{1$")
    (legend,) = axes[0].figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == names
    assert len(axes[0].lines) == 11


def test_temperatures_of_many_groups(tmp_path, axes):
    groups = [report.Group(str(k), [1.0, 2.0], [k, k + 1.0], [0.1, 0.1], k) for k in range(1, 10)]
    report.plot_temperatures(tmp_path / "a.png", groups, ("teacher", 1.0), "errors", "title")
    (legend,) = axes[0].figure.legends
    assert len(legend.get_texts()) == 19


@pytest.mark.parametrize(
    "names", [["a"] * 7, ["student, hard labels"] * 4, ["x" * 60] * 2], ids=len
)
def test_a_legend_is_in_the_picture(tmp_path, axes, names):
    report.plot_curves(
        tmp_path / "a.png", [("panel", [(name, [1, 2], [3, 4]) for name in names])], "y", "title"
    )
    figure = axes[0].figure
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(terminal):
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with report.progress(console) as bar:
        bar.advance(bar.add_task("loss 1.5, 20 tokens/s", total=2))
    shown = console.file.getvalue()
    assert ("loss 1.5, 20 tokens/s" in shown and "1/2" in shown) if terminal else shown == ""
