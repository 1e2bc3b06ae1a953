"""The resumable map: what is finished is not run again, what differs in any input is."""

import dataclasses
import json
import threading
import time

import pytest

from dnnlib import cells


@dataclasses.dataclass(frozen=True)
class Inputs:
    a: int
    b: float = 0.5


@dataclasses.dataclass(frozen=True)
class Other:
    a: int
    b: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outcome:
    value: float


def read(found):
    return Outcome(**found)


@pytest.fixture
def counted(tmp_path):
    """(run, calls): the map over a function that counts its calls."""
    calls = []

    def work(inputs, seed):
        calls.append((inputs, seed))
        if seed == 13:
            raise KeyboardInterrupt
        return Outcome(inputs.a / 3 + seed)

    return lambda grid, **options: cells.run(grid, work, tmp_path, read=read, **options), calls


def test_finished_cells_are_kept(counted):
    run, calls = counted
    grid = [(Inputs(1), 0), (Inputs(2), 0), (Inputs(1), 0)]
    first = run(grid)
    assert first == [Outcome(1 / 3), Outcome(2 / 3), Outcome(1 / 3)] and len(calls) == 2  # equal cells are one
    assert run(grid[::-1]) == first[::-1] and len(calls) == 2
    run([(Inputs(1, b=0.25), 0), (Inputs(1), 1), (Other(1), 0)])
    assert len(calls) == 5
    assert run(grid, fresh=True) == first and len(calls) == 7


def test_interruption_loses_one_cell(counted):
    run, calls = counted
    with pytest.raises(KeyboardInterrupt):
        run([(Inputs(1), 0), (Inputs(1), 13), (Inputs(1), 1)])
    seen = []
    assert run([(Inputs(1), 0), (Inputs(1), 1)], progress=lambda todo: seen.append(len(todo)) or todo)[1].value == 4 / 3
    assert seen == [1] and calls[-1] == (Inputs(1), 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"result": {"old": 1}}', '{"result": null}', "\x00"])
def test_damaged_and_older_files_are_run_again(counted, tmp_path, text):
    run, calls = counted
    run([(Inputs(1), 0)])
    (path,) = tmp_path.glob("*.json")
    path.write_text(text)
    assert run([(Inputs(1), 0)]) == [Outcome(1 / 3)] and len(calls) == 2
    assert json.loads(path.read_text()) == {"cell": [["Inputs", {"a": 1, "b": 0.5}], 0], "result": {"value": 1 / 3}}


def test_what_is_no_input_does_not_count(tmp_path):
    calls = []

    def work(name, tool):
        calls.append(tool)
        return {"length": len(name), "pair": (1, None)}

    for tool in (object(), object()):
        found = cells.run([("abc", tool)], work, tmp_path, identity=lambda name, tool: {"name": name})
        assert found == [{"length": 3, "pair": [1, None]}]  # plain data, whether run or read
    assert len(calls) == 1
    assert cells.run([("abcd", None)], work, tmp_path / "none", keep=False)[0]["length"] == 4
    assert not (tmp_path / "none").exists()


def test_processes_together_agree_on_what_is_missing(tmp_path):
    """The first process writes its cell as soon as it may; the second, slower to look, must still work on it."""
    lock, worked = threading.Barrier(2, timeout=20), []

    def process(slow):
        def identity(cell):
            time.sleep(0.2 * slow)
            return cell

        def work(cell):
            worked.append(cell)
            return cell

        cells.run([(1,), (2,)], work, tmp_path, identity=identity, keep=not slow, looked=lock.wait)

    threads = [threading.Thread(target=process, args=[slow]) for slow in (False, True)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert sorted(worked) == [1, 1, 2, 2]
