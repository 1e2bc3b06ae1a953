"""Which files a collection holds, and how its folders are understood: parts, classes, labels, strays. Needs no torch.

`Container` lists a folder or zip once, in natural order, without what systems and editors leave behind, links followed;
`understand` finds the images and their labels in it. The readers of `convert` and of training both start here.
"""

from __future__ import annotations

import dataclasses
import os
import re
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence

from dnnlib.reading import require_file, require_honest
from dnnlib.util import natural_key, traits
from training.dataset.format import LABELS_FILE, MOST_ITEM, ZIP_ERRORS, extension, image_extensions
from training.dataset.imagenet import named
from training.dataset.labels import (
    METADATA_FILES,
    check_labels,
    folded,
    match_labels,
    order_key,
    parse_meta,
    parse_metadata,
    path_of,
)

# What is never part of a collection, with all that is inside: hidden names, and what these patterns match.
_JUNK = re.compile(
    r"\..*|~\$.*|__macosx|__pycache__|thumbs\.db|ehthumbs\.db|desktop\.ini|icon\r|@eadir|@tmp|@__thumb|#recycle|#snapshot"
    r"|\$recycle\.bin|system volume information|lost\+found",
    re.IGNORECASE | re.DOTALL,
)
# Folders that are parts of one data set, not classes.
_PART = re.compile(r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval)([-_ ]?(set|data|images|\d{4}))?")
# Shards as written here, by generate_images.py --subdirs, and FFHQ's: 00001/img00001234.png, 001000/001234.png, 01000/01234.png
_SHARD = re.compile(r"(\d{5})/img(?:-mean-std-)?\1\d{3}\.\w+|(\d{2,})000/\2\d{3}\.\w+")
_SHOWN = 12  # classes named in a sentence


def is_junk(name: str) -> bool:
    """Whether a file, or a folder around it, is what systems and editors leave behind."""
    return any(map(_JUNK.fullmatch, name.split("/")))


def shards(path: str, matches: Callable[[str], object]) -> list[str]:
    """The file `path`, or the files of that folder in natural order; none if it is, or also holds, something else."""
    if not os.path.isdir(path):
        return [path] if matches(path) else []
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    return [os.path.join(path, n) for n in sorted(names, key=natural_key)] if all(map(matches, names)) else []


def choose_part(parts: Sequence[str], part: str | None, path: str) -> str:
    """The one of `parts` that is meant by --split-folder, which may be short for it; without one train, else the first.

    Raises ValueError where there is none.
    """
    if part is None:
        return next((name for name in parts if name.startswith("train")), parts[0])
    for name in parts:
        if folded(name) == folded(part) or (len(part) > 2 and name.startswith(folded(part))):
            return name
    raise ValueError(f"--split-folder={part}: no such part in {path}; it has {', '.join(parts)}")


def said(chosen: str | None, parts: Sequence[str]) -> str:
    """The end of a sentence: which of the parts was taken, and which were left out."""
    left = [name for name in parts if name != chosen]
    return f" (part {chosen}{'; left out: ' + ', '.join(left) if left else ''})" if chosen else ""


