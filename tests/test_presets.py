"""Every published configuration, typed here a second time from the publications."""

import json
import re

import pytest
from small_runs import one_line, run

import train_edm2
from dnnlib.util import parse_nimg
from training import presets
from training.config import make_config
from training.setup import build_process

MI = 2**20

# EDM2 (arXiv 2312.02696) table 6 and its released trainer: duration, channels, lr, decay, dropout, P_mean, P_std.
EDM2 = """
edm2-img512-xxs  2048  64   0.0170  70000  0.00  -0.4  1.0
edm2-img512-xs   2048  128  0.0120  70000  0.00  -0.4  1.0
edm2-img512-s    2048  192  0.0100  70000  0.00  -0.4  1.0
edm2-img512-m    2048  256  0.0090  70000  0.10  -0.4  1.0
edm2-img512-l    1792  320  0.0080  70000  0.10  -0.4  1.0
edm2-img512-xl   1280  384  0.0070  70000  0.10  -0.4  1.0
edm2-img512-xxl  896   448  0.0065  70000  0.10  -0.4  1.0
edm2-img64-xs    1024  128  0.0120  35000  0.00  -0.8  1.6
edm2-img64-s     1024  192  0.0100  35000  0.00  -0.8  1.6
edm2-img64-m     2048  256  0.0090  35000  0.10  -0.8  1.6
edm2-img64-l     1024  320  0.0080  35000  0.10  -0.8  1.6
edm2-img64-xl    640   384  0.0070  35000  0.10  -0.8  1.6
"""

# Wang et al., ICML 2025, published code: images, lr, decay in batches.
MULTI_SOURCE = """
1c-100        50331648    0.0040  4000
1c-500        134217728   0.0040  2000
1c-1000       184549376   0.0050  2500
3c-100        67108864    0.0020  2000
3c-500        67108864    0.0020  2500
3c-1000       67108864    0.0020  2500
5c-100        67108864    0.0040  4000
5c-500        134217728   0.0060  4000
5c-1000       100663296   0.0060  4000
10c-100       67108864    0.0030  3000
10c-500       100663296   0.0030  3000
10c-1000      402653184   0.0060  3000
10c-1000-nlr  1610612736  0.0040  6000
"""
# The same paper, table 2: kimg, lr, decay; the digest's §3.1.
TABLE_2 = """
table2-1c   184549   0.005  2500
table2-3c   268435   0.006  4000
table2-10c  1610612  0.012  6000
"""

# Pais et al. 2025 (arXiv 2509.15267): images, channels, lr, decay, ramp-up in million images.
SELECTION = """
edm2-cifar10-xxs  83808256   64   0.0170  2731  0.389120
edm2-tiny-xxs     167618560  64   0.0170  5463  0.780288
edm2-tiny-xs      167618560  128  0.0120  5463  0.780288
"""


def rows(table):
    return [(name, *map(float, values)) for name, *values in (line.split() for line in table.strip().splitlines())]


@pytest.mark.parametrize("row", rows(EDM2), ids=lambda row: row[0])
def test_edm2(row):
    name, duration, channels, lr, decay, dropout, p_mean, p_std = row
    config = make_config(name)
    assert config.total_nimg == duration * MI and config.batch_size == 2048
    assert (config.channels, config.lr, config.decay) == (channels, lr, decay)
    assert (config.dropout, config.P_mean, config.P_std) == (dropout, p_mean, p_std)
    common = dict(
        arch="edm2", loss="edm2", process="edm", optimizer="adam", betas=[0.9, 0.99], weight_decay=0, rampup=10,
        lr_schedule="edm2", ema="power", ema_std=[0.05, 0.1], sigma_data=0.5, fp16=True, loss_scaling=1, seed=0,
        status_nimg=128 << 10, snapshot_nimg=8 << 20, checkpoint_nimg=128 << 20, augment=0, select="none",
        channel_mult=None, num_blocks=None, attn_resolutions=None, grad_clip=None, label_dropout=0,
    )  # fmt: skip
    assert {key: getattr(config, key) for key in common} == common


@pytest.mark.parametrize("row", rows(MULTI_SOURCE), ids=lambda row: row[0])
def test_multi_source(row):
    name, duration, lr, decay = row
    config = make_config(f"edm2-img256-xs-{name}")
    assert (config.total_nimg, config.lr, config.decay) == (duration, lr, decay)
    assert (config.batch_size, config.channels, config.dropout, config.P_mean, config.P_std) == (
        2048,
        128,
        0,
        -0.4,
        1.0,
    )
    assert config.lr_schedule == "edm2-halved"  # the published code halves the rate at the start of the decay


