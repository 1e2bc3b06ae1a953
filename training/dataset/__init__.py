"""Data sets: EDM2's format (zip or folder with dataset.json), read as tensors in an order that depends on the seed alone."""

from training.dataset.dataset import ArrayDataset, Dataset, ImageFolderDataset, content_hash, load_arrays
from training.dataset.order import InfiniteSampler, epoch_permutation, order

__all__ = [
    "ArrayDataset", "Dataset", "ImageFolderDataset", "InfiniteSampler", "content_hash", "epoch_permutation", "load_arrays",
    "order",
]  # fmt: skip
