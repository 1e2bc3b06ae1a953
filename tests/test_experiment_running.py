"""Parts of experiments: what steps need, GPUs of their own, job arrays, stops by a signal, SLURM under stubs."""

import functools
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import noting_scripts
import pytest
from script_runs import bash
from small_runs import ROOT, one_line, run, small_command

import run_experiment
from dnnlib import experiment, launch

CHAIN = """
settings: {ks: [0, 1, 2], out: OUT}
steps:
  - {name: a, run: "note.py --dest={out}/a.txt"}
  - {name: "b-{k}", foreach: {k: ks}, run: "note.py --text={k} --source={out}/a.txt --dest={out}/b/{k}"}
  - {name: other, run: "note.py --dest={out}/other"}
  - {name: "c-{k}", foreach: {k: ks}, run: "note.py --source={out}/b/{k} --dest={out}/c-{k}"}
  - {name: sum, summary: true, run: "note.py --source={out}/c-* --dest={out}/sum"}
"""


@pytest.fixture
def chain(tmp_path, monkeypatch):
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN.replace("OUT", str(tmp_path / "out")))
    monkeypatch.setattr(run_experiment, "load_scripts", noting_scripts.load)
    monkeypatch.setattr(run_experiment, "visible_gpus", list)
    return functools.partial(run, run_experiment.main, path), path, tmp_path / "out"


def done(out):
    return sorted(p.stem for p in (out / "steps").glob("*.json"))


def test_a_step_says_what_it_needs_or_does_it(chain):
    call, path, out = chain
    needs = "c-1: not done yet, but needed: a, b-1; first do these, or add --with-needs"
    one_line(run_experiment.main, path, "--step=c-1", says=needs)
    one_line(run_experiment.main, path, "--index=6", says=needs)
    one_line(
        run_experiment.main, path, "--step=c-*", says="3 steps: not done yet, but needed: a, b-0, b-1, b-2; first do"
    )
    one_line(run_experiment.main, path, "--step=sum", says="a, b-0, b-1, b-2, c-0 and 2 more")
    assert not out.exists()
    call("--step=c-1", "--with-needs", "--jobs=1")
    assert done(out) == ["a", "b-1", "c-1"]
    call("--index=1,3", "--jobs=1")
    call("--step=c-[02]", "--jobs=1")
    assert done(out) == ["a", "b-0", "b-1", "b-2", "c-0", "c-1", "c-2"]
    (out / "c-2").unlink()
    one_line(run_experiment.main, path, "--step=sum", says="sum: not done yet, but needed: c-2")
    call("--step=b-*", "--step=other", "--step=c-*", "--jobs=1")
    call("--step=sum", "--jobs=1")
    assert "sum" in done(out)
    one_line(run_experiment.main, path, "--step=d-*", says="--step=d-* is no step")


def test_job_arrays_wait_for_those_that_they_need(chain):
    call, _, out = chain
    arrays = lambda *words: [line.split() for line in call("--arrays", *words).stdout.splitlines()]
    everything = [["0", "0", "-"], ["1", "0-2", "0"], ["4", "0", "-"], ["5", "0-2", "1"], ["8", "0", "0,1,2,3"]]
    assert arrays() == everything
    linked = [*everything[:2], everything[3], ["8", "0", "0,1,2"]]  # by what it reads: `other` is no part of that
    assert arrays("--step=sum", "--with-needs") == linked
    call("--step=c-1", "--with-needs", "--jobs=1")
    assert arrays("--step=c-*", "--with-needs") == [["1", "0,2", "-"], ["5", "0,2", "0"]]
    call("--jobs=1")
    assert arrays() == []


