"""The command line: each file registers its commands; the order is that of --help.

app        the app, and how a command is registered
ending     how a command ends: message, exit code, signals
limits     what a process may use, looked at before a command begins
options    the options of a command, made of the fields of its request
terminal   what is printed, and the progress
table      tables, whose figures stay whole in a narrow terminal
answers    the four answers of a run
runs       evaluate, verify, bench, report
lists      targets, recipes
quantize, sensitivity, search, sweep, lint, diff, show, export, serve: the command of that name
"""

from importlib import import_module

from fewbit.cli.app import app

for room in ("quantize", "runs", "diff", "show", "export", "serve", "search", "sensitivity", "sweep", "lint", "lists"):
    import_module(f"fewbit.cli.{room}")

__all__ = ["app"]
