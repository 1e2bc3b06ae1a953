"""Tables of results: means with errors, paired differences, and the one reader and writer of CSV and Markdown."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dnnlib.util import write_text


def write_csv(path: str | Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows (all with the keys of the first) as CSV, floats with all their digits.

    Raises:
        ValueError: a value is NaN or infinite, or there is no row.
    """
    if not rows:
        raise ValueError(f"no rows to write to {path}")
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"column {key!r} of {path} is {value}; refusing to write it")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: int(v) if isinstance(v, bool) else v for k, v in row.items()} for row in rows)
    return write_text(path, buffer.getvalue())


def read_csv(path: str | Path) -> list[dict[str, object]]:
    """Read a CSV file; cells that are numbers become int or float.

    Raises:
        ValueError: the file does not exist or holds no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run the run_*.py script first, or pass --results-dir")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{path} holds no rows; run the run_*.py script again")
    return rows


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    values = [float(v) for v in values]
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
