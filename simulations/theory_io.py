"""What the theory scripts share: result folders, atomic CSV and JSON files, and list options."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
RESULTS_DIR = HERE / "results"  # beside the scripts, so that commands work from any folder
FIGURES_DIR = HERE / "figures"


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically: an interrupted run leaves the earlier file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    return path


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


def write_json(path: str | Path, value: object) -> Path:
    """Write JSON atomically."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def exact_fraction(value: float | str) -> Fraction:
    """The decimal number that is written, not the binary one that is stored: 0.29 is 29/100."""
    return Fraction(str(value))


def shared_count(share: float, count: int) -> int:
    """floor(share * count) in exact decimals: (0.29, 100) is 29, where int(0.29 * 100) is 28.

    Raises:
        ValueError: share is not within [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"sim={share} must lie within [0, 1]")
    return math.floor(exact_fraction(share) * count)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    values = [float(v) for v in values]
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


class ListOption(click.ParamType):
    """A comma-separated list of numbers; ranges such as 0-4 are allowed for integers."""

    def __init__(self, kind: type = int, minimum: float | None = None, maximum: float | None = None) -> None:
        self.kind, self.minimum, self.maximum = kind, minimum, maximum
        self.name = "ints" if kind is int else "numbers"

    def convert(self, value, param, ctx):  # noqa: D102
        if isinstance(value, (list, tuple)):
            return list(value)
        items: list = []
        for part in str(value).split(","):
            part = part.strip()
            try:
                if self.kind is int and "-" in part[1:]:
                    first, last = (int(x) for x in part.split("-"))
                    if last < first or last - first >= 1_000_000:
                        raise ValueError
                    items.extend(range(first, last + 1))
                else:
                    items.append(self.kind(part))
            except ValueError:
                self.fail(f"{part!r} in {value!r} is no {self.kind.__name__}; write e.g. 1,3,5", param, ctx)
        for item in items:
            if not math.isfinite(item) or (self.minimum is not None and item < self.minimum):
                self.fail(f"{item} must be a finite number >= {self.minimum}", param, ctx)
            if self.maximum is not None and item > self.maximum:
                self.fail(f"{item} must be <= {self.maximum}", param, ctx)
        return items


class OneLineCommand(click.Command):
    """A command whose errors (click's, ValueError, OSError) are one line on stderr and exit code 2."""

    def main(self, *args, standalone_mode: bool = True, **kwargs):  # noqa: D102
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            result = super().main(*args, standalone_mode=False, **kwargs)
        except click.ClickException as error:
            message = error.format_message()
        except (ValueError, OSError) as error:
            message = str(error)
        except click.Abort:
            click.echo("Interrupted; earlier results are unchanged.", err=True)
            sys.exit(130)
        else:
            sys.exit(result if isinstance(result, int) else 0)
        click.echo("Error: " + " ".join(message.split()), err=True)
        sys.exit(2)
