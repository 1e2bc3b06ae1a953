"""Started by test_distributed.py, plainly or under torchrun: trains and samples, and writes what every process saw."""

import sys
from pathlib import Path

import torch
from small_runs import small_config

from torch_utils import distributed as dist
from training import phema, setup
from training.feed import Feed
from training.generation import generate_images
from training.losses import EDM2Loss, Objective
from training.selection import IdentitySelector
from training.training_loop import Periods, TrainingLoop

STEPS = 30
BATCH = 32


class Recorder(IdentitySelector):
    """The identity, noting which positions carried which draws, and the sum of the losses."""

    def __init__(self):
        self.draws, self.losses = {}, []

    def minibatches(self, objective, candidates):
        index = candidates.position + candidates.first
        for draws in candidates:
            for i in range(len(draws)):
                if candidates.cur_nimg <= BATCH:  # two steps are enough
                    self.draws[index] = {k: draws[k][i].clone() for k in ("images", "labels", "sigma", "noise")}
                index += 1
            yield draws

    def state_dict(self):
        return {}


class Watched(dist.Reduction):
    """Small buckets, noting how many of them had left when backward was over."""

    seen = []

    def __init__(self, tensors):
        super().__init__(tensors, bucket_bytes=2**12)

    def finish(self):
        self.seen.append((len(self.sent), len(self.buckets)))
        super().finish()


def train(data, out, batch_gpu, steps):
    config = small_config(data, batch_size=BATCH, block=4)
    dataset = setup.open_dataset(config)
    encoder = setup.choose_encoder(dataset)
    net = setup.build_network(config, setup.interface_of(dataset, encoder), "cpu")
    objective = Objective(net, EDM2Loss(label_dropout=0.2))
    recorder, losses = Recorder(), []
    run = setup.Run(
        objective,
        Feed(dataset, seed=0, block=4, rank=dist.get_rank(), world_size=dist.get_world_size()),
        encoder,
        recorder,
        torch.optim.Adam(objective.param_groups(), lr=1, betas=(0.9, 0.99)),
        phema.PowerFunctionEMA(objective, [0.1]),
        lambda nimg: 0.01 * min(nimg / 2000, 1),
        Periods(total_nimg=BATCH * 1024, status_nimg=BATCH, snapshot_nimg=0, checkpoint_nimg=0),
        batch_size=BATCH,
        batch_gpu=batch_gpu,
    )
    loop = TrainingLoop(run, out)
    gradients = {}
    for step in range(steps):
        loop.step()
        losses.append(loop.stats.means()["Loss/loss"])
        if step in (1, steps - 1):  # the first step with a gradient in every layer, and the last one
            gradients[step] = torch.cat([p.grad.flatten() for p in loop.parameters]).clone()
    gathered = [recorder.draws]
    if dist.get_world_size() > 1:
        gathered = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(gathered, recorder.draws)
    loop._check_ranks_agree()
    draws = {index: value for part in gathered for index, value in part.items()}
    return dict(draws=draws, losses=losses, gradients=gradients, count=sum(map(len, gathered)))


def sample(data, out):
    torch.manual_seed(0)
    config = small_config(data)
    dataset = setup.open_dataset(config)
    net = setup.build_network(config, setup.interface_of(dataset, setup.choose_encoder(dataset)), "cpu").eval()
    with torch.no_grad():
        net.unet.out_gain.fill_(0.7)
    batches = list(
        generate_images(
            net, range(100, 111), outdir=out, class_idx="balanced", max_batch_size=4, num_steps=4, S_churn=1
        )
    )
    own = {}
    for batch in batches:
        for i, seed in enumerate(batch.seeds):
            own[seed] = dict(noise=batch.noise[i], labels=batch.labels[i], image=batch.images[i])
    gathered = [own]
    if dist.get_world_size() > 1:
        gathered = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(gathered, own)
    return dict(samples={seed: v for part in gathered for seed, v in part.items()}, num_batches=len(batches))


def main(data, out):
    out = Path(out)
    torch.set_num_threads(1)
    dist.init("cpu")
    dist.Reduction = Watched
    result = dict(world=dist.get_world_size(), **train(data, out, None, STEPS))
    result["small"] = train(data, out, 3, STEPS)
    result.update(sample(data, out / "images"), sent=Watched.seen)
    if dist.get_rank() == 0:
        torch.save(result, out / "result.pt")
    dist.barrier()
    dist.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
