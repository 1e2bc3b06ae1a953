"""README's commands as they are written, in order, in a folder whose name holds spaces, commas and accents; runs made short."""

import re
import shlex

import numpy as np
import PIL.Image
import pytest
from command_rows import ADDED, exists
from small_runs import ROOT, run
from test_commands import command_of

from training.presets import GENERATION_PRESETS, PRESETS

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# What a script that sets up first hands its words to.
EXPERIMENTS = {"quickstart.sh": "experiments/quickstart.yaml", "own_data.sh": "experiments/own-data.yaml"}


def commands(text):
    """Command lines of the shell blocks and of the inline code that begins like one."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`((?:python|bash) [^`]+)`(?!`)", text)]
    words = (shlex.split(line, comments=True) for line in lines)
    return [w for w in words if w and w[0] in ("python", "bash")]


def of_python(words):
    """The python command behind one that sets up first; None for set-up and tests themselves (test_setup.py)."""
    script = words[1].rpartition("/")[2]
    if words[0] == "python" or script not in EXPERIMENTS:
        return words[1:] if words[0] == "python" else None
    rest = words[2:]
    if script == "own_data.sh":
        rest = ["--set", f"source={rest[0]}", *rest[1:]]
    return ["run_experiment.py", EXPERIMENTS[script], *rest]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photos of two sources."""
    folder = tmp_path_factory.mktemp("readme") / "mes photos, été = 1"
    rng = np.random.RandomState(0)
    for k in range(60):
        path = folder / "photos" / ("a cat", "été, dog")[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.randint(0, 256, [70, 80, 3], np.uint8)).save(path)
    return folder


ALL = [made for made in map(of_python, commands(TEXT)) if made]
STEPS = [made for made in ALL if made[0] in ("dataset_tool.py", "train_edm2.py", "generate_images.py")]


def test_the_readme_has_commands():
    assert len(STEPS) >= 4 and len(ALL) >= len(STEPS) + 5


def test_steps_one_by_one(place, monkeypatch):
    """On what the commands before wrote, so in one test."""
    monkeypatch.chdir(place)
    for words in STEPS:
        sub = [] if words[1].startswith("-") else [words[1]]
        added = ADDED.get((words[0], "".join(sub)), [])
        own = words[1 + len(sub) :]
        done = run(command_of(words[0]), *sub, *own, *(word for word in added if not word.startswith("--seeds")))
        if sub == ["inspect"]:
            assert re.search(r"train_edm2.py --sigma-data=0\.\d+ --preset=small64 --P_mean=-?\d\.\d+\n", done.stdout)
        for word in own:
            if re.match("--(dest|outdir)=", word):
                assert exists(place / word.partition("=")[2]), words


@pytest.mark.parametrize("words", [w for w in ALL if w[0] == "run_experiment.py"], ids=" ".join)
def test_experiments_have_steps(words, place, monkeypatch):
    monkeypatch.chdir(place)
    listed = run(command_of(words[0]), *words[1:], "--list").stdout
    assert len(re.findall(r"^ *\d+ todo \S+$", listed, re.M)) > 10


@pytest.mark.parametrize("words", [w for w in ALL if w not in STEPS and w[0] != "run_experiment.py"], ids=" ".join)
def test_others_know_their_options(words):
    """What takes longer, or has a test of its own: parsed as written."""
    command = command_of(words[0])
    for word in words[1:]:
        if word.startswith("--"):
            assert any(word.partition("=")[0] in param.opts for param in command.params), word


def used_x():
    """Command lines of the last column of "If you used X", and those that stay the same."""
    table = TEXT[TEXT.index("## If you used X") :].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    cells = [typed if "the same" in ours else ours for _, typed, ours in rows]
    return [shlex.split(code) for cell in cells for code in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("words", used_x(), ids=" ".join)
def test_what_users_of_others_type(words):
    """Its options are options here, its presets are rows."""
    if words[0].startswith("bash_files/"):
        assert (ROOT / words[0]).is_file()
        return
    test_others_know_their_options(words)
    known = PRESETS if words[0] == "train_edm2.py" else GENERATION_PRESETS
    assert [word.partition("=")[2] in known for word in words if word.startswith("--preset=")] == [True]


def test_folder_names_are_taken_as_they_are(place, monkeypatch, digits):
    """In lists, patterns and KIND:FILE, where a comma, a bracket or a colon has a meaning of its own."""
    monkeypatch.chdir(place)
    for name in ("a,b", "c d", "é[1]", "x=y"):
        place.joinpath(name).mkdir()
        metrics = command_of("calculate_metrics.py")
        detector = f"{name}/detector.safetensors"
        run(metrics, "detector", f"--data={digits}", f"--dest={detector}", "--epochs=1", "--device=cpu")
        both = [f"--metrics=pixel,classifier:{detector}", "--device=cpu", "--distances=fd"]
        run(metrics, "ref", f"--data={digits}", f"--dest={name}/ref.npz", *both[:-1])
        for arm in ("multi", "single"):
            score = [f"--images={digits}", f"--ref={name}/ref.npz", f"--dest={name}/{arm}.json", f"--tag=arm={arm}"]
            run(metrics, "calc", *score, "--tag=checkpoint=1", *both)
        best = ["best", f"--scores={name}/*.json", "--detector=pixel"]
        assert '"blocks": 2' in run(metrics, *best).stdout  # both files
