"""What all command lines share: option types, configuration files, and errors of one line with exit code 2.

A script uses `@cli.command()` or `@cli.group()` in place of click's. ValueError and OSError raised inside become one line
on stderr; set DNNLIB_TRACEBACK=1 to see where they come from.
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from dnnlib import outputs
from dnnlib.reading import read_yaml
from dnnlib.util import each_of, one_of, parse_integers, parse_nimg, parse_seeds, reason

MOST_LINE = 2000  # characters of an error
INTERRUPTED = 75  # exit code of a training that was stopped by a signal after writing a checkpoint (EX_TEMPFAIL)


class _Parsed(click.ParamType):
    """An option type made from a function text -> value that raises ValueError."""

    def __init__(self, name, parse):
        self.name, self.parse = name, parse

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            value = ",".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
        try:
            return self.parse(value)
        except ValueError as err:
            self.fail(str(err), param, ctx)


class Float(click.FloatRange):
    """A finite number within bounds; inf (and -inf) only where the option says so, nan never."""

    name = "float"

    def __init__(self, *bounds: float | None, infinite: bool = False, **options: Any):
        super().__init__(*bounds, **options)
        self.infinite = infinite

    def _describe_range(self):
        return super()._describe_range() if (self.min, self.max) != (None, None) else ""  # click says x<=None

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            raise click.UsageError(f"{param.opts[0]}={value} must be finite: give a number", ctx)
        return number


class Choice(click.Choice):
    """One of some names, with a suggestion for what is none."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return f"{value!r} {one_of(str(value), self.choices)}"


class _Mapping(click.ParamType):
    """NAME=VALUE,... as text, or a mapping from a configuration file."""

    name = "name=value,..."

    def convert(self, value, param, ctx):
        return value if isinstance(value, dict) else str(value)


def _numbers(text):
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is no comma-separated list of numbers") from None


def _size(text):
    match = re.fullmatch(r"0*([1-9]\d*)[x,]0*([1-9]\d*)", text)
    if not match:
        raise ValueError(f"{text!r} is no resolution: give WIDTHxHEIGHT, such as 32x32")
    return int(match[1]), int(match[2])


def _by_size(text):
    """25:10Ki,100:30Ki as {"25": 10240, "100": 30720}; 10Ki, for all sizes, as {"": 10240}."""
    found = {}
    for part in text.split(","):
        size, colon, nimg = part.strip().rpartition(":")
        if colon and not re.fullmatch("[1-9][0-9]*", size) or size in found or parse_nimg(nimg) == 0:
            raise ValueError(f"{part!r} of {text!r}: give images, or each size once, such as 25:10Ki,100:30Ki")
        found[size] = parse_nimg(nimg)
    return found


NIMG = _Parsed("nimg", parse_nimg)
NIMG_BY_SIZE = _Parsed("n:nimg,...", _by_size)
SEEDS = _Parsed("seeds", parse_seeds)
INTS = _Parsed("ints", parse_integers)
FLOATS = _Parsed("floats", _numbers)
SIZE = _Parsed("size", _size)
MAPPING = _Mapping()
COUNT = click.IntRange(min=1)
WORKERS = click.IntRange(0, 256)  # processes: more would take the machine down before the first image
STRINGS = _Parsed("names", lambda text: [part for part in text.split(",") if part])


def _reason(err):
    """What an exception says, in a line and without error numbers."""
    if isinstance(err, OSError) and err.strerror:
        return err.strerror if err.filename is None else f"{err.filename}: {err.strerror}"
    return reason(err)


def _read_config(ctx, param, paths):
    """Merge YAML files into the defaults of the command: later files win, the command line wins over all."""
    if not paths:
        return paths
    merged = dict(ctx.default_map or {})
    options = [p for p in ctx.command.params if p is not param]
    known = {name: p for p in options for name in (p.name, *(o.lstrip("-") for o in p.opts))}
    for path in paths:
        try:
            values = read_yaml(path) or {}
        except (OSError, ValueError) as err:
            why = err.strerror if isinstance(err, OSError) and err.strerror else _reason(err)
            raise click.BadParameter(f"{path}: {why.removeprefix(f'{path}: ')}", ctx, param) from err
        if not isinstance(values, dict):
            raise click.BadParameter(f"{path}: must map option names to values", ctx, param)
        for name, value in values.items():
            option = known.get(str(name)) or known.get(str(name).replace("_", "-"))
            if option is None:
                raise click.BadParameter(f"{path}: {name!r} is no option of this command", ctx, param)
            if isinstance(value, (list, dict)) and not (
                option.multiple or isinstance(option.type, (_Parsed, _Mapping))
            ):
                raise click.BadParameter(f"{path}: {name} takes one value, not {value!r}", ctx, param)
            if value == "":
                raise click.BadParameter(f"{path}: {name} is empty: give a value, or leave it out", ctx, param)
            if value is not None:  # null: not given
                text = isinstance(value, (int, float, str))
                merged[option.name] = expand_home(str(value)) if text else value
    ctx.default_map = merged
    return paths


