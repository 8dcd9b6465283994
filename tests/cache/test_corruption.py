"""Files that are not what was written: which error, what it names, and what is still read."""

import os
import pickle
import shutil

import forge
import pytest
import torch
from cache_samples import CLASSES, KINDS, rows_of, token_ids, write

from kdkernels import LinearHead, cache

pytest.importorskip("zstandard")

SHARDS = "shard-00000.kdc", "shard-00001.kdc"


def written(folder, kind="topk:7", **options):
    write(folder, kind, shard_tokens=20, **options)
    return folder


def assert_damaged(folder, name, message, samples=None):
    """However it is read, that file is blamed."""

    def verified():
        raise cache.verify(folder)[0]

    for use in (lambda: cache.open(folder).read(samples or token_ids()), verified):
        with pytest.raises(cache.CacheCorruptError, match=message) as caught:
            use()
        assert caught.value.shard == name and name in str(caught.value)


@pytest.mark.parametrize("name", [*SHARDS, "head.safetensors"])
def test_a_file_that_is_missing(tmp_path, name):
    (written(tmp_path, "hidden:bf16") / name).unlink()
    assert_damaged(tmp_path, name, "it is missing")


def test_without_its_manifest_it_is_no_cache(tmp_path):
    (written(tmp_path) / "manifest.json").unlink()
    for use in (cache.open, cache.verify):
        with pytest.raises(cache.CacheError, match="interrupted") as caught:
            use(tmp_path)
        assert type(caught.value) is cache.CacheError
        with pytest.raises(FileNotFoundError):
            use(tmp_path / "elsewhere")


def test_shards_that_changed_places(tmp_path):
    first, second = (written(tmp_path) / name for name in SHARDS)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert_damaged(tmp_path, SHARDS[0], "not what the manifest names")
    assert len(cache.verify(tmp_path)) == 2


def test_shards_that_changed_names_in_the_manifest_too(tmp_path):
    """Each says its number."""
    first, second = (forge.read_shard(written(tmp_path) / name) for name in SHARDS)
    forge.write_shard(tmp_path, second, SHARDS[0])
    forge.write_shard(tmp_path, first, SHARDS[1])
    assert_damaged(tmp_path, SHARDS[0], "not what the manifest names")


@pytest.mark.parametrize("options", [{"teacher": "another"}, {"seed": 1}, {}])
def test_a_shard_of_another_cache(tmp_path, options):
    """Of another teacher, another seed, or only of other samples."""
    written(tmp_path / "a")
    samples = token_ids() if options else token_ids(seed=50)
    written(tmp_path / "b", samples=samples, **options)
    shutil.copy(tmp_path / "b" / SHARDS[1], tmp_path / "a")
    assert_damaged(tmp_path / "a", SHARDS[1], "not what the manifest names")


def test_a_manifest_of_another_cache(tmp_path):
    written(tmp_path / "a")
    written(tmp_path / "b", samples=token_ids(seed=50))
    shutil.copy(tmp_path / "b" / "manifest.json", tmp_path / "a")
    assert_damaged(tmp_path / "a", SHARDS[0], "not what the manifest names")


def test_a_head_of_another_cache(tmp_path):
    written(tmp_path / "a", "hidden:fp32")
    head = LinearHead(torch.zeros(0, 16), torch.ones(CLASSES, 16))
    written(tmp_path / "b", "hidden:fp32", head=head)
    shutil.copy(tmp_path / "b" / "head.safetensors", tmp_path / "a")
    assert_damaged(tmp_path / "a", "head.safetensors", "not what was written")


@pytest.mark.parametrize("size", [0, 1, 15, 16, 100])
@pytest.mark.parametrize("name", [SHARDS[1], "manifest.json", "head.safetensors"])
def test_a_file_of_a_few_bytes(tmp_path, name, size):
    os.truncate(written(tmp_path, "hidden:bf16") / name, size)
    assert_damaged(tmp_path, name, f"{name} is damaged: ")


@pytest.mark.parametrize("more", [b"\0", b"\n", b"a whole page" * 400])
@pytest.mark.parametrize("name", [SHARDS[1], "manifest.json", "head.safetensors"])
def test_a_file_that_goes_on(tmp_path, name, more):
    with open(written(tmp_path, "hidden:bf16") / name, "ab") as file:
        file.write(more)
    assert_damaged(tmp_path, name, f"{name} is damaged: ")


