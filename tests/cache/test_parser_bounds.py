"""Files that somebody made, with checksums that are right: the parser refuses what cannot be.

Hazards C10 and C11. Every one is a `CacheError`, of whatever way of reading, before memory is taken
for it; the control, forged the same way with nothing wrong in it, is read.
"""

import copy
import hashlib
import json
import os
import struct
import tracemalloc
from dataclasses import replace

import forge
import numpy as np
import pytest
import torch

from kdkernels import LinearHead, Sampled, TopK, cache

zstandard = pytest.importorskip("zstandard")

CLASSES, K, ROWS, STEP = 300, 3, 4, 2.0**-6  # of depths up to 8
IDS = torch.tensor([7, 8, 9, 10])
OTHERS = torch.tensor([1, 2])
SHARD = "shard-00000.kdc"
SECTIONS = 4 + 2 + 2 + 2 + 1 + 1  # of top-k: tokens, counts, gaps, below, peak, tail
MEBIBYTE = 1 << 20


def write(folder, kind="topk:3", classes=CLASSES, **options):
    """A cache of IDS and OTHERS."""
    options = {"vocab_size": classes, "teacher": "numbers", **options}
    with cache.Writer(folder, kind, **options) as writer:
        for k, ids in enumerate((IDS, OTHERS)):
            generator = torch.Generator().manual_seed(k)
            size = options["head"].weight.shape[1] if "head" in options else classes
            values = torch.randn(len(ids), size, generator=generator)
            if kind.startswith("sampled"):
                counts = torch.tensor([[3, 2]]).expand(len(ids), 2)
                values = Sampled(torch.tensor([[4, 260]]).expand(len(ids), 2), counts)
            writer.add(ids, values)
    return folder


def head(classes=CLASSES, size=8):
    return LinearHead(torch.zeros(0, size), torch.ones(classes, size), torch.zeros(classes))


def top(**changed):
    """The columns of a row-by-row right top-k block of IDS, but for what is given."""
    below = np.tile([0, 44, 90], ROWS)
    peak = np.float32(np.log(0.5))
    kept = np.exp(peak - below[:3] * STEP).sum()
    columns = {
        "tokens": IDS.numpy(),
        "counts": np.full(ROWS, K),
        "gaps": np.tile([5, 0, 250], ROWS),
        "below": below,
        "peak": np.full(ROWS, peak),
        "tail": np.full(ROWS, np.log1p(-kept)),
        **changed,
    }
    widths = {"tokens": 4, "counts": 2, "gaps": 2, "below": 2}
    sections = [forge.planes(columns[name], width) for name, width in widths.items()]
    sections += [forge.floats(columns["peak"]), forge.floats(columns["tail"])]
    return sum(sections, [])


def put(folder, content, rows=ROWS, **entry):
    """Puts a block in the place of that of IDS."""
    shard = forge.read_shard(folder / SHARD)
    shard.blocks[0] = replace(shard.blocks[0], content=content, rows=rows, entry=entry)
    forge.write_shard(folder, shard)


def uses(folder, ids=IDS):
    """Ways to read it: each a function that fails where that is damaged."""

    def verified():
        for error in cache.verify(folder):
            raise error

    yield lambda: cache.open(folder).read(ids)
    yield lambda: cache.open(folder).read([OTHERS, ids])
    yield lambda: list(cache.open(folder).samples())
    yield verified


def assert_refused(folder, message=None, error=cache.CacheCorruptError, ids=IDS):
    for use in uses(folder, ids):
        with pytest.raises(error, match=message) as caught:
            use()
        if error is cache.CacheCorruptError:
            assert caught.value.shard in (SHARD, "manifest.json", "head.safetensors")
            assert 0 <= caught.value.begin <= caught.value.end


def assert_read(folder):
    for use in uses(folder):
        use()


def row(values, wrong, at=2):
    """A column with one number changed."""
    values = np.array(values)
    values[at] = wrong
    return values


