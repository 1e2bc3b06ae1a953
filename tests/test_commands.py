"""docs/commands.md: every command of ours runs, small, and no documented command of the published systems lacks a row."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from command_rows import NOT_RUN, World, printed_by, run_row
from small_runs import run
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "commands.md"


def rows():
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and cells[0] not in ("theirs", "---"):
            yield cells


def our_commands():
    """Commands in backticks in the columns `ours` and `note`."""
    for _, ours, note in rows():
        for text in re.findall(r"`([^`]+)`", ours + " " + note):
            if re.match(r"(python|torchrun|bash) \S", text):
                yield text


def command_of(script):
    """The click command of a script, by its path from the root."""
    import importlib

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return next(
        value
        for name in ("main", "cmdline", "cli", "run")
        if isinstance(value := getattr(module, name, None), click.Command)
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_vae):
    return World(tmp_path_factory.mktemp("world"), tiny_vae[0])


@pytest.mark.parametrize("text", [text for text in sorted(set(our_commands())) if not text.startswith(tuple(NOT_RUN))])
def test_our_command_runs(text, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(text)
    if words[0] != "bash":
        return run_one(words, world)
    done = set()
    for line in printed_by([word for word in words if word != "--dry-run"]):
        kind = tuple(re.sub(r"[\d.]+", "0", word) for word in line)  # the same with another number
        if kind not in done:
            done.add(kind)
            run_one(line, world)


def run_one(words, world):
    """A python command line, or one of torchrun as plain python."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[0] == "torchrun":  # it looks at all words, and refuses what could be an abbreviation of its options
        assert get_args_parser().parse_args(words[1:]).training_script == words[at]
    run_row(words[at], command_of(words[at]), words[at + 1 :], world)


@pytest.mark.parametrize("start", NOT_RUN)
def test_rows_that_are_not_run_parse(start):
    found = [text for text in our_commands() if text.startswith(start)]
    assert found, "no such row any more"
    for words in map(shlex.split, found):
        if words[0] == "bash":
            assert subprocess.run(["bash", "-n", str(ROOT / words[1])]).returncode == 0
        else:
            run(command_of(words[1]), *words[2:], "--help")


# What the published READMEs tell their users to type.
SEEDS = {
    "multi-source": """
        pip install; run_gaussian.py --tag=K; run_gaussian.py --tag=n; run_gaussian.py --tag=sim; plot_gaussian_K.py;
        plot_gaussian_n.py; plot_gaussian_sim.py; dataset_tool.py convert; dataset_tool.py encode; calculate_metrics.py ref;
        convert_1c.sh sim3; train_edm2.py; --preset; --batch; --status; --snapshot; --checkpoint
    """,
    "pfgmpp": """
        train.py --outdir; --pfgmpp; --aug_dim; --name; --arch; --batch-gpu; --dump; --resume; generate.py; --seeds=50000-99999;
        generate_alpha; generate_steps; generate_quant; fid.py calc; fid.py ref; cifar-10-python.tar.gz; images1024x1024;
        afhqv2; imagenet
    """,
    "ajest": """
        install.sh; dirs; jointly_sample_batch; random_baseline; REQUIRES_REF_LOSS; toy_example.py plot;
        toy_example.py train;
        --dim 32; --total-iter 512; --acid; --guide-path; --selection; toy_example.py test; --ema-path; external; mandala;
        edm2-img512-s-autog-dino; edm2-tiny-xxs; edm2-tiny-xs; --early; Swin-L; ref --dataset tiny
    """,
    "mdm": """
        train.py; grid.py; --config_path; --debug_mode; --offline; --index; pip install; seed; wandb_project; wandb_entity;
        save_dir; data_dir; resume_checkpoint; checkpoint_path; dataset; is_image; in_channels; out_channels; height; width;
        elbo_mc_samples_eval; elbo_offset_train; elbo_mc_samples_train; elbo_offset_eval; hutch_mc; sde_type; n_vars;
        stationary_aux_var; stationary_x_var; init_aux_var; beta_0; beta_1; beta_fn_type; score_parameterization;
        score_model_type; dropout; transform; batch_size; test_batch_size; accumulate_grad_batches; n_epochs; lr;
        lr_scheduling; lr_sched_max_iters; grad_clip_val; optim_type; warmup_iters; weight_decay; use_ema; ema_decay;
        val_loss_type; train_loss_type; imp_weight_train; switch_epoch; val_fid_epoch; fid_n_samples;
        hybrid_transition_kernel; T_max; T_min_sampling; T_min_eval; T_min_train; log_image_step; log_image_size; n_FEs;
        sampling_method; sampling_t_arr_fn
    """,
    "cld": """
        convert_tfrecord_to_lmdb.py; main.py; -cc; -sc; --root; --mode; --workdir; --n_gpus_per_node; --training_batch_size;
        --testing_batch_size; --sampling_batch_size; --snapshot_freq; --snapshot_threshold; --node_rank; --n_nodes;
        --master_address; --cont_nbr; --checkpoint; --eval_folder; --ckpt_file; --eval_likelihood; --eval_fid;
        --data_location; --dataset; multimodal_swissroll; tensorboard
    """,
}


@pytest.mark.parametrize(
    "needle", [(system, text.strip()) for system, texts in SEEDS.items() for text in texts.split(";")], ids="-".join
)
def test_every_documented_command_has_a_row(needle):
    system, text = needle
    assert any(text in theirs for theirs, _, _ in rows()), f"{system}: no row for {text}"
