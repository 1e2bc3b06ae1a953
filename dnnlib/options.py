"""Options declared once: a field of a dataclass carries its default, help, type, bounds and group.

    noise = functools.partial(opt, group="Noise")

    @dataclass
    class Config:
        sigma_data: float = noise(0.5, "Standard deviation of the data", above=0)

`options(Config)` are its click options (None where not given), `from_options(Config, given)` the checked object.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

import click
from click.shell_completion import CompletionItem

from dnnlib import cli
from dnnlib.util import format_nimg, one_of


@dataclass(frozen=True)
class Opt:
    """How a field appears on a command line, and which values it takes."""

    help: str
    flags: tuple[str, ...]  # first one names it in messages; empty: made from the field's name
    type: click.ParamType | None  # None: by the annotation
    metavar: str | None
    choices: Collection[str] | None  # names; a registry is read when it is asked
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    infinite: bool  # whether inf is a value
    group: str | None  # heading in --help
    free: bool  # whether a resumed run may change it
    shown: str | None  # default as --help shows it; None: the value itself
    writes: Any  # outputs.Kind of what it names, where the command writes that; None: nothing

    def range(self) -> str:
        """The bounds in words that follow `must`; empty without bounds."""
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if high is None:
            named = {(0, None): "not be negative", (None, 0): "be positive"}
            return "" if low is None else named.get((self.at_least, self.above), f"be at least {low:g}")
        left, right = "(" if self.at_least is None else "[", ")" if self.at_most is None else "]"
        return f"lie in {left}{-math.inf if low is None else low:g}, {high:.4g}{right}"

    def symbols(self) -> str:
        """The bounds as --help shows them: 0<=x<1; empty without bounds."""
        low = next((f"{v:g}{s}" for v, s in ((self.at_least, "<="), (self.above, "<")) if v is not None), "")
        bounds = ((self.at_most, "<="), (self.below, "<"))
        high = next((f"{s}{v if isinstance(v, int) else f'{v:.4g}'}" for v, s in bounds if v is not None), "")
        if low and not high:
            return f"x>{'=' if self.above is None else ''}{low.rstrip('<=')}"
        return f"{low}x{high}" if high else ""

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds, and finite unless it need not be."""
        lower, upper = [(self.at_least, ge), (self.above, gt)], [(self.at_most, le), (self.below, lt)]
        finite = math.isfinite(value) or (self.infinite and not math.isnan(value))
        return finite and all(bound is None or holds(value, bound) for bound, holds in lower + upper)


def opt(default: Any, help: str, *flags: str, **more: Any) -> Any:
    """A dataclass field that is also an option; `more`: the fields of Opt. A list or dict is copied for each object."""
    given = dict.fromkeys(f.name for f in dataclasses.fields(Opt)) | {"infinite": False, "free": False} | more
    metadata = {"opt": Opt(**given | {"help": help, "flags": flags})}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def declared(cls: type) -> dict[str, Opt]:
    """{field: Opt} of the fields that are options, in order."""
    return {f.name: f.metadata["opt"] for f in dataclasses.fields(cls) if "opt" in f.metadata}


def flag(cls: type, name: str) -> str:
    """How the command line calls a field."""
    own = declared(cls).get(name)
    return own.flags[0] if own and own.flags else "--" + (name if name[:2] in ("P_", "S_") else name.replace("_", "-"))


def _click_type(annotation: Any) -> Any:
    words = str(annotation if isinstance(annotation, str) else getattr(annotation, "__name__", annotation))
    kinds = dict(bool=click.BOOL, int=click.INT, float=cli.Float(infinite=True), list=cli.FLOATS, dict=cli.MAPPING)
    return next((kind for name, kind in kinds.items() if words.startswith(name)), click.STRING)


class Option(click.Option):
    """A click option made from a field: choices and default are read when help is asked for."""

    def __init__(self, declarations: list[str], own: Opt, default_shown: Any, **rest: Any) -> None:
        super().__init__(declarations, help=own.help, metavar=own.metavar, default=None, **rest)  # also for flags
        self.own, self.group, self.shown, self.writes = own, own.group, default_shown, own.writes

    def make_metavar(self, ctx: click.Context) -> str:
        return "|".join(self.own.choices) if self.own.choices and not self.metavar else super().make_metavar(ctx)

    def get_help_extra(self, ctx: click.Context) -> dict[str, str]:
        """Bounds and default as --help shows them."""
        extra = {"range": self.own.symbols()} if self.own.symbols() else {}
        shown = self.shown if self.own.shown is None else self.own.shown
        if shown in (None, "", [], {}):
            return extra
        shown = format_nimg(shown) if self.type is cli.NIMG else shown
        return extra | {"default": ",".join(map(str, shown)) if isinstance(shown, list) else str(shown)}

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The choices, where it has some."""
        found = [CompletionItem(name) for name in self.own.choices or () if name.startswith(incomplete)]
        return found or super().shell_complete(ctx, incomplete)


def options(cls: type, skip: Collection[str] = ()) -> Callable:
    """Decorator that adds the options of a dataclass to a command; what is not given arrives as None."""
    fields = {f.name: f for f in dataclasses.fields(cls)}

    def add(function):
        for name, own in reversed(declared(cls).items()):
            if name in skip:
                continue
            field = fields[name]
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            kind = own.type or _click_type(field.type)
            words = [*(own.flags or [flag(cls, name)]), name]
            function = click.option(*words, cls=Option, own=own, default_shown=default, type=kind)(function)
        return function

    return add


def from_options(cls: type, given: Mapping[str, Any]) -> Any:
    """The object of the values that were given (None: not), checked by `check`."""
    made = cls(**{name: value for name, value in given.items() if value is not None})
    check(made)
    return made


def check(made: Any) -> None:
    """Raises ValueError, naming option, value and remedy, for a number out of bounds or a name that is no choice."""
    for name, own in declared(type(made)).items():
        value = getattr(made, name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not own.holds(number):
                must = own.range() if math.isfinite(number) else "be finite"
                raise ValueError(f"{flag(type(made), name)}={value} must {must}")
        if own.choices is not None and value is not None and value not in own.choices:
            raise ValueError(f"{flag(type(made), name)}={value} {one_of(value, own.choices)}")