def test_a_block_that_is_right_is_read(tmp_path):
    write(tmp_path)
    put(tmp_path, forge.packed(top()))
    assert_read(tmp_path)
    found = cache.open(tmp_path)[IDS]
    assert found.ids.tolist() == [[5, 6, 257]] * ROWS
    assert (found.logprobs[:, 0] == np.float32(np.log(0.5))).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gaps": np.tile([5, 0, 293], ROWS)}, "ids must be below 300, got 300"),
        ({"gaps": row(np.tile([5, 0, 250], ROWS), 65535)}, "ids must be below 300"),
        ({"gaps": row(np.tile([5, 0, 250], ROWS), 65535, 0)}, "ids must be below 300"),
        ({"counts": [4, 3, 3, 2]}, "4 classes in a row of a cache of 3"),
        ({"counts": [3, 3, 3, 2]}, "a section of 12 bytes, 11 are wanted"),
        ({"counts": [65535] * 4}, "a section of 12 bytes, 262140 are wanted"),
        ({"below": row(np.tile([0, 44, 90], ROWS), 512 + 8 * 256)}, "depth of number 2560"),
        ({"below": row(np.tile([0, 44, 90], ROWS), 65535)}, "depth of number 65535"),
        ({"peak": row([-0.7] * 4, 0.1)}, "above 0 or not numbers"),
        ({"peak": row([-0.7] * 4, np.nan)}, "above 0 or not numbers"),
        ({"peak": row([-0.7] * 4, np.inf)}, "above 0 or not numbers"),
        ({"peak": row([-0.7] * 4, -np.inf)}, "above 0 or not numbers"),
        ({"tail": row([-0.7] * 4, np.nan)}, "above 0 or not numbers"),
        ({"tail": row([-0.7] * 4, 1e-3)}, "above 0 or not numbers"),
        ({"peak": [-0.1] * 4}, "do not sum to 1"),
        ({"peak": [-2.0] * 4}, "do not sum to 1"),
        ({"tail": [-0.01] * 4}, "do not sum to 1"),
        ({"tail": [-np.inf] * 4}, "do not sum to 1"),
        ({"below": row(np.tile([0, 44, 90], ROWS), 0)}, "do not sum to 1"),
        ({"tokens": [7, 8, 9, 11]}, "another sample"),
    ],
)
def test_predictions_that_cannot_be(tmp_path, changed, message):
    write(tmp_path)
    put(tmp_path, forge.packed(top(**changed)))
    assert_refused(tmp_path, message)


def frame(content, **options):
    return forge.COMPRESSED, zstandard.ZstdCompressor(**options).compress(content)