config_option = click.option(
    "--config",
    metavar="YAML",
    multiple=True,
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="Read options from a file; repeat for several, later ones win, the command line wins over all.",
)


def _load_plugins(ctx, param, paths):
    """Run files of the user's, which add names to the tables of choices, before any option that takes one is read."""
    for path in paths:
        spec = importlib.util.spec_from_file_location(f"plugin_{Path(path).stem}", path)
        if spec is None:
            raise click.BadParameter(f"{path}: give a Python file (.py)", ctx, param)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except OSError as err:
            raise click.BadParameter(_reason(err), ctx, param) from err
        except Exception as err:  # whatever the user's code does
            lines = [f"line {n}: " for file, n, *_ in traceback.extract_tb(err.__traceback__) if file == path]
            raise click.BadParameter(f"{path}: {lines[-1] if lines else ''}{reason(err)}", ctx, param) from err
    return paths


device_option = click.option("--device", metavar="NAME", help="cuda, cpu, ...; default: cuda where there is one")


def under(heading: str, *decorators: Callable) -> Callable:
    """Decorators of options as one, with a heading of --help over those that have none."""

    def add(function):
        for decorate in reversed(decorators):
            before = len(getattr(function, "__click_params__", ()))
            function = decorate(function)
            for param in function.__click_params__[before:]:
                param.group = getattr(param, "group", None) or heading
        return function

    return add


plugin_option = under(
    "Options",
    click.option(
        "--plugin",
        metavar="FILE.py",
        multiple=True,
        is_eager=True,
        expose_value=False,
        callback=_load_plugins,
        help="Run this file of yours first: its own choices (CONTRIBUTING.md) are then values of options. Repeatable.",
    ),
)


class Listing(click.Option):
    """A flag that counts after all others, so that plugins are known."""

    group = "Options"


def listing(flag: str, lines: Callable[[], list[str]], help: str) -> Callable:
    """A flag that prints lines and ends the command, whatever else is missing; what --plugin adds is among them."""

    def show(ctx, param, asked):
        if asked and not ctx.resilient_parsing:
            click.echo("\n".join(lines()))
            ctx.exit()

    return click.option(flag, cls=Listing, is_flag=True, is_eager=True, expose_value=False, callback=show, help=help)


def names_in(module: str, table: str) -> Callable[[], list[str]]:
    """For `listing`: a line for every name of a table of choices, which is imported when asked, with what it says of itself."""

    def lines():
        entries = getattr(importlib.import_module(module), table)
        width = max(map(len, entries))
        said = (" ".join((entry.__doc__ or "").split()) for entry in entries.values())
        first = (re.split(r"\.(?=\s+[A-Z]|$)|:\s", text, maxsplit=1)[0] for text in said)  # sentence
        return [f"{name:{width}}  {text}".rstrip() for name, text in zip(entries, first, strict=True)]

    return lines


