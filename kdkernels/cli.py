"""The command line: `python -m kdkernels distill`, `cache`, `sweep`, `report`, `bench`, `info`.

Exit codes: 0 done, 1 what `bench` or `cache verify` found wrong or a training that failed, 2 a
wrong argument or file (one line on stderr says which), 130 interrupted. Of several processes each
that fails says so in a line, and ends at once.
"""

import argparse
import functools
import importlib
import inspect
import os
import sys
import warnings
from pathlib import Path

from . import cache, files, info
from .cache import identity
from .distill import CheckpointError, TrainingError, failures
from .distill.jobs import CacheConfig, Config, caches, config, models
from .distill.presets import digits

WRONG = TypeError, ValueError, RuntimeError, OSError, ImportError
TECHNIQUES = (
    "teacher-first, unlabelled, missing-digit, offline, ensemble, specialists, hints, attention, "
    "born-again, schedule"
)
DISTILL = f"""
Trains a student on a teacher's soft targets and on labels, and compares the two on test data.

The preset `digits` trains a teacher on {digits.TRAINING:,} handwritten digits, then students on few
of them, with hard labels and with the teacher's soft targets, and compares them on 797 test images;
with --technique it shows another way to distil. The preset `text` does it with language models.
With --student, checkpoints of Hugging Face are distilled: causal language models on text files, or
image classifiers on a folder of images for each class. All that can be wrong is checked before the
first step. Interrupted (Ctrl-C) or killed, the same command goes on where it was.
"""
DISTILL_EXAMPLES = """
examples:
  python -m kdkernels distill                           digits; open runs/digits/report.html
  python -m kdkernels distill --technique specialists   Hinton et al. 2015, section 5, on digits
  python -m kdkernels distill --preset text
  python -m kdkernels distill --teacher DIR --student DIR --data DIR --out runs/mine
  python -m kdkernels distill --student DIR --data DIR --alpha 0     a teacher first, on labels
  python -m kdkernels distill --config run.yaml --alpha 0.9          options of a file, but alpha
  torchrun --nproc-per-node 8 -m kdkernels distill --config run.yaml --shard-teacher   on 8 GPUs

run.yaml has a line for each option, as in the config.yaml that every run leaves:
  teacher: models/large
  student: models/small
  data: texts
  epochs: 3
  hints: [{student: model.layers.3, teacher: model.layers.7, weight: 0.1}]

A language model's predictions can be written first, once, and read as often as you like:
  python -m kdkernels cache build --teacher DIR --data DIR --out runs/cache
  python -m kdkernels distill --teacher-cache runs/cache --student DIR --data DIR
"""
CACHE = """
A teacher's predictions on disk: a language model is asked once, and students learn from the files
as often as you like, in any order and batch size. What belongs to an example is found by its token
ids, and nothing damaged is read.
"""
BUILD = """
Asks a language model for its predictions for the training examples that `distill` will have with
the same --data, --test, --test-share, --length and --seed. Interrupted (Ctrl-C) or killed, the same
command goes on where it was, and ends with the same files.
"""
BUILD_EXAMPLES = """
examples:
  python -m kdkernels cache build --teacher DIR --data DIR           the 64 most probable tokens
  python -m kdkernels cache build --teacher DIR --data DIR --kind sampled:50    smaller, unbiased
  python -m kdkernels cache build --teacher DIR --data DIR --kind hidden:bf16   all, by its head
  torchrun --nproc-per-node 8 -m kdkernels cache build --teacher DIR --data DIR  on eight GPUs
  torchrun --nproc-per-node 8 -m kdkernels cache build --teacher DIR --data DIR --shard-teacher

and afterwards, as often as you like, without the teacher:
  python -m kdkernels distill --teacher-cache runs/cache --student DIR --data DIR
"""
VERIFY_EXAMPLES = """
Reads everything and compares it with its checksums. Prints a line for each damage; the exit code is
0 where there is none, 1 where there is some.

example:
  python -m kdkernels cache verify runs/cache
"""
IMPORT = """
Predictions that another program made: a server's log-probabilities, a line of JSON for each sample,
as vLLM writes them or with "token_ids", "ids" and "logprobs"; or NumPy's array of logits.
"""
IMPORT_EXAMPLES = """
examples:
  python -m kdkernels cache import served.jsonl --teacher NAME --vocab-size 151936
  python -m kdkernels cache import logits.npy --inputs ids.npy --teacher NAME --kind topk:64

ids.npy has token ids (N, L) for logits (N, L, V), or any array (N, ...) for logits (N, V).
"""
EXPORT_EXAMPLES = """
example:
  python -m kdkernels cache export runs/cache logits.npy --inputs ids.npy
"""
INFO_EXAMPLES = """
example:
  python -m kdkernels cache info runs/cache
"""
SWEEP_EXAMPLES = """
examples:
  python -m kdkernels sweep                                     a grid over both
  python -m kdkernels sweep --temperatures 1 20 --alphas 0 1 --trials 30     chosen by Optuna
"""
REPORT_EXAMPLES = """
Every run leaves a report.html. This writes it anew, of results.json and the pictures beside it.

example:
  python -m kdkernels report runs/digits
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; argv: the arguments without the program's name -> the exit code.

    Raises:
        SystemExit: code 2 after a wrong argument, code 0 after --help.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels",
        description="Knowledge distillation: the loss and the loop.",
        epilog="`COMMAND --help` explains each, with examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_distill(commands)
    _add_cache(commands)
    _add_sweep(commands)
    report = _add(commands, "report", "write report.html of a run again", REPORT_EXAMPLES)
    report.add_argument("folder", metavar="DIR", help="what --out was: it has a results.json")
    report.set_defaults(run=_report)
    # Its arguments are those of benchmarks/command.py, help included.
    commands.add_parser(
        "bench", help="measure losses: correctness, time and memory", add_help=False
    ).set_defaults(run=_bench)
    commands.add_parser(
        "info", help="print what was built, what is usable now and why the rest is not"
    ).set_defaults(run=_info)
    arguments, others = parser.parse_known_args(argv)
    if arguments.command == "bench":
        arguments.others = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    return code


def _add(commands, name, text, examples, description=None, usage="[options]"):
    """A command, whose options are absent where they are not given."""
    return commands.add_parser(
        name,
        help=text,
        usage=f"%(prog)s {usage}" if description else None,
        description=description or text,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )


def _add_distill(commands):
    distill = _add(
        commands,
        "distill",
        "distil a teacher into students: a preset, or checkpoints of yours",
        DISTILL_EXAMPLES,
        DISTILL,
    )
    distill.add_argument(
        "--preset",
        choices=["digits", "text"],
        help="data and models that are there; default: digits, where there is no --student",
    )
    distill.add_argument("--config", metavar="FILE.yaml", help="options of checkpoints, below")
    presets = distill.add_argument_group("presets (some options of checkpoints, too)")
    presets.add_argument(
        "--technique", metavar="NAME", help=f"of the preset digits, one of {TECHNIQUES}"
    )
    presets.add_argument(
        "--sizes",
        metavar="N",
        type=int,
        nargs="+",
        help=f"labelled images that students see; default: {_spaced(digits.SIZES)}",
    )
    _add_temperatures(presets)
    _add_seeds(presets)
    presets.add_argument(
        "--teacher-logits",
        metavar="FILE.npy",
        help="the teacher's logits for the training images, "
        f"({digits.TRAINING}, {digits.CLASSES}): used instead of a teacher where the file exists, "
        "written where it does not",
    )
    presets.add_argument(
        "--teacher-steps", metavar="N", type=int, help="of the teacher of the preset text"
    )
    presets.add_argument(
        "--blocks", metavar="N", type=int, help="of text that students of that preset see"
    )
    config.add_arguments(distill)
    distill.set_defaults(run=_distill)


def _add_cache(commands):
    both = _add(
        commands,
        "cache",
        "a teacher's predictions on disk: build, verify, info, import, export",
        "",
        CACHE,
        "ACTION [options]",
    )
    actions = both.add_subparsers(
        prog="python -m kdkernels cache", dest="command", required=True, metavar="ACTION"
    )
    build = _add(actions, "build", "write what a teacher predicts", BUILD_EXAMPLES, BUILD)
    config.add_arguments(build, CacheConfig, prefix="")
    build.set_defaults(run=_build, command="cache build")
    for name, text, examples, run in (
        ("verify", "look for damage", VERIFY_EXAMPLES, _verify),
        ("info", "print what a cache holds, and of whom", INFO_EXAMPLES, _describe),
    ):
        action = _add(actions, name, text, examples)
        action.add_argument("folder", metavar="DIR", help="of the cache")
        action.set_defaults(run=run, command=f"cache {name}")
    _add_exchange(actions)


def _add_exchange(actions):
    come = _add(
        actions,
        "import",
        "predictions of other programs",
        IMPORT_EXAMPLES,
        IMPORT,
        "FILE --teacher NAME [options]",
    )
    come.add_argument("file", metavar="FILE", help=".jsonl or .npy")
    come.add_argument("--teacher", metavar="NAME", required=True, help="what it is called")
    come.add_argument(
        "--kind", help="as in `cache build`; default: topk:64 of lines, dense:fp32 of logits"
    )
    come.add_argument("--vocab-size", metavar="N", type=int, help="of lines: the teacher's tokens")
    come.add_argument("--inputs", metavar="IDS.npy", help="of logits: what they are of")
    come.add_argument("--tokenizer", metavar="DIR", help="of whose tokens the ids are")
    come.add_argument("--out", metavar="DIR", default="runs/cache", help="default: runs/cache")
    come.set_defaults(run=_import, command="cache import")
    go = _add(actions, "export", "a cache's logits as a .npy file", EXPORT_EXAMPLES)
    go.add_argument("folder", metavar="DIR", help="of a cache of kind dense")
    go.add_argument("file", metavar="FILE.npy", help="to write")
    go.add_argument(
        "--inputs", metavar="IDS.npy", required=True, help="of which, in this order: ids (N, L)"
    )
    go.set_defaults(run=_export, command="cache export")


def _add_sweep(commands):
    sweep = _add(
        commands,
        "sweep",
        "try temperatures and alphas on the digits",
        SWEEP_EXAMPLES,
        "Which temperature and alpha suit students that see few labelled digits: chosen on "
        "images that are held out, with a picture.",
    )
    add = sweep.add_argument
    add("--out", metavar="DIR", help="for the results; default: runs/sweep")
    _add_temperatures(sweep)
    add("--alphas", metavar="X", type=float, nargs="+", help="weights of the teacher, in [0, 1]")
    add(
        "--trials",
        metavar="N",
        type=int,
        help="trainings that Optuna chooses, between the smallest and the largest of both; "
        "default: all combinations",
    )
    add("--size", metavar="N", type=int, help="labelled images that a student sees")
    _add_seeds(sweep)
    add("--steps", metavar="N", type=int, help="optimiser steps of every network")
    add("--backend", metavar="NAME", help="of the loss; default: the fastest that is usable")
    sweep.set_defaults(run=_sweep)


def _add_temperatures(parser):
    parser.add_argument(
        "--temperatures",
        metavar="T",
        type=float,
        nargs="+",
        help=f"of the soft targets; default: {_spaced(digits.TEMPERATURES)}",
    )


def _add_seeds(parser):
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        help=f"students of each kind; default: {digits.SEEDS}",
    )


def _spaced(numbers):
    return " ".join(f"{each:g}" for each in numbers)


def _distill(arguments):
    return _run(arguments, _job if _has_checkpoints(arguments) else _preset)


def _has_checkpoints(arguments):
    return any(
        name in arguments for name in ("student", "teacher", "teacher_cache", "data", "config")
    )


def _sweep(arguments):
    return _run(arguments, lambda given: _demo("the sweep", "sweep_demo", "runs/sweep", given))


def _build(arguments):
    from .distill.jobs import CacheJob

    try:
        _quiet()
        with failures.shared():
            CacheJob(CacheConfig.of(_given(arguments))).run()
    except Exception as error:
        return _wrong(arguments.command, error, *_code_of(error))
    return 0


def _verify(arguments):
    try:
        damages = cache.verify(arguments.folder)
    except cache.CacheCorruptError as error:  # of the manifest, without which nothing is known
        damages = [error]
    except WRONG as error:
        return _wrong(arguments.command, error)
    for damage in damages:
        print(damage)
    if not damages:
        print(f"{arguments.folder} is whole")
    return 1 if damages else 0


def _import(arguments):
    given = _given(arguments)
    file, out, inputs = given.pop("file"), given.pop("out"), given.pop("inputs", None)
    lines = not file.endswith(".npy")
    try:
        if lines != (inputs is None):
            raise ValueError("--inputs goes with logits, a .npy file, which needs them")
        if lines and "vocab_size" not in given:
            raise ValueError("--vocab-size must be given for lines")
        if "tokenizer" in given:
            tokenizer = models.tokenizer_of("tokenizer", given["tokenizer"])
            given["tokenizer"] = identity.of_tokenizer(tokenizer)
        if lines:
            cache.import_jsonl(out, file, **{"kind": "topk:64", **given})
        else:
            cache.import_npy(out, file, files.mapped_array("inputs", inputs), **given)
        found = cache.open(out)
    except (*WRONG, IndexError) as error:
        return _wrong(arguments.command, error)
    each = f"{found.bytes / max(1, found.tokens):,.1f} bytes each"
    print(f"{found.tokens:,} predictions of {len(found):,} samples, {each}: {out}")
    return 0


def _export(arguments):
    try:
        inputs = files.mapped_array("inputs", arguments.inputs)
        cache.export_npy(arguments.file, cache.open(arguments.folder), inputs)
    except WRONG as error:
        return _wrong(arguments.command, error)
    return 0


def _describe(arguments):
    try:
        found = cache.open(arguments.folder)
    except WRONG as error:
        return _wrong(arguments.command, error)
    for name, text in caches.facts_of(found):
        print(f"{name:<18}{text}")
    return 0


def _run(arguments, make):
    """make: options that were given by name -> what has a `run`, everything checked."""
    command = arguments.command
    try:
        with failures.shared():
            job = make(_given(arguments))
    except Exception as error:
        return _wrong(command, error, *_code_of(error))
    try:
        with warnings.catch_warnings(), failures.shared():
            warnings.showwarning = functools.partial(_warn, command)
            results = job.run()
    except (CheckpointError, cache.CacheError) as error:
        return _wrong(command, error)
    except TrainingError as error:
        return _wrong(command, error, code=1)
    except Exception as error:
        if not failures.several():
            raise
        return _wrong(command, error, code=1)
    if results is not None:  # of several processes, the main one has them
        from .distill import html

        html.write(job.out)
    return 0


def _code_of(error):
    """[exit code] for an exception while a job is made; one process alone shows where it came
    from, if it is of nothing that was given."""
    if isinstance(error, WRONG):
        return [2]
    if failures.several():
        return [1]
    raise error


def _given(arguments):
    """The options of a command, by name."""
    return {k: x for k, x in vars(arguments).items() if k not in ("command", "run")}


def _quiet():
    """No bars of `transformers`, unless somebody is looking."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def _job(given):
    from .distill.jobs import Job

    if "preset" in given:
        raise ValueError("--preset goes without --student and --config")
    in_file = config.read(given.pop("config")) if "config" in given else {}
    _check_options("checkpoints", given, [each.name for each in config.fields()])
    _quiet()
    return Job(Config.of({**in_file, **given}))


