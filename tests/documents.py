"""The blocks of code, the links and the quoted names of the documentation."""

import ast
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
MARKDOWN = MarkdownIt("commonmark").enable("table")
# Those of results/ are written by the benchmarks, and those below docs/ are the site's frame.
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/README.md", "kdkernels/**/README.md")
    for path in ROOT.glob(pattern)
    if path != ROOT / "docs" / "index.md"
)

SECTIONS = "Args:", "Attributes:", "Raises:", "Returns:"  # of docstrings, which are text


@dataclass(frozen=True)
class Block:
    """language: "python", "bash", "text", of which there is nothing to run, or as it is there."""

    path: str
    line: int  # of its first line
    language: str
    text: str

    def __str__(self):
        return f"{self.path}:{self.line}"


def tokens_of(path):
    return MARKDOWN.parse((ROOT / path).read_text(encoding="utf-8"))


def inline_of(path, kind):
    """(line, token) of a kind in running text and tables."""
    return [
        (token.map[0] + 1 if token.map else 0, each)
        for token in tokens_of(path)
        for each in token.children or ()
        if each.type == kind
    ]


def blocks_of(path):
    """Fenced blocks have a language; what is indented, and what has none, is for a shell."""
    return [
        Block(path, token.map[0] + 1 + (token.type == "fence"), token.info or "bash", token.content)
        for token in tokens_of(path)
        if token.type in ("fence", "code_block")
    ]


def examples():
    """What is indented in the docstrings of the package and is Python, as below `Example:`."""
    found = []
    for path in sorted(ROOT.glob("kdkernels/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                name = str(path.relative_to(ROOT))
                for offset, text in _indented(ast.get_docstring(node) or ""):
                    found.append(Block(name, node.body[0].lineno + offset, "python", text))
    return found


def _indented(docstring):
    """(lines before it, text) of each block of code."""
    heads = re.compile(r"^\S.*\n\n?(?=((?: {4}.*\n|\n)+))", re.M)  # the line before, and the block
    for match in heads.finditer(docstring + "\n"):
        head, text = match[0].strip(), textwrap.dedent(match[1])
        if head == "Example:" or (head not in SECTIONS and _is_python(text)):
            yield docstring[: match.end()].count("\n"), text


def _is_python(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return bool(text.strip())


def anchors_of(path):
    """Of its headings, as GitHub makes them."""
    tokens = tokens_of(path)
    titles = [
        "".join(each.content for each in content.children)
        for opening, content in zip(tokens, tokens[1:], strict=False)
        if opening.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
