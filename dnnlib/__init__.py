"""Helpers that know nothing about diffusion: dictionaries with attributes, logging, options, cached downloads."""

from dnnlib.util import EasyDict, atomic_write, format_nimg, format_time, logged, parse_nimg, parse_seeds

__all__ = ["EasyDict", "atomic_write", "format_nimg", "format_time", "logged", "parse_nimg", "parse_seeds"]
