"""`make doors`: try every case, print a line for each that was answered wrong, then a table; exit with 1 if any was."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from doors.serve import SETTINGS

if any(os.environ.get(name) != value for name, value in SETTINGS.items()):  # read when torch is imported, so set before
    os.execve(sys.executable, [sys.executable, "-m", "doors", *sys.argv[1:]], os.environ | SETTINGS)

from doors import serve
from doors.case import Case
from doors.kinds import KINDS
from doors.log import Log, Row, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="doors", description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"{', '.join(KINDS)}; all where none is named")
    parser.add_argument("--fast", action="store_true", help="only the cases of the fast part")
    parser.add_argument("--every", type=int, default=1, help="only every n-th case")
    parser.add_argument("--only", default="", help="only cases with this text in their name")
    parser.add_argument("--log", type=Path, help="go on from this file, and write each answer into it")
    parser.add_argument("--again", action="store_true", help="try those again that the log has as wrong")
    parser.add_argument("--list", action="store_true", help="print the names and try nothing")
    options = parser.parse_args()
    if unknown := [name for name in options.kinds if name not in KINDS]:
        parser.error(f"unknown kind {', '.join(unknown)}; there are {', '.join(KINDS)}")
    cases = [(kind, case) for kind in options.kinds or KINDS for case in KINDS[kind]() if not options.fast or case.fast]
    cases = [(kind, case) for kind, case in cases if options.only in f"{kind}/{case.name}"]
    cases = cases[:: options.every]
    if options.list:
        print(*(f"{kind}/{case.name}" for kind, case in cases), sep="\n")
        return 0
    log = Log(options.log, again=options.again)
    try_all(cases, log)
    rows = [log.rows[name] for name in (f"{kind}/{case.name}" for kind, case in cases)]
    print(table(rows))
    return 1 if any(row.wrong for row in rows) else 0


def try_all(cases: Iterable[tuple[str, Case]], log: Log) -> None:
    """Try every case that the log has no answer for; a line for each that is answered wrong."""
    missing = [(kind, case) for kind, case in cases if f"{kind}/{case.name}" not in log.rows]
    if not missing:
        return
    root = Path(tempfile.mkdtemp(prefix="doors-"))  # no TemporaryDirectory, which a forked process would remove as it ends
    root.chmod(0o755)
    try:
        needs = {name for _, case in missing for name in case.needs}
        commands = sum(isinstance(case.does, tuple) for _, case in missing)
        serve.warm(root / "place", needs, whole="run" in needs or commands > 50)
        for kind, case in missing:
            wrong, ended = serve.tried(case, root / "place", root / "case")
            row = Row(kind, case.name, wrong, round(ended.seconds, 2), ended.err[-2000:] if wrong else "")
            log.add(row)
            if wrong:
                print(f"{row.key} ({case.typed:.200}): {wrong}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
