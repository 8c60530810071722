"""`fewbit`, and `python -m fewbit` where that is not on the path."""

import sys


def main() -> None:
    """The command line, also where it is interrupted while it is imported."""
    try:
        from fewbit.cli.app import app
        from fewbit.cli.ending import ending

        with ending():
            from fewbit import cli  # noqa: F401

            app()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
