"""Labels of images: the files that hold them, their names matched to images, their values checked. Needs no torch.

`dataset.json` (EDM2), and `metadata.jsonl` or `metadata.csv` with `file_name` and `label` (Hugging Face imagefolder).
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dnnlib.reading import parse_json
from dnnlib.util import natural_key
from training.dataset.format import LABELS_FILE, MOST_CLASSES, extension, item_extensions

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

METADATA_FILES = ("metadata.jsonl", "metadata.csv")


# --- Files ------------------------------------------------------------------------------------------------------------


def parse_meta(data: bytes, where: str = LABELS_FILE) -> dict:
    """Bytes of dataset.json -> dict with `labels` ({name: label} or None), `num_classes`, `class_names` (or None).

    A label is an int, also where it is written as 3.0, "3", true or a class name, or a list of numbers. Raises ValueError.
    """
    try:
        meta = parse_json(data)
    except ValueError as err:
        raise ValueError(f"{where}: {err}") from err
    if not isinstance(meta, dict):
        raise ValueError(f'{where}: must be an object like {{"labels": [[name, label], ...]}}')
    labels, num, names = meta.get("labels"), meta.get("num_classes"), meta.get("class_names")
    if num is not None and (type(num) is not int or not 1 <= num <= MOST_CLASSES):
        raise ValueError(f"{where}: num_classes={num!r:.40} must be an integer from 1 to {MOST_CLASSES}")
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{where}: class_names must be a list of strings")
        num = len(names) if num is None else num
        if len(names) != num:
            raise ValueError(f"{where}: {len(names)} class_names, but num_classes={num}")
    if labels is not None:
        pairs = isinstance(labels, list) and all(isinstance(e, list) and len(e) == 2 for e in labels)
        if not pairs or not all(isinstance(e[0], str) for e in labels):
            raise ValueError(f"{where}: labels must be null or a list of [name, label] pairs")
        ids = {name: i for i, name in enumerate(names or [])}
        labels = _table(((name, _label(label, ids, name, where)) for name, label in labels), where)
    return {"labels": labels, "num_classes": num, "class_names": names}


def parse_metadata(data: bytes, name: str, where: str) -> dict:
    """Bytes of metadata.jsonl or .csv -> as `parse_meta`; no labels without a column `label`. Raises ValueError.

    Labels that are no numbers are class names, numbered in natural order; fractions are vectors of one number.
    """
    try:
        text = data.decode("utf-8-sig")
        if extension(name) == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [parse_json(line) for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error) as err:
        raise ValueError(f"{where}: not readable ({err})") from err
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f"{where}: row {number} has no file_name")
    given = [row.get("label") for row in rows]
    nothing = {"labels": None, "num_classes": None, "class_names": None}
    if all(label is None for label in given):
        return nothing
    for row, label in zip(rows, given, strict=True):
        if label is None or label == "":
            raise ValueError(f"{where}: {row['file_name']} has no label")
    names = [row["file_name"] for row in rows]
    values = [_number(label) if isinstance(label, str) else label for label in given]
    if any(isinstance(value, str) for value in values):
        classes = sorted(set(map(str, given)), key=order_key)
        ids = {name: i for i, name in enumerate(classes)}
        labels = [ids[str(label)] for label in given]
        return {"labels": _table(zip(names, labels, strict=True), where), **_of_classes(classes)}
    if any(
        isinstance(value, float) and not value.is_integer() for value in values
    ):  # also NaN: `check_labels` names it
        values = [value if isinstance(value, list) else [value] for value in values]
    labels = [_label(value, {}, name, where) for name, value in zip(names, values, strict=True)]
    return nothing | {"labels": _table(zip(names, labels, strict=True), where)}


def _of_classes(names):
    return {"num_classes": len(names), "class_names": names}


def _number(text):
    """The number, or list of numbers, that a text is; else the text."""
    if text.strip().lstrip("+-").lower() in ("nan", "inf", "infinity"):  # what is missing in a table is no class
        return math.nan
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return value if type(value) in (int, float, list) else text


def _label(label, ids, name, where):
    if isinstance(label, str):
        label = ids[label] if label in ids else _number(label)
    if isinstance(label, list) and all(type(v) in (int, float) for v in label):
        return label
    if isinstance(label, (int, float)) and (math.isfinite(label) and int(label) == label):  # also true and false
        return int(label)
    raise ValueError(f"{where}: the label of {name} must be an integer or a list of numbers, not {label!r:.40}")


def _table(pairs, where):
    table = {}
    for name, label in pairs:
        if name in table and table[name] != label:
            raise ValueError(f"{where}: two labels for {name}: {table[name]} and {label}; keep one")
        table[name] = label
    return table


# --- Names ------------------------------------------------------------------------------------------------------------


def order_key(path: str) -> list:
    """Sort key of paths: folder by folder, numbers by their value, without case; ties by name."""
    return [(natural_key(part.casefold())[0], part) for part in path.split("/")]


def path_of(name: str) -> str:
    """A name with forward slashes, without `./`, doubled or leading slashes."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def folded(name: str) -> str:
    """A path that people would call the same: composed accents, no case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path_of(name)).casefold())


def _bare(name):
    name = folded(name)
    return name[: -len(extension(name))] if extension(name) in item_extensions() else name


def match_labels(names: Sequence[str], table: dict, where: str) -> tuple[list, str | None]:
    """Labels of the images `names` (None: there is none), and a sentence about missing ones, or None.

    Entries are taken by name; for those that are left slashes and `./`, then case and accents, then the extension, then
    leading folders of either side do not count. Raises ValueError for an entry of several images, several entries of one.
    """
    key_of = {name: name for name in names if name in table}
    for form in (path_of, folded, _bare):
        _match_form(names, table, key_of, form, where)
    _match_ends(names, table, key_of, where)
    _refuse_second_labels(table, key_of, where)
    missing = [name for name in names if name not in key_of]
    problem = None
    if missing:
        used = set(key_of.values())
        left = [entry for entry in table if entry not in used][:2000]
        near = difflib.get_close_matches(missing[0], left or [*table][:2000], n=1, cutoff=0.3)
        hint = f"; the nearest entry is {near[0]}" if near else ""
        problem = f"{where}: no label for {missing[0]} ({len(missing)} of {len(names)} images have none{hint})"
    return [table[key_of[name]] if name in key_of else None for name in names], problem


def _open(names, table, key_of):
    """(images without an entry, entries without an image)."""
    used = set(key_of.values())
    return [n for n in names if n not in key_of], [entry for entry in table if entry not in used]


def _grouped(items, form):
    groups = defaultdict(list)
    for item in items:
        groups[form(item)].append(item)
    return groups


def _match_form(names, table, key_of, form: Callable, where):
    images, entries = _open(names, table, key_of)
    if not images or not entries:
        return
    entries = _grouped(entries, form)
    for key, same in _grouped(images, form).items():
        if key in entries:
            _take(same, entries[key], table, key_of, where)


def _match_ends(names, table, key_of, where):
    images, entries = _open(names, table, key_of)
    if not images or not entries:
        return
    ends = lambda key: [key.split("/", i)[-1] for i in range(key.count("/") + 1)]
    whole, ending = _grouped(entries, _bare), defaultdict(list)
    for key, same in whole.items():
        for end in ends(key)[1:]:
            ending[end] += same
    chosen = defaultdict(list)
    for image in images:
        key = _bare(image)
        found = ending.get(key) or next((whole[end] for end in ends(key)[1:] if end in whole), [])
        if found:
            chosen[tuple(found)].append(image)
    for found, same in chosen.items():
        _take(same, [*found], table, key_of, where)


def _take(images, entries, table, key_of, where):
    if len(images) > 1:
        raise ValueError(f"{where}: {entries[0]} may be {images[0]} or {images[1]}: write the names as they are")
    if any(table[entry] != table[entries[0]] for entry in entries):
        raise ValueError(f"{where}: two labels for {images[0]}: of {entries[0]} and {entries[1]}; keep one")
    key_of[images[0]] = entries[0]


def _refuse_second_labels(table, key_of, where):
    used = set(key_of.values())
    left = _grouped((entry for entry in table if entry not in used), folded)
    for image, entry in key_of.items() if left else ():
        for other in left.get(folded(image), ()):
            if table[other] != table[entry]:
                raise ValueError(f"{where}: two labels for {image}: of {entry} and {other}; keep one")


# --- Values -----------------------------------------------------------------------------------------------------------


def check_labels(
    labels: ArrayLike,
    count: int,
    num_classes: int | None = None,
    where: str = "labels",
    names: Sequence[str] | None = None,  # of the images, for messages
) -> np.ndarray:
    """int64 [N] in 0..num_classes-1 or finite float32 [N,K]; ValueError otherwise, which names the image."""
    name = lambda i: f"item {i}" if names is None else names[int(i)]
    try:
        array = np.asarray(labels)
    except ValueError as err:
        kinds = ["an index" if np.ndim(v) == 0 else f"{len(v)} numbers" for v in labels]
        other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(
            f"{where}: labels must all be class indices, or label vectors of the same length: "
            f"{name(0)} has {kinds[0]}, {name(other)} {kinds[other]}"
        ) from err
    large = array.dtype == object and array.ndim == 1 and all(isinstance(v, int) for v in array)
    if array.shape[:1] != (count,) or array.ndim not in (1, 2) or not (large or array.dtype.kind in "iuf"):
        raise ValueError(f"{where}: labels must be class indices [N] or vectors [N,K], one for each of {count} images")
    if array.ndim == 1:
        if array.dtype.kind == "f":
            raise ValueError(f"{where}: class indices must be integers")
        top = num_classes if num_classes is not None else MOST_CLASSES
        bad = np.flatnonzero((array < 0) | (array >= top))
        if bad.size:
            hint = f"0..{top - 1}; raise num_classes or" if num_classes is not None else "counted from 0;"
            raise ValueError(
                f"{where}: label {array[bad[0]]} out of range ({name(bad[0])}): class indices are {hint} correct it"
            )
        return array.astype(np.int64)
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise ValueError(f"{where}: label vectors must be finite, that of {name(bad[0])} is not")
    return array
