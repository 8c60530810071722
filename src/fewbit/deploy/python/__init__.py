"""The pieces of `predict.py`: plain Python without torch and fewbit. deploy/program.py puts those of a run together."""
