"""The dashboard: it shows a study as it grows, changes nothing, talks to this machine only, and ends cleanly."""

import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import optuna
import pytest
from browser import Complaints, chromium
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from processes import descendants, left_after
from run_tables import DISTRIBUTIONS, write_run

from search import dashboard

pytest.importorskip("optuna_dashboard", reason="needs the extra dashboard")

ROOT = Path(__file__).resolve().parents[2]
PARAMS = {"arch": "resnet18", "epochs": 2, "lr_max": 0.001, "mixup_alpha": 0.1}


class Served:
    """`python -m search.dashboard` in a process of its own, once it has said where it is."""

    def __init__(self, folder: Path, *arguments: object, preamble: str = "pass") -> None:
        # A test run in the background has passed on that it ignores both signals.
        defaults = (
            "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)"
        )
        code = f"import signal, sys; {defaults}; {preamble}; "
        code += "from search import dashboard; dashboard.run_cli(dashboard.main)"
        ports = ("--port", 18080, "--tensorboard-port", 16006)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, (folder, *ports, *arguments))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("Ctrl-C"):
                break
        self.text = "\n".join(self.lines)
        self.address = f"http://127.0.0.1:{self.port_of('optuna-dashboard')}" if "Ctrl-C" in self.text else ""

    def port_of(self, name: str) -> int:
        return int(re.search(rf"^{name}: +http://127.0.0.1:(\d+)", self.text, re.MULTILINE)[1])

    def get(self, path: str, **options) -> tuple[int, str]:
        try:
            with urlopen(Request(self.address + path, **options), timeout=30) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def end(self, number: int) -> int:
        children = descendants(self.process.pid)
        self.process.send_signal(number)
        code = self.process.wait(20)
        assert children or "not installed" in self.text
        assert not left_after(20, children)
        return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "run")
    (folder / "tune").mkdir()
    (folder / "report.html").write_text("<title>the report</title>")
    return folder


@pytest.fixture(scope="module")
def served(folder):
    served = Served(folder)
    yield served
    if served.process.poll() is None:
        served.end(signal.SIGTERM)


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(
        study_name="pets", storage=JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    )


def test_it_shows_the_study_and_a_trial_that_comes_while_it_is_open(served, folder):
    assert served.get("/dashboard")[0] == 200
    (study,) = json.loads(served.get("/api/studies")[1])["study_summaries"]
    assert study["study_name"] == "pets"
    before = json.loads(served.get(f"/api/studies/{study['study_id']}")[1])["trials"]
    trial = optuna.trial.create_trial(value=0.0625, params=PARAMS, distributions=DISTRIBUTIONS)
    study_of(folder).add_trial(trial)
    deadline = time.monotonic() + 30  # it looks again after some seconds
    while len(after := json.loads(served.get(f"/api/studies/{study['study_id']}")[1])["trials"]) == len(before):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert after[-1]["values"] == [0.0625]


def test_the_report_is_served_as_it_is_now(served, folder):
    assert served.get("/report") == (200, "<title>the report</title>")
    (folder / "report.html").write_text("<title>a newer one</title>")
    assert served.get("/report") == (200, "<title>a newer one</title>")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/studies"),
        ("DELETE", "/api/studies/0"),
        ("PUT", "/api/studies/0/note"),
        ("POST", "/api/trials/0/tell"),
    ],
)
def test_nothing_can_be_changed(served, folder, method, path):
    before = (folder / "study.journal").read_bytes()
    body = json.dumps({"body": "x", "version": 1, "study_name": "x", "directions": ["minimize"]}).encode()
    headers = {"Content-Type": "application/json"}
    assert served.get(path, method=method, data=body, headers=headers) == (405, "This dashboard is read-only.\n")
    assert (folder / "study.journal").read_bytes() == before
    assert not list(folder.glob("study.journal.*"))


