"""What happened at which step: a CSV file, TensorBoard, a line in the terminal."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path


class CsvLog:
    """A CSV file that grows a line at a time; all lines have the columns of the first.

    A run that is resumed at a step drops what was written of later ones, so that none is there
    twice; a run that begins, at step 0, begins the file anew.

    Raises:
        ValueError: there is such a file, and it is no log: it is left alone.
    """

    def __init__(self, path: Path | str, step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._lines(step) if self.path.exists() else []
        self.columns = lines[0] if lines else None
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
        os.replace(partial, self.path)

    def _lines(self, step: int) -> list[list[str]]:
        """The header and the lines up to a step; nothing where no line is left."""
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            text = file.read()
        # What a killed process wrote of its last line may look like a whole one.
        whole = io.StringIO(text[: text.rfind("\n") + 1], newline="")
        cut = [["step"]] if "step,".startswith(text[:5]) else [[text]]
        header, *lines = [row for row in csv.reader(whole) if row] or cut
        if header[0] != "step":
            raise ValueError(f"path must be a log of CsvLog, or new, got {self.path}")
        kept = [row for row in lines if len(row) == len(header) and row[0].isdecimal()]
        kept = [row for row in kept if int(row[0]) <= step]
        return [header, *kept] if kept else []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """values: {name: number}; those that the first line did not have are left out."""
        line = io.StringIO()
        writer = csv.writer(line)
        if self.columns is None:
            self.columns = ["step", *values]
            writer.writerow(self.columns)
        writer.writerow([step, *(values.get(name, "") for name in self.columns[1:])])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(line.getvalue())

    def close(self) -> None:
        pass


class TensorBoardLog:
    """A directory that TensorBoard shows.

    Raises:
        ImportError: tensorboard is missing (the extra `train`).
    """

    def __init__(self, folder: Path | str, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a run that is killed and resumed does not write it again

    def close(self) -> None:
        self.writer.close()