def _out_of_memory(err):
    """Whether there was no room for a tensor, on the CPU or a GPU."""
    return isinstance(err, MemoryError) or any(
        sign in str(err) for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _one_line_warning(message, category, *where):
    """What users are told is one line; what developers are told keeps its place."""
    return f"Warning: {message}\n" if category is UserWarning else _formatwarning(message, category, *where)


_formatwarning = warnings.formatwarning


class _OneLineErrors:
    """Mixed into click's classes: every error is one line, bad input exits with 2."""

    def main(self, args=None, prog_name=None, standalone_mode=True, **extra):
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        warnings.formatwarning = _one_line_warning
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
            sys.exit(code if isinstance(code, int) else 0)
        except click.exceptions.Exit as err:
            sys.exit(err.exit_code)
        except (click.Abort, KeyboardInterrupt):
            self._fail("interrupted", 130)
        except click.ClickException as err:
            self._fail(err.format_message(), 2)
        except (ValueError, OSError) as err:
            if os.environ.get("DNNLIB_TRACEBACK"):
                raise
            self._fail(_reason(err) if isinstance(err, OSError) else str(err) or type(err).__name__, 2)
        except (RuntimeError, MemoryError) as err:
            if os.environ.get("DNNLIB_TRACEBACK") or not _out_of_memory(err):
                raise
            self._fail(f"out of memory ({_reason(err)}): lower the batch (training: --batch-gpu) or the network", 1)

    @staticmethod
    def _fail(message, code):
        text = " ".join(str(message)[: 4 * MOST_LINE].split())  # files may say things without end
        print("Error: " + (text if len(text) <= MOST_LINE else f"{text[:MOST_LINE]}..."), file=sys.stderr, flush=True)
        sys.exit(code)


class Output(click.Option):
    """An option that names what the command writes; writes: its outputs.Kind, or a function of the parameters to it."""

    def __init__(self, *args: Any, writes: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.writes = writes


def output(flags: str, writes: Any, **more: Any) -> Callable:
    """click.option of an Output; flags: its name, and older ones that still work."""
    return click.option(*flags.split(), cls=Output, writes=writes, **more)


_PATHS = re.compile("FILE|DIR|ZIP|PATH|SNAPSHOT|GLOB|NPZ|SPEC|STEM")  # metavars of options that take a path


def _texts(ctx: click.Context) -> Iterator[tuple[click.Option, str]]:
    """(option, a value that is text) of all options of a command that were given or have a default."""
    for param in ctx.command.params:
        value = ctx.params.get(param.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, (str, os.PathLike)):
                yield param, os.fspath(item)


def _flag(param: click.Parameter) -> str:
    long = (name for name in param.opts if name.startswith("--"))
    return next(long, param.human_readable_name)


def _naming_option(message: str, ctx: click.Context) -> str:
    """What went wrong with a path, with the option that gave the path."""
    if message.startswith("--"):
        return message
    given = [
        (param, path)
        for param, text in _texts(ctx)
        if isinstance(param, click.Option) and _PATHS.search(param.metavar or "")
        for path in [*outputs.paths_in(text), os.path.normpath(text)]
    ]
    for param, path in sorted(given, key=lambda item: -len(item[1])):
        found = re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", message)
        if found and re.search(r"\w", path) and not (found.start() and getattr(param, "writes", None)):
            return f"{_flag(param)}{': ' if found.start() else '='}{message}"
    return message


def given_options() -> dict[str, str]:
    """{option: digest of its value} of the command that is running, for comparing processes; empty outside of one."""
    ctx = click.get_current_context(silent=True)
    digest = lambda value: hashlib.sha256(repr(value).encode()).hexdigest()[:16]
    return {_flag(p): digest(ctx.params[p.name]) for p in ctx.command.params if p.name in ctx.params} if ctx else {}


class Command(_OneLineErrors, click.Command):
    """A command that takes no empty values (they come from unset shell variables), with options under headings.

    What it writes passes the door of dnnlib/outputs.py first, and is held until it ends; errors name the option. Where it
    has an option --each, all others may name its entries (see `each_of`): `each` becomes the options of all.
    """

    def make_context(self, name: str | None, args: list[str], parent: click.Context | None = None, **more: Any) -> Any:
        """click's, or that of the first entry of --each."""
        own = any(param.name == "each" for param in self.params)
        index = next((i for i, word in enumerate(args) if own and re.match(r"--each(=|$)", word)), None)
        if index is None:
            return super().make_context(name, args, parent, **more)
        _, equals, value = args[index].partition("=")
        rest = args[:index] + args[index + (1 if equals else 2) :]
        words = each_of(value if equals else "".join(args[index + 1 : index + 2]), rest)
        ctx, *others = (super(Command, self).make_context(name, w, parent, **more) for w in words)
        ctx.obj = [ctx, *others]
        ctx.params["each"] = [dict(own.params) for own in ctx.obj]
        return ctx

    def invoke(self, ctx: click.Context) -> Any:
        """Check and hold the outputs, then run."""
        try:
            with contextlib.ExitStack() as held:
                several = ctx.obj if ctx.params.get("each") else [ctx]
                for param in (p for p in self.params if getattr(p, "writes", None)):
                    if len({str(own.params[param.name]) for own in several}) < len(several):
                        own = f"{_flag(param)}={ctx.params[param.name]}"
                        raise ValueError(
                            f"{own}: every entry of --each needs a place of its own: put %s (or %1, %2, ...) into it"
                        )
                for own in several:
                    self.check_outputs(own, held)
                return super().invoke(ctx)
        except (ValueError, OSError) as err:
            message = _reason(err) if isinstance(err, OSError) else str(err)
            if (better := _naming_option(message, ctx)) != message:
                raise ValueError(better) from err
            raise

    def check_outputs(self, ctx: click.Context, held: contextlib.ExitStack) -> None:
        """Every output passes the door; it is held too, unless this is a dry run."""
        for param, text in _texts(ctx):
            if kind := getattr(param, "writes", None):
                kind = kind if isinstance(kind, outputs.Kind) else kind(ctx.params)
                enter = outputs.check if ctx.params.get("dry_run") else outputs.claimed
                door = enter(_flag(param), text, kind, _others(ctx, param))
                held.enter_context(door or contextlib.nullcontext())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = {}
        for param in self.get_params(ctx):
            if record := _help_row(param, ctx):
                sections.setdefault(getattr(param, "group", None) or "Options", []).append(record)
        for heading, records in sorted(sections.items(), key=lambda item: item[0] == "Options"):
            with formatter.section(heading):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Words of the command line: an empty value is refused, `~` is the home folder after = too, where no shell says so."""
        for word in args:
            if re.fullmatch(r"-[-\w]*=", word) or not word:
                raise click.UsageError(f"{word[:-1] or 'an argument'} is empty: give a value, or leave it out", ctx)
        lists = {param.opts[0] for param in self.params if isinstance(param, Listing)}
        args = sorted(args, key=lists.__contains__)
        return super().parse_args(ctx, [expand_home(word) for word in args])


def _help_row(param, ctx):
    """(names, text) of an option: its short and first long name, then what it takes; bounds and default behind the text."""
    if not isinstance(param, click.Option) or param.hidden:
        return None
    short, long = ([name for name in param.opts if name.startswith("--") == kind] for kind in (False, True))
    words = ", ".join([*short[:1], *long[:1]]) + "".join(f" / {name}" for name in param.secondary_opts[:1])
    if not param.is_flag:
        words += f" {param.make_metavar(ctx).replace(' RANGE', '').replace('INTEGER', 'INT').strip('[]')}"
    text, said = re.fullmatch(r"(?s)(.*?)(?:(?:; | \[)default: (.*?)\]?)?", param.help or "").groups()
    extra = param.get_help_extra(ctx)
    default = said or str(extra.get("default", "")).strip("()")
    more = [extra.get("range"), f"default: {default}" if default else "", extra.get("required")]
    return words, f"{text}  [{'; '.join(filter(None, more))}]" if any(more) else text


def _others(ctx, output):
    """Every other path on the command line."""
    for param, text in _texts(ctx):
        if param is not output:
            collection = "ZIP" in (param.metavar or "").split("|")
            yield from (outputs.Named(_flag(param), path, collection) for path in outputs.paths_in(text))


def expand_home(text: str) -> str:
    """`~/` at the start of a value, or of an entry of a list, as the home folder."""
    return re.sub(r"(^|=|,|:)~(?=/|$)", lambda match: match[1] + os.path.expanduser("~"), text)


class Group(_OneLineErrors, click.Group):
    command_class = Command

    def command(self, *args: Any, **kwargs: Any) -> Callable:
        """A sub-command, with --config."""
        make = super().command(*args, **kwargs)
        return lambda function: make(config_option(function))


def command(name: str | None = None, **kwargs: Any) -> Callable:
    """click.command with one-line errors and --config."""
    make = click.command(name, cls=Command, context_settings={"show_default": True}, **kwargs)
    return lambda function: make(config_option(function))


def group(name: str | None = None, **kwargs: Any) -> Callable:
    """click.group with one-line errors; its sub-commands take --config."""
    return click.group(name, cls=Group, context_settings={"show_default": True}, **kwargs)
