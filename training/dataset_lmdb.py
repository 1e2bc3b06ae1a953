"""Read-only access to LMDB files (format of LMDB 0.9, 64-bit little-endian), without the lmdb package. Needs no torch.

A file is a row of pages. Two meta pages at its start name the root of a B+ tree; branch pages lead to leaf pages, whose
nodes hold key and value, or the number of the first overflow page of a long value.
"""

from __future__ import annotations

import mmap
import struct

MAGIC, VERSION = 0xBEEFC0DE, 1
HEADER = 16  # of a page: its number u64, padding u16, flags u16, end of the node pointers u16, free space u16
BRANCH, LEAF = 0x01, 0x02
BIGDATA = 0x01  # a node whose value lies on overflow pages
EMPTY = 2**64 - 1  # root of a tree without nodes


class LMDB:
    """The main database of an LMDB file: `keys()`, `read(key)`. Raises ValueError where the file is none or damaged."""

    def __init__(self, path):
        self.path = str(path)
        with open(path, "rb") as file:
            try:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (ValueError, OSError) as err:  # an empty file cannot be mapped
                raise ValueError(f"{self.path}: no LMDB file ({err})") from err
        try:
            self._open()
            self.unseen = (
                len(self.data) // self.page_size
            )  # pages that the walk may still visit: a damaged tree has loops
            self.places = dict(self._walk(self.root))  # key -> (start, length)
        except (struct.error, IndexError, OverflowError, RecursionError) as err:
            raise self._damaged("it ends early") from err
        if len(self.places) != self.entries:
            raise self._damaged(f"{len(self.places)} of {self.entries} entries found")

    def _damaged(self, why):
        return ValueError(f"{self.path}: damaged LMDB file ({why}); copy it again")

    def _open(self):
        newest = None
        self.page_size = 0
        for start in (0, None):
            start = self.page_size if start is None else start
            magic, version = struct.unpack_from("<II", self.data, start + HEADER)
            if (magic, version) != (MAGIC, VERSION):
                raise ValueError(f"{self.path}: no LMDB file of version {VERSION}")
            free, main = start + HEADER + 24, start + HEADER + 24 + 48  # after magic, version, address, map size
            self.page_size = struct.unpack_from("<I", self.data, free)[0]
            if not 256 <= self.page_size <= 65536:
                raise self._damaged(f"pages of {self.page_size} bytes")
            transaction = struct.unpack_from("<Q", self.data, main + 48 + 8)[0]
            if newest is None or transaction > newest:
                newest = transaction
                self.flags = struct.unpack_from("<H", self.data, main + 4)[0]
                self.entries, self.root = struct.unpack_from("<QQ", self.data, main + 32)
        if self.flags & 0x04:
            raise ValueError(f"{self.path}: keys with several values are not supported")

    def _walk(self, page):
        """(key, (start, length)) of every entry below a page, in the order of keys."""
        if page == EMPTY:
            return
        base = page * self.page_size
        flags, lower = struct.unpack_from("<HH", self.data, base + 10)
        self.unseen -= 1
        if self.unseen < 0 or not flags & (BRANCH | LEAF) or not HEADER <= lower <= self.page_size:
            raise self._damaged(f"page {page} is no page of the tree")
        for offset in struct.unpack_from(f"<{(lower - HEADER) // 2}H", self.data, base + HEADER):
            start = base + offset
            low, high, node_flags, key_size = struct.unpack_from("<HHHH", self.data, start)
            if flags & BRANCH:
                yield from self._walk(low | high << 16 | node_flags << 32)
                continue
            if node_flags & ~BIGDATA:
                raise ValueError(f"{self.path}: named databases are not supported")
            key = self.data[start + 8 : start + 8 + key_size]
            value, length = start + 8 + key_size, low | high << 16
            if node_flags & BIGDATA:
                value = struct.unpack_from("<Q", self.data, value)[0] * self.page_size + HEADER
            if value + length > len(self.data):
                raise self._damaged(f"the value of {key!r} is cut off")
            yield key, (value, length)

    def keys(self):
        """All keys, in the file's order."""
        return list(self.places)

    def read(self, key):
        """The value of a key."""
        start, length = self.places[key]
        return self.data[start : start + length]
