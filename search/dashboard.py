"""A run in the browser, while it goes on or after its end: `python -m search.dashboard RUN`."""

import argparse
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import NoReturn
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from search.cli.messages import command_name, run_cli, say
from search.options.arguments import positive
from search.runs.command import CommandRecord
from search.runs.paths import RunFolder
from search.runs.trained_model import require_run

LOCALHOST = "127.0.0.1"
NAMES = (LOCALHOST, "localhost", "::1")
"""What this machine is called by its own browser, also at the end of an SSH tunnel."""
MOST_PORTS = 100
"""How many ports after a taken one are tried."""
Application = Callable[[dict, Callable], Iterable[bytes]]

EXAMPLES = """
examples:
  python -m search.dashboard results/pets-20250101-120000
      optuna-dashboard, TensorBoard and the report of a run; Ctrl-C ends them
  ssh -L 8080:127.0.0.1:8080 -L 6006:127.0.0.1:6006 HEAD
      from a laptop to a cluster's head node, where the command above runs; then open the same addresses here

Nothing can be changed from the browser, and only this machine can connect. Exit code 130 after Ctrl-C, 2 if the run or
an option is no good.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.dashboard"),
        description="Show a run's study in optuna-dashboard, its curves in TensorBoard, and its report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as results/<name>")
    for name, port in (("--port", 8080), ("--tensorboard-port", 6006)):
        parser.add_argument(
            name, type=positive, default=port, metavar="N", help=f"the next free one is taken from here on ({port})"
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> NoReturn:
    args = parse_arguments(argv)
    folder = run_folder(args.run.expanduser())
    server = serve_on_free_port(application(folder), args.port)
    signal.signal(signal.SIGTERM, _end)
    with server, tensorboard(folder, args.tensorboard_port) as curves:
        address = f"http://{LOCALHOST}:{server.server_port}"
        say(f"optuna-dashboard: {address}/dashboard")
        if folder.report.is_file():
            say(f"report:           {address}/report")
        say(f"TensorBoard:      {curves}")
        if ray := ray_dashboard(folder):
            say(f"Ray's dashboard:  {ray}")
        say("Ctrl-C ends this; a search that is going on goes on")
        server.serve_forever()


def run_folder(path: Path) -> RunFolder:
    """Raises `ValueError` where there is no run, no study yet, or nothing to show it with."""
    require_run(path)
    folder = RunFolder(path)
    if not folder.journal.is_file():  # Optuna would begin one
        raise ValueError(f"{path} has no study yet: no trial has started. Try again in a minute.")
    if not _installed("optuna_dashboard"):
        raise ValueError("optuna-dashboard is not installed. Get it with: pip install optuna-dashboard tensorboard")
    return folder


# --- What is served ---------------------------------------------------------------------------------------------------


class ReadOnlyJournal(JournalFileBackend):
    """The journal belongs to the search, which may be writing it."""

    def append_logs(self, logs: list[dict]) -> None:
        raise PermissionError("this dashboard only reads")


def application(folder: RunFolder) -> Application:
    """optuna-dashboard and the report, guarded."""
    from optuna_dashboard import wsgi

    study = wsgi(JournalStorage(ReadOnlyJournal(str(folder.journal))))
    return for_this_machine(read_only(with_report(study, folder.report)))


def with_report(inner: Application, report: Path) -> Application:
    """`inner`, and the report as it is now under /report."""

    def serve(environment: dict, start_response: Callable) -> Iterable[bytes]:
        if environment["PATH_INFO"] != "/report":
            return inner(environment, start_response)
        if not report.is_file():
            return _refuse(start_response, "404 Not Found", "There is no report yet: no trial has completed.")
        start_response("200 OK", [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")])
        return [report.read_bytes()]

    return serve


def for_this_machine(inner: Application) -> Application:
    """`inner` for those who asked for this machine by name.

    A page of somebody else's may make its own name point here (DNS rebinding) and would then read all; its requests
    still carry its name.
    """

    def serve(environment: dict, start_response: Callable) -> Iterable[bytes]:
        if not _is_this_machine(environment.get("HTTP_HOST", "")):
            return _refuse(start_response, "403 Forbidden", f"Ask for http://{LOCALHOST}.")
        return inner(environment, start_response)

    return serve


def read_only(inner: Application) -> Application:
    """`inner` for those who read; optuna-dashboard asks for all it shows by GET."""

    def serve(environment: dict, start_response: Callable) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refuse(
                start_response, "405 Method Not Allowed", "This dashboard only reads.", ("Allow", "GET, HEAD")
            )
        return inner(environment, start_response)

    return serve


def _is_this_machine(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in NAMES
    except ValueError:  # such as "["
        return False


def _refuse(start_response: Callable, status: str, reason: str, *headers: tuple[str, str]) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [f"{reason}\n".encode()]


# --- Servers ----------------------------------------------------------------------------------------------------------


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that hangs up is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Quiet(WSGIRequestHandler):
    def log_message(self, *words: object) -> None:
        """Not a line per request."""


def serve_on_free_port(served: Application, port: int) -> WSGIServer:
    """A server on `port` of this machine or the next free one. Raises `ValueError` where there is none."""
    free = free_port(port)
    return make_server(LOCALHOST, free, served, _Server, _Quiet)


def free_port(wanted: int) -> int:
    """`wanted` or the next port that nobody listens on. Raises `ValueError` where there is none."""
    for port in range(wanted, min(wanted + MOST_PORTS, 2**16)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOCALHOST, port))
            except OSError:
                continue
            if port != wanted:
                say(f"port {wanted} is taken: taking {port}")
            return port
    raise ValueError(f"No port is free from {wanted} on. Give another one, such as --port 9000, between 1 and 65535.")


@contextlib.contextmanager
def tensorboard(folder: RunFolder, port: int) -> Iterator[str]:
    """TensorBoard as a process of its own, as long as this lasts: its address, or how to get it."""
    if not _installed("tensorboard"):
        yield "not installed; get it with: pip install tensorboard"
        return
    port = free_port(port)
    command = [sys.executable, "-c", "from search.dashboard import serve_tensorboard; serve_tensorboard()"]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(
        [*command, "--logdir", str(folder.tune), "--host", LOCALHOST, "--port", str(port)],
        stdin=subprocess.PIPE,  # closes with us, see serve_tensorboard
        stdout=nowhere,
        stderr=nowhere,
        start_new_session=True,  # Ctrl-C is for us, and we end it
    )
    try:
        yield f"http://{LOCALHOST}:{port} (takes some seconds to start)"
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()


def serve_tensorboard() -> NoReturn:
    """TensorBoard by its own arguments, guarded, until its stdin is closed.

    The dashboard may end without a chance to end it: by SIGKILL, or by SIGHUP when a terminal or SSH session closes.
    """
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    from tensorboard import main_lib, program

    main_lib.global_init()
    # It asks for some of what it shows by POST, so it is not read_only; it has nothing that could be changed.
    board = program.TensorBoard(server_class=lambda app, flags: program.WerkzeugServer(for_this_machine(app), flags))
    board.configure(argv=("", *sys.argv[1:]))
    sys.exit(board.main())


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def ray_dashboard(folder: RunFolder) -> str:
    """The address that Ray had when the run started, if somebody listens there now."""
    address = CommandRecord.load(folder.path).ray_dashboard
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, ValueError):
        socket.create_connection((host, int(port)), timeout=1).close()
        return f"http://{address}"
    return ""


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # `sys.modules` holds something else under this name
        return False


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    run_cli(main)
