"""LMDB's file, read as data: the library maps it and follows its pointers, so that a damaged one ends the process.

A file is pages. Two meta pages say where the root of a B+ tree was before and after the last change; branch pages lead to
leaf pages, which hold keys with their values, or with the page where a long value starts (lmdb's mdb.c). Needs no torch.
"""

from __future__ import annotations

import os
import struct

from dnnlib.reading import require_file

MAGIC, VERSION = 0xBEEFC0DE, 1
HEADER = 16  # bytes of a page before its content
BRANCH, LEAF, OVERFLOW = 1, 2, 4  # kinds of pages
BIG = 1  # flag of a node whose value lies in pages of its own
MOST_DEPTH = 32  # of the tree, as in mdb.c


def entries(path: str) -> list[tuple[bytes, int, int]]:
    """[(key, offset, length)] of the values of the main database, by key. ValueError, in one line, for a damaged file."""
    size = os.path.getsize(require_file(path))
    with open(path, "rb") as file:
        try:
            found = list(_Tree(file, size).walk())
        except (struct.error, IndexError, RecursionError) as err:
            raise ValueError(f"{path}: no readable LMDB file, or cut off; copy it again ({err})") from err
        except ValueError as err:
            raise ValueError(f"{path}: no readable LMDB file, or cut off; copy it again ({err})") from None
    return found


class _Tree:
    def __init__(self, file, size):
        self.file, self.size, self.seen = file, size, set()
        first = self._meta(0)
        self.page_size = first[0]
        if self.page_size not in [2**i for i in range(8, 17)]:
            raise ValueError(f"pages of {self.page_size} bytes")
        self.flags, self.root = max(first, self._meta(self.page_size), key=lambda meta: meta[-1])[1:3]
        if self.flags:
            raise ValueError("keys with several values, or numbers as keys")

    def _read(self, offset, length):
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError("a page beyond the end")
        self.file.seek(offset)
        return self.file.read(length)

    def _meta(self, offset):
        """(page size, flags, root, number of the transaction) of a meta page."""
        data = self._read(offset + HEADER, 136)
        if struct.unpack_from("<II", data) != (MAGIC, VERSION):
            raise ValueError("another magic number or version")
        page_size, _ = struct.unpack_from("<IH", data, 24)
        (flags,) = struct.unpack_from("<H", data, 24 + 48 + 4)
        root, _, transaction = struct.unpack_from("<QQQ", data, 24 + 48 + 40)
        return page_size, flags, root, transaction

    def walk(self):
        """(key, offset, length) of all values, in order."""
        if self.root != 2**64 - 1:  # an empty file
            yield from self._walk(self.root, 0)

    def _walk(self, number, depth):
        if depth > MOST_DEPTH or number in self.seen:
            raise ValueError("pages that go round")
        self.seen.add(number)
        start = number * self.page_size
        page = self._read(start, self.page_size)
        kind, lower = struct.unpack_from("<HH", page, 10)
        if kind & (BRANCH | LEAF) not in (BRANCH, LEAF) or not HEADER <= lower <= self.page_size:
            raise ValueError(f"page {number} is of no known kind")
        for (at,) in struct.iter_unpack("<H", page[HEADER : lower - lower % 2]):
            low, high, flags, key_size = struct.unpack_from("<HHHH", page, at)
            key = page[at + 8 : at + 8 + key_size]
            if kind & BRANCH:
                yield from self._walk(low | high << 16 | flags << 32, depth + 1)
                continue
            if len(key) < key_size or flags & ~BIG:
                raise ValueError(f"page {number} holds what is no key with one value")
            offset, length = at + 8 + key_size, low | high << 16
            if flags & BIG:
                (pages,) = struct.unpack_from("<Q", page, offset)
                (found,) = struct.unpack_from("<H", self._read(pages * self.page_size, HEADER), 10)
                if not found & OVERFLOW:
                    raise ValueError(f"page {pages} holds no long value")
                offset = pages * self.page_size + HEADER
            else:
                offset += start
            if offset + length > self.size:
                raise ValueError("a value beyond the end")
            yield key, offset, length