def test_gpus_are_shared_out():
    four = ["4", "5", "6", "7"]
    assert [experiment.share(four, 2, i) for i in range(2)] == [["4", "6"], ["5", "7"]]
    assert [experiment.share(four, 6, i) for i in range(6)] == [[g] for g in [*four, "4", "5"]]
    assert experiment.share(four, 1, 0) == four and experiment.share([], 3, 1) == []
    step = lambda words: experiment.Step("s", [*shlex.split(words), "train_edm2.py"], 0)
    assert step("").processes(4) == 1 and step("torchrun --standalone --nproc_per_node=2").processes(4) == 2
    assert step("torchrun --nproc-per-node gpu").processes(4) == 4
    assert experiment.default_jobs([step("")], four) == 4
    two = step("torchrun --nproc_per_node=2")
    assert experiment.default_jobs([step(""), two], four) == 2 and experiment.default_jobs([two], ["0"]) == 1


def test_visible_gpus(monkeypatch):
    for text, expected in {"2,GPU-x": ["2", "GPU-x"], "": [], "-1": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert run_experiment.visible_gpus() == expected


def test_every_step_sees_a_gpu_of_its_own(tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    line = "note.py --dest={out}/{k} --beside={out}/{other}"
    pairs = "[{k: 0, other: 1}, {k: 1, other: 0}]"
    path.write_text(f"steps: [{{name: 'b-{{k}}', foreach: {{pair: {pairs}}}, run: '{line}'}}]")
    settings, steps = experiment.load(path, overrides={"out": str(tmp_path / "out")})
    experiment.run(steps, settings["out"], noting_scripts.load, 2, False, ["4", "7"])
    assert {(tmp_path / "out" / str(k)).read_text().split()[0] for k in range(2)} == {"4", "7"}
    many = experiment.Step("big", ["torchrun", "--standalone", "--nproc_per_node=2", "note.py", "--dest=x"], 0)
    with pytest.raises(ValueError, match="--jobs=2: step big starts 2 processes on 1 of 2 GPUs"):
        experiment.run([many], tmp_path / "new", noting_scripts.load, 2, False, ["4", "7"])


@pytest.mark.parametrize(
    "jobs, deaf, number", [(1, "", "SIGTERM"), (2, "", "SIGUSR1"), (1, "--deaf", "SIGUSR1"), (2, "--deaf", "SIGTERM")]
)
def test_stopped_by_a_signal_and_gone_on(tmp_path, jobs, deaf, number):
    """A listening step ends as it wants, a deaf one at once; the code is 75, what follows has not begun."""
    path, out = tmp_path / "x.yaml", tmp_path / "out"
    line = "{name: 'w-{k}', foreach: {k: [0, 1]}, run: 'wait.py --dest={out}/w-{k} DEAF'}".replace("DEAF", deaf)
    path.write_text(f"steps:\n  - {line}\n  - {{name: last, run: 'note.py --dest={{out}}/last'}}\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, ROOT / "tests" / "noting_scripts.py", path, out, str(jobs)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for k in range(jobs):
        wait_for(out / f"w-{k}-begun")
    process.send_signal(getattr(signal, number))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "Stopped: step w-" in error and "Traceback" not in error, error
    assert not (out / "last").exists() and done(out) == []
    if jobs == 1:
        (out / "w-1-begun").touch()
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert done(out) == ["last", "w-0", "w-1"]


def wait_for(path, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"no {path}"
        time.sleep(0.05)


def test_launcher_hands_on_the_code_of_its_workers(monkeypatch):
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def ends_with(error):
        def raises(argv):
            assert argv[-1] == "x.py" and any(word.startswith("--shutdown-timeout=") for word in argv)
            raise error

        monkeypatch.setattr(torchrun, "main", raises)
        return pytest.raises((SystemExit, ChildFailedError))

    failed = lambda code: ChildFailedError("x", {0: ProcessFailure(0, 1, code, "/none")})
    for error, code in ((failed(75), 75), (SignalException("", signal.SIGTERM), 75), (failed(1), None)):
        with ends_with(error) as caught:
            launch.main(["x.py"])
        assert getattr(caught.value, "code", None) == code


WORKER = """import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1] + os.environ["RANK"]).write_text(os.environ["WORLD_SIZE"])
time.sleep(float(sys.argv[2]))
"""


def test_launcher_waits_for_workers_that_it_stops(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "dnnlib.launch", "--standalone", "--nproc_per_node=2", tmp_path / "worker.py"]
    process = subprocess.Popen([*command, f"{tmp_path}/rank", "60"], cwd=ROOT, stderr=subprocess.PIPE)
    for rank in range(2):
        wait_for(tmp_path / f"rank{rank}")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.slow
def test_two_nodes_meet(tmp_path):
    """torchrun twice, as srun starts it on two nodes, through c10d on this machine."""
    (tmp_path / "worker.py").write_text(WORKER)
    words = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_id=7",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:29731",
    ]
    command = [sys.executable, "-m", "dnnlib.launch", *words, tmp_path / "worker.py", f"{tmp_path}/rank", "0"]
    for process in [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]:
        assert process.wait(timeout=120) == 0
    assert [(tmp_path / f"rank{r}").read_text() for r in range(2)] == ["2", "2"]


# --- SLURM ------------------------------------------------------------------------------------------------------------

# sbatch runs its job at once, every task of an array in turn, again while it asks to be requeued; STRIKE: a file at whose
# appearance the batch script gets the signal that its #SBATCH line asks for, once.
SBATCH = """#!{python} -IS
import os, re, signal, subprocess, sys, time
options, words = [], sys.argv[1:]
while words[0].startswith("-"):
    options.append(words.pop(0))
given = dict(word[2:].partition("=")[::2] for word in options)
state = os.environ["STUB"]
number = len(open(state).readlines()) + 100 if os.path.exists(state) else 100
with open(state, "a") as log:
    print(" ".join(options), file=log)
wanted = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", open(words[0]).read(), re.M))
assert "requeue" in wanted and wanted["signal"].startswith("B:USR1@")
tasks = [n for part in re.sub("%.*", "", given.get("array", "0")).split(",")
         for n in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)]
for task in tasks:
    job = str(number * 1000 + task)
    env = dict(os.environ, SLURM_JOB_ID=job, SLURM_ARRAY_TASK_ID=str(task), SLURM_SUBMIT_DIR=os.getcwd(),
               SLURM_NNODES=given.get("nodes", "1"), SLURM_JOB_NODELIST="node[1-2]",
               SLURM_GPUS_ON_NODE=given.get("gpus-per-node", "1"))
    for attempt in range(5):
        process = subprocess.Popen(["bash", *words], env=env, stdout=sys.stderr)
        strike = os.environ.get("STRIKE")
        while strike and attempt == 0 and process.poll() is None:
            if os.path.exists(strike):
                process.send_signal(signal.SIGUSR1)
                break
            time.sleep(0.05)
        code = process.wait()
        if not os.path.exists(state + job):
            break
        os.remove(state + job)
        with open(state + "-requeued", "a") as log:
            print(code, file=log)
    if code:
        sys.exit(code)
print(number)
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then touch "$STUB$2"; else echo node1; echo node2; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """(folder of stubs, file with a line of options per submission)."""
    stubs = {
        "sbatch": SBATCH.replace("{python}", sys.executable),
        "scontrol": SCONTROL,
        "srun": '#!/bin/bash\\nwhile [[ "$1" == --* ]]; do shift; done\\nexec "$@"\\n'.replace("\\n", "\n"),
    }
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in stubs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder, tmp_path / "submitted"


def test_slurm_runs_an_experiment_as_arrays(slurm, tmp_path):
    stubs, submitted = slurm
    path = tmp_path / "x.yaml"
    path.write_text(
        f"settings: {{ks: [0, 1], out: {tmp_path}/out}}\nsteps:\n"
        "  - {name: all, run: 'dataset_tool.py convert --source=sklearn:digits --dest={out}/all.zip'}\n"
        "  - {name: 'part-{k}', foreach: {k: ks}, run: 'dataset_tool.py convert --source={out}/all.zip --sources={k}"
        " --dest={out}/{k}.zip'}\n"
    )
    words = [path, "--", "--time=9", "--gpus=1"]
    printed = bash("slurm/experiment.sh", *words, path=stubs, STUB=submitted, LIMIT=3)
    first, second = submitted.read_text().splitlines()
    assert first == "--parsable --array=0%3 --export=ALL --time=9 --gpus=1"
    assert second.startswith("--parsable --array=0-1%3 --export=ALL --dependency=afterok:100 --kill-on-invalid-dep=yes")
    assert "101: steps 1 + 0-1, after 100" in printed
    assert done(tmp_path / "out") == ["all", "part-0", "part-1"]
    bash("slurm/experiment.sh", *words, path=stubs, STUB=submitted)
    assert len(submitted.read_text().splitlines()) == 2, "submitted again what is done"


def real_python(folder):
    (folder / "python").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / "python").chmod((folder / "python").stat().st_mode | stat.S_IXUSR)


def submit(stubs, submitted, *words, code=0, **environment):
    given = {**os.environ, "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}", "STUB": str(submitted), **environment}
    result = subprocess.run(
        ["sbatch", *map(str, words)], cwd=ROOT, env=given, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == code, result.stderr
    return result


def test_a_preempted_training_is_requeued_and_finishes(slurm, digits, tmp_path):
    """As a task of an array: the signal reaches the training, which writes a checkpoint; the second attempt goes on from it."""
    stubs, submitted = slurm
    real_python(stubs)
    path, run_dir = tmp_path / "x.yaml", tmp_path / "out" / "run"
    line = " ".join(
        small_command(
            digits, run_dir, "--batch=32", "--duration=4Ki", "--status=1Ki", "--snapshot=4Ki", "--checkpoint=0"
        )
    )
    path.write_text(f"settings: {{out: {tmp_path}/out}}\nsteps: [{{name: train, run: 'train_edm2.py {line}'}}]\n")
    words = ["--array=0", "bash_files/slurm/step.sh", path]
    submit(stubs, submitted, *words, STRIKE=str(run_dir / "stats.jsonl"), FIRST="0")
    assert Path(f"{submitted}-requeued").read_text() == "75\n"
    log = (run_dir / "log.txt").read_text()
    assert log.count("Stopped by a signal") == 1 and log.count("Resuming from") == 1 and "Done." in log
    times = [json.loads(text)["Progress/kimg"] for text in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert times == sorted(times) and times[-1] == pytest.approx(4.096) and done(tmp_path / "out") == ["train"]


def test_many_nodes_are_launched_and_requeued(slurm, tmp_path):
    """What a node is told, with a stand-in for python that is stopped once."""
    stubs, submitted = slurm
    said = tmp_path / "said"
    (stubs / "python").write_text(
        f'#!/bin/bash\necho "$@" >> {said}\nif [ "$(wc -l < {said})" = 1 ]; then exit 75; fi\n'
    )
    (stubs / "python").chmod(0o755)
    submit(stubs, submitted, "--nodes=2", "--gpus-per-node=4", "bash_files/slurm/train.sh", "--outdir=r", "--preset=x")
    first, second = said.read_text().splitlines()
    assert first == second and Path(f"{submitted}-requeued").read_text() == "75\n"
    assert first.startswith("-m dnnlib.launch --nnodes=2 --nproc_per_node=4 --rdzv_id=100000 --rdzv_backend=c10d")
    assert first.endswith("--rdzv_endpoint=node1:20000 train_edm2.py --outdir=r --preset=x")
    (stubs / "python").write_text("#!/bin/bash\nexit 3\n")
    submit(stubs, submitted, "bash_files/slurm/train.sh", "--outdir=r", code=3)
    assert Path(f"{submitted}-requeued").read_text() == "75\n", "a failure went back into the queue"
