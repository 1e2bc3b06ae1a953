"""Files by URL: a changed source is noticed, an unreachable one leaves what is cached."""

import http.server
import os
import threading

import pytest
import torch

from dnnlib import download
from torch_utils.persistence import load_snapshot, save_snapshot


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(folder, URL of it, list of requests, headers that answers carry besides)."""
    folder, asked, more = tmp_path / "www", [], {}
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def end_headers(self):
            for name, value in more.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *args):
            asked.append(self.command)

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    yield folder, f"http://127.0.0.1:{serving.server_port}", asked, more
    serving.shutdown()
    serving.server_close()


def test_a_changed_source_is_noticed(server):
    folder, url, asked, more = server
    file, url = folder / "net.bin", f"{url}/net.bin"
    more["ETag"] = '"a"'

    def put(content, time):
        file.write_bytes(content)
        os.utime(file, (0, time))

    put(b"first", 10**9)
    assert download.cached(url).read_bytes() == b"first"
    assert download.cached(url).read_bytes() == b"first" and asked == ["GET", "HEAD"]
    put(b"first", 10**9 + 5)  # another time, the same content: asked, and kept
    assert download.cached(url).read_bytes() == b"first" and asked[2:] == ["HEAD", "GET"]
    assert download.cached(url).read_bytes() == b"first" and asked[4:] == ["HEAD"]
    for content, time, tag in ((b"longer", 10**9 + 5, "a"), (b"other", 10**9 + 9, "a"), (b"other", 10**9 + 5, "b")):
        put(content, time)
        more["ETag"] = f'"{tag}"'
        with pytest.raises(ValueError, match="not the file of its first use"):
            download.cached(url)
        assert download.cache_path(url).read_bytes() == b"first"


def test_without_the_source_the_cached_file_is_used(server):
    folder, url, _, _ = server
    (folder / "net.bin").write_bytes(b"one")
    path = download.cached(f"{url}/net.bin")
    (folder / "net.bin").unlink()
    assert download.cached(f"{url}/net.bin") == path and path.read_bytes() == b"one"


def test_a_changed_file_url_is_noticed(tmp_path, monkeypatch, tiny_net):
    """Same size, same second: only the content tells."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "net.safetensors"
    save_snapshot(path, tiny_net(seed=0))
    os.utime(path, (0, 10**9))
    for _ in range(2):
        found = load_snapshot(path.as_uri()).net.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in tiny_net(seed=0).state_dict().items())
    save_snapshot(path, tiny_net(seed=1))
    os.utime(path, (0, 10**9))
    with pytest.raises(ValueError, match="not the file of its first use"):
        load_snapshot(path.as_uri())
