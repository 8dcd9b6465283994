"""Every command in the documents runs, in small, or is of a kind whose parts are looked up.

Each line of a block for a shell is of one of `KINDS`; a line of none of them is a failure. A block
runs in a directory of its own, where `DIR`, `NAME` and the files that it names stand for something.
"""

import functools
import json
import re
import shlex

import pytest

pytest.importorskip("markdown_it", reason="the extra `docs` is not installed")

from documents import DOCUMENTS, ROOT, blocks_of, inline_of  # noqa: E402

from kdkernels import cli  # noqa: E402
from kdkernels.distill import validation  # noqa: E402

BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path) if block.language == "bash"]
LANGUAGES = {"python", "bash", "text", "yaml"}
COMMANDS = ("distill", "cache build", "cache verify", "cache info", "cache import", "cache export")
COMMANDS += ("sweep", "report", "bench cache", "bench shards", "bench stages", "bench", "info")
# Options of other programs: mypy, torchrun, and NVIDIA's ncu.
FOREIGN = {
    "--strict",
    "--nproc-per-node",
    "--import",
    "--page",
    "--import-source",
    "--clock-control",
}
FOREIGN |= {"--section", "--query-metrics", "--launch-skip"}
# What makes a command short, by what it begins with.
SMALL = {
    "distill": "--length 16 --steps 2 --batch-size 4 --no-tensorboard",
    "cache build": "--length 16",
    "cache": "",
    "bench dense --quick": "--variants native --dtypes float32 --divergences forward_kl "
    "--temperatures 2 --alphas 0.5 --rounds 1 --device cpu",
    "bench": "--list",
}
# Minutes, of which other tests run less: here they have options that exist.
LONG = "distill --preset text", "bench cache", "bench shards", "bench stages"
LEAVES = {"distill": "report.html", "cache build": "manifest.json", "cache import": "manifest.json"}


@functools.cache
def help_of(command):
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr("argparse.ArgumentParser._print_message", lambda self, x, to: shown.append(x))
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
    return "".join(shown)


def options_of(command):
    lines = re.findall(r"^  (-.*?)(?:  |$)", help_of(command), re.M)  # not those of its examples
    return set(re.findall(r"--[a-z][\w-]*", " ".join(lines)))


def command_of(words):
    """The longest of `COMMANDS` that a line begins with, or None."""
    return next((each for each in COMMANDS if words[: each.count(" ") + 1] == each.split()), None)


# The kinds of a command


def target(found, folder):
    """CI runs `make test`; of the others it is known that they exist."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert found["name"] in " ".join(re.findall(r"^\.PHONY: (.*)$", makefile, re.M)).split()


def extra(found, folder):
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    optional = pyproject.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert re.search(rf"^{found['name']} = ", optional, re.M)


def kdkernels(found, folder):
    words = shlex.split(found["rest"])
    command = command_of(words)
    assert command, f"no such command: {words}"
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options <= options_of(command)
    if found["rest"].startswith(LONG):
        return
    # A placeholder stands for what is called like its option.
    words = [
        before.strip("-") if word in ("DIR", "NAME") else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    line = " ".join(words)
    short = next(more for start, more in SMALL.items() if line.startswith(start))
    assert cli.main([*words, *short.split()]) == 0
    if command in LEAVES:
        out = words[words.index("--out") + 1] if "--out" in words else "runs"
        assert list((folder / out).glob(f"**/{LEAVES[command]}"))


def stages(found, folder):
    """`python -m benchmarks.stages` is `bench stages`."""
    assert set(re.findall(r" (--[\w-]+)", found["rest"])) <= options_of("bench stages")


def elsewhere(found, folder):
    """It cannot run here."""


KINDS = {
    r"make (?P<name>[\w-]+)( \w+=\S+)*": target,
    r'pip install "?kdkernels\[(?P<name>\w+)\]"?': extra,
    r"(\.venv/bin/)?python -m kdkernels (?P<rest>.*)": kdkernels,
    r"ncu .* python -m benchmarks\.stages(?P<rest>.*)": stages,  # a GPU, counted by its own tool
    r'pip install "cuda-toolkit\[.*': elsewhere,  # a download
    r"export CUDA_HOME=\$\(python -c .*": elsewhere,  # where that one was
    r"cat > calls\.py <<END": elsewhere,  # for a GPU
    r"ncu .* python calls\.py": elsewhere,
}


def furnish(folder):
    """Models that know 70 words, texts, a configuration and the answers of a server."""
    made = pytest.importorskip("distill.jobs.checkpoints_made")
    words = [*made.WORDS, *(f"word{k}" for k in range(70 - len(made.WORDS)))]
    for name, width in (("student", 16), ("teacher", 32)):
        options = dict(tokens=made.tokenizer(words), vocab_size=72, hidden_size=width)
        made.language_model(folder / name, **options)
    made.texts(folder / "data")
    (folder / "run.yaml").write_text("teacher: teacher\nstudent: student\ndata: data\n")
    answer = {"token_ids": [4, 2], "ids": [[5, 7], [3, 1]], "logprobs": [[-0.5, -2.0]] * 2}
    (folder / "answers.jsonl").write_text(json.dumps(answer) + "\n")


def lines_of(text):
    """Commands, without comments; a heredoc and what is continued is one."""
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r"<<'(\w+)'\n.*?\n\1$", r"<<\1", text, flags=re.S | re.M)
    return [line for each in text.splitlines() if (line := re.sub(r"(^|\s)#.*", "", each).strip())]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_commands(block, bench, tmp_path, monkeypatch):
    lines = lines_of(block.text)
    kinds = [
        next(((kind, m) for x, kind in KINDS.items() if (m := re.fullmatch(x, line))), None)
        for line in lines
    ]
    assert lines and None not in kinds, f"of no kind: {lines[kinds.index(None)]}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "SECONDS", 0.0)
    if re.search(" kdkernels (distill|cache)", block.text):
        furnish(tmp_path)
    for kind, found in kinds:
        kind(found, tmp_path)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_block_is_of_a_known_language(path):
    assert {block.language for block in blocks_of(path)} <= LANGUAGES


@pytest.mark.parametrize("path", DOCUMENTS)
def test_options_in_the_text_exist(path, bench):
    for line, code in inline_of(path, "code_inline"):
        words = re.sub(r"^.*\bkdkernels ", "", code.content).split()
        options = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
        command = command_of(words)
        wanted = options_of(command) if command else set().union(*map(options_of, COMMANDS))
        assert options <= wanted | FOREIGN, f"{path}:{line}"
        for option, value in zip(words, words[1:], strict=False):
            if option == "--technique":
                assert value in cli.TECHNIQUES.split(", "), f"{path}:{line}"
        if found := re.fullmatch(r"make (?P<name>[\w-]+)( \w+=\S+)*", code.content):
            target(found, None)
        if found := re.fullmatch(r'pip install "kdkernels\[(?P<name>\w+)\]"', code.content):
            extra(found, None)


def test_examples_of_the_help_exist(bench):
    lines = re.findall(r"^  .*-m kdkernels (.*)$", "".join(map(help_of, COMMANDS)), re.M)
    assert len(lines) > 20
    for line in lines:
        words = line.split()
        options = {word for word in words if word.startswith("--")}
        assert options <= options_of(command_of(words)), line
