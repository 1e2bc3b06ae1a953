"""Shell scripts as a user types them, whose `python` and `torchrun` are quick to start: children of `child_runs`.

The script runs as it is; the two words on its PATH pass their command line on to a server here.
"""

import json
import os
import socketserver
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import child_runs
from small_runs import ROOT

PASS_ON = """#!{python} -IS
import json, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps(sys.argv).encode() + b"\\n")
    answer = json.loads(server.makefile().readline())
sys.stdout.write(answer[1])
sys.exit(answer[0])
"""


def answer(words, log):
    """(exit code, output) of `python FILE ...` or `torchrun ... --nproc_per_node=N FILE ...`."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    count = int(next((w.partition("=")[2] for w in words[:at] if w.startswith("--nproc_per_node=")), 1))
    environments = child_runs.ranks(count) if count > 1 else [{}]
    logs = [f"{log}-{rank}" for rank in range(count)]
    script, arguments = words[at].removesuffix(".py"), words[at + 1 :]
    started = [child_runs.start(script, arguments, log, env=env) for log, env in zip(logs, environments, strict=True)]
    codes = [child_runs.wait(process) for process in started]
    return max(codes, key=abs), "".join(Path(log).read_text() for log in logs)


def bash(script, *words, code=0, path="", **environment):
    """Output of `ENVIRONMENT bash bash_files/SCRIPT WORDS`; path: a folder of further programs."""
    with tempfile.TemporaryDirectory() as folder:  # not of pytest: the names of sockets have to be short
        address, logs = f"{folder}/socket", iter(range(1000))

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                found = answer(json.loads(self.rfile.readline()), f"{folder}/log{next(logs)}")
                self.wfile.write(json.dumps(found).encode() + b"\n")

        for name in ("python", "torchrun"):
            (Path(folder) / name).write_text(PASS_ON.format(python=sys.executable, address=address))
            (Path(folder) / name).chmod(0o755)
        given = {"PATH": os.pathsep.join([folder, str(path), os.environ["PATH"]])}
        given |= {name: str(value) for name, value in environment.items()}
        with socketserver.UnixStreamServer(address, Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            command = ["bash", str(ROOT / "bash_files" / script), *map(str, words)]
            done = subprocess.run(command, cwd=folder, env={**os.environ, **given}, capture_output=True, text=True)
            server.shutdown()
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout
