"""What is written about a run, read back; and what a run that is resumed keeps of it."""

import csv

import pytest

from kdkernels.distill.logs import CsvLog, TensorBoardLog

pytest.importorskip("tensorboard", reason="the extra `train` is not installed")


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def write(path, *steps):
    log = CsvLog(path)
    for step in steps:
        log.write(step, {"loss": step / 8, "learning_rate": 1e-3})
    log.close()


def test_a_line_a_step(tmp_path):
    path = tmp_path / "new" / "log.csv"
    write(path, 50, 100)
    assert rows(path) == [
        ["step", "loss", "learning_rate"],
        ["50", "6.25", "0.001"],
        ["100", "12.5", "0.001"],
    ]


def test_numbers_come_back_with_their_bits(tmp_path):
    log = CsvLog(tmp_path / "log.csv")
    log.write(1, {"loss": 0.1 + 0.2, "hard": float("inf"), "distill": float("nan")})
    _, (_, loss, hard, distill) = rows(tmp_path / "log.csv")
    assert float(loss) == 0.1 + 0.2 and hard == "inf" and distill == "nan"


def test_the_first_line_fixes_the_columns(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path)
    log.write(1, {"loss": 1.0, "hard": 2.0})
    log.write(2, {"hard": 3.0, "other": 4.0})
    CsvLog(path, step=2).write(3, {"other": 5.0, "hard": 6.0, "loss": 7.0})
    assert rows(path) == [
        ["step", "loss", "hard"],
        ["1", "1.0", "2.0"],
        ["2", "", "3.0"],
        ["3", "7.0", "6.0"],
    ]


def test_text_with_commas_and_quotes(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path)
    log.write(1, {'of "a", b\nc': "x, y"})
    CsvLog(path, step=1).write(2, {'of "a", b\nc': '"'})
    assert rows(path) == [["step", 'of "a", b\nc'], ["1", "x, y"], ["2", '"']]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (49, []), (50, [50]), (120, [50, 100])])
def test_a_resumed_run_drops_later_lines(tmp_path, step, kept):
    path = tmp_path / "log.csv"
    write(path, 50, 100, 150)
    log = CsvLog(path, step=step)
    assert [int(row[0]) for row in rows(path)[1:]] == kept
    log.write(200, {"loss": 1.0, "learning_rate": 2.0})
    assert rows(path)[0] == ["step", "loss", "learning_rate"]
    assert rows(path)[-1] == ["200", "1.0", "2.0"] and len(rows(path)) == len(kept) + 2
    assert [x.name for x in tmp_path.iterdir()] == ["log.csv"]


def test_a_line_that_was_cut_anywhere_is_dropped(tmp_path):
    """A killed process leaves a part of a line; a number that was cut looks like another one."""
    path = tmp_path / "log.csv"
    write(path, 50, 100)
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    first = len(lines[0] + lines[1]) + 2
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        log = CsvLog(path, step=100)
        assert path.read_bytes() == (b"" if end < first else whole[:first])
        log.write(100, {"loss": 12.5, "learning_rate": 1e-3})
        assert path.read_bytes() == (whole if end >= first else b"\n".join([lines[0], *lines[2:]]))


def test_a_run_that_begins_has_columns_of_its_own(tmp_path):
    path = tmp_path / "log.csv"
    write(path, 50, 100)
    CsvLog(path).write(50, {"errors": 3.0})
    assert rows(path) == [["step", "errors"], ["50", "3.0"]]


def test_lines_that_are_none_are_dropped(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"step,loss\n1,2,3\nfifty,1.0\n2,3\n\xff,\xff\n4\n\n")
    CsvLog(path, step=5)
    assert rows(path) == [["step", "loss"], ["2", "3"]]


def test_a_file_that_is_no_log_is_left_alone(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("name,value\na,b\n")
    with pytest.raises(ValueError, match="path must be a log of CsvLog, or new, got .*data.csv"):
        CsvLog(path, step=5)
    assert path.read_text() == "name,value\na,b\n"
    for text in ("precious", "steps to take", "\nstep"):  # a line that was not ended
        path.write_text(text)
        with pytest.raises(ValueError, match="path must be a log"):
            CsvLog(path, step=5)
        assert path.read_text() == text


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_number(tmp_path):
    log = TensorBoardLog(tmp_path)
    for step in (50, 100):
        log.write(step, {"loss": step / 8, "learning_rate": 0.5})
    log.close()
    assert scalars(tmp_path) == {
        "loss": [(50, 6.25), (100, 12.5)],
        "learning_rate": [(50, 0.5), (100, 0.5)],
    }


def test_tensorboard_of_a_killed_run_has_what_was_written(tmp_path):
    """Without close: a resumed run does not write it again."""
    log = TensorBoardLog(tmp_path)
    for step in (50, 100, 150):
        log.write(step, {"loss": 1.0})
    assert scalars(tmp_path) == {"loss": [(50, 1.0), (100, 1.0), (150, 1.0)]}
    log.close()


@pytest.mark.parametrize(("step", "kept"), [(0, []), (50, [50]), (120, [50, 100])])
def test_tensorboard_of_a_resumed_run_has_no_step_twice(tmp_path, step, kept):
    log = TensorBoardLog(tmp_path)
    for each in (50, 100, 150):
        log.write(each, {"loss": 1.0})
    log.close()
    log = TensorBoardLog(tmp_path, step=step)
    for each in (150, 200):
        log.write(each, {"loss": 2.0})
    log.close()
    wanted = [*((each, 1.0) for each in kept), (150, 2.0), (200, 2.0)]
    assert scalars(tmp_path) == {"loss": wanted}
