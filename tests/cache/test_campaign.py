"""What `make cache-campaign` does thousands of times, a few times: hazards C5, C8, C9 and P34."""

import os

import pytest
import torch

pytest.importorskip("zstandard")

import campaign

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def one_thread():
    """A process that forks must have no other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_right(tally, least):
    assert not tally.wrong, str(tally)
    assert tally.done >= least


def test_a_writer_that_is_killed_at_any_step_is_taken_up_again():
    assert_right(campaign.kills_at_steps(seed=1, count=12), 12)


def test_a_writer_that_is_killed_at_any_time_is_taken_up_again():
    assert_right(campaign.kills_at_random(8, seed=1), 8)


def test_writers_of_one_cache_that_are_killed_are_taken_up_again():
    assert_right(campaign.kills_at_random(5, seed=1, processes=3), 5)


def test_files_reach_the_disk_before_their_names_do_and_the_manifest_last(tmp_path, monkeypatch):
    """What a power cut needs, and no kill shows."""
    events, fsync, rename = [], os.fsync, os.replace

    def synchronised(handle):
        events.append(os.fstat(handle).st_ino)
        fsync(handle)

    def renamed(source, target):
        events.append((os.stat(source).st_ino, os.path.basename(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synchronised)
    monkeypatch.setattr(os, "replace", renamed)
    campaign.case("hidden:bf16").write(tmp_path)
    places = [k for k, event in enumerate(events) if isinstance(event, tuple)]
    names = [events[k][1] for k in places]
    shards = ["shard-00000.kdc", "shard-00001.kdc"]
    assert names == [*shards, "head.safetensors", "manifest.json"]
    for k in places:
        assert events[k - 1] == events[k][0]
        assert events[k + 1] == tmp_path.stat().st_ino


def test_a_flipped_bit_is_noticed_and_found():
    assert_right(campaign.flips(400, seed=1), 400)


def test_a_truncated_file_is_noticed():
    assert_right(campaign.truncations(320, seed=1), 320)


def test_a_file_that_is_truncated_while_it_is_mapped_ends_no_process():
    assert_right(campaign.truncations_while_mapped(80, seed=1), 80)
