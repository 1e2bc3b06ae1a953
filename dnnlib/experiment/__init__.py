"""Experiment files: named settings, budgets that override them, and steps that are command lines of this project's scripts.

    name: quickstart
    settings: {sources: [0, 1, 2], duration: 64Ki}
    budgets: {smoke: {duration: 2Ki}}
    steps:
      - name: train-{source}
        foreach: {source: sources}
        run: train_edm2.py --outdir={out}/runs/{source} --duration={duration}

`{name}` in a step is a setting, `{out}` the folder of the results, `{file}` the experiment file, and `{name,}` a list joined by
commas. `foreach` repeats the step for every combination of the lists it names (or writes out); an entry that is a mapping
sets several names at once, which later names may be lists of. A setting without a value must be given with --set, and
`{classes: "{source}"}` is the list of the classes in a data set (what may stand there besides, and what it reads, the caller
says).
The repetitions of one step are independent of each other and may run side by side; steps follow each other in order.
A run line may start with `torchrun --standalone --nproc_per_node=2`: the step then runs in so many processes.
`summary: true` marks a step that is done again whenever another one was. A step is done when its marker
`<out>/steps/<name>.json` holds the same command line. Interrupting loses the steps in progress only.
"""

from dnnlib.experiment.file import load, read, texts
from dnnlib.experiment.running import default_jobs, execute, run, share
from dnnlib.experiment.steps import Step, arrays, choose, is_done, missing, to_do, with_needs

__all__ = ["Step", "arrays", "choose", "default_jobs", "execute", "is_done", "load", "missing", "read", "run", "share"]
__all__ += ["texts", "to_do", "with_needs"]
