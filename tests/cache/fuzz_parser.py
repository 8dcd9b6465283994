"""The parser behind the checksums, under anything: what `test_fuzz.py` and a fuzzer feed it.

A cache is taken apart, changed step by step, sealed again by `forge`, and read: the outcome is a
`CacheError`, or numbers that are within bounds. As a program it runs atheris, with libFuzzer's
arguments.
"""

import copy
import json
import sys
import tempfile
import types
from pathlib import Path

import forge
import torch
from cache_samples import rows_of
from campaign import small
from zstandard import ZstdCompressor, ZstdDecompressor

from kdkernels import Sampled, TopK, cache

KINDS = "topk:3", "sampled:4", "hidden:fp8", "hidden:fp32", "dense:bf16"
SHARD = "shard-00000.kdc"
VALUES = (None, True, 0, 1, -1, 2, 4, 300, 2**31, 2**32, 2**70, 0.0, 1.0, 0.5, -1.5, 1e308, "", "x")
VALUES += ([], {}, "topk", "fp16", "values", "../x", "1", [1], {"name": "topk"})
NOISE = 1e-3  # what float32 leaves of a sum, too


class Cache:
    """A small cache of a kind, in pieces, and a folder for what becomes of it."""

    def __init__(self, kind, folder):
        self.folder, self.case = folder, small(kind)
        self.case.write(folder)
        self.manifest, self.shard = forge.read_manifest(folder), forge.read_shard(folder / SHARD)
        self.columns = sum(column.width for column in cache.open(folder).codec.columns)

    def changed(self, steps):
        """Writes it, changed by steps: (which change, three whole numbers, bytes), any of them."""
        manifest, shard = copy.deepcopy(self.manifest), copy.deepcopy(self.shard)
        for which, *arguments in steps:
            CHANGES[which % len(CHANGES)](self, manifest, shard, *arguments)
        content = shard.bytes()
        (self.folder / SHARD).write_bytes(content)
        _, count, rows = forge.FOOTER.unpack_from(content, len(content) - 32 - forge.FOOTER.size)
        listed = manifest.get("shards")
        for facts in listed if isinstance(listed, list) else ():
            if isinstance(facts, dict) and facts.get("root") == self.manifest["shards"][0]["root"]:
                facts.update(bytes=len(content), samples=count, rows=rows, root=content[-32:].hex())
        forge.write_manifest(self.folder, manifest)

    def check(self):
        """Reads it: fails where that gives anything but an error or numbers that can be."""
        try:
            whole = not cache.verify(self.folder)
            teacher = cache.open(self.folder)
        except cache.CacheError:
            return False
        listed = []
        try:
            listed = list(teacher.samples())
            read = True
        except cache.CacheError:
            read = False
        assert read == whole, "samples are there, or are not, for one of samples() and verify()"
        for ids in listed if teacher.description["sample"] == "tokens" else ():
            check_bounds(teacher, ids, teacher[ids])
        for ids in self.case.samples:
            try:
                found = teacher[ids]
            except cache.CacheError:
                continue
            check_bounds(teacher, ids, found)
        return whole


def check_bounds(teacher, ids, source):
    rows, classes = rows_of(source), teacher.description["vocab_size"]
    assert all(len(x) == len(ids) for x in rows.values())
    if not isinstance(source, (TopK, Sampled)):
        for name, x in rows.items():
            assert not (x.isnan() | (x == torch.inf)).any()
            assert name == "logits" or x.isfinite().all()
        return
    kept, found = rows["ids"] >= 0, rows["ids"].long()
    assert ((found >= -1) & (found < classes)).all()
    assert (kept[:, 1:] <= kept[:, :-1]).all(), "padding comes last"
    assert ((found[:, 1:] > found[:, :-1]) | ~kept[:, 1:]).all()
    assert kept.sum(1).max() <= (teacher.kind.k if isinstance(source, TopK) else teacher.kind.draws)
    if isinstance(source, Sampled):
        counts = source.counts.where(kept, 0)
        assert (counts[kept] >= 1).all()
        assert ((counts.sum(1) == teacher.kind.draws) | ~kept.any(1)).all()
    else:
        logprobs = source.logprobs
        assert logprobs[kept].isfinite().all() and (logprobs[kept] <= 0).all()
        assert (logprobs.double().exp().where(kept, 0).sum(1) <= 1 + NOISE).all()


def _block(shard, a):
    return shard.blocks[a % len(shard.blocks)]


def _spliced(content, at, bytes_of):
    at = at % (len(content) + 1)
    return content[:at] + bytes_of + content[at + len(bytes_of) :]


def _block_bytes(self, manifest, shard, a, b, c, text):
    block = _block(shard, a)
    block.content = _spliced(block.content, b, text)


def _block_length(self, manifest, shard, a, b, c, text):
    block = _block(shard, a)
    block.content = block.content[: b % (len(block.content) + 1)] + text