def claimed(size):
    """A frame of zstd with a header that says so, and a block of 4 times the byte 0."""
    start = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size)
    return forge.COMPRESSED, start + (4 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"


def sections(at, content):
    """Of a right block, one of them changed."""
    found = top()
    found[at] = content
    return forge.packed(found)


BLOCKS = {
    "empty": (b"", None),
    "without all sizes": (b"\0" * (4 * SECTIONS - 1), "less than the sizes"),
    "nothing but zeros": (b"\0" * 4 * SECTIONS, None),
    "bytes after the last section": (forge.packed(top()) + b"\0", "sections of"),
    "a section too few": (forge.packed(top()[:-1] + [b""]), None),
    "a section too long": (sections(0, b"\7" * 5), "a section of 5 bytes, 4 are wanted"),
    "a section too short": (sections(0, b"\7" * 3), "a section of 3 bytes, 4 are wanted"),
    "a section beyond the block": (
        forge.packed(top(), [2**31 - 1] + [len(each) for each in top()[1:]]),
        "are wanted",
    ),
    "the last section beyond the block": (forge.packed(top())[:-1], "are wanted"),
    "no frame": (sections(0, (forge.COMPRESSED, b"\7" * 4)), "zstd"),
    "an empty frame": (sections(0, (forge.COMPRESSED, b"")), "zstd"),
    "half a frame": (sections(0, (forge.COMPRESSED, frame(b"7890")[1][:-2])), "zstd"),
    "a frame and more": (sections(0, (forge.COMPRESSED, frame(b"7890")[1] + b"x")), None),
    "a frame that is too long": (sections(0, frame(b"7890x")), "a section of 5 bytes"),
    "a frame of 2^60 bytes": (sections(0, claimed(2**60)), "4 are wanted"),
    "a frame of 2^64 - 1 bytes": (sections(0, claimed(2**64 - 1)), "zstd|4 are wanted"),
    "a frame of fewer bytes than it holds": (sections(0, claimed(3)), "4 are wanted"),
    "a frame of a mebibyte": (sections(0, frame(bytes(MEBIBYTE))), "a section of 1048576 bytes"),
    "a frame without its size": (sections(0, frame(b"7890", write_content_size=False)), None),
    "a frame with a checksum that is wrong": (
        sections(0, (forge.COMPRESSED, frame(b"7890", write_checksum=True)[1][:-1] + b"\0")),
        "zstd",
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_cannot_be(tmp_path, name):
    content, message = BLOCKS[name]
    write(tmp_path)
    put(tmp_path, content)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize("claim", [ROWS, 2**60])
def test_a_frame_that_holds_less_than_it_says(tmp_path, claim):
    """Its header is right, or is not: its block is of one byte of each kind."""
    flag, content = claimed(claim)
    write(tmp_path)
    put(tmp_path, sections(1, (flag, content[:-4] + b"\x0b\0\0\0")))
    assert_refused(tmp_path)


def traced(use):
    """Bytes that Python and NumPy took at most, beyond those before."""
    tracemalloc.start()
    try:
        use()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rows", [5, 2**16, 2**24, 2**24 + 1, 2**32 - 1])
@pytest.mark.parametrize(
    "content", [b"\0" * 4 * SECTIONS, forge.packed(top())], ids=["zeros", "right"]
)
def test_rows_are_no_more_than_bytes_can_hold(tmp_path, rows, content):
    """Sections of 0 take no bytes: 2³² rows of them are said in 48."""
    write(tmp_path)
    put(tmp_path, content, rows)
    ids = torch.zeros(min(rows, 2**24), dtype=torch.int32)
    message = "rows that do not add up" if rows > 2**24 else None
    assert traced(lambda: assert_refused(tmp_path, message)) < 16 * MEBIBYTE
    with pytest.raises(cache.CacheError):
        cache.open(tmp_path)[ids]


@pytest.mark.parametrize("size", [2**20, 2**26])
def test_a_frame_that_expands_beyond_measure(tmp_path, size):
    """Of 2²⁶ zeros zstd makes 6 KB: more than 1,000 to 1, and what every section says."""
    write(tmp_path)
    counts = [frame(bytes(size))] * SECTIONS
    put(tmp_path, forge.packed(counts), size)
    assert traced(lambda: assert_refused(tmp_path)) < 16 * MEBIBYTE


def test_one_row_of_all_classes_does_not_make_all_rows_as_wide(tmp_path):
    """300 KB that would be 2 · 17 GB as ids and log-probabilities (n, K)."""
    rows, k = 65_536, 65_535
    tokens = torch.zeros(rows, dtype=torch.int64)
    ids, logprobs = torch.full((rows, 1), -1), torch.zeros(rows, 1)
    with cache.Writer(tmp_path, f"topk:{k}", vocab_size=2**16, teacher="numbers") as writer:
        writer.add(tokens, TopK(ids, logprobs))
    shard = forge.read_shard(tmp_path / SHARD)
    counts, tail = np.zeros(rows, int), np.zeros(rows)
    counts[0], tail[0] = k, -np.inf
    columns = [np.zeros(rows, int), counts, np.zeros(k, int), np.zeros(k, int)]
    widths = 4, 2, 2, 2
    found = [x for column, width in zip(columns, widths, strict=True)
             for x in forge.planes(column, width)]  # fmt: skip
    found += forge.floats(row(np.zeros(rows), -np.log(k), 0)) + forge.floats(tail)
    shard.blocks[0].content = forge.packed([frame(each, level=3) for each in found])
    forge.write_shard(tmp_path, shard)

    def read():
        with pytest.raises(cache.CacheCorruptError, match="65536 rows of up to 65535 entries"):
            cache.open(tmp_path)[tokens]

    assert traced(read) < 64 * MEBIBYTE


@pytest.mark.parametrize(
    ("draws", "counts", "message"),
    [
        ([3, 1, 3, 2, 3, 2, 3, 2], [2] * 4, "do not sum to 5"),
        ([3, 3, 3, 2, 3, 2, 3, 2], [2] * 4, "do not sum to 5"),
        ([3, 2, 3, 2, 3, 2, 3, 2], [2, 1, 3, 2], "do not sum to 5"),
        ([5, 256, 3, 2, 3, 2, 3, 2], [2] * 4, "do not sum to 5"),
        ([3, 2, 3, 2, 3, 2, 3, 2], [2, 2, 2, 1], "a section of 8 bytes, 7 are wanted"),
    ],
)
def test_draws_that_cannot_be(tmp_path, draws, counts, message):
    write(tmp_path, "sampled:5")
    sections = forge.planes(IDS, 4) + forge.planes(counts, 2)
    sections += forge.planes(np.tile([4, 100], ROWS), 2)
    put(tmp_path, forge.packed(sections + forge.planes(np.array(draws) - 1, 1)))
    assert_refused(tmp_path, message)


def test_draws_outside_of_the_vocabulary(tmp_path):
    write(tmp_path, "sampled:5")
    sections = forge.planes(IDS, 4) + forge.planes([2] * 4, 2)
    sections += forge.planes([4, 295] + [4, 294] * 3, 2) + forge.planes([2, 1] * ROWS, 1)
    put(tmp_path, forge.packed(sections))
    assert_refused(tmp_path, "ids must be below 300, got 300")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["hidden:fp32", "dense:fp32"])
def test_numbers_that_are_none(tmp_path, kind, wrong):
    size, options = (8, {"head": head()}) if kind == "hidden:fp32" else (CLASSES, {})
    write(tmp_path, kind, **options)
    values = np.zeros((ROWS, size), "<f4")
    values[2, 5] = wrong
    put(tmp_path, forge.packed(forge.planes(IDS, 4) + forge.planes(values.view("<u4"), 4)))
    if kind == "dense:fp32" and wrong == -np.inf:
        assert_read(tmp_path)  # a class without probability
    else:
        assert_refused(tmp_path, "not finite|NaN or infinite")


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 2.0**127])
def test_fp8_states_that_are_no_numbers(tmp_path, scale):
    write(tmp_path, "hidden:fp8", head=head())
    bits = np.full((ROWS, 8), 0x7E, np.uint8)  # 448
    scales = forge.floats(row(np.ones(ROWS), scale))
    put(tmp_path, forge.packed(forge.planes(IDS, 4) + [bits.tobytes()] + scales))
    assert_refused(tmp_path, "not finite")


