"""ImageNet's classes by name, and the lead paper's lists of them. Needs no torch.

Classes are numbered by the order of their WordNet ids, and are called `n02091032 Italian greyhound` where a name is known:
from a file beside the images (LOC_synset_mapping.txt of Kaggle's ImageNet, words.txt), else from the table below.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence

from dnnlib.reading import require_file
from dnnlib.util import parse_integers
from training.dataset.format import MOST_ITEM, ImageSource
from training.dataset.labels import folded

WNID = re.compile(r"n\d{8}")

# The ten classes of each similarity level of the multi-source experiments (Wang et al., ICML 2025), from their code: index
# among the 1000, WordNet id, name. The first 3 and 5 are K = 3 and K = 5.
_DOGS = """
171 n02091032 Italian greyhound; 182 n02093754 Border terrier; 198 n02097209 standard schnauzer;
208 n02099712 Labrador retriever; 215 n02101388 Brittany spaniel; 231 n02106030 collie; 236 n02107142 Doberman;
244 n02108551 Tibetan mastiff; 245 n02108915 French bulldog; 258 n02111889 Samoyed
"""
_MAMMALS = """
171 n02091032 Italian greyhound; 269 n02114367 timber wolf; 279 n02120079 Arctic fox; 283 n02123394 Persian cat;
294 n02132136 brown bear; 330 n02325366 wood rabbit; 340 n02391049 zebra; 366 n02480855 gorilla; 370 n02484975 guenon;
386 n02504458 African elephant
"""
_KINDS = """
171 n02091032 Italian greyhound; 1 n01443537 goldfish; 18 n01582220 magpie; 31 n01644373 tree frog;
46 n01693334 green lizard; 532 n03201208 dining table; 579 n03452741 grand piano; 609 n03594945 jeep; 849 n04398044 teapot;
980 n09472597 volcano
"""
_rows = lambda text: [(int(i), wnid, name) for i, wnid, name in (row.split(maxsplit=2) for row in text.split(";"))]
LEVELS = {"sim1": _rows(_KINDS), "sim2": _rows(_MAMMALS), "sim3": _rows(_DOGS)}  # the names of their scripts
# Their Python code numbers them the other way round; the paper's "Sim=1" is sim1, its "Sim=2" is sim3.
ALIASES = {"level1": "sim3", "level2": "sim2", "level3": "sim1"}
NAMES = {wnid: name for rows in LEVELS.values() for _, wnid, name in rows}


def level(text: str) -> list[tuple[int, str, str]] | None:
    """(index, WordNet id, name) of the classes of `sim1`, `sim2:3` (its first three), `level3`; None for another word."""
    word, _, first = text.casefold().partition(":")
    rows = LEVELS.get(ALIASES.get(word, word))
    if rows is None or not first:
        return rows
    if not first.isdecimal() or not 1 <= int(first) <= len(rows):
        raise ValueError(f"--sources={text}: give {word}, or {word}:3, :5 or another number up to {len(rows)}")
    return rows[: int(first)]


def resolve(sources: Iterable[int | str], source: ImageSource) -> list[int]:
    """Class indices of `--sources`: indices and ranges, class names, WordNet ids, and the lists above.

    A name may be that of the data set, or its part after or before the WordNet id, in any case. ValueError names what is
    not there, and what is near.
    """
    ids, twice = {}, {}
    for index, name in enumerate(source.class_names or []):
        wnid, _, rest = name.partition(" ") if WNID.fullmatch(name[:9]) else ("", "", name)
        for word in {folded(name), wnid, folded(rest), folded(rest.split(",")[0])} - {""}:
            if ids.setdefault(word, index) != index:
                twice[word] = name
    found = []
    for entry in sources:
        if isinstance(entry, int):
            found.append(entry)
        elif re.fullmatch(r"[\d+-]+", entry):
            found += parse_integers(entry)
        elif (rows := level(entry)) is not None:
            found += [_of_level(entry, row, ids, source) for row in rows]
        elif (word := folded(entry.strip())) in ids and word not in twice:
            found.append(ids[word])
        else:
            raise ValueError(f"--sources={entry}: {_why_not(word, ids, twice, source.class_names or [])}")
    return list(dict.fromkeys(found))


def _why_not(word, ids, twice, names):
    if word in twice:
        return f"is {names[ids[word]]} and {twice[word]}: give the index or the WordNet id"
    near = difflib.get_close_matches(word, ids, 1, 0.6)
    known = f"it has {', '.join(names[:3])}, ..." if names else "its classes have no names"
    hint = f"do you mean {names[ids[near[0]]]!r}" if near else known
    return f"no class of that name ({hint}); give indices, names, WordNet ids or {', '.join(LEVELS)} (:3)"


def _of_level(entry, row, ids, source):
    index, wnid, name = row
    if wnid in ids:
        return ids[wnid]
    if any(map(WNID.fullmatch, ids)) or source.num_classes != 1000:
        raise ValueError(
            f"--sources={entry}: the class {wnid} ({name}) is not in {source.name}: give ImageNet's folders"
        )
    return index


def named(class_names: Sequence[str], path: str) -> list[str]:
    """Class names, with words where all are WordNet ids: from a file beside or above the folder `path`, else our own."""
    if not class_names or not all(map(WNID.fullmatch, class_names)):
        return list(class_names)
    words = dict(NAMES)
    folder = os.path.abspath(path)
    for _ in range(4):  # .../imagenet/ILSVRC/Data/CLS-LOC/train
        folder = os.path.dirname(folder)
        for name in ("LOC_synset_mapping.txt", "words.txt"):
            if os.path.isfile(os.path.join(folder, name)):
                text = require_file(os.path.join(folder, name), MOST_ITEM).read_bytes()
                words |= read_words(text)
    return [f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in class_names]


def read_words(data: bytes) -> dict[str, str]:
    """{WordNet id: first of its names} of lines `n02091032 Italian greyhound, ...`, divided by a blank or tab."""
    rows = (line.split(None, 1) for line in data.decode("utf-8", "replace").splitlines())
    return {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) == 2}
