"""What the theory scripts share: result folders, atomic CSV and JSON files, and list options."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
RESULTS_DIR = HERE / "results"  # beside the scripts, so that commands work from any folder
FIGURES_DIR = HERE / "figures"


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