def test_the_bits_of_an_fp8_nan(tmp_path):
    write(tmp_path, "hidden:fp8", head=head())
    bits = np.full((ROWS, 8), 0x7F, np.uint8)
    scales = forge.floats(np.ones(ROWS))
    put(tmp_path, forge.packed(forge.planes(IDS, 4) + [bits.tobytes()] + scales))
    assert_refused(tmp_path, "not finite")


def test_tokens_that_are_not_those_of_the_key(tmp_path):
    """Two blocks under each other's key; and one of other tokens than anybody may ask for."""
    write(tmp_path)
    shard = forge.read_shard(tmp_path / SHARD)
    first, second = shard.blocks
    shard.blocks = [replace(first, key=second.key), replace(second, key=first.key)]
    forge.write_shard(tmp_path, shard)
    assert_refused(tmp_path)
    put(write(tmp_path / "other"), forge.packed(top(tokens=IDS.numpy() + 1)))
    assert_refused(tmp_path / "other", "another sample")


INDICES = {
    "keys that are not sorted": {"in_order": False},
    "samples too few": {"footer": {"count": 1}},
    "samples too many": {"footer": {"count": 3}},
    "samples beyond all bounds": {"footer": {"count": 2**64 - 1}},
    "samples whose bytes overflow": {"footer": {"count": 2**60}},
    "rows too few": {"footer": {"rows": 5}},
    "rows too many": {"footer": {"rows": 2**63}},
    "an index elsewhere": {"footer": {"begin": 16}},
    "an index in front of the file": {"footer": {"begin": 0}},
    "an index behind the file": {"footer": {"begin": 2**64 - 1}},
    "bytes that belong to nothing": {"between": b"12345678"},
    "another magic": {"magic": b"KDKCACHF"},
    "another version": {"version": 2},
    "version 0": {"version": 0},
    "a header of another length": {"length": 12},
    "a header beyond the file": {"length": 2**32 - 1},
    "no header": {"header": b""},
    "a header of nothing": {"header": b"{}"},
    "a header that is a list": {"header": b"[]"},
    "a header that is a number": {"header": b"1"},
    "a header that is no JSON": {"header": b"{" * 100},
    "a header deeper than any stack": {"header": b"[" * 200_000 + b"]" * 200_000},
    "a header that is no text": {"header": b"\xff\xfe" * 50},
}


