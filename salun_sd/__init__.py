"""Erase a concept from a Stable Diffusion checkpoint with SalUn (arXiv 2310.12508), and prove it."""

from importlib.metadata import version

__version__ = version("salun-sd")
