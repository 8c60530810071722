"""`fewbit serve`."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.app import command
from fewbit.cli.terminal import out
from fewbit.errors import FewbitError

OF_HOST = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL, errno.ENODEV, errno.ENETUNREACH)  # not of the port


@command
def serve(
    run: Path,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is any.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
) -> None:
    """A page in the browser on which a picture is dropped: the float and the integer answer side by side, with their times."""
    try:
        import uvicorn

        from fewbit.deploy.serve import application
    except ImportError as error:
        raise FewbitError(f"fewbit serve needs {error.name}: pip install 'fewbit[serve]'.") from error
    app = application(run)
    with _listening(host, port) as place:
        out.print(f"http://{host}:{place.getsockname()[1]}  (Ctrl-C ends it)", soft_wrap=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[place])


def _listening(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises FewbitError where it cannot be had."""
    place = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
        place.listen()
        return place
    except (OSError, UnicodeError) as error:  # a name with a part that is empty or too long is told by its codec
        if place is not None:
            place.close()
        is_host = isinstance(error, socket.gaierror | UnicodeError) or error.errno in OF_HOST
        advice = "give another host: --host 127.0.0.1, or 0.0.0.0 for any" if is_host else "give another port: --port 0"
        why = error.strerror if isinstance(error, OSError) else error
        raise FewbitError(f"cannot listen at {host}, port {port}: {why}; {advice}.") from error