@pytest.mark.parametrize("name", INDICES)
def test_shards_that_cannot_be(tmp_path, name):
    write(tmp_path)
    shard = forge.read_shard(tmp_path / SHARD)
    if name == "keys that are not sorted":
        shard.blocks.sort(key=lambda block: block.key, reverse=True)
    forge.write_shard(tmp_path, replace(shard, **INDICES[name]))
    assert_refused(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.replace(b":", b": ", 1),
        lambda header: header.replace(b'"seed":0', b'"seed":0,"seed":0'),
        lambda header: header.replace(b'"seed":0', b'"seed":NaN'),
        lambda header: header.replace(b'"seed":0', b'"seed":1e999'),
        lambda header: header.replace(b'"seed":0', b'"seed":' + b"1" * 5000),
        lambda header: header.replace(b'"seed":0', b'"seed":-0'),
        lambda header: header.replace(b"numbers", b"\\u006eumbers"),
        lambda header: header.replace(b"numbers", "Zahlen, größer".encode()),
        lambda header: header + b"\n",
    ],
)
def test_json_has_one_way_to_be_written(tmp_path, change):
    write(tmp_path)
    shard = forge.read_shard(tmp_path / SHARD)
    header = forge.canonical(shard.header)
    assert change(header) != header
    forge.write_shard(tmp_path, replace(shard, header=change(header)))
    assert_refused(tmp_path, "JSON")


@pytest.mark.parametrize(
    "entry",
    [
        {"offset": 0},
        {"offset": 2**64 - 1},
        {"offset": 2**63},
        {"size": 0},
        {"size": 2**32 - 1},
        {"rows": 3},
        {"rows": 2**32 - 1},
        {"checksum": bytes(16)},
        {"key": bytes(16)},
        {"key": b"\xff" * 16},
    ],
)
def test_entries_of_the_index_that_cannot_be(tmp_path, entry):
    write(tmp_path)
    shard = forge.read_shard(tmp_path / SHARD)
    shard.blocks[0].entry = entry
    forge.write_shard(tmp_path, shard)
    if "key" in entry:
        with pytest.raises(cache.CacheMissError):
            cache.open(tmp_path)[IDS]
        with pytest.raises(cache.CacheCorruptError, match="its key is that of another sample"):
            list(cache.open(tmp_path).samples())
        assert len(cache.verify(tmp_path)) == 1
    else:
        assert_refused(tmp_path)


