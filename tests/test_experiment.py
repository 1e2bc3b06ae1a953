"""Experiment files: settings, budgets, repetitions, markers, resuming after a failure."""

import functools
import json
import pathlib
import re
import shutil

import click
import pytest
from small_runs import one_line, python, run

import run_experiment
from dnnlib import experiment

FILE = """
name: demo
settings: {sources: [0, 1, 2], n: 50, pairs: [{a: 1, b: x}, {a: 2, b: y}], out: "{folder}", print: "{{out}}/table.md"}
budgets:
  smoke: {sources: [0, 1], n: 5}
  single: {sources: [7]}
steps:
  - name: all
    run: note.py --text={{sources,}} --dest={{out}}/all
  - name: one-{{source}}
    foreach: {source: sources}
    run: note.py --text={{source}}:{{n}} --dest={{out}}/one-{{source}}
  - name: pair-{{source}}-{{a}}
    foreach: {source: [5], pair: pairs}
    run: note.py --text="{{a}} {{b}} {{source}}" --dest={{out}}/pair-{{a}}
  - name: table
    run: note.py --text=TABLE --dest={{out}}/table.md
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(FILE.replace("{folder}", str(tmp_path / "out")).replace("{{", "{").replace("}}", "}"))
    return path


@click.command()
@click.option("--text")
@click.option("--dest", "to")
@click.option("--source")
def note(text, to, source):
    """A script that notes what it was told, and fails on demand."""
    if text == "fail":
        raise click.UsageError("--text=fail was asked for")
    if text == "break":
        raise RuntimeError("broken")
    if text == "code":
        return 3
    with open(to, "a", encoding="utf-8") as out:
        out.write(text + "\n")


def load_scripts():
    return {"note.py": note}


def commands(steps):
    return {step.name: step.argv[1] for step in steps}


def test_settings_lists_and_repetitions(file):
    settings, steps = experiment.load(file)
    assert commands(steps) == {
        "all": "--text=0,1,2",
        "one-0": "--text=0:50",
        "one-1": "--text=1:50",
        "one-2": "--text=2:50",
        "pair-5-1": "--text=1 x 5",
        "pair-5-2": "--text=2 y 5",
        "table": "--text=TABLE",
    }
    assert [step.stage for step in steps] == [0, 1, 1, 1, 2, 2, 3]
    assert steps[0].argv[0] == "note.py" and settings["n"] == 50


def test_budgets_and_overrides_in_that_order(file):
    assert commands(experiment.load(file, "smoke")[1])["one-1"] == "--text=1:5"
    assert set(commands(experiment.load(file, "smoke,single")[1])) == {"all", "one-7", "pair-5-1", "pair-5-2", "table"}
    steps = experiment.load(file, "smoke", {"n": 9, "sources": [4]})[1]
    assert commands(steps)["one-4"] == "--text=4:9"


def test_the_default_folder_is_plain_and_no_two_choices_share_it(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text("settings: {a: 1, b: 2, c: [3, 4]}\nbudgets: {x: {}, x-y: {}, y: {}}\nsteps: []\n")
    folder = lambda *choice: experiment.load(path, *choice)[0]["out"]
    assert folder() == folder("default") == "results/demo"
    assert folder("x") == "results/demo-x" and folder("x", {"a": 5, "b": 0.5}) == "results/demo-x-a-5-b-0.5"
    lists = [
        (None, {"c": value})
        for value in (
            [0, 1],
            "0-1",
            ["0,1"],
            [0, "", 1],
            "0/1",
            "a/../b",
            [[0], 1],
            "-1",
            1,
            "[0, 1]",
            "x" * 300,
            "x" * 301,
        )
    ]
    mixed = [("x,y",), ("x-y",), (None, {"a": "b", "b": 3}), (None, {"a": ["b", "b", 3]}), (None, {"a": "b-b-3"})]
    folders = [folder(*choice) for choice in lists + mixed]
    assert len(set(folders)) == len(folders)
    assert all(re.fullmatch(r"results/[A-Za-z0-9_.-]{1,120}", name) for name in folders), folders
    assert folders[0].startswith("results/demo-c-0-1-") and folders[len(lists)].startswith("results/demo-x-y-")


def test_steps_run_once_and_again_when_their_command_changes(file, tmp_path, capsys):
    settings, steps = experiment.load(file)
    for _ in range(2):
        experiment.run(steps, settings["out"], load_scripts, progress=False)
    out = tmp_path / "out"
    assert (out / "all").read_text() == "0,1,2\n" and (out / "pair-2").read_text() == "2 y 5\n"
    assert all(experiment.is_done(out, step) for step in steps)
    _, steps = experiment.load(file, overrides={"n": 60})
    assert [experiment.is_done(out, step) for step in steps] == [True, False, False, False, True, True, True]
    assert not capsys.readouterr().err
    experiment.run(steps, settings["out"], load_scripts, progress=False)
    assert "Done again, since command, inputs or outputs changed: one-0, one-1, one-2 (" in capsys.readouterr().err
    assert (out / "one-0").read_text() == "0:60\n" and (out / "all").read_text() == "0,1,2\n"
    assert [path.read_text() for path in (out / "replaced").glob("one-0-*/one-0~")] == ["0:50\n"]  # nothing is lost
    marker = json.loads((out / "steps" / "one-0.json").read_text())
    assert marker["argv"] == ["note.py", "--text=0:60", f"--dest={out}/one-0"]
    assert (out / "logs" / "one-0.log").is_file()


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"key": 1}'])
def test_a_damaged_marker_means_not_done(file, tmp_path, damage):
    _, steps = experiment.load(file)
    marker = tmp_path / "out" / "steps" / "all.json"
    marker.parent.mkdir(parents=True)
    marker.write_text(damage)
    assert not experiment.is_done(tmp_path / "out", steps[0])


@pytest.mark.parametrize(
    "how, message", [("fail", "was asked for"), ("break", "broken"), ("code", "ended with code 3")]
)
def test_resuming_after_a_failure(file, tmp_path, how, message):
    settings, steps = experiment.load(file)
    steps[2].argv[1], good = f"--text={how}", steps[2].argv[1]
    with pytest.raises(ValueError, match=f"step one-1.*{message}.*one-1.log"):
        experiment.run(steps, settings["out"], load_scripts, progress=False)
    out = tmp_path / "out"
    assert (out / "one-0").exists() and not (out / "table.md").exists() and not experiment.is_done(out, steps[2])
    steps[2].argv[1] = good
    experiment.run(steps, settings["out"], load_scripts, progress=False)
    assert (out / "one-0").read_text() == "0:50\n" and (out / "table.md").exists()


def test_side_by_side(tmp_path):
    """Several processes; the scripts are the real ones."""
    path = tmp_path / "x.yaml"
    path.write_text(
        "settings: {k: [0, 1]}\nsteps:\n  - name: convert-{k}\n    foreach: {k: k}\n"
        "    run: dataset_tool.py convert --source=sklearn:digits --sources={k} --per-source=4 --dest={out}/{k}.zip\n"
    )
    python("run_experiment.py", path, f"--out={tmp_path}/out", "--jobs=2")
    assert (tmp_path / "out" / "0.zip").exists() and (tmp_path / "out" / "1.zip").exists()


WHO = """import os, pathlib, sys
pathlib.Path(sys.argv[1] + os.environ["RANK"]).write_text(os.environ["WORLD_SIZE"])
print("said by", os.environ["RANK"])
sys.exit(int(sys.argv[2]))
"""


def test_a_step_in_several_processes(tmp_path):
    script = tmp_path / "who.py"
    script.write_text(WHO)
    line = f"torchrun --standalone --nproc_per_node=2 {script} {tmp_path}/rank {{code}}"
    path = tmp_path / "b.yaml"
    path.write_text(f"steps:\n  - {{name: 'who-{{code}}', foreach: {{code: [0, 3]}}, run: '{line}'}}\n")
    settings, (good, bad) = experiment.load(path, overrides={"out": str(tmp_path / "out")})
    assert good.script == str(script)
    assert experiment.execute(settings["out"], good, dict) is None and experiment.is_done(settings["out"], good)
    assert [(tmp_path / f"rank{i}").read_text() for i in range(2)] == ["2", "2"]
    log = (tmp_path / "out/logs/who-0.log").read_text()
    assert log.startswith("torchrun") and "said by 0" in log and "said by 1" in log
    alone = experiment.Step(good.name, good.command, good.stage)  # what is done does not depend on the processes
    assert alone.reads == good.reads and experiment.is_done(settings["out"], alone)
    assert "step who-3 ended with code 1" in experiment.execute(settings["out"], bad, dict)
    assert not experiment.is_done(settings["out"], bad)
    with pytest.raises(ValueError, match="runs nothing; known scripts"):
        experiment.run([experiment.Step("a", ["torchrun", "nothing"], 0)], tmp_path, dict)


def test_command_line(file, tmp_path, monkeypatch):
    monkeypatch.setattr(run_experiment, "load_scripts", load_scripts)
    call = functools.partial(run, run_experiment.main)
    listed = call(file, "--list").stdout.splitlines()
    assert len(listed) == 7 and listed[1].split() == ["1", "todo", "one-0"]
    assert call(file, "--list", "--index=2").stdout.splitlines() == listed[2:3]
    call(file, "--jobs=1", "--index=1")
    call(file, "--jobs=1", "--step=one-2")
    done = [line.split()[1:] for line in call(file, "--list").stdout.splitlines()]
    assert [name for state, name in done if state == "done"] == ["one-0", "one-2"]
    assert "TABLE" in call(file, "--jobs=1").stdout  # prints what `print` names
    call(file, "--jobs=1", f"--out={tmp_path}/elsewhere", "--set", "n=3", "--set", "sources=1,2", "--step=one-2")
    assert (tmp_path / "elsewhere" / "one-2").read_text() == "2:3\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget=huge"], "--budget=huge of .* is unknown; known: default, single, smoke"),
        (["--set", "m=1"], "--set m: .*no such setting, it is unknown; known: n, out"),
        (["--set", "n"], "--set n: give NAME=VALUE"),
        (["--set", "n=[1"], "--set n=.*not readable"),
        (["--step=nothing"], "--step=nothing is no step"),
        (["--list", "--step=nothing"], "--step=nothing is no step"),
        (["--index=7"], "--index=7: .*steps 0 to 6"),
        (["--jobs=0"], "--jobs"),
    ],
)
def test_mistakes_are_one_line(file, arguments, message):
    assert re.search(message, one_line(run_experiment.main, file, *arguments))


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: [", "not a readable experiment file"),
        ("- 1", "is a mapping"),
        ("steps: {}", "is a mapping"),
        ("steps: [{name: a}]", "step 0: a step has a name and a run line"),
        ("steps: [{name: a, run: 'note.py {x}'}]", "step 0: no setting named 'x'"),
        ("steps: [{name: a, run: note.py, foreach: {k: ks}}]", "foreach names the setting 'ks'"),
        ("steps: [{name: a, run: note.py}, {name: a, run: note.py}]", "two steps are called 'a'"),
        ("steps: [{name: a, run: other.py}]", "step a runs other.py; known scripts"),
        ('steps: [{name: a, run: "note.py \'open"}]', "step 0"),
        ("steps: [{name: a, run: ''}]", "step 0"),
        ("steps: [{name: 1, run: 2}]", "step 0"),
        ("settings: [1]\nsteps: []", "settings"),
        ("budgets: [1]\nsteps: []", "budgets"),
        ("steps: [{name: a, run: note.py, foreach: [1]}]", "step 0"),
        ("\x00", "not a readable experiment file"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    line = one_line(run_experiment.main, path, says=message)
    assert "wrong.yaml" in line or message.startswith("step a")


def test_a_summary_is_done_again_whenever_another_step_was(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(
        "settings: {n: 1}\nsteps:\n  - {name: work, run: 'note.py --text={n} --dest={out}/work'}\n"
        "  - {name: sum, summary: true, run: 'note.py --text=SUM --dest={out}/sum'}\n"
    )
    lines = []
    for n in (1, 1, 2):
        settings, steps = experiment.load(path, overrides={"n": n, "out": str(tmp_path / "out")})
        experiment.run(steps, settings["out"], load_scripts, progress=False)
        lines.append(len(list((tmp_path / "out" / "replaced").glob("sum-*"))))
    assert lines == [0, 0, 1]


CHAIN = """
settings: {text: one}
steps:
  - {name: a, run: "copy.py --text={text} --dest={out}/a.txt"}
  - {name: other, run: "copy.py --text=other --dest={out}/other"}
  - {name: b, run: "copy.py --source=kind:{out}/a.txt,more --dest={out}/b"}
  - {name: c, run: "copy.py --source={out}/b*/x --dest={out}/c"}
  - {name: outside, run: "copy.py --source=FILE --dest={out}/outside"}
