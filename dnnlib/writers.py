"""Which steps of an experiment write what: found by path, for paths with patterns in them, too."""

import fnmatch
import os
from typing import Any


class Writers:
    """Which steps write what: a tree of the parts of paths, so that thousands of steps are linked in no time."""

    def __init__(self) -> None:
        self.children, self.steps = {}, []

    def add(self, path: str, step: Any) -> None:
        node = self
        for part in path.split(os.sep):
            node = node.children.setdefault(part, Writers())
        node.steps.append((path, step))

    def of(self, path: str, root: str) -> list:
        """Steps that write something at, in, around or beside `path` (perhaps a pattern); the root only itself."""
        nodes, found = [self], []
        for part in path.split(os.sep):
            nodes = [child for node in nodes for child in node._matching(part)]
            found += [pair for node in nodes for pair in node.steps]  # around it
        while nodes:  # in it
            node = nodes.pop()
            found += node.steps
            nodes += node.children.values()
        return [step for written, step in found if written == path or root not in (written, path)]

    def _matching(self, part):
        if any(sign in part for sign in "*?["):
            return [
                child
                for name, child in self.children.items()
                if fnmatch.fnmatch(name, part) or part.startswith(name + ".")
            ]
        stems = [part[:i] for i, sign in enumerate(part) if sign == "."]  # FILE stands for FILE.json, too
        return [self.children[name] for name in (part, *stems) if name in self.children]
