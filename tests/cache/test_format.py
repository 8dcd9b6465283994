"""docs/cache.md is enough to read a cache: this does, with struct, zstandard and NumPy alone."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from cache_samples import CLASSES, KINDS, head_of, rows_of, token_ids, write

from kdkernels import cache

zstandard = pytest.importorskip("zstandard")


def canonical(facts):
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


def columns_of(kind, rows, entries):
    """(name, numbers, bytes of each, negative of floats), `entries` being known after "counts"."""
    found = {
        "topk": [("counts", rows, 2), ("gaps", entries, 2), ("below", entries, 2),
                 ("peak", rows, -4), ("tail", rows, -4)],
        "sampled": [("counts", rows, 2), ("gaps", entries, 2), ("draws", entries, 1)],
        "hidden": [("hidden", rows * kind.get("size", 0),
                    {"fp32": 4, "fp8": 1}.get(kind.get("dtype"), 2))],
        "dense": [("logits", rows * CLASSES, {"fp32": 4}.get(kind.get("dtype"), 2))],
    }[kind["name"]]  # fmt: skip
    scale = [("scale", rows, -4)] if kind.get("dtype") == "fp8" else []
    return [("tokens", rows, 4), *found, *scale]


def parsed(kind, block, rows):
    """-> {column: integers}"""
    count = sum(max(1, width) for _, _, width in columns_of(kind, rows, 0))
    sizes = np.frombuffer(block, "<u4", count).tolist()
    place, found, entries = 4 * count, {}, 0
    for k in range(len(columns_of(kind, rows, 0))):
        name, numbers, width = columns_of(kind, rows, entries)[k]
        total = np.zeros(numbers, np.uint64)
        for plane in range(max(1, width)):
            size = sizes.pop(0)
            content = block[place : place + size % 2**31]
            place += size % 2**31
            if size >= 2**31:
                content = zstandard.decompress(content)
            content = content or bytes(numbers * max(1, -width))
            if width < 0:
                total = np.frombuffer(content, "<u4").astype(np.uint64)
                continue
            total += np.frombuffer(content, np.uint8).astype(np.uint64) << np.uint64(8 * plane)
        found[name] = total.astype(np.int64)
        entries = found["counts"].sum() if name == "counts" else entries
    assert place == len(block) and not sizes
    return found


def floats(bits, dtype):
    if dtype == "fp8":
        return torch.from_numpy(bits).to(torch.uint8).view(torch.float8_e4m3fn).float()
    if dtype == "bf16":
        bits, dtype = bits << 16, "fp32"
    if dtype == "fp16":
        return torch.from_numpy(bits.astype(np.uint16).view(np.float16)).float()
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def depth(i):
    if i < 512:
        return i / 64
    k, j = divmod(i - 512, 256)
    return 2**k * (8 + j / 32)


@pytest.mark.parametrize("kind", [*KINDS, "hidden:fp16", "dense:fp16"])
def test_a_cache_is_what_the_documentation_says(tmp_path, kind):
    samples = token_ids()
    write(tmp_path, kind, samples, shard_tokens=15)
    teacher = cache.open(tmp_path)

    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    assert (tmp_path / "manifest.json").read_bytes() == canonical(manifest)
    checksum = manifest.pop("checksum")
    assert checksum == hashlib.sha256(canonical(manifest)).hexdigest() == teacher.checksum
    description = manifest["description"]
    salt = hashlib.sha256(canonical(description["teacher"])).digest()
    unread = {tuple(ids.tolist()) for ids in samples}
    for number, facts in enumerate(manifest["shards"]):
        content = (tmp_path / facts["name"]).read_bytes()
        assert facts["name"] == f"shard-{number:05d}.kdc" and facts["bytes"] == len(content)
        magic, version, n = struct.unpack_from("<8sII", content)
        assert (magic, version) == (b"KDKCACHE", 1)
        header = {"description": description, "shard": number}
        assert content[16 : 16 + n] == canonical(header)
        begin, count, rows = struct.unpack_from("<QQQ", content, len(content) - 56)
        assert (count, rows) == (facts["samples"], facts["rows"])
        root = hashlib.sha256(content[: 16 + n] + content[begin:-32]).digest()
        assert root == content[-32:] and root.hex() == facts["root"]
        assert begin + 48 * count + 56 == len(content)
        entries = [struct.unpack_from("<16sQII16s", content, begin + 48 * k) for k in range(count)]
        assert entries == sorted(entries)
        place = 16 + n
        for key, offset, size, rows, half in sorted(entries, key=lambda x: x[1]):
            assert offset == place
            place += size
            block = content[offset:place]
            assert hashlib.sha256(block).digest()[:16] == half
            found = parsed(description["kind"], block, rows)
            ids = found["tokens"]
            assert hashlib.sha256(salt + ids.astype("<u4").tobytes()).digest()[:16] == key
            unread.remove(tuple(ids.tolist()))
            compare(description["kind"], found, rows_of(teacher[ids]))
        assert place == begin
    assert not unread
    for facts in manifest["files"]:
        content = (tmp_path / facts["name"]).read_bytes()
        assert facts["bytes"] == len(content)
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    if head_of(kind) is not None:
        assert torch.equal(teacher.head.weight, head_of(kind).weight)
        assert torch.equal(teacher.head.bias, head_of(kind).bias)


def compare(kind, found, read):
    """Columns as they are documented, and what the reader made of them."""
    if kind["name"] in ("hidden", "dense"):
        ((name, values),) = read.items()
        wanted = floats(found[name], kind["dtype"]).view(values.shape)
        if "scale" in found:
            wanted = wanted * floats(found["scale"], "fp32")[:, None]
        assert torch.equal(values.float(), wanted)
        return
    place = 0
    for row, count in enumerate(found["counts"]):
        here = slice(place, place + count)
        place += count
        ids = np.cumsum(found["gaps"][here] + 1) - 1
        assert read["ids"][row, :count].tolist() == ids.tolist()
        assert (read["ids"][row, count:] == -1).all()
        if kind["name"] == "sampled":
            assert read["counts"][row, :count].tolist() == (found["draws"][here] + 1).tolist()
            continue
        peak, tail = (float(floats(found[x][row : row + 1], "fp32")) for x in ("peak", "tail"))
        depths = np.array([depth(i) for i in found["below"][here]])
        wanted = torch.from_numpy(peak - depths)
        assert torch.allclose(read["logprobs"][row, :count].double(), wanted, rtol=1e-6, atol=0)
        assert abs(np.exp(peak - depths).sum() + np.exp(tail) - 1) < 1e-6
