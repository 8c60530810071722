"""`python -m fewbit`: the command line where its script is not on the path."""

from fewbit.cli import app

if __name__ == "__main__":
    app()