def _section(change):
    """A section as (flag, bytes) becomes another."""

    def changed(self, manifest, shard, a, b, c, text):
        block = _block(shard, a)
        try:
            sections = forge.unpacked(block.content, self.columns)
        except forge.struct.error:
            return  # changed before
        sections[b % len(sections)] = change(*sections[b % len(sections)], c, text)
        block.content = forge.packed(sections)

    return changed


def _numbers(flag, content, c, text):
    """Bytes of its numbers, which then lie there as they are."""
    try:
        content = ZstdDecompressor().decompress(content, 1 << 16) if flag else content
    except Exception:
        pass
    return 0, _spliced(content or bytes(4), c, text)


def _size(self, manifest, shard, a, b, c, text):
    at = b % self.columns * 4
    block = _block(shard, a)
    block.content = _spliced(block.content, at, forge.struct.pack("<I", c % 2**32))


def _entry(self, manifest, shard, a, b, c, text):
    name, bits = (("offset", 64), ("size", 32), ("rows", 32))[b % 3]
    _block(shard, a).entry[name] = c % 2**bits


def _rows(self, manifest, shard, a, b, c, text):
    _block(shard, a).rows = c % 2**32 if b % 2 else c % 8


def _key(self, manifest, shard, a, b, c, text):
    _block(shard, a).key = text[:16].ljust(16, b"\0") if c % 2 else _block(shard, b).key


def _footer(self, manifest, shard, a, b, c, text):
    shard.footer[("begin", "count", "rows")[b % 3]] = c % 2**64


def _start(self, manifest, shard, a, b, c, text):
    if b % 2:
        shard.version = c % 2**32
    else:
        shard.length = c % 2**32


def _header(self, manifest, shard, a, b, c, text):
    header = shard.header
    header = header if isinstance(header, bytes) else forge.canonical(header)
    shard.header = _spliced(header, b, text)


def _places(facts):
    """(container, key) of everything in JSON."""
    for key in sorted(facts) if isinstance(facts, dict) else range(len(facts)):
        yield facts, key
        if isinstance(facts[key], (dict, list)):
            yield from _places(facts[key])


def _described(self, manifest, shard, a, b, c, text):
    """A fact of the description, in the manifest and in the header."""
    for facts in (manifest, shard.header):
        if isinstance(facts, dict) and isinstance(facts.get("description"), dict):
            _fact(facts["description"], b, c)


def _listed(self, manifest, shard, a, b, c, text):
    _fact(manifest, b, c)


def _fact(facts, b, c):
    found = list(_places(facts))
    if not found:
        return
    container, key = found[b % len(found)]
    if c % (len(VALUES) + 1) == len(VALUES):
        del container[key]
    else:
        container[key] = copy.deepcopy(VALUES[c % (len(VALUES) + 1)])


def _twice(self, manifest, shard, a, b, c, text):
    shard.blocks.insert(b % 3, copy.deepcopy(_block(shard, a)))


CHANGES = (
    _section(_numbers),
    _section(_numbers),
    _section(_numbers),
    _section(lambda flag, content, c, text: (0, text)),
    _section(lambda flag, content, c, text: (forge.COMPRESSED, text)),
    _section(lambda flag, content, c, text: (flag, _spliced(content, c, text))),
    _section(
        lambda flag, content, c, text: (
            forge.COMPRESSED,
            ZstdCompressor(write_content_size=c % 2 > 0).compress(text * (c % 2**16)),
        )
    ),
    _block_bytes,
    _block_length,
    _size,
    _entry,
    _rows,
    _key,
    _footer,
    _start,
    _header,
    _described,
    _listed,
    _twice,
)


def steps_of(data):
    """Bytes -> a kind and steps, whatever they are."""
    steps = []
    for at in range(1, len(data), 12):
        part = data[at : at + 12].ljust(12, b"\0")
        c = int.from_bytes(part[4:12], "little") >> (0, 24, 48, 56)[part[3] % 4]
        steps.append((part[0], part[1], part[2], c, part[12 - part[3] % 9 :]))
    return KINDS[data[0] % len(KINDS) if data else 0], steps


def functions_of(package):
    """All that it has, methods too."""
    for name, module in sorted(sys.modules.items()):
        if name.startswith(package):
            for value in list(vars(module).values()):
                inside = vars(value).values() if isinstance(value, type) else [value]
                for each in inside:
                    each = getattr(each, "__func__", each)
                    if isinstance(each, types.FunctionType) and each.__module__ == name:
                        yield each


def main():
    import atheris

    for function in functions_of("kdkernels.cache"):
        atheris.instrument_func(function)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        caches = {kind: Cache(kind, Path(parent) / str(k)) for k, kind in enumerate(KINDS)}

        def run(data):
            kind, steps = steps_of(data)
            caches[kind].changed(steps)
            try:
                caches[kind].check()
            except Exception:
                print(json.dumps([kind, [[*s[:4], s[4].hex()] for s in steps]]), file=sys.stderr)
                raise

        atheris.Setup(sys.argv, run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
