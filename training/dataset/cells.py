"""Which classes the lead paper's experiment is about: settings of experiments/imagenet.yaml that are read from the data."""

from __future__ import annotations

import os

from training.dataset.imagenet import WNID, level, resolve
from training.dataset.sources import open_source


def class_ids(source: str, lists: list[str]) -> list[list[int]]:
    """Class indices of lists such as sim3:10 in a collection; where it is not there, those of the whole ImageNet.

    Of a folder of class folders only their names are read: ImageNet has 1.3 million files. Raises ValueError.
    """
    rows = [level(text) for text in lists]
    if None in rows:
        raise ValueError(f"sims={lists[rows.index(None)].partition(':')[0]}: give sim1, sim2 or sim3")
    if not os.path.exists(source):
        return [[index for index, _, _ in chosen] for chosen in rows]
    if os.path.isdir(source):
        names = sorted(entry.name for entry in os.scandir(source) if entry.is_dir() and WNID.fullmatch(entry.name))
        known = {name: index for index, name in enumerate(names)}
        if known and all(wnid in known for chosen in rows for _, wnid, _ in chosen):
            return [[known[wnid] for _, wnid, _ in chosen] for chosen in rows]
    opened = open_source(source)
    return [resolve([text], opened) for text in lists]


def _words(text, count):
    """The last `count` parts of a text, divided by `; `, as lists; what stands before them."""
    head, *parts = text.rsplit("; ", count)
    return head, [part.split(",") for part in parts]


def cells(text: str) -> list[dict]:
    """`SOURCE; sim1,sim3; 3,10; 500; 0` -> {sim, k, n, members, top} of every combination; top: as of `levels`. ValueError."""
    source, (sims, counts, sizes, pool) = _words(text, 4)
    top = _top(counts, pool)
    pairs = [(sim, k) for sim in sims for k in counts]
    found = class_ids(source, [f"{sim}:{k}" for sim, k in pairs])
    one = lambda sim, k, n, ids: {"sim": sim, "k": int(k), "n": int(n), "members": ids, "top": top}
    return [one(*pair, n, ids) for pair, ids in zip(pairs, found, strict=True) for n in sizes]


def levels(text: str) -> list[dict]:
    """`SOURCE; sim1,sim3; 3,10; 0` -> {sim, top, pooled, members}: of every similarity the classes of the largest K, and the
    first `top` that are converted: as many as the last number says, 0 or less than K: K. Raises ValueError.
    """
    source, (sims, counts, pool) = _words(text, 3)
    most, top = max(map(int, counts)), _top(counts, pool)
    found = class_ids(source, [f"{sim}:{top}" for sim in sims])
    return [
        {"sim": sim, "top": top, "pooled": ids, "members": ids[:most]} for sim, ids in zip(sims, found, strict=True)
    ]


def _top(counts, pool):
    return max(map(int, [*counts, *pool]))
