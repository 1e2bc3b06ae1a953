"""Helpers that know nothing about diffusion: dictionaries with attributes, logging, options, cached downloads."""

from dnnlib.util import EasyDict, Logger, atomic_write, format_nimg, format_time, parse_nimg, parse_seeds

__all__ = ["EasyDict", "Logger", "atomic_write", "format_nimg", "format_time", "parse_nimg", "parse_seeds"]
