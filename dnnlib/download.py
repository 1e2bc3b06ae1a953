"""Files by URL, downloaded once: DNNLIB_CACHE_DIR (default ~/.cache/dnnlib), sub-folder downloads.

Beside each file stands the SHA-256 of its first download; a file that is no longer the same, here or at its source, is
refused.
"""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from dnnlib.util import atomic_write, write_json, write_text

ATTEMPTS, PAUSE = 10, 1  # number, seconds between two
TIMEOUT, ASK_TIMEOUT = 60, 10  # seconds without an answer: to a download, and to whether the file has changed


def is_url(path: str | Path) -> bool:
    """Whether `path` names a file by http(s) or file URL rather than by path."""
    return re.match(r"(https?|file)://", str(path)) is not None


def cache_root() -> Path:
    """The folder of everything that is kept."""
    return Path(os.environ.get("DNNLIB_CACHE_DIR") or Path.home() / ".cache" / "dnnlib")


def cache_path(url: str) -> Path:
    """Where the file of `url` is kept: <cache>/downloads/<md5 of the URL>_<name>."""
    name = re.sub(r"[^\w.-]", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1], flags=re.ASCII)
    return cache_root() / "downloads" / f"{hashlib.md5(url.encode(), usedforsecurity=False).hexdigest()}_{name}"


STAMP = ("ETag", "Last-Modified", "Content-Length")  # what an answer says of the file's version


def _stamp(answer):
    return {name: answer.headers[name] for name in STAMP if answer.headers.get(name)}


def _stamp_path(path):
    return path.with_name(path.name + ".source")


def _is_current(url, path):
    """Whether the source still has the version that was downloaded; also where it cannot be asked or does not say.

    A local source is as quick to read again as to compare.
    """
    try:
        if url.startswith("file:"):
            urllib.request.urlopen(url, timeout=TIMEOUT).close()
            return False
        ours = json.loads(_stamp_path(path).read_text(encoding="utf-8"))
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ASK_TIMEOUT) as answer:
            theirs = _stamp(answer)
        return all(theirs.get(name, value) == value for name, value in ours.items())
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        return True


def cached(url: str) -> Path:
    """Path of the file at `url`, downloaded if it is not in the cache; appears there under its name only when complete.

    Tries several times; an answer that will not change (404, ...) ends at once. A source that cannot be reached leaves what
    is cached. Raises OSError with the URL and the reason, and ValueError for content other than at the first use, in the
    cache or at the source.
    """
    path = cache_path(url)
    record = path.with_name(path.name + ".sha256")
    for left in reversed(range(ATTEMPTS)):
        if path.is_file() and _is_current(url, path):
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
            _compare(url, record, digest.hexdigest())
            break
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, atomic_write(path) as file:
                expected, received, digest = answer.headers.get("Content-Length"), 0, hashlib.sha256()
                while chunk := answer.read(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                if expected is not None and received != int(expected):
                    raise OSError(f"{received} of {expected} bytes arrived")
                _compare(url, record, digest.hexdigest())
            if not url.startswith("file:"):
                write_json(_stamp_path(path), _stamp(answer))
            break
        except OSError as err:
            status = getattr(err, "code", None)  # of an answer; a lost connection has none
            if left == 0 or (status is not None and status < 500):
                why = getattr(err, "reason", err)
                why = f"({why}); give a local file instead" if status is None else f"(HTTP {status} {why})"
                raise OSError(f"{url}: download failed {why}") from err
            time.sleep(PAUSE)
    return path


def unreachable(url: str) -> str | None:
    """Why a server gives no answer within ASK_TIMEOUT seconds, asked once; None where it gives any."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ASK_TIMEOUT).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, http.client.HTTPException) as err:
        return str(getattr(err, "reason", err))
    return None


def _compare(url, record, digest):
    """Records the digest at the first use of a URL, compares it later."""
    if not record.is_file():
        write_text(record, digest + "\n")
    elif record.read_text(encoding="utf-8").strip() != digest:
        names = f"{record.with_suffix('')} and {record.name}"
        raise ValueError(
            f"{url}: is not the file of its first use (SHA-256 {digest[:12]}...): remove {names} to accept it"
        )
