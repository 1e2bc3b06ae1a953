"""What Trackio is sent, read back by its own reader. It wants a pillow older than the pinned one and is installed beside:
`bash bash_files/test.sh --trackio tests/test_trackio.py`.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from small_runs import ROOT, python, small_command

pytestmark = pytest.mark.trackio
READ = """
import json, sys
from pathlib import Path
from trackio.sqlite_storage import SQLiteStorage as storage
from trackio.utils import MEDIA_DIR
(run,) = storage.get_runs(sys.argv[1])
logs = storage.get_logs(sys.argv[1], run)
print(json.dumps([run, storage.get_run_config(sys.argv[1], run), logs, str(MEDIA_DIR)]))
"""


@pytest.fixture(scope="module")
def sent(digits, tmp_path_factory):
    """A run that was stopped and resumed, and what the reader finds: name, options, lines, folder of the pictures."""
    folder = tmp_path_factory.mktemp("trackio")
    words = [word for word in small_command(digits, folder / "run") if not word.startswith(("--grid", "--snapshot"))]
    words += ["--log=trackio", "--grid=True", "--grid-every=1Ki", "--snapshot=2Ki"]
    place = os.pathsep.join([os.environ["TRACKIO"], str(ROOT)])
    env = os.environ | {"PYTHONPATH": place, "TRACKIO_DIR": str(folder / "logs"), "NO_PROXY": "127.0.0.1,localhost"}
    for more in (["--slice=1Ki"], []):
        python("train_edm2.py", *words, *more, env=env)
    found = python("-c", READ, "multi-source-diffusion", env=env).stdout.splitlines()[-1]
    return folder / "run", *json.loads(found)


def test_trackio_reads_every_number(sent):
    run_dir, name, options, logs, _ = sent
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert name == "run" and options["batch_size"] == 128 and len(lines) == 3
    for key in {key for line in lines for key, value in line.items() if value is not None} - {"timestamp"}:
        expected = [(round(line["Progress/kimg"] * 1e3), line[key]) for line in lines if line.get(key) is not None]
        assert [(log["step"], log[key]) for log in logs if key in log] == expected


def test_trackio_reads_every_grid(sent):
    run_dir, _, _, logs, media = sent
    found = [(log["step"], Path(media) / log["samples"]["file_path"]) for log in logs if "samples" in log]
    paths = sorted(run_dir.glob("samples-*.png"))
    assert [step for step, _ in found] == [1024, 2048] and len(paths) == 2
    for (_, sent_to), path in zip(found, paths, strict=True):
        theirs, ours = (np.asarray(PIL.Image.open(io.BytesIO(f.read_bytes())).convert("RGB")) for f in (sent_to, path))
        assert np.array_equal(theirs, ours)