def test_blocks_that_overlap_or_leave_a_gap(tmp_path):
    write(tmp_path)
    whole = forge.read_shard(tmp_path / SHARD)
    begin = forge.START.size + len(forge.canonical(whole.header))
    for offset in (begin, begin + 1, begin + len(whole.blocks[0].content) + 1):
        shard = copy.deepcopy(whole)
        shard.blocks[1].entry = {"offset": offset}
        forge.write_shard(tmp_path, shard)
        assert_refused(tmp_path, "do not follow each other")


def test_the_same_sample_twice_in_a_shard(tmp_path):
    write(tmp_path)
    shard = forge.read_shard(tmp_path / SHARD)
    forge.write_shard(tmp_path, replace(shard, blocks=[shard.blocks[0], *shard.blocks]))
    assert_refused(tmp_path, "keys that are not sorted")


MISSING = object()
DESCRIPTIONS = {
    "format": [MISSING, None, True, 1.0, 0, 2, "1", 2**70],
    "vocab_size": [MISSING, None, True, 300.0, 0, -1, 2**32 + 1, 2**70, "300", [300]],
    "sample": [MISSING, None, "words", "values", 1, [], {}, ["tokens"]],
    "temperature": [MISSING, None, 2.0, "1", 0],
    "teacher": [MISSING],
    "tokenizer": [MISSING],
    "data": [MISSING],
    "seed": [MISSING],
    "library": [MISSING],
    "kind": [MISSING, None, "topk:3", 3, [], {}, {"name": "topk"}, ["name"]],
    "kind.name": [MISSING, None, "", "topk:3", "sampled", "dense", "hidden", 1, [], {}],
    "kind.bound": [MISSING, None, {}, {"logprobs": {"absolute": 1e-9}}],
    "kind.more": [1],
}
KINDS = {
    "topk:3": {
        "kind.k": [MISSING, None, True, 3.0, 0, -1, 301, 2**70, "3", "03", [3]],
        "kind.tail": [MISSING, None, "", "rest", 1, [], {}],
    },
    "sampled:5": {"kind.draws": [MISSING, None, True, 5.0, 0, -1, 2**16, 2**70, "5", [5]]},
    "dense:fp32": {"kind.dtype": [MISSING, None, "fp8", "float32", 32, [], {}, "bf16", "fp16"]},
    "hidden:bf16": {
        "kind.dtype": [MISSING, None, "float32", 16, [], {}, "fp8"],
        "kind.size": [MISSING, None, True, 8.0, 0, -8, 9, 2**31, 2**70, "8", [8]],
        "kind.logit_scale": [MISSING, None, True, 0.0, 1e300, "1", []],
        "kind.softcap": [MISSING, True, 0.0, -5.0, 1e300, "1", []],
        "vocab_size": DESCRIPTIONS["vocab_size"] + [301],
    },
}
WRONG = [
    (kind, name, value)
    for kind, facts in KINDS.items()
    for name, values in {**(DESCRIPTIONS if kind == "topk:3" else {}), **facts}.items()
    for value in values
]


def label(value):
    return "missing" if value is MISSING else repr(value)[:20] if type(value) is not str else value


@pytest.mark.parametrize(("kind", "name", "value"), WRONG, ids=label)
def test_a_description_that_no_cache_has(tmp_path, kind, name, value):
    """In the manifest and in the header of the shard, both with checksums that are right."""
    write(tmp_path, kind, **({"head": head()} if kind == "hidden:bf16" else {}))
    description = forge.read_manifest(tmp_path)["description"]
    *path, last = name.split(".")
    facts = description
    for each in path:
        facts = facts[each]
    if value is MISSING:
        del facts[last]
    else:
        facts[last] = value
    forge.write_description(tmp_path, description)
    assert_refused(tmp_path, error=cache.CacheError)


def test_what_a_description_only_says_may_be_anything(tmp_path):
    write(tmp_path)
    description = forge.read_manifest(tmp_path)["description"]
    description.update(seed=None, library=[], data={"x": [None]}, more=1)
    forge.write_description(tmp_path, description)
    assert_read(tmp_path)


@pytest.mark.parametrize(
    "facts",
    [{"teacher": {}}, {"teacher": None}, {"tokenizer": {"digest": "1"}}, {"data": "text"}],
)
def test_what_a_description_says_of_whom_it_is_is_looked_at(tmp_path, facts):
    write(tmp_path)
    description = forge.read_manifest(tmp_path)["description"]
    forge.write_description(tmp_path, {**description, **facts})
    assert_refused(tmp_path, "must be a dict")


def test_a_shard_of_another_description_than_the_manifest(tmp_path):
    write(tmp_path)
    shard = forge.read_shard(tmp_path / SHARD)
    shard.header["description"]["seed"] = 1
    forge.write_shard(tmp_path, shard)
    assert_refused(tmp_path, "not what the manifest names")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("shards", value) for value in (MISSING, None, {}, "", "x", 1, [1], [None], [[]], [{}])),
        *(("files", value) for value in (MISSING, None, {}, "", "x", 1, [1], [None], [[]], [{}])),
        ("files", [{"name": "head.safetensors"}]),
        ("files", [{"name": "head.safetensors", "bytes": 1, "sha256": "00"}]),
        ("files", [{"name": "../head.safetensors", "bytes": 1, "sha256": "00"}]),
        ("description", MISSING),
        ("description", None),
        ("description", []),
        ("description", "x"),
        ("description", {}),
        *(
            ("name", value)
            for value in (
                *(
                    MISSING,
                    None,
                    1,
                    [],
                    {},
                    "",
                    ".",
                    "..",
                    "/etc/passwd",
                    "/dev/zero",
                    "../" + SHARD,
                ),
                *("./" + SHARD, "x/" + SHARD, SHARD + "\n", SHARD + "\0", "shard-0.kdc"),
                *("manifest.json", "shard-٠٠٠٠٠.kdc", "shard-00001.kdc", "SHARD-00000.KDC"),
            )
        ),
        *(("bytes", value) for value in (MISSING, None, True, -1, 0, 1.5, "1", [], 2**70)),
        *(("samples", value) for value in (MISSING, None, True, -1, 0, 3, 2.0, "2", [], 2**70)),
        *(("rows", value) for value in (MISSING, None, True, -1, 0, 7, 6.0, "6", [], 2**70)),
        *(("root", value) for value in (MISSING, None, True, 1, "", "00", [], {}, b"".hex())),
    ],
    ids=label,
)
def test_a_manifest_that_no_cache_has(tmp_path, name, value):
    write(tmp_path / "cache")
    os.link(tmp_path / "cache" / SHARD, tmp_path / SHARD)
    found = forge.read_manifest(tmp_path / "cache")
    facts = found if name in ("shards", "files", "description") else found["shards"][0]
    if value is MISSING:
        del facts[name]
    else:
        facts[name] = value
    forge.write_manifest(tmp_path / "cache", found)
    assert_refused(tmp_path / "cache", error=cache.CacheError)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b'"' + b"x" * 2 * MEBIBYTE + b'"',
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"\xff" * 100,
        b"1" * 100_000,
        b'{"checksum":NaN}',
        b'{"checksum":"","description":{},"files":[],"shards":[]}',
    ],
    ids=range(12),
)
def test_a_manifest_that_is_none(tmp_path, content):
    (write(tmp_path) / "manifest.json").write_bytes(content)
    assert_refused(tmp_path)


def test_json_is_a_mebibyte_at_most(tmp_path):
    """Though it says nothing that is wrong."""
    write(tmp_path)
    shard = forge.read_shard(tmp_path / SHARD)
    header = {**shard.header, "more": "x" * MEBIBYTE}
    forge.write_shard(tmp_path, replace(shard, header=header))
    assert_refused(tmp_path, "more than 1048576")
    forge.write_shard(tmp_path, shard)
    forge.write_manifest(tmp_path, {**forge.read_manifest(tmp_path), "more": "x" * MEBIBYTE})
    assert_refused(tmp_path, "more than 1048576")


