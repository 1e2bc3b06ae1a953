"""Data and networks that several test files share; all tiny, all on the CPU."""

import socket

import pytest
import torch
from small_runs import run

import dataset_tool
from training.networks_edm2 import Precond

ASKED_FOR = {"browser": "drive a real browser", "trackio": "read what Trackio was sent"}


def pytest_addoption(parser):
    for name, about in ASKED_FOR.items():
        parser.addoption(f"--{name}", action="store_true", help=f"also {about}")


def pytest_collection_modifyitems(config, items):
    asked = [name for name in ASKED_FOR if not config.getoption(name)]
    left = [item for item in items if any(map(item.get_closest_marker, asked))]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_terminal_summary(terminalreporter, config):
    for name, about in ASKED_FOR.items():
        if not config.getoption(name) and not config.option.file_or_dir:
            terminalreporter.write_line(f"Not run: tests that {about} (bash bash_files/test.sh --{name})")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: threads only cost. Also what makes two runs of the same step equal in every bit."""
    torch.set_num_threads(1)


HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", socket.gethostname())


@pytest.fixture(autouse=True, scope="session")
def cut_network():
    """No test reaches beyond this machine: sockets of this process refuse to, downloads of its children find no proxy."""
    connect = socket.socket.connect

    def local(self, address):
        if self.family != socket.AF_UNIX and address[0] not in HERE:
            raise OSError(f"the network is cut: {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local)
        for name in ("http_proxy", "https_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        patch.setenv("no_proxy", ",".join(HERE))
        yield


@pytest.fixture(autouse=True, scope="session")
def empty_caches(tmp_path_factory):
    """Whatever weights a user of this machine has: tests find none, and leave none."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DNNLIB_CACHE_DIR", "TORCH_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


def convert_digits(dest, sources="0,1,2", per_source=16, **options):
    """A zip of 8x8 digits, made by the command a user would type."""
    arguments = ["convert", "--source=sklearn:digits", f"--sources={sources}", f"--per-source={per_source}"]
    more = [f"--{name}={value}" for name, value in options.items()]
    run(dataset_tool.main, *arguments, f"--dest={dest}", *more)
    return dest


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Path of a data set: digits 0, 1, 2, 16 images each, ten classes."""
    return convert_digits(tmp_path_factory.mktemp("digits") / "digits.zip")


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """(folder, diffusers AutoencoderKL) of a small VAE with random weights that halves the sides."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return str(path), vae.eval()


@pytest.fixture
def tiny_net():
    """Function (label_dim, **options) -> Precond for 8x8 grey images with random weights, out_gain not zero."""

    def make(label_dim=10, seed=0, **options):
        torch.manual_seed(seed)
        given = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=8)
        net = Precond(8, 1, label_dim, **{**given, **options})
        with torch.no_grad():
            for name, p in net.named_parameters():
                if p.ndim == 0:  # gains start at zero, which would hide most of the network
                    p.fill_(0.7 if name.endswith("out_gain") else 0.3)
        return net.eval()

    return make
