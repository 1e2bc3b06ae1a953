"""torchrun and plain runs through the same few calls. Works without a process group (one process)."""

from __future__ import annotations

import faulthandler
import functools
import os
import re
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed
from tqdm import tqdm

from dnnlib import cli
from dnnlib.util import reason
from torch_utils.devices import keep_memory

T = TypeVar("T")


def init(device: str | None = None) -> torch.device:
    """Start the process group that torchrun announces (NCCL for what is on GPUs, gloo on the CPU); a plain run needs none.

    Sets the CUDA device from LOCAL_RANK. Returns the device of this process. Raises ValueError for one that is not there.
    """
    rank, world_size = _announced()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device={name} is no device: give cpu or cuda") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"--device={name}: {count} GPUs are available; give another or --device=cpu")
        if device.index is None:
            device = torch.device("cuda", _number("LOCAL_RANK", 0) % count)
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if world_size > 1 and not is_initialized():
        faulthandler.enable(sys.__stderr__ or 2)  # an abort in one of many processes says where it was
        try:
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as err:
            where = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
            why = reason(err)
            raise ValueError(f"process {rank} of {world_size} cannot reach the others at {where} ({why})") from err
        _check_same_options()
    return device


def _number(name, default, most=None):
    """An environment variable that torchrun sets."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or (most is not None and int(text) > most):
        limit = "" if most is None else f" from 0 to {most}"
        raise ValueError(f"{name}={text} in the environment is no number{limit}: start with torchrun, or unset it")
    return int(text)


def _announced():
    """(rank, world size) of the environment. Raises ValueError where it makes no sense."""
    world_size = _number("WORLD_SIZE", 1)
    if world_size == 0:
        raise ValueError("WORLD_SIZE=0 in the environment is no number of processes: start with torchrun, or unset it")
    if world_size > 1:
        lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if lacking:
            raise ValueError(f"WORLD_SIZE={world_size} in the environment, but no {lacking[0]}: start with torchrun")
        host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0, 65535)
        try:
            socket.getaddrinfo(host, port)
        except OSError as err:  # the process group would try for minutes
            raise ValueError(f"MASTER_ADDR={host} in the environment is no known address ({err.strerror})") from None
    return _number("RANK", 0, world_size - 1), world_size


def _check_same_options():
    """Raises ValueError, on every process, where they were not started by the same command line, the device aside."""
    given = [{}] * get_world_size()
    torch.distributed.all_gather_object(given, cli.given_options())
    for rank, options in enumerate(given):
        other = next(
            (o for o in {**given[0], **options} if o != "--device" and given[0].get(o) != options.get(o)), None
        )
        if other is not None:
            raise ValueError(f"{other} differs between process 0 and process {rank}: start all with the same options")


def is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if is_initialized():
        torch.distributed.destroy_process_group()


LOST_PEER = "another process of this training has ended, see its own message"


def is_lost_peer(error: Exception) -> bool:
    """Whether an exception only says that another process is gone: the first error is that process's own."""
    text = str(error)
    signs = ("onnection closed by peer", "onnection reset by peer", "remote process has terminated", "Broken pipe")
    network = ("gloo", "NCCL", "c10d", "socket", "store")
    return get_world_size() > 1 and any(s in text for s in signs) and any(n in text for n in network)


def get_rank() -> int:
    return torch.distributed.get_rank() if is_initialized() else 0


def get_world_size() -> int:
    return torch.distributed.get_world_size() if is_initialized() else 1


def barrier() -> None:
    if is_initialized():
        torch.distributed.barrier()


def print0(*args: object) -> None:
    """print on rank 0 only; a line of its own above progress bars."""
    if get_rank() == 0:
        tqdm.write(" ".join(map(str, args)), file=sys.stdout)
        sys.stdout.flush()


def all_reduce_(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Reduce `tensor` in place over all processes ("sum", "min" or "max"); returns it."""
    if get_world_size() > 1:
        torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, op.upper()))
    return tensor


def all_gather_varying(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate tensors of different lengths (first axis) from all ranks, in rank order, on every rank.

    tensor [n_r, ...] with a common trailing shape -> [sum n_r, ...].
    """
    if get_world_size() == 1:
        return tensor
    count = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = [torch.zeros_like(count) for _ in range(get_world_size())]
    torch.distributed.all_gather(counts, count)
    counts = [int(c) for c in counts]
    padded = tensor.new_zeros([max(max(counts), 1), *tensor.shape[1:]])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.zeros_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class Reduction:
    """Sums the gradients of `tensors` over processes, a bucket at a time while `backward` still runs.

    Made before the last backward pass that reaches them; `finish` afterwards. Every process gives the same tensors in the same
    order. A bucket leaves when the gradients in it and in those before are there; backward reaches the last tensors first.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], bucket_bytes: int = 2**25):
        self.buckets = list(torch._utils._take_tensors(list(tensors)[::-1], bucket_bytes))  # of one type each
        self.missing, self.sent = [len(bucket) for bucket in self.buckets], []
        self.hooks = [
            t.register_post_accumulate_grad_hook(functools.partial(self._arrived, index))
            for index, bucket in enumerate(self.buckets)
            for t in bucket
        ]

    def _arrived(self, index, tensor):
        self.missing[index] -= 1
        while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:
            self._send()

    def _send(self):
        bucket = self.buckets[len(self.sent)]
        flat = torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).reshape(-1) for t in bucket])
        self.sent.append((flat, torch.distributed.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Wait for all sums, which take the place of the gradients; of tensors without one, too."""
        for hook in self.hooks:
            hook.remove()
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.grad = part.view_as(t)


def broadcast_(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Overwrite `tensors` by those of rank `src`."""
    if get_world_size() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), src=src)


def broadcast_object(value: T) -> T:
    """A small plain object of rank 0, on every rank."""
    box = [value]
    if get_world_size() > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def gather_objects(value: T) -> list[T] | None:
    """A plain object of every rank, in their order, on rank 0; None on the others."""
    if get_world_size() == 1:
        return [value]
    parts = [value] * get_world_size() if get_rank() == 0 else None
    torch.distributed.gather_object(value, parts)
    return parts


def share(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """The contiguous part of `items` that falls to `rank`; parts differ in length by one at most, some may be empty."""
    small, extra = divmod(len(items), world_size)
    start = rank * small + min(rank, extra)
    return items[start : start + small + (rank < extra)]


def split_batches(items: Iterable[T], max_batch_size: int) -> list[list[T]]:
    """This rank's share of `items` as a list of nearly equal contiguous batches (EDM2's rule).

    Every rank gets the same number of batches, some possibly empty, so that barriers match.
    """
    items, world_size = list(items), get_world_size()
    count = max(-(-len(items) // (max_batch_size * world_size)), 1) * world_size
    return [share(items, i, count) for i in range(get_rank(), count, world_size)]
