"""Caches whose checksums are right whatever is in them: what only the parser can refuse.

The format is written down here a second time, from docs/cache.md: nothing of `kdkernels.cache` is
used, so that a mistake there is not repeated here.
"""

import hashlib
import json
import struct
from dataclasses import dataclass, field, replace

import numpy as np

START, ENTRY, FOOTER = struct.Struct("<8sII"), struct.Struct("<16sQII16s"), struct.Struct("<QQQ")
MAGIC, VERSION = b"KDKCACHE", 1
COMPRESSED = 1 << 31


@dataclass
class Block:
    """A sample's: key (16 bytes), rows, content. `entry` changes what the index says of it."""

    key: bytes
    rows: int
    content: bytes
    entry: dict = field(default_factory=dict)  # key, offset, size, rows, checksum


@dataclass
class Shard:
    """header: facts, or bytes that stand for them; blocks: in the order of the file. The others
    take the place of what follows from these."""

    header: dict | bytes
    blocks: list
    magic: bytes = MAGIC
    version: int = VERSION
    length: int | None = None
    in_order: bool = True  # of their keys, the index
    footer: dict = field(default_factory=dict)  # begin, count, rows
    between: bytes = b""  # the blocks and the index

    def bytes(self):
        header = self.header if isinstance(self.header, bytes) else canonical(self.header)
        length = len(header) if self.length is None else self.length
        start = START.pack(self.magic, self.version, length) + header
        content, entries = bytearray(), []
        for block in self.blocks:
            facts = {"key": block.key, "offset": len(start) + len(content)}
            facts.update(size=len(block.content), rows=block.rows)
            facts["checksum"] = hashlib.sha256(block.content).digest()[:16]
            facts.update(block.entry)
            entries.append(ENTRY.pack(*facts.values()))
            content += block.content
        content += self.between
        footer = {"begin": len(start) + len(content), "count": len(entries)}
        footer["rows"] = sum(block.rows for block in self.blocks)
        footer.update(self.footer)
        index = b"".join(sorted(entries) if self.in_order else entries)
        end = index + FOOTER.pack(*footer.values())
        return start + content + end + hashlib.sha256(start + end).digest()


def canonical(facts):
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


def read_shard(path):
    """A file -> `Shard`"""
    content = path.read_bytes()
    _, _, length = START.unpack_from(content)
    begin, count, _ = FOOTER.unpack_from(content, len(content) - 32 - FOOTER.size)
    entries = [ENTRY.unpack_from(content, begin + k * ENTRY.size) for k in range(count)]
    entries.sort(key=lambda entry: entry[1])
    return Shard(
        json.loads(content[START.size : START.size + length]),
        [Block(key, rows, content[at : at + size]) for key, at, size, rows, _ in entries],
    )


def read_manifest(folder):
    return json.loads((folder / "manifest.json").read_bytes())


def write_manifest(folder, facts):
    """facts: of a manifest; its checksum is made anew."""
    facts = {name: value for name, value in facts.items() if name != "checksum"}
    checksum = hashlib.sha256(canonical(facts)).hexdigest()
    (folder / "manifest.json").write_bytes(canonical({**facts, "checksum": checksum}))


def write_shard(folder, shard, name="shard-00000.kdc"):
    """A `Shard`, or the bytes of a file, and a manifest that names it."""
    content = shard if isinstance(shard, bytes) else shard.bytes()
    (folder / name).write_bytes(content)
    facts = read_manifest(folder)
    for each in facts["shards"]:
        if each["name"] == name and len(content) >= FOOTER.size + 32:
            _, count, rows = FOOTER.unpack_from(content, len(content) - 32 - FOOTER.size)
            each.update(bytes=len(content), samples=count, rows=rows, root=content[-32:].hex())
    write_manifest(folder, facts)


def write_description(folder, description):
    """Puts it into the manifest and into every shard."""
    facts = read_manifest(folder)
    write_manifest(folder, {**facts, "description": description})
    for each in facts["shards"]:
        shard = read_shard(folder / each["name"])
        header = {**shard.header, "description": description}
        write_shard(folder, replace(shard, header=header), each["name"])


def write_head(folder, content):
    """Bytes of head.safetensors."""
    (folder / "head.safetensors").write_bytes(content)
    facts = read_manifest(folder)
    digest = hashlib.sha256(content).hexdigest()
    facts["files"] = [{"name": "head.safetensors", "bytes": len(content), "sha256": digest}]
    write_manifest(folder, facts)


def key(description, tokens):
    """tokens: (n,) -> the key of that sample, of the description's teacher."""
    salt = hashlib.sha256(canonical(description["teacher"])).digest()
    return hashlib.sha256(salt + np.asarray(tokens, "<u4").tobytes()).digest()[:16]


def planes(numbers, width):
    """Integers -> [bytes of every plane]"""
    bytes_of = np.asarray(numbers, "<u8").reshape(-1, 1).view(np.uint8)
    return [bytes_of[:, k].tobytes() for k in range(width)]


def floats(numbers):
    """float32 -> [bytes of their section]"""
    return [np.asarray(numbers, "<f4").tobytes()]


def packed(sections, sizes=None):
    """[bytes] of every section, as they are; a pair (flag, bytes) sets bits of its size -> block"""
    pairs = [each if isinstance(each, tuple) else (0, each) for each in sections]
    sizes = [len(content) | flag for flag, content in pairs] if sizes is None else sizes
    return struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(content for _, content in pairs)


def unpacked(block, count):
    """-> [(flag, bytes)] of that many sections, compressed ones as they are"""
    sizes, at, found = struct.unpack_from(f"<{count}I", block), 4 * count, []
    for size in sizes:
        stored = size & ~COMPRESSED
        found.append((size & COMPRESSED, block[at : at + stored]))
        at += stored
    return found
