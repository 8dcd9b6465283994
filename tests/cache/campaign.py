"""Does a cache survive its writer being killed, and is all that happens to its files noticed?

`make cache-campaign`: 1,000 kills, 10,000 flipped bits, 10,000 truncations, every bit of two small
caches, and a fuzzer where atheris is installed. A line for each, exit status 1 where one was not as
it must be. The tests do the same, less often; a number as argument is the seed.
"""

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import forge
import torch
from cache_samples import CLASSES, KINDS, generator, head_of, prediction, rows_of, token_ids

from kdkernels import LinearHead, __version__, cache, files
from kdkernels.cache import build, kinds, manifest

PUBLISHED = re.compile(r"manifest\.json|head\.safetensors|shard-[0-9]{5}\.kdc")
MANY = (2, 3, 4) * 60  # of which the index is longer than a page
FUZZ = Path(__file__).with_name("fuzz_parser.py")
FILES = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "fcntl.flock")  # audit events


class Tally:
    """How often something was done to a cache, and what was then not as it must be."""

    def __init__(self, name, seed):
        self.name, self.seed, self.begin = name, seed, time.monotonic()
        self.done, self.wrong = 0, []

    def __str__(self):
        right = self.done - len(self.wrong)
        took = time.monotonic() - self.begin
        counts = f"{self.name:<38}{self.done:>7,} done{right:>7,} right"
        lines = [f"{counts}  seed {self.seed}, {took:.0f} s"]
        return "\n    ".join(lines + self.wrong[:10])

    def add(self, wrong):
        """Something was done; wrong: what is then not as it must be, or ""."""
        self.done += 1
        self.wrong += [wrong] if wrong else []


class Case(NamedTuple):
    """A cache to be written: of these samples, these predictions."""

    kind: str
    samples: list
    given: list
    shard_tokens: int
    options: dict

    def write(self, folder):
        options = {"shard_tokens": self.shard_tokens, **self.options}
        with cache.Writer(folder, self.kind, **options) as writer:
            for ids, each in zip(self.samples, self.given, strict=True):
                writer.add(ids, each)
        return folder

    def read(self, folder):
        """-> {name: tensor} of all samples"""
        return rows_of(cache.open(folder).read(self.samples))


def case(kind, lengths=(5, 12, 1, 12, 30), shard_tokens=20, teacher="numbers"):
    samples = token_ids(lengths)
    given = [prediction(kind, len(ids), k) for k, ids in enumerate(samples)]
    options = {"vocab_size": CLASSES, "teacher": teacher, "head": head_of(kind)}
    return Case(kind, samples, given, shard_tokens, options)


def images():
    """A case of samples that are no tokens, with one prediction each."""
    samples = list(torch.randn(8, 3, 4, generator=generator()))
    given = [prediction("dense:fp32", 1, k) for k in range(len(samples))]
    options = {"vocab_size": CLASSES, "teacher": "numbers", "sample": "values"}
    return Case("dense:fp32", samples, given, 3, options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], wanted[name]) for name in wanted
    )


# Damage: a file is changed, and must be found out, whichever way the cache is read.


def errors_of(folder, samples):
    """The errors of reading all of it, and of `verify`; of a way that finds none: what it gave."""
    found = []
    for use in (lambda: cache.open(folder).read(samples), lambda: cache.verify(folder)):
        try:
            given = use()
            (error,) = given if isinstance(given, list) and len(given) == 1 else (repr(given)[:80],)
        except Exception as raised:
            error = raised
        found.append(error)
    return found


def places(folder):
    """{name of a shard: [(begin, end) of every block]}"""
    found = {}
    for path in folder.glob("shard-*"):
        shard = forge.read_shard(path)
        end = forge.START.size + len(forge.canonical(shard.header))
        found[path.name] = ranges = []
        for block in shard.blocks:
            ranges.append((end, end + len(block.content)))
            end += len(block.content)
    return found


def unnoticed(folder, samples, name, at=None, blocks=None):
    """What is wrong with the errors that a changed file gives, or "".

    at: the byte that was changed, or None where the length was.
    """
    for error in errors_of(folder, samples):
        if not isinstance(error, cache.CacheCorruptError) or error.shard != name:
            return f"{name}, byte {at}: {error!r}"
        if at is None:
            continue
        hit = [k for k, (begin, end) in enumerate(blocks.get(name, [])) if begin <= at < end]
        right = error.begin <= at < error.end and name in str(error)
        if hit:
            block = (hit[0], *blocks[name][hit[0]])
            right = right and block == (error.block, error.begin, error.end)
        if not right or isinstance(error.block, str) == bool(hit):
            return f"{name}, byte {at}, blames {error.block}, {error.begin} to {error.end}"
    return ""


