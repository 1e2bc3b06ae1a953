"""Data sets: EDM2's format (zip or folder with dataset.json), read as tensors in an order that depends on the seed alone."""

from training.dataset.order import order

__all__ = ["ArrayDataset", "Dataset", "ImageFolderDataset", "InfiniteSampler", "content_hash", "hash_of_items"]
__all__ += ["label_rows", "load_arrays", "load_raw", "open_stack", "order"]


def __getattr__(name):  # late: writing a data set needs no torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from training.dataset import dataset

    return getattr(dataset, name)
