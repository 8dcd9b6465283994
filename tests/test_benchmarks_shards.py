"""`bench shards`: a model of bytes and memory, and processes in which they are counted."""

import csv
import json
import multiprocessing
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo here", allow_module_level=True)

from kdkernels.backends import native  # noqa: E402

if native.unavailable("cpu"):
    pytest.skip(native.unavailable("cpu"), allow_module_level=True)

from benchmarks import command as bench  # noqa: E402
from benchmarks import results  # noqa: E402
from benchmarks.shards import command, model, pages, simulation  # noqa: E402

QUICK = simulation.Settings().small()


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """What a tiny run of the command wrote, and where."""
    folder = tmp_path_factory.mktemp("out")
    assert bench.main(["shards", "--quick", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), path


def test_bytes_are_the_models_and_memory_is_within_its_margin(document):
    rows = document[0]["rows"]
    assert {row["way"] for row in rows if row["ranks"] == 2} == {*model.WAYS, model.HEADS}
    for row in rows:
        assert pages.wrong(row) is None
        assert row["ranks"] == 1 or row["received"] > 0
    received = {row["way"]: row["received"] for row in rows if row["ranks"] == 2}
    assert received[model.TRANSPOSED] < received[model.GATHERED]
    assert received[model.ONE_PASS] < received[model.TWO_PASSES] < received[model.GATHERED]


def test_a_run_writes_what_it_counted(document):
    found, path = document
    with path.with_suffix(".csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"])
    assert path.stem == results.file_name(found["machine"], "shards", "some")
    check = path.with_suffix(".check.md").read_text()
    assert found["machine"]["commit"] in check and "over gloo" in check
    table = path.with_suffix(".model.md").read_text()
    assert f"| 64 | {pages.shown(model.cost(model.ONE_PASS, _published(64)).received / 1e6)} |" in (
        table
    )


def test_pages_are_renewed_from_the_records(document, monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text(document[1].read_text())
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("nothing to include")
    assert bench.main(["--include", str(page)]) == 0
    assert (tmp_path / "a.check.md").read_text() == document[1].with_suffix(".check.md").read_text()


@pytest.mark.parametrize(
    "field, factor, said",
    [
        ("received", 2, "received: "),
        ("collectives", 2, "collectives: "),
        ("peak", 1.1, "peak: "),
        ("gradient_error", 1e4, "another loss or gradient"),
        ("loss_error", 1e9, "another loss or gradient"),
    ],
)
def test_what_is_not_as_the_model_says_is_said(document, monkeypatch, capsys, field, factor, said):
    rows = [row for row in document[0]["rows"] if row["way"] == model.REDUCTIONS]
    other = dict(rows[0], loss_error=1e-9)
    other[field] *= factor
    monkeypatch.setattr(simulation, "run", lambda settings: [rows[0], other])
    assert bench.main(["shards", "--quick"]) == 1
    assert f"{model.REDUCTIONS}, 2 ranks, float32: {said}" in capsys.readouterr().err


def test_a_process_that_fails_ends_the_run():
    began = time.monotonic()
    with pytest.raises(simulation.Failed, match=r"ended with .*\b1\b"):
        # Whole rows cannot be shared out.
        simulation.run(replace(QUICK, ranks=(2,), dtypes=("bfloat16",), rows=63))
    assert time.monotonic() - began < 60 and not multiprocessing.active_children()


def test_a_run_that_takes_too_long_is_given_up():
    with pytest.raises(simulation.Failed, match=r"ended with \[None, None\]"):
        simulation.run(replace(QUICK, dtypes=("bfloat16",), seconds=0))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--ranks", "0"], "argument --ranks: 0: expected at least 1"),
        (["--vocab", "100", "--ranks", "8"], "--rows and --vocab must be multiples of all --ranks"),
    ],
)
def test_wrong_arguments_say_what_is_expected(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["shards", *arguments])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_without_two_gpus_nccl_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert bench.main(["shards", "--device", "cuda"]) == 0
    assert capsys.readouterr().out.startswith("skipped: ranks over NCCL take a GPU each")
    options = command.make_parser().parse_args(["--device", "cuda"])
    assert command.chosen(options, 4)[0].ranks == (1, 2, 4)


def test_without_compiled_operators_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(native, "_C", None)
    with pytest.raises(SystemExit) as end:
        bench.main(["shards"])
    assert end.value.code == 2
    assert "the compiled operators are missing: " in capsys.readouterr().err


def test_only_the_published_settings_replace_the_published_files():
    def some(*arguments):
        return command.chosen(command.make_parser().parse_args(arguments))[1]

    assert not some() and not some("--ranks", "1", "2", "4", "8")
    assert some("--quick") and some("--rows", "8")


# Where the ways cross


def _published(ranks, vocab=pages.VOCAB, itemsize=2):
    return model.Sizes(pages.ROWS, vocab, ranks, itemsize)


def _fewer(way, other, **sizes):
    """Whether a way receives less than another."""
    x = _published(**sizes)
    return model.cost(way, x).received < model.cost(other, x).received


@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("ranks", (2, 8, 64))
def test_statistics_are_less_than_logits_from_some_columns_on(itemsize, ranks):
    columns = model.least_columns(itemsize)
    for factor, fewer in ((0.9, False), (1.1, True)):
        vocab = int(factor * columns) * ranks + ranks * (factor > 1)
        sizes = dict(ranks=ranks, vocab=vocab, itemsize=itemsize)
        assert _fewer(model.ONE_PASS, model.GATHERED, **sizes) == fewer


def test_statistics_are_less_than_whole_rows_up_to_some_ranks():
    most = model.most_ranks(2**18, 2)
    assert most == pytest.approx((2**18 / 12) ** 0.5)
    for ranks, fewer in ((128, True), (256, False)):
        assert (ranks < most) == fewer
        assert _fewer(model.ONE_PASS, model.TRANSPOSED, ranks=ranks, vocab=2**18) == fewer


def test_at_some_ranks_statistics_take_as_long_as_the_shards():
    link, memory = 50e9, 4.8e12
    equal = model.ranks_of_equal_time(2**18, 2, link, memory)
    for ranks in (int(equal), int(equal) + 1):
        found = model.statistics(_published(ranks))
        assert (found.received / link > found.moved / memory) == (ranks > equal)


def test_one_rank_communicates_nothing():
    for way in model.WAYS:
        found = model.cost(way, _published(1))
        assert (found.collectives, found.received) == (0, 0)
        assert found == model.cost(model.GATHERED, _published(1))
