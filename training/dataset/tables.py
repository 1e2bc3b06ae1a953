"""Parquet, Arrow and Feather tables of images, as the datasets library of Hugging Face writes them; read with pyarrow."""

from __future__ import annotations

import os
import re

from dnnlib.reading import parse_json, require_file
from dnnlib.util import reason
from training.dataset.format import ImageSource, base_name, extension, open_image
from training.dataset.listing import choose_part, said, shards

TABLES = (".parquet", ".arrow", ".feather")
_IMAGES, _LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "class")


def open_tables(path: str, part: str | None = None) -> ImageSource | None:
    """One table, or a folder of shards such as train-00000-of-00004.parquet; images in a column of encoded files."""
    files = shards(path, lambda name: extension(name) in TABLES)
    if not files and os.path.isdir(os.path.join(path, "data")):  # a downloaded data set
        files = shards(os.path.join(path, "data"), lambda name: extension(name) in TABLES)
    if not files:
        return None
    by_part = {}
    for file in files:
        named = re.match(r"([a-z]+)(-\d+-of-\d+)?\.", os.path.basename(file).lower())
        by_part.setdefault(named[1] if named else "", []).append(file)
    parts = list(by_part) if len(by_part) > 1 else []
    chosen = choose_part(parts, part, path) if parts else next(iter(by_part))
    tables = [_read(file) for file in by_part[chosen]]
    image, label, names = _columns(tables[0], by_part[chosen][0])
    try:
        rows = [row for table in tables for row in table.column(image).to_pylist()]
        labels = None if label is None else [v for table in tables for v in table.column(label).to_pylist()]
    except (KeyError, ValueError, TypeError) as err:
        raise ValueError(f"--source={path}: its tables have different columns ({reason(err)})") from err
    if labels and all(isinstance(v, str) for v in labels):
        names = sorted(set(labels))
        labels = [names.index(v) for v in labels]
    if labels and not all(type(v) is int and 0 <= v < 2**31 for v in labels):
        raise ValueError(f"--source={path}: column {label} must hold class indices or names, one for every image")
    encoded = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
    describe = lambda i: f"{path}: row {i}"

    def decode(data, name, header_only):
        if not isinstance(data, bytes):
            raise ValueError(f"{name} of column {image} holds no encoded image; write the files into folders")
        return open_image(data, name, header_only)

    count = len(names) if names else max(labels) + 1 if labels else None
    about = f"{len(encoded)} images of column {image}{said(chosen, parts)}"
    more = dict(describe=describe, decode=decode, about=about, parted=bool(parts))
    return ImageSource(base_name(path), len(encoded), encoded.__getitem__, labels, count, names, **more)


def _read(file):
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as err:
        raise ValueError(f"--source={file}: tables need the pyarrow package: pip install pyarrow") from err
    require_file(file)
    try:
        if extension(file) == ".parquet":
            return pa.parquet.read_table(file)
        with pa.OSFile(file) as source:
            start = source.read(6)
            source.seek(0)
            opened = pa.ipc.open_file(source) if start == b"ARROW1" else pa.ipc.open_stream(source)
            return opened.read_all()
    except Exception as err:  # a damaged table fails in any way
        raise ValueError(f"{file}: no readable table ({reason(err)})") from err


def _columns(table, file):
    """(column of images, column of labels or None, class names or None), by the table's own description, else by name."""
    import pyarrow as pa

    about = parse_json((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {}) if isinstance(about, dict) else {}
    kind = lambda name: features[name].get("_type") if isinstance(features.get(name), dict) else None
    holds = lambda name: (
        pa.types.is_struct(table.schema.field(name).type) or pa.types.is_binary(table.schema.field(name).type)
    )
    names = table.column_names
    images = [n for n in names if kind(n) == "Image"] or [n for n in _IMAGES if n in names and holds(n)]
    if not images:
        raise ValueError(f"--source={file}: no column of encoded images; it has {', '.join(names)}")
    label = next((n for n in [*filter(lambda n: kind(n) == "ClassLabel", names), *_LABELS] if n in names), None)
    return images[0], label, features[label].get("names") if label and kind(label) == "ClassLabel" else None
