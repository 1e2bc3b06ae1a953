"""torchrun and plain runs through the same few calls. Works without a process group (one process)."""

import os
import sys

import torch
import torch.distributed


def init(device=None):
    """Start the process group that torchrun announces (NCCL on GPUs, gloo on the CPU); a plain run needs none.

    Sets the CUDA device from LOCAL_RANK. Returns the device of this process. Raises ValueError for one that is not there.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device={name} is no device: give cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device={name}: {torch.cuda.device_count()} GPUs are available; give another or --device=cpu"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_initialized():
        torch.distributed.init_process_group(backend="nccl" if device.type == "cuda" else "gloo")
    return device


def is_initialized():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def shutdown():
    """Leave the process group, if there is one."""
    if is_initialized():
        torch.distributed.destroy_process_group()


LOST_PEER = "another process of this training has ended, see its own message"


def is_lost_peer(error):
    """Whether an exception only says that another process is gone: the first error is that process's own."""
    text = str(error)
    signs = ("onnection closed by peer", "onnection reset by peer", "remote process has terminated", "Broken pipe")
    network = ("gloo", "NCCL", "c10d", "socket", "store")
    return get_world_size() > 1 and any(s in text for s in signs) and any(n in text for n in network)


def get_rank():
    return torch.distributed.get_rank() if is_initialized() else 0


def get_world_size():
    return torch.distributed.get_world_size() if is_initialized() else 1


def barrier():
    if is_initialized():
        torch.distributed.barrier()


def print0(*args, **kwargs):
    """print on rank 0 only."""
    if get_rank() == 0:
        print(*args, **kwargs)
        sys.stdout.flush()


def all_reduce_(tensor, op="sum"):
    """Reduce `tensor` in place over all processes ("sum", "min" or "max"); returns it."""
    if get_world_size() > 1:
        torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, op.upper()))
    return tensor


def all_gather_varying(tensor):
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


def all_reduce_flat_(tensors, op="sum", bucket_bytes=2**25):
    """Reduce a list of tensors in place, flattened into buckets: few calls, and the same order on every rank."""
    if get_world_size() == 1:
        return
    bucket, size = [], 0

    def flush():
        if bucket:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            all_reduce_(flat, op)
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))
            bucket.clear()

    for tensor in tensors:
        if bucket and (size + tensor.numel() * tensor.element_size() > bucket_bytes or bucket[0].dtype != tensor.dtype):
            flush()
            size = 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    flush()


def broadcast_(tensors, src=0):
    """Overwrite `tensors` by those of rank `src`."""
    if get_world_size() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), src=src)


def broadcast_object(value, src=0):
    """A small plain object of rank `src`, on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=src)
    return box[0]


def split_batches(items, max_batch_size, rank=None, world_size=None):
    """This rank's share of `items` as a list of nearly equal contiguous batches (EDM2's rule).

    Every rank gets the same number of batches, some possibly empty, so that barriers match.
    """
    rank = get_rank() if rank is None else rank
    world_size = get_world_size() if world_size is None else world_size
    items = list(items)
    num = max(-(-len(items) // (max_batch_size * world_size)), 1) * world_size
    small, extra = divmod(len(items), num)
    bounds = [0]
    for i in range(num):
        bounds.append(bounds[-1] + small + (i < extra))
    return [items[bounds[i] : bounds[i + 1]] for i in range(rank, num, world_size)]