"""


@click.command()
@click.option("--text", default="")
@click.option("--source")
@click.option("--dest")
def copy(text, source, dest):
    """Writes a file, or a file into a folder."""
    dest = pathlib.Path(dest)
    target = dest if dest.suffix else dest / "x"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + str(source))


def test_what_reads_a_changed_output_is_done_again(tmp_path):
    """A changed setting, a deleted file and a changed input redo exactly what depends on them."""
    path, given, out = tmp_path / "e.yaml", tmp_path / "given", tmp_path / "out"
    given.write_text("first")
    path.write_text(CHAIN.replace("FILE", str(given)))
    done = []

    def ran(**settings):
        _, steps = experiment.load(path, overrides={**settings, "out": str(out)})
        before = {s.name: experiment.is_done(out, s) for s in steps}
        assert {s.name: [n.name for n in s.needs] for s in steps} == dict(a=[], other=[], b=["a"], c=["b"], outside=[])
        times = {s.name: (out / "steps" / f"{s.name}.json").stat().st_mtime_ns for s in steps if before[s.name]}
        experiment.run(steps, out, lambda: {"copy.py": copy}, progress=False)
        assert all(experiment.is_done(out, s) for s in steps)
        after = {s.name: (out / "steps" / f"{s.name}.json").stat().st_mtime_ns for s in steps}
        done.append(after)
        return sorted(name for name in after if after[name] != times.get(name))

    assert ran() == ["a", "b", "c", "other", "outside"] and ran() == []
    assert ran(text="two") == ["a", "b", "c"]
    (out / "b" / "x").unlink()
    assert ran(text="two") == ["b", "c"]
    (out / "other" / "x").write_text("changed by hand")
    assert ran(text="two") == ["other"]
    written = out / "a.txt"
    written.write_text(written.read_text()[::-1])  # of the same size
    assert ran(text="two") == ["a", "b", "c"]
    moved = out.with_name("moved")
    shutil.copytree(out, moved)  # with other times
    shutil.rmtree(out)
    shutil.copytree(moved, out, copy_function=shutil.copy)
    assert ran(text="two") == []
    given.write_text("second, longer")
    assert ran(text="two") == ["outside"]
    assert ran(text="one") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "options",
    ["--no-python /bin/sh -c 'x'", "--module", "-m", "--standalone=/bin/sh", "--run-path", "--nproc_per_node 2"],
)
def test_a_step_starts_scripts_of_the_project_only(tmp_path, options):
    path = tmp_path / "x.yaml"
    path.write_text(f'steps: [{{name: a, run: "torchrun {options} train_edm2.py"}}]\n')
    if "nproc" in options:
        assert experiment.load(path)[1][0].script == "train_edm2.py"
        return
    one_line(run_experiment.main, path, f"--out={tmp_path}/out", says="step a: ")
    assert not (tmp_path / "out").exists()


READING = """
settings: {folder: , pair: "a, b", list: x, found: {classes: "{folder}"}, kept: {other: 1}, out: "%s"}
steps:
  - {name: "all-{f}", foreach: {f: found}, run: 'note.py --text={f}:{pair} --source={folder} --dest={out}/all-{f}'}
  - {name: "list-{l}", foreach: {l: list}, run: "note.py --text={l} --dest={out}/list-{l}"}
