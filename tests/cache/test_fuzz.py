"""The parser behind the checksums, whatever is there: an error, or numbers that can be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("zstandard")

import campaign
import fuzz_parser

WORD = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1), st.sampled_from([2**31, 2**32]))
STEP = st.tuples(
    st.sampled_from(range(len(fuzz_parser.CHANGES))),
    st.integers(0, 1),
    st.integers(0, 900),
    WORD,
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from([b"\xff" * 4, b"\x7f\x80", b"\0" * 8, b"\x80\x7f\0\0"]),
    ),
)


def checked(examples):
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, print_blob=False
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return {
        kind: fuzz_parser.Cache(kind, tmp_path_factory.mktemp("fuzzed"))
        for kind in fuzz_parser.KINDS
    }


@checked(250)
@given(kind=st.sampled_from(fuzz_parser.KINDS), steps=st.lists(STEP, min_size=1, max_size=4))
def test_whatever_is_in_a_file_is_an_error_or_numbers_that_can_be(caches, kind, steps):
    caches[kind].changed(steps)
    caches[kind].check()


@checked(250)
@given(
    kind=st.sampled_from(fuzz_parser.KINDS),
    section=st.integers(0, 17),
    at=st.integers(0, 40),
    content=st.binary(min_size=1, max_size=2),
)
def test_numbers_of_a_block_are_refused_or_can_be(caches, kind, section, at, content):
    """A byte or two of one section, as near to what is right as there is."""
    caches[kind].changed([(0, 0, section, at, content)])
    caches[kind].check()


def test_a_fuzzer_finds_no_more():
    """Thousands of times in `make cache-campaign`."""
    pytest.importorskip("atheris")
    tally = campaign.fuzzed(seed=1, runs=500)
    assert not tally.wrong, str(tally)
    assert tally.done >= 500