@pytest.mark.parametrize("row", rows(TABLE_2), ids=lambda row: row[0])
def test_multi_source_as_in_the_paper(row):
    name, kimg, lr, decay = row
    config = make_config(f"edm2-img256-xs-{name}")
    assert (config.total_nimg // 1000, config.lr, config.decay, config.channels) == (kimg, lr, decay, 128)
    assert config.total_nimg % 8192 == 0  # the batch of the published scripts
    assert config.lr_schedule == "edm2-halved"


@pytest.mark.parametrize("row", rows(SELECTION), ids=lambda row: row[0])
def test_selection(row):
    name, duration, channels, lr, decay, rampup = row
    config = make_config(name)
    assert (config.total_nimg, config.channels, config.lr, config.decay) == (duration, channels, lr, decay)
    assert (config.rampup, config.batch_size, config.dropout) == (rampup, 2048, 0)
    images = 50_000 if "cifar" in name else 100_000
    for value, full in (
        (config.total_nimg, 2048 * MI),
        (config.rampup * 1e6, 10e6),
        (config.decay * 2048, 70000 * 2048),
    ):
        assert abs(value - full * images / 1281167) <= 2048  # scaled by the number of images, to whole batches


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp"])
@pytest.mark.parametrize("system", ["edm", "pfgmpp"])
@pytest.mark.parametrize("labels", ["", "-cond"])
def test_cifar10(system, arch, labels):
    """EDM (arXiv 2206.00364) table 7, CIFAR-10; PFGM++ (arXiv 2302.04265) changes the kernel only."""
    config = make_config(f"{system}-cifar10-{arch}{labels}")
    wanted = dict(
        arch=arch, precond="edm", loss="edm", channel_mult=[2, 2, 2], channels=128, total_nimg=200_000_000, batch_size=512,
        lr=1e-3, dropout=0.13, augment=0.12, P_mean=-1.2, P_std=1.2, rampup=10, ema="halflife", ema_halflife=0.5,
        ema_rampup=0.05, betas=[0.9, 0.999], cond=bool(labels), lr_schedule="constant", optimizer="adam",
    )  # fmt: skip
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert (config.process, config.aug_dim) == (("pfgmpp", 2048.0) if system == "pfgmpp" else ("edm", None))


@pytest.mark.parametrize("system, D", [("edm", None), ("pfgmpp", 128.0)])
def test_ffhq(system, D):
    config = make_config(f"{system}-ffhq64-ddpmpp")
    assert (config.channel_mult, config.lr, config.batch_size) == ([1, 2, 2, 2], 2e-4, 256)
    assert (config.dropout, config.augment, config.cond, config.aug_dim) == (0.05, 0.15, False, D)


# CLD's configurations (arXiv 2112.07068; digest §15): blocks, cov_eps, lr, weight decay, iterations, batch of 16 GPUs, beta0,
# its slope, t_min.
CLD = """
cld-cifar10                8  1e-9  2e-4  0     800000  128  4    0    1e-5
cld-celebahq256-paper      2  1e-6  1e-4  0     320000  64   4    0    1e-5
cld-celebahq256-postpaper  4  1e-6  1e-4  0.01  600000  64   0.1  6.9  1e-3
"""


@pytest.mark.parametrize("row", rows(CLD), ids=lambda row: row[0])
def test_cld(row):
    name, blocks, cov_eps, lr, weight_decay, iterations, batch, beta0, slope, t_min = row
    config, cifar = make_config(name), "cifar" in name
    assert (config.num_blocks, config.cov_eps, config.lr, config.t_min) == (blocks, cov_eps, lr, t_min)
    assert (config.total_nimg, config.batch_size, config.rampup) == (iterations * batch, batch, 0.1 * batch)  # 100000
    assert config.process_options == dict(m_inv=4, gamma=0.04, beta0=beta0, beta1=slope)
    assert (config.weight_decay, config.optimizer) == (weight_decay, "adamw" if weight_decay else "adam")
    assert config.channel_mult == ([1, 2, 2, 2] if cifar else [1, 1, 2, 2, 2, 2, 2])
    plain = dict(embedding_type="positional", encoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1])
    assert config.net_options == ({} if cifar else plain)  # CIFAR-10: Fourier codes, residual input, FIR
    common = dict(
        parameterization="joint", process="cld", prediction="mixed", predict="noised", transition="hybrid", loss="joint",
        objective="noise", weighting="reweightedv2", time_sampling=None, arch="ncsnpp", channels=128, attn_resolutions=[16],
        dropout=0.1, ema="decay", ema_decay=0.9999, grad_clip=1.0, betas=[0.9, 0.999], lr_schedule="constant", cond=False,
        xflip=True, encoder="rgb", elbo_samples=None, switch_at=None,
    )  # fmt: skip
    assert {key: getattr(config, key) for key in common} == common


