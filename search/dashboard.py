"""Shows a running or finished run in the browser: `python -m search.dashboard RUN`."""

import argparse
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, NoReturn
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from search.cli.messages import command_name, say
from search.options.arguments import positive
from search.runs.command import CommandRecord
from search.runs.paths import RunFolder
from search.runs.trained_model import require_run
from trainables.system.command_line import run_cli

LOCALHOST = "127.0.0.1"
NAMES = (LOCALHOST, "localhost", "::1")
"""This machine's names in its own browser, and in one at the other end of an SSH tunnel."""
MAX_PORTS = 100  # to try when the first is taken

EXAMPLES = """
examples:
  python -m search.dashboard results/pets-20250101-120000
      optuna-dashboard, TensorBoard and the report of a run; Ctrl-C stops them
  ssh -L 8080:127.0.0.1:8080 -L 6006:127.0.0.1:6006 HEAD
      on a laptop, to a cluster's head node that runs the command above; then open the same addresses on the laptop

The browser cannot change anything, and only this machine can connect. Exit code 130 after Ctrl-C, 2 if the run or an
option is invalid.
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
        text = f"the first port to try; the next free one is used (default {port})"
        parser.add_argument(name, type=positive, default=port, metavar="N", help=text)
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
        say("Ctrl-C stops this; a running search continues")
        server.serve_forever()
        raise AssertionError("serve_forever returned")


def run_folder(path: Path) -> RunFolder:
    """Raises `ValueError` if there is no run, no study yet, or no dashboard installed."""
    require_run(path)
    folder = RunFolder(path)
    if not folder.journal.is_file():  # Optuna would start one
        raise ValueError(f"{path} has no study yet: no trial has started. Try again in a minute.")
    if not _installed("optuna_dashboard"):
        raise ValueError("optuna-dashboard is not installed. Install it with: pip install optuna-dashboard tensorboard")
    return folder


# --- What is served ---------------------------------------------------------------------------------------------------


class ReadOnlyJournal(JournalFileBackend):
    """A journal that belongs to a search, which may be writing to it."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise PermissionError("this dashboard is read-only")


def application(folder: RunFolder) -> WSGIApplication:
    """optuna-dashboard and the report, read-only and for this machine only."""
    from optuna_dashboard import wsgi

    study = wsgi(JournalStorage(ReadOnlyJournal(str(folder.journal))))
    return for_this_machine(read_only(with_report(study, folder.report)))


def with_report(inner: WSGIApplication, report: Path) -> WSGIApplication:
    """`inner` plus the current report at /report."""

    def serve(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environment["PATH_INFO"] != "/report":
            return inner(environment, start_response)
        if not report.is_file():
            return _refuse(start_response, "404 Not Found", "There is no report yet: no trial has completed.")
        start_response("200 OK", [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")])
        return [report.read_bytes()]

    return serve


def for_this_machine(inner: WSGIApplication) -> WSGIApplication:
    """`inner`, for requests that address this machine by name.

    A malicious web page can make its own name resolve to this machine (DNS rebinding) to read everything, but its
    requests still carry its name.
    """

    def serve(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not _is_this_machine(environment.get("HTTP_HOST", "")):
            return _refuse(start_response, "403 Forbidden", f"Ask for http://{LOCALHOST}.")
        return inner(environment, start_response)

    return serve


def read_only(inner: WSGIApplication) -> WSGIApplication:
    """`inner` without requests that could change anything; optuna-dashboard loads all it shows by GET."""

    def serve(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] not in ("GET", "HEAD"):
            allowed = ("Allow", "GET, HEAD")
            return _refuse(start_response, "405 Method Not Allowed", "This dashboard is read-only.", allowed)
        return inner(environment, start_response)

    return serve


def _is_this_machine(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in NAMES
    except ValueError:  # such as "["
        return False


def _refuse(start_response: StartResponse, status: str, reason: str, *headers: tuple[str, str]) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [f"{reason}\n".encode()]


# --- Servers ----------------------------------------------------------------------------------------------------------


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """A browser that hangs up is not an error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*args)


class _Quiet(WSGIRequestHandler):
    def log_message(self, *args: object) -> None:
        """Do not print a line for every request."""


def serve_on_free_port(served: WSGIApplication, port: int) -> WSGIServer:
    """A server on `port` of this machine or the next free one. Raises `ValueError` if there is none."""
    return make_server(LOCALHOST, free_port(port), served, _Server, _Quiet)


def free_port(wanted: int) -> int:
    """The first free port from `wanted` on. Raises `ValueError` if there is none."""
    for port in range(wanted, min(wanted + MAX_PORTS, 2**16)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOCALHOST, port))
            except OSError:
                continue
            if port != wanted:
                say(f"port {wanted} is taken: using {port}")
            return port
    raise ValueError(f"No port is free from {wanted} on. Give another one between 1 and 65535, such as --port 9000.")


@contextlib.contextmanager
def tensorboard(folder: RunFolder, port: int) -> Iterator[str]:
    """Runs TensorBoard in a separate process. Yields its address, or how to install it."""
    if not _installed("tensorboard"):
        yield "not installed; install it with: pip install tensorboard"
        return
    port = free_port(port)
    command = [sys.executable, "-c", "from search.dashboard import serve_tensorboard; serve_tensorboard()"]
    process = subprocess.Popen(
        [*command, "--logdir", str(folder.tune), "--host", LOCALHOST, "--port", str(port)],
        stdin=subprocess.PIPE,  # closes when this process ends, see serve_tensorboard
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C stops only this process, which stops TensorBoard
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
    """TensorBoard with its own arguments, for this machine only, until its stdin is closed.

    The dashboard may die without stopping it: by SIGKILL, or by SIGHUP when a terminal or SSH session closes.
    """
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    from tensorboard import main_lib, program  # type: ignore[import-untyped]  # published without hints

    main_lib.global_init()
    # It loads some of what it shows by POST, so it is not read_only; there is nothing to change.
    board = program.TensorBoard(server_class=lambda app, flags: program.WerkzeugServer(for_this_machine(app), flags))
    board.configure(argv=("", *sys.argv[1:]))
    sys.exit(board.main())


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def ray_dashboard(folder: RunFolder) -> str:
    """The address that Ray had when the run started, if something listens there now."""
    address = CommandRecord.load(folder.path).ray_dashboard
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, ValueError):
        socket.create_connection((host, int(port)), timeout=1).close()
        return f"http://{address}"
    return ""


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # for a module without a spec
        return False


def _end(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    run_cli(main)
