"""Reading experiment files: settings, budgets and overrides fill the words of steps (the format: `dnnlib.experiment`)."""

import collections
import hashlib
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from dnnlib.experiment.steps import Step, link
from dnnlib.reading import read_yaml
from dnnlib.util import one_of, reason

MOST_STEPS, MOST_REPLACED = 2000, 1000  # steps of one entry, settings in one word


def _fill(template, values, where, done=None):
    """The template with `{name}` replaced, in what replaces it too; done: one entry per replacement so far."""
    done = [] if done is None else done

    def replace(match):
        name, comma = match[1], match[2]
        done.append(name)
        if len(done) > MOST_REPLACED:
            raise ValueError(f"{where}: settings that refer to each other stand for too much")
        if name not in values:
            raise ValueError(f"{where}: no setting named {name!r}; known: {', '.join(sorted(values))}")
        value = values[name]
        if comma:
            return ",".join(str(v) for v in (value if isinstance(value, list) else [value]))
        # A setting may be made of others; it must not contain itself.
        rest = {key: v for key, v in values.items() if key != name}
        return _fill(value, rest, where, done) if isinstance(value, str) else str(value)

    return re.sub(r"\{(\w+)(,?)\}", replace, template)


def _combinations(foreach, values, where):
    """All assignments of a `foreach` mapping, in order."""
    assignments = [{}]
    for name, items in (foreach or {}).items():
        longer = []
        for assignment in assignments:
            chosen = items
            if isinstance(items, str):  # a setting, or an entry of a mapping that an earlier name went through
                known = {**values, **assignment}
                if items not in known:
                    raise ValueError(f"{where}: foreach names the setting {items!r}, which is not there")
                chosen = known[items]
            for item in chosen if isinstance(chosen, list) else [chosen]:
                named = item if isinstance(item, dict) else {name: item}
                if not all(isinstance(key, str) for key in named):
                    raise ValueError(f"{where}: foreach {name} must map names to values")
                longer.append({**assignment, **named})
        assignments = longer
        if len(assignments) > MOST_STEPS:
            raise ValueError(f"{where}: foreach makes more than {MOST_STEPS} steps")
    return assignments


def _folder_name(name, budget, overrides):
    """Where results go by default: another budget or setting is another experiment, which must not mix with this one.

    Letters, digits and `-_.` only; where several choices would read alike, a hash tells them apart.
    """
    choices = [] if budget in (None, "default") else [budget]
    choices += [part for key, value in overrides.items() if key != "out" for part in (key, value)]
    parts = [str(part) for part in choices]
    plain = re.sub(r"[^\w.-]+", "", re.sub(r"[,=]\s*", "-", "-".join([str(name), *parts])))
    if len(plain) <= 100 and all(re.fullmatch(r"[\w.]+", part) for part in parts):
        return plain
    return f"{plain[:100]}-{hashlib.sha256(repr(choices).encode()).hexdigest()[:6]}"


def read(path: str | Path) -> dict:
    """The content of an experiment file: settings, budgets and steps are there. ValueError with the file and what is wrong."""
    try:
        spec = read_yaml(path)
    except (OSError, ValueError) as err:
        raise ValueError(f"{path}: not a readable experiment file ({reason(err)})") from err
    if not isinstance(spec, dict) or not isinstance(spec.get("steps"), list):
        raise ValueError(f"{path}: an experiment file is a mapping with the keys name, settings, budgets and steps")
    for key in ("settings", "budgets"):
        if not isinstance(spec.get(key) or {}, dict) or not all(isinstance(n, str) for n in spec.get(key) or {}):
            raise ValueError(f"{path}: {key} must map names to values")
    for stage, entry in enumerate(spec["steps"]):
        where = f"{path}, step {stage}"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "run")):
            raise ValueError(f"{where}: a step has a name and a run line")
        if not isinstance(entry.get("foreach") or {}, dict):
            raise ValueError(f"{where}: foreach must map names to lists")
    return {**spec, "settings": spec.get("settings") or {}, "budgets": spec.get("budgets") or {}}


def texts(path: str | Path) -> set[str]:
    """Settings that are a text, or must be given, and that no foreach goes through: their values are taken as written."""
    spec = read(path)
    listed = {
        name for entry in spec["steps"] for name in (entry.get("foreach") or {}).values() if isinstance(name, str)
    }
    return {name for name, value in spec["settings"].items() if value is None or isinstance(value, str)} - listed


def load(
    path: str | Path,
    budget: str | None = None,
    overrides: dict | None = None,
    readers: dict[str, Callable[[str], list]] | None = None,
) -> tuple[dict, list[Step]]:
    """The settings and the steps of an experiment file. Raises ValueError with the file and what is wrong.

    budget: names (comma-separated) of entries under `budgets`, applied in order; overrides: {setting: value}, last.
    readers: {name: function of a text}; a setting `{name: text}` becomes what the function returns.
    """
    spec = read(path)
    name = spec.get("name") or Path(path).stem
    settings, budgets = dict(spec["settings"]), {"default": {}, **spec["budgets"]}
    for part in (budget or "default").split(","):
        if part not in budgets:
            raise ValueError(f"--budget={part} of {path} {one_of(part, budgets)}")
        if not isinstance(budgets[part] or {}, dict) or not all(isinstance(n, str) for n in budgets[part] or {}):
            raise ValueError(f"{path}: the budget {part} must map names to values")
        settings.update(budgets[part] or {})
    unknown = set(overrides or {}) - {*settings, "out"}
    if unknown:
        raise ValueError(f"--set {min(unknown)}: {path} has no such setting, it {one_of(min(unknown), settings)}")
    settings.update(overrides or {})
    wanted = [name for name, value in spec["settings"].items() if value is None]
    missing = next((name for name in wanted if settings[name] in (None, "")), None)
    if missing is not None:
        raise ValueError(f"{path}: {missing} has no value; give --set {missing}=...")
    settings.setdefault("out", "results/" + _folder_name(name, budget, overrides or {}))
    settings.setdefault("file", os.fspath(path))
    for name, value in settings.items():
        if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in (readers or {}):
            ((reader, text),) = value.items()
            settings[name] = readers[reader](_fill(str(text), settings, f"{path}, {name}"))
    steps = []
    for stage, entry in enumerate(spec["steps"]):
        where = f"{path}, step {stage}"
        try:
            words = shlex.split(entry["run"])
        except ValueError as err:
            raise ValueError(f"{where}: the run line is not readable ({err})") from err
        if not words:
            raise ValueError(f"{where}: run must name a script")
        for assignment in _combinations(entry.get("foreach"), settings, where):
            values = {**settings, **assignment}
            argv = []
            for word in words:
                text = _fill(word, values, where)
                # A word that is one setting may hold several options.
                argv.extend(shlex.split(text) if re.fullmatch(r"\{\w+\}", word) else [text])
            steps.append(Step(_fill(entry["name"], values, where), argv, stage, bool(entry.get("summary"))))
    names = [step.name for step in steps]
    strange = next((n for n in names if "/" in n or n in ("", ".", "..") or not n.isprintable()), None)
    if strange is not None:
        raise ValueError(f"{path}: a step is called {strange!r}, which cannot be the name of a file: use letters and -")
    double = next((n for n, count in collections.Counter(names).items() if count > 1), None)
    if double is not None:
        raise ValueError(f"{path}: two steps are called {double!r}: put what differs into the name")
    for step in steps:
        step.script  # noqa: B018 (raises for what may not be started)
    link(steps, settings["out"])
    return settings, steps
