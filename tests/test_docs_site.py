"""The site builds without a warning and has every public name once; links of the documents lead
somewhere."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("markdown_it", reason="the extra `docs` is not installed")

from documents import DOCUMENTS, ROOT, anchors_of, inline_of  # noqa: E402

PACKAGES = "", "cache", "distill", "distill/jobs"
KINDS = ast.ClassDef, ast.FunctionDef


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason="the extra `docs` is not installed")
    out = tmp_path_factory.mktemp("site")
    options = "-W --keep-going -n -q -b html".split()
    command = [sys.executable, "-m", "sphinx", *options, "-d", out / "doctrees", ROOT / "docs"]
    # One thread: other tests run on the other cores.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, out / "html"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return {str(p.relative_to(out / "html")): p.read_text() for p in out.glob("html/**/*.html")}


def public_names():
    """Those of `__all__`, or where there is none what a module defines."""
    packages = [ROOT / "kdkernels" / name for name in PACKAGES]
    integrations = ROOT.glob("kdkernels/integrations/[a-z]*")
    for path in [*(each / "__init__.py" for each in packages), *sorted(integrations)]:
        path = path / "__init__.py" if path.is_dir() else path
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = [x.name for x in body if isinstance(x, KINDS) and not x.name.startswith("_")]
        for node in body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names = ast.literal_eval(node.value)
        yield from (f"{module}.{name}" for name in names)


NAMES = list(public_names())


def test_every_public_name_is_on_the_site_once(site):
    assert {"kdkernels.kd_loss", "kdkernels.cache.Writer", "kdkernels.distill.jobs.Job"} <= {*NAMES}
    ids = re.findall(r' id="(?:module-)?(kdkernels[\w.]*)"', "".join(site.values()))
    assert {name: ids.count(name) for name in NAMES} == dict.fromkeys(NAMES, 1)


def test_every_command_is_on_the_site(site):
    page = site["api/command-line.html"]
    assert "usage: python -m kdkernels" in page
    for commands in re.findall(r"\{([a-z,]+)\} \.\.\.|COMMAND|ACTION", page):
        assert all(f"kdkernels {name}" in page for name in commands.split(",") if name)
    for name in re.findall(r"^    ([a-z]+) {2,}\S", page, re.M):
        assert re.search(rf"<h2>python -m kdkernels (cache )?{name}<", page), name


def test_docstrings_are_text_and_not_markup(site):
    for name, page in site.items():
        if name.startswith("api/"):
            text = re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
            assert not re.search(r"`|\*\*\w+\*\*|:py:|\\ ", re.sub("<[^>]*>", "", text)), name


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_of_documents_lead_somewhere(path):
    for line, link in [*inline_of(path, "link_open"), *inline_of(path, "image")]:
        target = link.attrs.get("href") or link.attrs["src"]
        file, _, anchor = target.partition("#")
        if ":" not in file:
            found = Path(os.path.normpath((ROOT / path).parent / file if file else ROOT / path))
            assert found.exists(), f"{path}:{line}: {target}"
            if anchor:
                wanted = anchors_of(found.relative_to(ROOT))
                assert anchor in wanted, f"{path}:{line}: {target}"