class Container:
    """The files of a folder or zip, by name in natural order with forward slashes. Every process opens the zip itself.

    `ignored` counts the files and folders of systems and editors, `left_out` names links that lead nowhere or to a folder
    that is listed already. Raises ValueError with the path, the name, what is wrong and the `remedy`.
    """

    def __init__(self, path: str, remedy: str = ""):
        self.path, self.remedy = path, remedy
        self.is_folder = os.path.isdir(path)
        self.left_out, junk, self._stored = [], set(), {}  # name: as the zip calls it
        folders = set()
        for stored, is_folder in self._walk() if self.is_folder else self._entries():
            name = path_of(stored) if not self.is_folder else stored
            parts = name.split("/")
            first = next((i for i, part in enumerate(parts) if _JUNK.fullmatch(part)), None)
            if first is not None:
                junk.add("/".join(parts[: first + 1]))
                continue
            above = len(parts) + (1 if is_folder else 0)
            folders.update("/".join(parts[:depth]) for depth in range(1, above))
            if not is_folder:
                self._stored[name] = stored
        self.ignored = len(junk)
        self.names = sorted(self._stored, key=order_key)
        self.folders = sorted(folders, key=order_key)
        if self.is_folder:
            self._stored = {}

    def _walk(self):
        """(name, whether it is a folder); each real folder once, by its own name rather than by a link to it."""
        seen, folders, links = {os.path.realpath(self.path)}, deque([""]), deque()
        while folders or links:
            folder = folders.popleft() if folders else links.popleft()
            real = os.path.realpath(os.path.join(self.path, folder))
            if folder and real in seen:
                self.left_out.append(folder)
                continue
            seen.add(real)
            if folder:
                yield folder, True
            with os.scandir(os.path.join(self.path, folder)) as entries:
                for entry in entries:
                    name, link = f"{folder}/{entry.name}" if folder else entry.name, entry.is_symlink()
                    if _JUNK.fullmatch(entry.name):
                        yield name, False
                    elif os.path.isdir(entry.path) if link else entry.is_dir():
                        (links if link else folders).append(name)
                    elif link and not os.path.exists(entry.path):
                        self.left_out.append(name)
                    else:
                        yield name, False

    def _entries(self):
        return ((name, name.endswith(("/", "\\"))) for name in self._zip().namelist() if path_of(name))

    def _zip(self):
        opened_by, archive = self.__dict__.get("_opened", (None, None))
        if opened_by != os.getpid():  # a forked worker must not share a file position
            require_file(self.path)
            try:
                archive = zipfile.ZipFile(self.path)
                require_honest(archive)
            except ZIP_ERRORS as err:
                raise ValueError(f"{self.path}: no readable zip, perhaps truncated ({err}){self.remedy}") from err
            self._opened = os.getpid(), archive
        return archive

    def read(self, name: str) -> bytes:
        """The content of one file."""
        try:
            if not self.is_folder:
                return self._zip().read(self._stored[name])
            return require_file(os.path.join(self.path, name), MOST_ITEM).read_bytes()
        except ZIP_ERRORS as err:
            raise ValueError(f"{self.path}: cannot read {name} ({err}){self.remedy}") from err

    def checksum(self, name: str) -> int:
        """CRC-32 of the content of one file; of a zip from its directory, without reading the file."""
        return zlib.crc32(self.read(name)) if self.is_folder else self._zip().getinfo(self._stored[name]).CRC

    def stamp(self, name: str) -> list:
        """What changes with one file, without reading it: size and time; in a zip size and CRC-32."""
        if self.is_folder:
            return traits(os.path.join(self.path, name))
        info = self._zip().getinfo(self._stored[name])
        return [info.file_size, info.CRC]

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}


@dataclasses.dataclass
class Layout:
    """What `understand` found."""

    names: list[str]  # of the images, or of the arrays
    arrays: bool  # whether they are .npy
    labels: list | None = None  # per name: int, list of floats, or None where there is no entry
    num_classes: int | None = None
    class_names: list[str] | None = None
    missing: str | None = None  # a sentence about images without a label
    written_here: bool = False  # dataset.json has `num_classes`
    other_parts: list[str] = dataclasses.field(default_factory=list)  # folders such as val that were left out
    sentence: str = ""  # what was understood, in one line
    warnings: list[str] = dataclasses.field(default_factory=list)


def understand(files: Container, part: str | None = None, labels: str | None = None) -> Layout:
    """The images of a collection and their labels. part: the folder to take of train, val, test (--split-folder).

    Parts are never mixed: `train` is taken where none is named. One folder around everything is looked into. Labels come
    from dataset.json, else from metadata.jsonl or .csv, else from class folders, two or more, and are checked. labels:
    "none", or that they are the folders instead, those at the "top" or those that images lie in ("leaf"). ValueError.
    """
    return _Reading(files, part, labels).layout()


