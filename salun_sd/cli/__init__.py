"""Typer only: parse, check, print, call."""
