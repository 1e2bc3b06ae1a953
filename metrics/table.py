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


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, without a newline at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _mean_and_variance(values: Iterable[float]) -> tuple[float, float, int]:
    values = [float(v) for v in values]
    mean, n = math.fsum(values) / len(values), len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan, n


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1); NaN deviation for a single value."""
    mean, variance, _ = _mean_and_variance(values)
    return mean, math.sqrt(variance)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    mean, variance, n = _mean_and_variance(values)
    return mean, math.sqrt(variance / n) if n > 1 else 0.0


def paired_difference(a: Iterable[float], b: Iterable[float]) -> tuple[float, float, float, float]:
    """Mean of a - b over pairs, its standard error, and the ends of its 95 % interval (Student's t).

    A single pair has no error: all but its difference are NaN. Raises ValueError for sequences of different lengths.
    """
    import scipy.stats

    mean, variance, n = _mean_and_variance(x - y for x, y in zip(a, b, strict=True))
    if n < 2:
        return mean, math.nan, math.nan, math.nan
    error = math.sqrt(variance / n)
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    return mean, error, mean - half, mean + half