def _preset(given):
    preset = given.pop("preset", "digits")
    if preset == "text":
        return _demo("the preset text", "text_demo", "runs/text", given)
    if "technique" in given:
        return _demo("a technique", "techniques_demo", f"runs/{given['technique']}", given)
    return _demo("the preset digits", "digits_demo", "runs/digits", given)


def _demo(what, module, out, given):
    """The `Demo` of a module of the loop, with the options that it takes."""
    demo = importlib.import_module(f".distill.presets.{module}", __package__).Demo
    _check_options(what, given, inspect.signature(demo).parameters)
    return demo(**{"out": out, **given})


def _check_options(what, given, known):
    for name in given:
        if name not in known:
            raise ValueError(f"{_flag(name)} is no option of {what}: {' '.join(map(_flag, known))}")


def _flag(name):
    return f"--{name.replace('_', '-')}"


def _report(arguments):
    try:
        from .distill import html

        print(html.write(arguments.folder))
    except WRONG as error:
        return _wrong("report", error)
    return 0


def _warn(command, message, *where, **more):
    print(f"python -m kdkernels {command}: warning: {message}", file=sys.stderr)


def _wrong(command, error, code=2):
    text = " ".join(str(error).split())
    if failures.several():
        known = isinstance(error, (*WRONG, CheckpointError, cache.CacheError))
        text = f"{failures.place()}: {text if known else failures.line(error)}"
    print(f"python -m kdkernels {command}: error: {text}", file=sys.stderr)
    if failures.several():
        # The others are waiting, and threads of the process group may hang or abort a proper end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _bench(arguments):
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "command.py").is_file():
        print(
            "python -m kdkernels bench: error: the benchmarks come with the source, not with the "
            f"installed package, and {root} has none: run it in a checkout of kdkernels",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.command").main(arguments.others)


def _info(arguments):
    info.main()
    return 0