@pytest.mark.parametrize("data", ["cifar10", "mnist", "imagenet32"])
@pytest.mark.parametrize("kind", ["vp", "cld", "alda", "malda", "learned2", "learned3"])
def test_mdm(data, kind):
    """Its YAML files (arXiv 2302.07261; digest §14) differ in nothing but these; HoUNet for MNIST, too, see §13."""
    config, mnist = make_config(f"mdm-{data}-{kind}"), data == "mnist"
    name, variables = kind.rstrip("23"), {"malda": 3, "learned2": 2, "learned3": 3}.get(kind)
    assert (config.process, config.process_options) == (name, {"V": variables} if variables else {})
    made = build_process(config)
    assert {"vp": 1, "cld": 2, "alda": 3}.get(kind, variables) == made.V
    assert made.beta_range == (0.1, 10) and made.init_aux_var == 0.01 and made.S.diagonal().tolist() == [1.0] * made.V
    assert kind[:7] != "learned" or not made.full
    assert (config.channels, config.channel_mult) == ((32, [1, 2, 2]) if mnist else (128, [1, 2, 2, 2]))
    assert config.total_nimg == 300 * 60000 if mnist else 0 <= config.total_nimg - 300 * 50000 < 128
    assert config.xflip == (data == "cifar10")
    common = dict(
        parameterization="joint", prediction="noise", predict="all", transition="hybrid", loss="joint", objective="elbo",
        cov_eps=None, time_sampling=None, t_min=1e-3, elbo_samples=None, switch_at=None, arch="hounet", num_blocks=2,
        attn_resolutions=[16], dropout=0, batch_size=128, lr=2e-4, optimizer="adam", weight_decay=0, betas=[0.9, 0.999],
        lr_schedule="constant", rampup=0, grad_clip=2.0, ema="none", encoder="logit", process_lr_scale=1.0, cond=False,
    )  # fmt: skip
    assert {key: getattr(config, key) for key in common} == common


def test_no_row_is_missing_and_all_are_plain_data():
    names = {row[0] for row in rows(EDM2) + rows(SELECTION)} | {
        f"edm2-img256-xs-{row[0]}" for row in rows(MULTI_SOURCE) + rows(TABLE_2)
    }
    assert names <= set(presets.PRESETS)
    for name in presets.PRESETS:
        row = presets.get(name)
        assert json.loads(json.dumps(row)) == row
        make_config(name)  # passes its own checks


def test_get_copies_and_names_the_known():
    presets.get("digits8")["lr"] = 7
    assert presets.get("digits8")["lr"] != 7
    with pytest.raises(ValueError, match=r"edm2-img999.*did you mean edm2-img\d+-\w+ or .*--list-presets"):
        presets.get("edm2-img999")


def test_explicit_options_win():
    assert make_config("edm2-img512-xs", lr=0.5, batch_size=1024).lr == 0.5
    assert make_config("edm2-img512-xs", lr=None).lr == 0.012
    with pytest.raises(ValueError, match="unknown training options.*learning"):
        make_config("digits8", learning=1)


def test_whoever_names_none_is_asked(tmp_path):
    """With the list; --list-presets needs no other option, and shows every row with its size and source."""
    line = one_line(train_edm2.main, f"--outdir={tmp_path}/run", f"--data={tmp_path}/x.zip", says="--list-presets")
    assert all(word in line for word in ("small32", "edm2-img512-{xxs,", "edm2-img256-xs-table2-{1c,3c,10c}"))
    assert len(line) < 1500 and not (tmp_path / "run").exists()
    shown = run(train_edm2.main, "--list-presets").stdout
    for name, row in presets.PRESETS.items():
        found = re.search(rf"^  {re.escape(name)} .*", shown, re.M)[0].split()
        assert parse_nimg(found[1]) == row["total_nimg"] and float(found[-1]) == row["lr"]
    titles = [line for line in shown.splitlines() if line and line[0] != " "]
    assert sum("table 2 of the paper" in title for title in titles) == sum("published code" in t for t in titles) == 1