@pytest.mark.parametrize("kind", KINDS)
def test_other_samples_than_the_damaged_are_read(tmp_path, kind):
    """And the error says which block, which bytes."""
    samples = token_ids()
    wanted = [rows_of(cache.open(written(tmp_path, kind))[ids]) for ids in samples]
    content = bytearray((tmp_path / SHARDS[0]).read_bytes())
    shard = forge.read_shard(tmp_path / SHARDS[0])
    begin = forge.START.size + len(forge.canonical(shard.header))
    begin += len(shard.blocks[0].content)
    end = begin + len(shard.blocks[1].content)
    content[end - 1] ^= 1
    (tmp_path / SHARDS[0]).write_bytes(content)
    teacher = cache.open(tmp_path)
    for k, ids in enumerate(samples):
        if k == 1:
            message = (
                f"{SHARDS[0]} is damaged: block 1, bytes {begin} to {end}: not what was written"
            )
            with pytest.raises(cache.CacheCorruptError, match=message) as caught:
                teacher[ids]
            error = caught.value
        else:
            found = rows_of(teacher[ids])
            assert all(torch.equal(found[name], wanted[k][name]) for name in found)
    assert (error.shard, error.block, error.begin, error.end) == (SHARDS[0], 1, begin, end)
    with pytest.raises(cache.CacheCorruptError):
        teacher.read(samples)
    assert [str(each) for each in cache.verify(tmp_path)] == [str(error)]


def test_all_that_is_damaged_is_listed(tmp_path):
    written(tmp_path)
    for name in SHARDS:
        content = bytearray((tmp_path / name).read_bytes())
        at = forge.START.size + int.from_bytes(content[12:16], "little")
        content[at] ^= 128
        (tmp_path / name).write_bytes(content)
    assert [(each.shard, each.block) for each in cache.verify(tmp_path)] == [
        (SHARDS[0], 0),
        (SHARDS[1], 0),
    ]


@pytest.mark.parametrize(
    ("at", "block"),
    [
        (0, "header"),
        (8, "header"),
        (12, "header, index or footer"),
        (15, "header or footer"),
        (40, "header, index or footer"),
        (-1, "header, index or footer"),
        (-33, "header, index or footer"),
        (-50, "header or footer"),
        (-56, "header or footer"),
        (-57, "header, index or footer"),
    ],
)
def test_outside_of_blocks_the_part_is_named(tmp_path, at, block):
    path = written(tmp_path) / SHARDS[0]
    content = bytearray(path.read_bytes())
    content[at] ^= 64
    path.write_bytes(content)
    with pytest.raises(cache.CacheCorruptError) as caught:
        cache.open(tmp_path)
    assert caught.value.block == block
    assert caught.value.begin <= at % len(content) < caught.value.end


def test_an_error_comes_whole_out_of_another_process(tmp_path):
    os.truncate(written(tmp_path) / SHARDS[0], 100)
    with pytest.raises(cache.CacheCorruptError) as caught:
        cache.open(tmp_path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is cache.CacheCorruptError and str(again) == str(caught.value)
    assert vars(again) == vars(caught.value)


def test_files_that_the_manifest_does_not_name_are_not_read(tmp_path):
    """What a killed writer left, or anybody."""
    written(tmp_path)
    for name in ("shard-00002.kdc", "shard-00000.kdcabc.partial", "shard-00000.lock", "x"):
        (tmp_path / name).write_bytes(b"anything")
    assert cache.verify(tmp_path) == []
    assert len(cache.open(tmp_path)) == len(token_ids())


@pytest.mark.parametrize("name", ["../{}", "{}/../{}", "./{}", "/{}", "cache/{}", "{}/", "{}\0"])
def test_names_lead_nowhere_else(tmp_path, name):
    """Though the file is there, and all checksums are right."""
    folder = written(tmp_path / "cache")
    shutil.copy(folder / SHARDS[1], tmp_path)
    (folder / "cache").symlink_to(folder)
    facts = forge.read_manifest(folder)
    name = name.format(*[str(tmp_path / SHARDS[1])[1:] if name[0] == "/" else SHARDS[1]] * 2)
    facts["shards"][1]["name"] = name
    forge.write_manifest(folder, facts)
    assert_damaged(folder, "manifest.json", "no shard is called")


@pytest.mark.parametrize("name", [SHARDS[0], "manifest.json", "head.safetensors"])
@pytest.mark.parametrize("instead", ["link", "folder", "pipe"])
def test_files_are_files(tmp_path, name, instead):
    """A link leads out of the cache, whether or not what it names is right."""
    folder = written(tmp_path / "cache", "hidden:bf16")
    outside = tmp_path / "outside"
    os.rename(folder / name, outside)
    if instead == "link":
        os.symlink(outside, folder / name)
    elif instead == "folder":
        (folder / name).mkdir()
    else:
        os.mkfifo(folder / name)
    for use in (cache.open, cache.verify):
        with pytest.raises(cache.CacheError, match=f"{name} must be a file"):
            use(folder)


def test_a_cache_may_be_reached_by_a_link(tmp_path):
    written(tmp_path / "cache")
    os.symlink(tmp_path / "cache", tmp_path / "link")
    assert cache.verify(tmp_path / "link") == []
    assert len(cache.open(tmp_path / "link")) == len(token_ids())