def test_a_manifest_that_is_written_another_way(tmp_path):
    path = write(tmp_path) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))
    assert_refused(tmp_path, "not canonical")


def test_a_shard_that_is_named_twice(tmp_path):
    write(tmp_path)
    facts = forge.read_manifest(tmp_path)
    facts["shards"] *= 2
    forge.write_manifest(tmp_path, facts)
    assert_refused(tmp_path, "a shard twice")


def tensors(**named):
    from safetensors.torch import save

    return save(named)


def safetensors(header, content=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + content


HEADS = {
    "no bytes": lambda: b"",
    "no safetensors": lambda: b"\0" * 100,
    "a header of 2^63 bytes": lambda: struct.pack("<Q", 2**63) + b"{}",
    "no tensors": lambda: safetensors({}),
    "a tensor beyond the file": lambda: safetensors(
        {"weight": {"dtype": "F32", "shape": [2**40, 8], "data_offsets": [0, 2**45]}}
    ),
    "a tensor of an unknown dtype": lambda: safetensors(
        {"weight": {"dtype": "X", "shape": [0, 8], "data_offsets": [0, 0]}}
    ),
    "another name": lambda: tensors(w=torch.zeros(CLASSES, 8)),
    "a vector": lambda: tensors(weight=torch.zeros(CLASSES * 8)),
    "fewer classes": lambda: tensors(weight=torch.zeros(CLASSES - 1, 8)),
    "wider states": lambda: tensors(weight=torch.zeros(CLASSES, 9)),
    "integers": lambda: tensors(weight=torch.zeros(CLASSES, 8, dtype=torch.int32)),
    "a bias of other length": lambda: tensors(
        weight=torch.zeros(CLASSES, 8), bias=torch.zeros(CLASSES + 1)
    ),
    "a bias of other dtype": lambda: tensors(
        weight=torch.zeros(CLASSES, 8), bias=torch.zeros(CLASSES).half()
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_none(tmp_path, name):
    pytest.importorskip("safetensors")
    forge.write_head(write(tmp_path, "hidden:bf16", head=head()), HEADS[name]())
    assert_refused(tmp_path)


@pytest.mark.parametrize("kind", ["topk:3", "sampled:5", "dense:bf16"])
def test_a_head_that_goes_with_nothing(tmp_path, kind):
    forge.write_head(write(tmp_path, kind), tensors(weight=torch.zeros(CLASSES, 8)))
    assert_refused(tmp_path)


@pytest.mark.parametrize("heads", [0, 2])
def test_hidden_states_have_one_head(tmp_path, heads):
    write(tmp_path, "hidden:bf16", head=head())
    facts = forge.read_manifest(tmp_path)
    facts["files"] *= heads
    forge.write_manifest(tmp_path, facts)
    assert_refused(tmp_path)


def test_what_is_right_by_its_own_checksums_is_not_by_the_manifest_s(tmp_path):
    """A shard of the same cache of another teacher's numbers."""
    write(tmp_path / "a")
    write(tmp_path / "b")
    shard = forge.read_shard(tmp_path / "b" / SHARD)
    shard.blocks[0].content = forge.packed(top())
    (tmp_path / "a" / SHARD).write_bytes(shard.bytes())
    assert_refused(tmp_path / "a", "not what the manifest names")


def test_keys_are_of_teacher_and_tokens(tmp_path):
    """What docs/cache.md says of them: another program finds a sample."""
    write(tmp_path)
    shard = forge.read_shard(tmp_path / SHARD)
    for block, ids in zip(shard.blocks, (IDS, OTHERS), strict=True):
        assert block.key == forge.key(shard.header["description"], ids)
    found = hashlib.sha256((tmp_path / SHARD).read_bytes()).hexdigest()
    assert hashlib.sha256(shard.bytes()).hexdigest() == found
