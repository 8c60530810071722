"""Request: every option of fewbit, once, with its type, limits, default and help. No torch before a value is checked.

The command line is made from these fields (cli/options.py), `fewbit.quantize(model, images, **options)` makes a `Request`, and
its `key` identifies a killed run. Whatever can be checked before the work starts is checked here.

options         of all that begins with a model (`Options`), and of what makes a plan (`Planned`)
requests        those of quantize, sensitivity, search and sweep
runs            those of commands on a finished run: evaluate, verify, bench
types           of options: limits, how a text becomes a value, and the message for one that is not allowed
recipe_options  time, loss, iterations and bits, in the passes of the recipe and on the target
checks          what of a model, its images and its task is known to fail before anything is loaded
command         a request as words on the command line
"""

from fewbit.request.options import Options, Planned
from fewbit.request.requests import Request, SearchRequest, SensitivityRequest, SweepRequest
from fewbit.request.runs import BenchRequest, EvaluateRequest, VerifyRequest

__all__ = [
    "BenchRequest",
    "EvaluateRequest",
    "Options",
    "Planned",
    "Request",
    "SearchRequest",
    "SensitivityRequest",
    "SweepRequest",
    "VerifyRequest",
]