class _Reading:
    def __init__(self, files, part, labels=None):
        self.files, self.part, self.prefix, self.notes, self.warnings = files, part, "", [], []
        self.label_files = [n for n in files.names if n.split("/")[-1] in (LABELS_FILE, *METADATA_FILES)]
        self.by = labels
        images = [name for name in files.names if extension(name) in image_extensions()]
        arrays = [name for name in files.names if extension(name) == ".npy"]
        self.arrays = len(arrays) > len(images)
        self.names = arrays if self.arrays else images

    def layout(self):
        if not self.names:
            known = " ".join(sorted(image_extensions()))
            raise ValueError(f"{self.files.path}: no images found (looked for {known} and .npy)")
        self._descend()
        found = self._labelled()
        left = len(self.files.names) - len(self.outside) - len(found.names) - len(self.used)
        left += self.files.ignored
        if left:
            self.notes.append(f"{left} stray file{'s' * (left > 1)} ignored")
        if self.files.left_out:
            some = ", ".join(self.files.left_out[:3])
            number = len(self.files.left_out)
            self.warnings.append(
                f"{number} link{'s' * (number > 1)} left out, to nothing or to a folder listed already: {some}"
            )
        found.sentence += f" ({'; '.join(self.notes)})" if self.notes else ""
        found.warnings, found.other_parts = self.warnings, self.other_parts
        return found

    # --- Where the images are

    def _inside(self, names):
        return [name for name in names if name.startswith(self.prefix)]

    def _tops(self):
        """(images per folder, images beside the folders) under the prefix."""
        below = [name[len(self.prefix) :].partition("/") for name in self._inside(self.names)]
        return Counter(top for top, slash, _ in below if slash), sum(not slash for _, slash, _ in below)

    def _descend(self):
        """Move the prefix into the chosen part and through single folders around everything."""
        self.outside, self.other_parts, part_open = [], [], True
        while True:
            tops, loose = self._tops()
            chosen = self._choose_part(tops, loose) if part_open else None
            if chosen is not None:
                part_open = False
                self.other_parts = others = [top for top in tops if top != chosen]
                where = f"{self.prefix}{chosen}"
                self.notes.append(f"in {where}" + (f"; left out: {', '.join(others)}" if others else ""))
                gone = tuple(f"{self.prefix}{top}/" for top in others)
                self.outside += [name for name in self.files.names if name.startswith(gone)] if gone else []
            elif len(tops) == 1 and not self._label_files_here() and self._is_around(*tops, loose):
                chosen = next(iter(tops))
            else:
                break
            self.prefix += f"{chosen}/"
        if self.part is not None and part_open:
            have = ", ".join(tops) or "no folders"
            raise ValueError(f"--split-folder={self.part}: no such folder in {self.files.path}; it has {have}")

    def _choose_part(self, tops, loose):
        if self.part is not None:
            return next((top for top in tops if folded(top) == folded(self.part)), None)
        parts = [top for top in tops if _PART.fullmatch(top.casefold())]
        if len(parts) > 1 and len(parts) < len(tops):
            other = next(top for top in tops if top not in parts)
            raise ValueError(
                f"{self.files.path}: {', '.join(parts)} look like parts of a data set, {other} beside them does not: "
                f"choose with --split-folder={parts[0]}"
            )
        if not parts or len(parts) < len(tops) or loose > sum(tops.values()):
            return None
        train = [top for top in parts if top.casefold().startswith("train")]
        if len(parts) > 1 and len(train) != 1:
            raise ValueError(
                f"{self.files.path}: holds the parts {', '.join(parts)}, which are not mixed: choose with "
                f"--split-folder={parts[0]} (`dataset_tool.py convert`)"
            )
        return (train or parts)[0]

    def _is_around(self, top, loose):
        """Whether a folder holds all images, or folders of them beside fewer strays."""
        inner = {
            n[len(self.prefix) :].split("/")[1] for n in self._inside(self.names) if n.count("/") > 1 + self._depth()
        }
        return not loose or (len(inner) > 1 and loose < len(self._inside(self.names)) - loose)

    def _depth(self):
        return self.prefix.count("/")

    def _label_files_here(self):
        return [name for name in self.label_files if name.rpartition("/")[0] == self.prefix.rstrip("/")]

    # --- What their labels are

    def _labelled(self):
        names, self.used = self._inside(self.names), []
        meta, where, base = self._read_label_files()
        if self.by is not None:
            found = self._by_folders(names)
            found.written_here = meta.get("written_here", False)
            return found
        if meta["labels"] is not None:
            relative = [name[len(base) :] for name in names]
            labels, missing = match_labels(relative, meta["labels"], where)
            given = [(n, k) for n, k in zip(relative, labels, strict=True) if k is not None]
            known = [k for _, k in given]
            check_labels(known, len(known), meta["num_classes"], where, [n for n, _ in given])
            found = Layout(names, self.arrays, labels, meta["num_classes"], meta["class_names"], missing)
            if known and isinstance(known[0], int):
                found.num_classes = found.num_classes or max(known) + 1
            if missing is not None:
                found.sentence = f"{len(names)} images, {len(names) - len(known)} of them without label"
            elif isinstance(known[0], int):
                found.sentence = self._sentence(Counter(known), found.class_names, where)
            else:
                found.sentence = f"{len(names)} images, label vectors of length {len(known[0])} in {where}"
        else:
            found = self._class_folders(names, meta["class_names"], explicit=meta.get("null", False))
        found.written_here = meta.get("written_here", False)
        return found

    def _read_label_files(self):
        """(content as of `parse_meta`, where it is, the folder that its names count from)."""
        meta, where, base = {"labels": None, "num_classes": None, "class_names": None}, "", ""
        for at in self._prefixes():
            if f"{at}{LABELS_FILE}" in self.label_files:
                where, base = f"{self.files.path}/{at}{LABELS_FILE}", at
                self.used.append(f"{at}{LABELS_FILE}")
                data = self.files.read(f"{at}{LABELS_FILE}")
                meta = parse_meta(data, where)
                meta |= {"written_here": meta["num_classes"] is not None, "null": not meta["class_names"]}
                break
        if meta["labels"] is None:
            rows = [n for n in self.label_files if n.split("/")[-1] in METADATA_FILES]
            inside = [n for n in rows if n.startswith(self.prefix)]
            inside = inside or [n for at in self._prefixes() for n in rows if n.rpartition("/")[0] == at.rstrip("/")]
            tables = [(n, parse_metadata(self.files.read(n), n, f"{self.files.path}/{n}")) for n in inside]
            self.used += inside
            tables = [(n, table) for n, table in tables if table["labels"] is not None]
            if len(tables) == 1:
                name, meta = tables[0]
                return meta, f"{self.files.path}/{name}", name.rpartition("/")[0] + "/" if "/" in name else ""
            if tables:
                some = ", ".join(name for name, _ in tables[:3])
                raise ValueError(
                    f"{self.files.path}: {len(tables)} files of labels ({some}); keep one, beside the folders"
                )
        return meta, where, base

    def _prefixes(self):
        """The prefix, and the folders above it."""
        parts = self.prefix.split("/")[:-1]
        return ["".join(f"{p}/" for p in parts[:n]) for n in range(len(parts), -1, -1)]

    def _by_folders(self, names):
        """Labels as --labels asks for them, whatever label files say."""
        if self.by == "none":
            return Layout(names, self.arrays, sentence=f"{len(names)} images, no labels")
        parts = {name: name[len(self.prefix) :].split("/")[:-1] for name in names}
        folder = {name: above[-1 if self.by == "leaf" else 0] for name, above in parts.items() if above}
        classes = sorted(set(folder.values()), key=order_key)
        if not classes:
            raise ValueError(f"--labels={self.by}: no folders in {self.files.path}/{self.prefix}")
        if beside := len(names) - len(folder):
            self.warnings.append(f"{beside} images in no folder left out (--labels={self.by})")
        ids = {name: i for i, name in enumerate(classes)}
        labels = [ids[name] for name in folder.values()]
        sentence, classes = self._sentence(Counter(labels), classes), named(classes, self.files.path)
        return Layout([*folder], self.arrays, labels, len(classes), classes, sentence=sentence)

    def _class_folders(self, names, listed, explicit):
        tops, loose = self._tops()
        relative = [name[len(self.prefix) :] for name in names]
        if explicit or (len(tops) < 2 and not listed) or all(_SHARD.fullmatch(name) for name in relative):
            return Layout(names, self.arrays, sentence=f"{len(names)} images, no labels")
        if loose > len(names) - loose:
            raise ValueError(
                f"{self.files.path}: {loose} images lie beside the class folders {', '.join([*tops][:3])}, more than in "
                f"them: move them, or give their labels in {LABELS_FILE}"
            )
        inside = [(n, r.split("/")[0]) for n, r in zip(names, relative, strict=True) if "/" in r]
        here = [f[len(self.prefix) :] for f in self.files.folders if f.startswith(self.prefix)]
        empty = [f for f in here if f and "/" not in f and f not in tops]
        if listed is None:
            classes = sorted(tops, key=order_key)
            ids = {top: i for i, top in enumerate(classes)}
            self._warn_of_ids(classes, empty)
        else:
            classes, known = listed, {folded(name): i for i, name in enumerate(listed)}
            unknown = [top for top in tops if folded(top) not in known]
            if unknown:
                raise ValueError(
                    f"{self.files.path}: folder {unknown[0]} is not among the class_names of {LABELS_FILE}"
                )
            ids = {top: known[folded(top)] for top in tops}
        labels = [ids[top] for _, top in inside]
        counts = dict.fromkeys(range(len(classes)), 0) | Counter(labels)
        sentence, classes = self._sentence(counts, classes), named(classes, self.files.path)
        return Layout([n for n, _ in inside], self.arrays, labels, len(classes), classes, sentence=sentence)

    def _warn_of_ids(self, classes, empty):
        if empty:
            self.warnings.append(
                f"folders without images are no sources and get no id: {_some(empty)}; to keep them, list "
                f'all in {LABELS_FILE}: {{"class_names": [...]}}'
            )
        numbers = [int(name) for name in classes if name.isdecimal()]
        if len(numbers) == len(classes) and numbers != [*range(len(classes))]:
            pairs = [f"folder {name} is source {i}" for i, name in enumerate(classes) if int(name) != i]
            self.warnings.append(f"the folders' numbers are not the ids: {_some(pairs)}")

    def _sentence(self, counts, classes, where=None):
        title = lambda name: f"{name}:" if name.isdecimal() else name
        shown = _some([f"{title(classes[k] if classes else str(k))} {n}" for k, n in sorted(counts.items())])
        return f"{len(counts)} source{'s' * (len(counts) > 1)}: {shown}" + (f"; labels of {where}" if where else "")


def _some(items):
    """The first items, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
