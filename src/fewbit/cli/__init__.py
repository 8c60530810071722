"""The command line. Each room registers its commands; the order is that of --help."""

from importlib import import_module

from fewbit.cli.app import app

for room in ("quantize", "runs", "diff", "show", "export", "serve", "search", "sensitivity", "sweep", "lint", "lists"):
    import_module(f"fewbit.cli.{room}")

__all__ = ["app"]