def test_the_journal_cannot_be_written_even_from_within(folder):
    storage = JournalStorage(dashboard.ReadOnlyJournal(str(folder / "study.journal")))
    with pytest.raises(PermissionError, match="is read-only"):
        optuna.create_study(storage=storage, study_name="another")


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example:18080", 403), ("", 403), ("[", 403), ("localhost:9", 200), ("[::1]", 200)]
)
def test_only_who_asks_for_this_machine_by_name_gets_an_answer(served, host, status):
    assert served.get("/api/studies", headers={"Host": host})[0] == status


def test_it_listens_on_this_machine_only(served):
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", served.port_of("optuna-dashboard")), timeout=2)


def test_tensorboard_comes_up_beside_it_and_taken_ports_are_passed_over(served, folder):
    pytest.importorskip("tensorboard")
    first = served.port_of("TensorBoard")
    deadline = time.monotonic() + 60
    while True:
        try:
            assert b"TensorBoard" in urlopen(f"http://127.0.0.1:{first}/", timeout=10).read()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    with pytest.raises(HTTPError, match="403"):
        urlopen(Request(f"http://127.0.0.1:{first}/data/runs", headers={"Host": "evil.example"}), timeout=10)
    second = Served(folder)
    port = served.port_of("optuna-dashboard")
    assert f"port {port} is taken: using {second.port_of('optuna-dashboard')}" in second.text
    assert second.get("/api/studies")[0] == 200
    assert second.end(signal.SIGTERM) == 128 + signal.SIGTERM


def test_ctrl_c_ends_it_and_tensorboard_without_a_word(folder):
    served = Served(folder)
    hang_up(served.port_of("optuna-dashboard"))
    assert served.get("/api/studies")[0] == 200
    assert served.end(signal.SIGINT) == 130
    assert served.process.stdout.read() == ""


def hang_up(port: int) -> None:
    """What a browser does with a connection that it does not want any more: a reset in the middle of a request."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /rep")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_tensorboard_ends_with_a_terminal_that_closes(folder):
    pytest.importorskip("tensorboard")
    assert Served(folder).end(signal.SIGHUP) == -signal.SIGHUP


def test_without_tensorboard_it_says_how_to_get_it(folder):
    served = Served(folder, preamble="sys.modules['tensorboard'] = None")
    assert "TensorBoard:      not installed; install it with: pip install tensorboard" in served.text
    assert served.get("/api/studies")[0] == 200
    served.end(signal.SIGINT)


def test_without_optuna_dashboard_it_says_how_to_get_it(folder):
    served = Served(folder, preamble="sys.modules['optuna_dashboard'] = None")
    assert served.process.wait(20) == 2
    assert served.lines == [
        "error: optuna-dashboard is not installed. Install it with: pip install optuna-dashboard tensorboard"
    ]


def test_rays_address_is_told_while_somebody_listens_there(tmp_path):
    folder = write_run(tmp_path / "run")
    command = json.loads((folder / "command.json").read_text())
    with socket.create_server(("127.0.0.1", 0)) as ray:
        address = f"127.0.0.1:{ray.getsockname()[1]}"
        (folder / "command.json").write_text(json.dumps(command | {"ray_dashboard": address}))
        assert dashboard.ray_dashboard(dashboard.run_folder(folder)) == f"http://{address}"
    assert dashboard.ray_dashboard(dashboard.run_folder(folder)) == ""


def test_what_cannot_be_shown_is_said_and_nothing_is_made(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        dashboard.main([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="is no run"):
        dashboard.main([str(tmp_path)])
    (tmp_path / "command.json").write_text("{}")
    with pytest.raises(ValueError, match="no study yet"):
        dashboard.main([str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["command.json"]


@pytest.mark.browser
def test_the_page_of_the_study_opens_without_a_complaint(served, screenshots):
    complaints = Complaints()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        complaints.watch(page)
        complaints.watch_network(page, (served.address, "data:", "blob:"))
        page.goto(f"{served.address}/dashboard")
        page.get_by_text("pets").first.click()
        page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
        page.wait_for_timeout(2000)
        page.screenshot(path=screenshots / "dashboard.png")
    assert not complaints
