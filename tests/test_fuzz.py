"""Every loader on seeded mutations of a sound file: works or one line; see fuzz_child.py for what is watched."""

import json

import child_runs
import fuzz_child
import pytest

NORMAL, LONG = 200, 20_000  # mutations per loader


def check(loader, seeds, folder):
    folder.mkdir(exist_ok=True)
    process = child_runs.CONTEXT.Process(target=fuzz_child.fuzz, args=(loader, seeds, str(folder)))
    process.start()
    code = child_runs.wait(process, timeout=3600)
    at = (folder / "current").read_text() if (folder / "current").exists() else "the start"
    assert code == 0, f"exit code {code} at seed {at}"
    failures = json.loads((folder / "failures.json").read_text())
    assert not failures, "\n".join(f"seed {seed}: {what}" for seed, what in failures)


@pytest.mark.parametrize("loader", fuzz_child.LOADERS)
def test_damaged_files(loader, tmp_path):
    if loader == "lmdb":
        pytest.importorskip("lmdb")
    check(loader, range(NORMAL), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loader", fuzz_child.LOADERS)
def test_many_damaged_files(loader, tmp_path):
    if loader == "lmdb":
        pytest.importorskip("lmdb")
    check(loader, range(NORMAL, LONG), tmp_path)