@contextmanager
def caches():
    """[(case, folder)] of all kinds"""
    cases = [*map(case, (*KINDS, "hidden:fp16", "dense:fp16")), images()]
    with tempfile.TemporaryDirectory() as parent:
        yield [(each, each.write(Path(parent) / str(k))) for k, each in enumerate(cases)]


def flips(count, seed):
    """Single bits, of any file."""
    tally, chance = Tally("bits flipped", seed), random.Random(seed)
    with caches() as found:
        known = [(each, folder, contents(folder), places(folder)) for each, folder in found]
        for k in range(count):
            each, folder, whole, blocks = known[k % len(known)]
            name = chance.choice(sorted(whole))
            bit = chance.randrange(8 * len(whole[name]))
            tally.add(_flip(each, folder, name, whole[name], bit, blocks))
    return tally


def every_bit(seed):
    """Of two small caches."""
    tally = Tally("every bit of two small caches", seed)
    with tempfile.TemporaryDirectory() as parent:
        for kind in ("topk:2", "hidden:fp8"):
            each, folder = small(kind), Path(parent) / kind[:4]
            blocks = places(each.write(folder))
            for name, content in contents(folder).items():
                for bit in range(8 * len(content)):
                    tally.add(_flip(each, folder, name, content, bit, blocks))
    return tally


def small(kind):
    """Two samples, 5 classes."""
    samples = [torch.tensor([3, 1, 2]), torch.tensor([4])]
    options = {"vocab_size": 5, "teacher": "a", "head": None}
    if kind.startswith("hidden"):
        options["head"] = LinearHead(torch.zeros(0, 3), torch.ones(5, 3))
    width = 3 if options["head"] else 5
    given = [torch.arange(len(ids) * width).view(-1, width) / 4 for ids in samples]
    if kind.startswith("sampled"):
        draws = kinds.parse(kind, 5)
        given = [draws.draw(each, k) for k, each in enumerate(given)]
    return Case(kind, samples, given, 20, options)


def _flip(each, folder, name, content, bit, blocks):
    with open(folder / name, "r+b", buffering=0) as file:
        file.seek(bit // 8)
        file.write(bytes([content[bit // 8] ^ 1 << bit % 8]))
        wrong = unnoticed(folder, each.samples, name, bit // 8, blocks)
        file.seek(bit // 8)
        file.write(content[bit // 8 : bit // 8 + 1])
    return wrong and f"{each.kind}: {wrong}"


def truncations(count, seed):
    """Of any file, before it is opened; every tenth file is longer instead."""
    tally, chance = Tally("files truncated, some extended", seed), random.Random(seed)
    with caches() as found:
        known = [(each, folder, contents(folder)) for each, folder in found]
        for k in range(count):
            each, folder, whole = known[k % len(known)]
            name = chance.choice(sorted(whole))
            content = whole[name]
            if chance.random() < 0.1:
                more = chance.randbytes(chance.randint(1, 64))
                changed = content + chance.choice([more, bytes(len(more)), b"\n", content])
            else:
                changed = content[: chance.randrange(len(content))]
            (folder / name).write_bytes(changed)
            wrong = unnoticed(folder, each.samples, name)
            (folder / name).write_bytes(content)
            tally.add(wrong and f"{each.kind}: {len(changed)} bytes of {wrong}")
    return tally


def truncations_while_mapped(count, seed):
    """A sample is then what it was, or an error; a process that ends by a signal is neither."""
    tally, chance = Tally("files truncated while they are mapped", seed), random.Random(seed)
    with tempfile.TemporaryDirectory() as parent:
        known = []
        cases = case("dense:fp32"), case("topk:7", MANY, 10**6), case("hidden:fp8")
        for k, each in enumerate(cases):
            folder = each.write(Path(parent) / str(k))
            teacher = cache.open(folder)
            wanted = [rows_of(teacher[ids]) for ids in each.samples]
            known.append((each, folder, contents(folder), wanted))
        while tally.done < count:
            some = min(50, count - tally.done)
            wrong = in_child(lambda some=some: _truncate_while_mapped(known, chance, some))
            chance.seed(chance.getrandbits(64))
            tally.done += some
            tally.wrong += wrong
    return tally


def _truncate_while_mapped(known, chance, count):
    wrong = []
    for _ in range(count):
        each, folder, whole, wanted = chance.choice(known)
        name = chance.choice([name for name in whole if name.startswith("shard")])
        teacher = cache.open(folder)
        before = chance.sample(range(len(wanted)), 2)
        for k in before:
            teacher[each.samples[k]]
        size = chance.randrange(len(whole[name]))
        os.truncate(folder / name, size)
        for k in before + chance.sample(range(len(wanted)), 3):
            try:
                found = rows_of(teacher[each.samples[k]])
            except cache.CacheCorruptError:
                continue
            except Exception as error:
                wrong.append(f"{each.kind}, {name}, {size} bytes: {error!r}")
            else:
                if not same(found, wanted[k]):
                    wrong.append(f"{each.kind}, {name}, {size} bytes: other numbers")
        (folder / name).write_bytes(whole[name])
    return wrong


# Kills.


def child(work):
    """A process that does it -> its id; it exits with 0, or with 1 and a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def ended(pid, options=0):
    """-> how a process ended: 0, 1, −9; None while it runs"""
    found, status = os.waitpid(pid, options)
    return os.waitstatus_to_exitcode(status) if found else None


def in_child(work):
    """Lines that work, in a process of its own, returns; how it ended if it did not."""
    read, write = os.pipe()

    def told():
        with open(write, "w") as out:
            out.write("\n".join(work()))

    pid = child(told)
    os.close(write)
    with open(read) as lines:
        found = lines.read()
    code = ended(pid)
    return found.splitlines() if not code else [f"a process ended with {code}"]


def built(each, folder, first):
    """Writes a cache as one process of several does, which begin with different shards."""
    head = each.options["head"]
    kind = kinds.parse(each.kind, CLASSES, head=head)
    teacher = {"name": each.options["teacher"], "weights": None, "dtype": None}
    found = build.Build(folder, manifest.describe(kind, teacher=teacher, library=__version__))
    shards = build.cut([len(ids) for ids in each.samples], each.shard_tokens)
    order = [(first + k) % len(shards) for k in range(len(shards))]
    for number in order:
        with found.shard(number) as writer:
            if writer is None:
                continue
            begin, end = shards[number]
            for ids, given in zip(each.samples[begin:end], each.given[begin:end], strict=True):
                rows, block = found.codec.encode(ids, given)
                _, content, _ = found.codec.sample.content(ids)
                writer.add(found.codec.key(content), block, rows)
    found.publish(len(shards), head)


class Steps:
    """Counts what this process does to files from now on; at the last, it is killed.

    A write is two steps: half of the bytes arrive before the second.
    """

    def __init__(self, folder, last=None):
        self.folder, self.last, self.count = str(folder), last, 0
        sys.addaudithook(self._heard)
        fsync = os.fsync
        os.fsync = lambda handle: (self(), fsync(handle))
        files.open = lambda path, mode: _Torn(open(path, mode, buffering=0), self)

    def __call__(self):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def _heard(self, event, args):
        if event in FILES and (event == "fcntl.flock" or str(args[0]).startswith(self.folder)):
            self()


class _Torn:
    def __init__(self, file, step):
        self.file, self.step = file, step

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def tell(self):
        return self.file.tell()

    def write(self, content):
        self.step()
        self.file.write(content[: len(content) // 2])
        self.step()
        self.file.write(content[len(content) // 2 :])


class Killed:
    """A case whose writing is killed, and what its directory must be afterwards."""

    def __init__(self, each, parent, tally):
        self.each, self.parent, self.tally, self.runs = each, parent, tally, 0
        begin = time.monotonic()
        folder = each.write(parent / "whole")
        self.seconds = time.monotonic() - begin
        self.whole, self.wanted = contents(folder), each.read(folder)

    def folder(self):
        self.runs += 1
        return self.parent / str(self.runs)

    def look(self, folder):
        """What a reader sees is nothing, or all of it."""
        try:
            found = self.each.read(folder)
        except FileNotFoundError as error:
            right = not folder.exists() or "must be a directory" in str(error)
        except cache.CacheError as error:
            right = type(error) is cache.CacheError and "interrupted" in str(error)
        else:
            right = same(found, self.wanted)
        if not right:
            self.tally.wrong.append(f"{self.each.kind}: a reader saw something else")

    def finish(self, folder):
        """Of what is complete."""
        found = contents(folder)
        wrong = {name for name, _ in found.items() ^ self.whole.items()}
        if wrong := sorted(wrong | {name for name in found if not PUBLISHED.fullmatch(name)}):
            self.tally.wrong.append(f"{self.each.kind}: {', '.join(wrong)}")
        elif cache.verify(folder):
            self.tally.wrong.append(f"{self.each.kind}: {cache.verify(folder)[0]}")
        for path in folder.iterdir():
            path.unlink()

    def steps(self):
        """How many there are."""

        def counted():
            steps = Steps(self.parent / "counted")
            self.each.write(self.parent / "counted")
            return [str(steps.count)]

        return int(in_child(counted)[0])

    def at_step(self, last, again):
        """Killed there, and at step `again` of what comes next; and then not."""
        folder = self.folder()
        for step in (last, again, None):
            pid = child(lambda step=step: (Steps(folder, step), self.each.write(folder)))
            if (code := ended(pid)) == -signal.SIGKILL:
                self.tally.done += 1
            elif code:
                wrong = f"{self.each.kind}: steps {last}, {again}: ended with {code}"
                self.tally.wrong.append(wrong)
            self.look(folder)
        self.finish(folder)

    def at_random(self, chance, processes):
        """Kills any of several processes at any time, and starts it again, until all is written."""
        folder = self.folder()
        running, kills = {}, chance.randint(1, 4)
        for first in range(processes):
            running[self._start(folder, first, processes)] = first
        deadline = time.monotonic() + chance.uniform(0, 2 * processes * self.seconds)
        while running:
            self.look(folder)
            if kills and time.monotonic() >= deadline:
                kills -= 1
                os.kill(chance.choice(list(running)), signal.SIGKILL)
                deadline = time.monotonic() + chance.uniform(0, 2 * processes * self.seconds)
            for pid in list(running):
                if (code := ended(pid, os.WNOHANG)) is None:
                    continue
                first = running.pop(pid)
                if code == -signal.SIGKILL:
                    self.tally.done += 1
                    running[self._start(folder, first, processes)] = first
                elif code:
                    self.tally.wrong.append(f"{self.each.kind}: ended with {code}")
        self.look(folder)
        self.finish(folder)

    def _start(self, folder, first, processes):
        if processes == 1:
            return child(lambda: self.each.write(folder))
        return child(lambda: built(self.each, folder, first))


@contextmanager
def killed(name, seed):
    with tempfile.TemporaryDirectory() as parent:
        tally = Tally(name, seed)
        yield (
            tally,
            [
                Killed(case(kind, shard_tokens=10), _made(Path(parent) / kind[:4]), tally)
                for kind in ("topk:7", "hidden:bf16")
            ],
        )


def _made(folder):
    folder.mkdir()
    return folder


def kills_at_steps(seed, count=None):
    """At every step, or at as many, and once more at any."""
    chance = random.Random(seed)
    with killed("kills at every step of writing", seed) as (tally, found):
        for each in found:
            steps = each.steps()
            chosen = range(1, steps + 1)
            for last in chosen if count is None else chance.sample(chosen, count // len(found)):
                each.at_step(last, chance.randint(1, steps))
    return tally


def kills_at_random(count, seed, processes=1):
    name = "kills at any time" if processes == 1 else f"kills of {processes} processes, at any time"
    chance = random.Random(seed)
    with killed(name, seed) as (tally, found):
        while tally.done < count and not tally.wrong:
            chance.choice(found).at_random(chance, processes)
    return tally


def fuzzed(seed, **limit):
    """The parser under a fuzzer that sees which lines it reaches.

    limit: of libFuzzer, runs or max_total_time (seconds).
    """
    tally = Tally("inputs of a fuzzer", seed)
    with tempfile.TemporaryDirectory() as folder:
        options = {"seed": seed, "artifact_prefix": f"{folder}/", "len_control": 0, "max_len": 120}
        options = [f"-{name}={value}" for name, value in {**options, **limit}.items()]
        command = [sys.executable, FUZZ, *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        found = subprocess.run(command, env=environment, errors="replace", **pipes)
    runs = re.findall(r"^(?:Done |#)(\d+)", found.stdout, re.MULTILINE)
    tally.done = int(runs[-1]) if runs else 1
    if found.returncode:
        tally.wrong.append(found.stdout[-4000:])
    return tally


def main(seed):
    torch.set_num_threads(1)
    wrong = 0
    works = [
        lambda: kills_at_steps(seed),
        lambda: kills_at_random(400, seed),
        lambda: kills_at_random(300, seed, 3),
        lambda: every_bit(seed),
        lambda: flips(10_000, seed),
        lambda: truncations(9_000, seed),
        lambda: truncations_while_mapped(2_000, seed),
    ]
    if importlib.util.find_spec("atheris"):
        works.append(lambda: fuzzed(seed, max_total_time=180))
    else:
        print("no fuzzer: atheris is not installed")
    for work in works:
        tally = work()
        print(tally, flush=True)
        wrong += len(tally.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
