"""The site: README.md, the guides, and pages made of docstrings and `--help`. `make docs`."""

import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import re
import sys
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

from sphinx.domains.python._object import PyObject
from sphinx.ext.autodoc.mock import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kdkernels  # noqa: E402
from kdkernels import cli, integrations  # noqa: E402

# Files of the repository that are pages; their links are read where they are.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "site/contributing.md",
    "benchmarks/README.md": "site/benchmarks.md",
    "benchmarks/stages/README.md": "site/stages.md",
    "examples": "site/examples.md",
}
COMMANDS = (
    "",
    "distill",
    "cache",
    "cache build",
    "cache verify",
    "cache info",
    "cache import",
    "cache export",
    "sweep",
    "report",
    "bench",
    "info",
)


def _names(package):
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return [name for name in names if not name.startswith("_")]


project = "kdkernels"
version = release = kdkernels.__version__
html_title = f"kdkernels {version}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["conf.py"]
myst_heading_anchors = 3
default_role = "py:obj"
# Names in backticks are links where they are on a page, and code where they are not.
nitpick_ignore_regex = [("py:obj", ".*"), ("py:.*", r"(torch|transformers)\..*")]

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have shapes and dtypes
napoleon_attr_annotations = False
smartquotes_action = "D"  # dashes; quotes are parts of values
maximum_signature_line_length = 88
napoleon_use_ivar = True
# Whether they are installed must not change a page.
autodoc_mock_imports = [
    "keras",
    "liger_kernel",
    "lightning",
    "modelopt",
    "nemo_automodel",
    "peft",
    "torchtune",
    "transformers",
    "trl",
]
with mock(autodoc_mock_imports):
    import keras

    # What its adapter does before there is a class.
    keras.backend = SimpleNamespace(backend=lambda: "torch")
    keras.saving = SimpleNamespace(register_keras_serializable=lambda package: lambda kind: kind)
    for name in _names(integrations):
        module = importlib.import_module(f"kdkernels.integrations.{name}")
        for lazy in getattr(module, "__all__", ()):
            setattr(module, lazy, getattr(module, lazy))
BLOCKS = {"code": ["::", ""], "table": [".. list-table::", "   :header-rows: 1", ""]}
SECTIONS = "Args:", "Attributes:", "Raises:", "Returns:"
for field in PyObject.doc_field_types:
    if field.name == "variable":
        field.label = "Attributes"


def setup(app):
    app.connect("source-read", _page)
    app.connect("include-read", _included)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # napoleon has 500


def _page(app, docname, source):
    if docname == "site/examples":
        source[0] += "".join(_example(path) for path in sorted(ROOT.glob("examples/*.py")))
    elif docname == "api/integrations":
        source[0] += "".join(_module(name) for name in _names(integrations))
    elif docname == "api/command-line":
        source[0] += "".join(_help(command) for command in COMMANDS)
    else:
        source[0] = _linked(source[0], PurePosixPath("docs", docname).parent)


def _included(app, path, docname, source):
    source[0] = _linked(source[0], PurePosixPath(os.path.normpath("docs" / path)).parent)


def _linked(text, folder):
    """Markdown whose relative links, from that folder of the repository, lead to pages."""

    def replace(match):
        path, mark, anchor = match[2].partition("#")
        if not path or ":" in path:
            return match[0]
        path = PurePosixPath(os.path.normpath(folder / path))
        if page := PAGES.get(str(path)):
            path = page
        elif str(path.parent) == "examples":
            path, mark, anchor = PAGES["examples"], "#", path.name.replace(".", "")
        else:
            path = os.path.relpath(path, "docs")
            if path.startswith("..") and not match[1].startswith("!"):
                return f"{match[1]}(path:/{path})"  # a file to download
        return f"{match[1]}(/{path}{mark}{anchor})"

    return re.sub(r"(!?\[[^]\n]*\])\(([^)\s]+)\)", replace, text)


def _example(path):
    return f"\n## {path.name}\n\n```{{literalinclude}} /../examples/{path.name}\n```\n"


def _module(name):
    title = f"kdkernels.integrations.{name}"
    return f"\n{title}\n{'-' * len(title)}\n\n.. automodule:: {title}\n   :members:\n"


def _help(command):
    shown = io.StringIO()
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    title = f"python -m kdkernels {command}".strip()
    return f"\n## {title}\n\n```text\n{shown.getvalue()}```\n"


def _docstring(app, what, name, obj, options, lines):
    """Plain text with `names` in backticks and indented code -> what napoleon takes."""
    found, section, block = [], "", ""
    if what == "class" and "Attributes:" not in lines:
        lines += _fields(obj)
    text = re.sub(r"(?m)^( {4}[\w, ]+,)\n +", r"\1 ", "\n".join(lines))  # names of one description
    for line in text.split("\n"):
        if line[:1].strip():
            section = line
        kind = line.strip() and _kind(line, section)
        if kind != block and kind in BLOCKS:
            found += BLOCKS[kind]
        block = kind or block
        if line == "Example:":
            found += [".. rubric:: Example", ""]
        elif line == "Returns:":
            found.append(":returns:")  # where napoleon would look for a type
        elif kind == "code":
            found.append(line)
        elif kind == "table":
            cells = [_escaped(x.strip()) for x in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not re.fullmatch("[-|]+", line):
                found += [f"   {'*' if k == 0 else ' '} - {x}" for k, x in enumerate(cells)]
        elif section == "Returns:":
            item = re.sub(r"^ {4}(?=\w+: )", "    - ", line)
            found.append(_escaped(re.sub("^ {8}", "      ", item)))
        else:
            found.append(_escaped(line))
    lines[:] = found


def _kind(line, section):
    if line.startswith("|"):
        return "table"
    return "code" if line.startswith("    ") and section not in SECTIONS else "text"


def _fields(obj):
    """Fields of a class that comments describe, beside them or above -> a section "Attributes:"."""
    found, above = [], []
    for line in inspect.getsource(obj).splitlines() if inspect.get_annotations(obj) else ():
        field = re.fullmatch(r"    (\w+): [^#]*?(?:  # (.*))?", line)
        if field and field[1] in obj.__annotations__:
            text = " ".join([*above, field[2] or ""]).strip()
            found += [f"    {field[1]}: {text}"] if text else []
        above = [*above, line.strip("# ")] if line.startswith("    # ") else []
    return ["Attributes:", *found, ""] if found else []


def _escaped(line):
    """Names become links where they are on a page, other code is code, signs of markup are text."""
    found = ""
    for k, part in enumerate(line.split("`")):
        if k % 2 == 0:
            glue = "\\ " if k and part[:1].isalnum() else ""
            # "T." alone would be the first of a list.
            found += glue + re.sub(r"[*|]|(?<=\b[A-Za-z])\.(?=\s|$)", r"\\\g<0>", part)
        elif re.fullmatch(r"[A-Za-z_][\w.]*", part):
            found += f":py:obj:`{part}`"
        else:
            found += f"``{part}``"
    return found
