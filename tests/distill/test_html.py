"""report.html: what is on it, that nothing of a user's is code in it, and what is refused."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from kdkernels.distill import html

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

pytest.importorskip("jinja2", reason="the extra `train` is not installed")
pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
RESULTS = {
    "title": "Digits",
    "comparison": [
        {"name": "teacher", "accuracy": 0.97, "bytes": 4_000_000, "agreement": None},
        {"name": "hard", "targets": "labels", "accuracy": 0.881, "bytes": 70_000, "speed_up": 3.0},
        {"name": "soft", "targets": "T = 8", "accuracy": 0.926, "bytes": 70_000, "labels": 100},
    ],
    "options": {"temperature": 8.0, "sizes": [50, 100], "backend": None, "nested": {"a": True}},
    "curves": [
        {"name": "hard", "steps": [50, 100], "values": [90.0, 70.0], "ylabel": "errors"},
        {"name": "soft", "steps": [50, 100], "values": [80.0, 60.5], "ylabel": "errors"},
        {"name": "soft", "steps": [50], "values": [1.5], "ylabel": "loss"},
    ],
    "notes": ["100 labels: 94 → 61 errors"],
}


class Page(HTMLParser):
    """The elements of a page and its text; fails where they are not closed in order."""

    EMPTY = {"meta", "img", "!doctype"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.rows, self.texts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)


def page_of(folder, results=RESULTS, **changes):
    (folder / "results.json").write_text(json.dumps({**results, **changes}))
    path = html.write(folder)
    assert path == folder / "report.html"
    return Page(path.read_text("utf-8"))


def test_what_is_on_it(tmp_path):
    page = page_of(tmp_path, versions={"torch": "2.13"}, finished="2026-11-23")
    texts = " ".join(page.texts)
    assert "Digits" in texts and RESULTS["notes"][0] in texts
    assert "2026-11-23" in texts and "torch 2.13" in texts
    headings, *lines = page.rows[:4]
    assert headings == [
        "model",
        "targets",
        "accuracy (%)",
        "size (MB)",
        "speed-up (times)",
        "labels",
    ]
    assert lines == [
        ["teacher", "–", "★ 97.00", "4.000", "–", "–"],
        ["hard", "labels", "88.10", "★ 0.070", "3", "–"],
        ["soft", "T = 8", "92.60", "★ 0.070", "–", "100"],
    ]
    assert page.rows[4:] == [
        ["temperature", "8"],
        ["sizes", "50, 100"],
        ["backend", "–"],
        ["nested", '{"a": true}'],
    ]


def test_it_needs_nothing_else(tmp_path):
    (tmp_path / "soft_targets.png").write_bytes(PNG)
    page = page_of(tmp_path)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & set(names)
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:") and "href" not in attributes
    assert "default-src 'none'" in (tmp_path / "report.html").read_text("utf-8")


def test_pictures_are_in_it(tmp_path):
    (tmp_path / "soft_targets.png").write_bytes(PNG)
    (tmp_path / "learning_curves.png").write_bytes(PNG)
    page = page_of(tmp_path, pictures={"soft_targets.png": "A seven."})
    assert [image["alt"] for image in page.images] == ["learning curves", "A seven."]
    for image in page.images:
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG


def test_curves_are_drawn_where_no_picture_has_them(tmp_path):
    page = page_of(tmp_path)
    assert [image["alt"] for image in page.images] == [
        "learning curves, errors: hard 70 after 100 steps; soft 60.5 after 100 steps",
        "learning curves, loss: soft 1.5 after 50 steps",
    ]
    drawn = [base64.b64decode(image["src"].partition(",")[2]) for image in page.images]
    assert all(each.startswith(b"\x89PNG") for each in drawn) and drawn[0] != drawn[1]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_names_are_text(tmp_path):
    evil = "</td><script>alert(1)</script>\"'&amp; $\\frac{1$ {{ title }}"
    (tmp_path / "a<b>&'\".png").write_bytes(PNG)
    page = page_of(
        tmp_path,
        title=evil,
        notes=[evil],
        comparison=[{"name": evil, "targets": evil, evil: evil}],
        options={evil: evil},
        curves=[{"name": evil, "steps": [1], "values": [2.0], "ylabel": evil}],
        versions={evil: evil},
        finished=evil,
    )
    assert "script" not in [tag for tag, _ in page.tags]
    assert "".join(page.texts).count(evil) == 8  # title, h1, note, caption (2), version (2), date
    assert page.rows == [["model", "targets", evil], [evil, evil, evil], [evil, evil]]
    assert page.images[0]["alt"] == "a<b>&'\""


def test_the_best_is_marked_where_there_is_one(tmp_path):
    comparison = [
        {"name": "a", "errors": 5, "agreement": 0.5, "latency_ms": float("nan"), "bytes": 7},
        {"name": "b", "errors": 3, "agreement": 0.9, "latency_ms": 2.0, "bytes": 7},
        {"name": "c", "errors": 3, "agreement": 0.8, "latency_ms": 1.0, "bytes": 7},
    ]
    _, *rows = page_of(tmp_path, comparison=comparison, options={}).rows
    marked = [[cell.startswith("★") for cell in row] for row in rows]
    # errors, agreement, bytes, latency: a tie has two; what all share is nobody's merit
    assert marked == [
        [False, False, False, False, False],
        [False, True, True, False, False],
        [False, True, False, False, True],
    ]
    assert rows[0][-1] == "nan"


def test_an_empty_run_has_a_page(tmp_path):
    page = page_of(tmp_path, comparison=[], options={}, curves=[], notes=[])
    assert page.rows == [] and page.images == []
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d · kdkernels \d", " ".join(page.texts))


def test_shapes_nobody_promised(tmp_path):
    """What other runs may keep under these names does no harm."""
    page_of(tmp_path, pictures=["a.png"], versions="2", notes=["\ud800"])


WRONG = {
    "damaged": ('{"title": "Dig', "must be JSON"),
    "binary": (b"\xff\xfe\x00", "must be JSON"),
    "deep": ("[" * 100_000, "must be JSON"),
    "a list": ("[]", "results must be an object, got list"),
    "no title": ("title", "results must have 'title', a str, it is missing"),
    "no curves": ("curves", "results must have 'curves', a list, it is missing"),
    "options": ({"options": [1]}, "results must have 'options', a dict, got list"),
    "a line": ({"comparison": [{}, 3]}, r"comparison\[1\] must be an object, got int"),
    "a curve": ({"curves": [{"name": "a"}]}, r"curves\[0\] must have 'steps', a list"),
    "lengths": (
        {"curves": [{"name": "a", "steps": [1], "values": [], "ylabel": ""}]},
        r"curves\[0\] must have a number in values for each in steps",
    ),
    "text for a number": (
        {"curves": [{"name": "a", "steps": [1], "values": ["b"], "ylabel": ""}]},
        r"curves\[0\] must have a number in values for each in steps",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_results_of_another_form_are_refused(tmp_path, kind):
    change, message = WRONG[kind]
    if isinstance(change, dict):
        change = json.dumps({**RESULTS, **change})
    elif change in RESULTS:
        change = json.dumps({key: value for key, value in RESULTS.items() if key != change})
    path = tmp_path / "results.json"
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(ValueError, match=message) as caught:
        html.write(tmp_path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_results(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="folder must have a results.json, got .*results.json"):
            html.write(folder)


def test_every_known_number_has_its_unit(tmp_path):
    line = {key: 0.5 for key in html.COLUMNS} | {"name": "a", "targets": "b"}
    headings, cells = page_of(tmp_path, comparison=[line], options={}).rows
    assert len(headings) == 13 and cells[2] == "50.00" and cells[9] == "0.000"