"""


def test_settings_that_must_be_given_are_read_as_written_and_may_be_read_from_data(tmp_path):
    path = tmp_path / "reading.yaml"
    path.write_text(READING % (tmp_path / "out"))
    assert experiment.texts(path) == {"folder", "pair", "out"}  # a foreach goes through `list`
    parsed = [run_experiment.parse_setting(f"{name}=007, [1", experiment.texts(path)) for name in ("folder", "pair")]
    assert parsed == [("folder", "007, [1"), ("pair", "007, [1")]
    assert run_experiment.parse_setting("list=1,2", experiment.texts(path)) == ("list", [1, 2])
    for value in (None, ""):
        with pytest.raises(ValueError, match="reading.yaml: folder has no value; give --set folder="):
            experiment.load(path, overrides={"folder": value})
    readers = {"classes": lambda text: [len(text), text[0]]}
    settings, steps = experiment.load(path, None, {"folder": "my, é"}, readers)
    assert settings["found"] == [5, "m"] and settings["kept"] == {"other": 1}
    assert commands(steps) == {"all-5": "--text=5:a, b", "all-m": "--text=m:a, b", "list-x": "--text=x"}
    assert steps[0].argv[2] == "--source=my, é"


@pytest.mark.parametrize("change", ["add", "grow", "remove", "deep", "link"])
def test_a_step_is_done_again_when_the_folder_it_reads_changed(change, tmp_path):
    path, folder = tmp_path / "reading.yaml", tmp_path / "my, é"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.png").write_bytes(b"1")
    (tmp_path / "elsewhere").mkdir()
    for name, target in {"b": tmp_path / "elsewhere", "a/round": folder, "gone": tmp_path / "none"}.items():
        (folder / name).symlink_to(target)
    path.write_text(READING % (tmp_path / "out"))
    load = lambda: experiment.load(path, None, {"folder": str(folder)}, {"classes": lambda text: [0]})[1]
    experiment.run(load(), tmp_path / "out", load_scripts, progress=False)
    assert all(experiment.is_done(tmp_path / "out", step) for step in load())
    if change == "remove":
        (folder / "a" / "1.png").unlink()
    else:
        name = {"add": "2.png", "grow": "a/1.png", "deep": "a/b.png", "link": "b/3.png"}[change]
        (folder / name).write_bytes(b"12")
    assert [experiment.is_done(tmp_path / "out", step) for step in load()] == [False, True]
