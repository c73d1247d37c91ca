"""Fetching from a web server and from folders, once per node, complete or not at all."""

import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from trainables.data import fetch as fetching
from trainables.data.fetch import FetchError, fetch, pinned, shown


class Server:
    """A web server whose answers a test sets: path -> bytes, or a function that writes the answer itself."""

    def __init__(self) -> None:
        self.answers: dict = {}
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                answer = outer.answers.get(self.path.partition("?")[0])
                if callable(answer):
                    answer(self)
                elif answer is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *line: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def uri(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}{path}"


@pytest.fixture
def web(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "time", QuickTime)
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


class QuickTime:
    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(seconds / 100)


def tar_of(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def encrypted_zip() -> bytes:
    """By its headers, which is all that is looked at before a password is asked for."""
    out = bytearray(zip_of({"a.jpg": b"x"}))
    for start in (out.find(b"PK\x03\x04") + 6, out.find(b"PK\x01\x02") + 8):
        out[start] |= 1
    return bytes(out)


FILES = {"birds/ant/1.jpg": b"one", "birds/bee/2.jpg": b"two"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "fetched").glob("*") if path.suffix != ".lock")


@pytest.mark.parametrize(
    "archive",
    [tar_of(FILES), tar_of(FILES, "w:xz"), tar_of(FILES, "w"), zip_of(FILES)],
    ids=["tar.gz", "tar.xz", "tar", "zip"],
)
def test_an_archive_of_one_folder_means_what_is_in_it(web, archive):
    web.answers["/birds"] = archive
    assert content(fetch(web.uri("/birds"))) == {"ant/1.jpg": b"one", "bee/2.jpg": b"two"}


def test_an_archive_is_fetched_once_and_leaves_no_second_copy(web, tmp_path):
    web.answers["/birds.tar"] = tar_of(FILES)
    assert fetch(web.uri("/birds.tar")) == fetch(web.uri("/birds.tar"))
    assert web.requests == ["/birds.tar"]
    (target,) = cached(tmp_path)
    assert sorted(path.name for path in (tmp_path / "cache" / "fetched" / target).iterdir()) == [
        "content",
        "source.json",
    ]


def test_an_address_may_have_any_letters(web):
    web.answers["/v%C3%B6gel%20(1).tar"] = tar_of(FILES)
    assert content(fetch(web.uri("/vögel%20(1).tar")))


def test_weights_may_be_a_single_file(web):
    web.answers["/my%20net.safetensors"] = b"\x08" * 99
    assert content(fetch(web.uri("/my%20net.safetensors"))) == {"my net.safetensors": b"\x08" * 99}


def test_many_processes_make_one_request(web, tmp_path):
    archive = tar_of(FILES)
    web.answers["/birds.tar"] = lambda handler: slowly(handler, archive)
    command = [
        sys.executable,
        "-c",
        f"from trainables.data.fetch import fetch; print(fetch({web.uri('/birds.tar')!r}))",
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0] * 4
    assert len(web.requests) == 1


def slowly(handler, body: bytes, seconds: float = 1.0) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    time.sleep(seconds)
    handler.wfile.write(body[len(body) // 2 :])


def test_a_kill_in_the_middle_leaves_nothing_that_looks_complete(web, tmp_path):
    archive = tar_of(FILES)
    begun = threading.Event()

    def stuck(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(archive)))
        handler.end_headers()
        handler.wfile.write(archive[:50])
        handler.wfile.flush()
        begun.set()
        time.sleep(30)

    web.answers["/birds.tar"] = stuck
    command = [sys.executable, "-c", f"from trainables.data.fetch import fetch; fetch({web.uri('/birds.tar')!r})"]
    process = subprocess.Popen(command)
    assert begun.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    web.answers["/birds.tar"] = archive
    assert content(fetch(web.uri("/birds.tar"))) == {"ant/1.jpg": b"one", "bee/2.jpg": b"two"}
    assert len(cached(tmp_path)) == 1


def test_a_busy_server_and_one_that_breaks_off_are_asked_again(web):
    answers = [busy, broken, lambda handler: slowly(handler, tar_of(FILES), 0)]
    web.answers["/birds.tar"] = lambda handler: answers[len(web.requests) - 1](handler)
    assert content(fetch(web.uri("/birds.tar")))
    assert len(web.requests) == 3


def busy(handler) -> None:
    handler.send_error(503)


def broken(handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"begun")


@pytest.mark.parametrize(("answer", "said"), [(broken, "broke off after 5 of 100000 bytes"), (busy, "503")])
def test_a_server_that_stays_broken_is_given_up(web, tmp_path, answer, said):
    web.answers["/birds.tar"] = answer
    with pytest.raises(FetchError, match=rf"{said}.*{1 + len(fetching.PAUSES)} times"):
        fetch(web.uri("/birds.tar"))
    assert len(web.requests) == 1 + len(fetching.PAUSES)
    assert cached(tmp_path) == []


def test_nothing_there_is_said_at_once_without_the_signature(web):
    with pytest.raises(FetchError, match="404") as raised:
        fetch(web.uri("/none.tar?Signature=verysecret"))
    assert len(web.requests) == 1
    assert "verysecret" not in str(raised.value)


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(fetching, "time", QuickTime)
    with pytest.raises(FetchError, match="refused"):
        fetching._with_retries(lambda: fetching._download("http://127.0.0.1:9/x.tar", Path("unused")))


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (tar_of({"../evil": b"x"}), "outside of their folder"),
        (tar_of({"/tmp/evil": b"x", "../../evil": b""}), "outside of their folder"),
        (zip_of({"a/../../evil": b"x"}), "outside of their folder"),
        (tar_of(FILES)[:-30], "damaged"),
        (encrypted_zip(), "damaged|password"),
        (b"<!DOCTYPE html><title>Sign in</title>", "neither a tar nor a zip archive.*<!DOCTYPE html"),
        (b"", "neither a tar nor a zip"),
    ],
    ids=["parent in tar.gz", "absolute in tar.gz", "parent in zip", "cut off", "encrypted", "page", "empty"],
)
def test_archives_that_are_refused(web, tmp_path, archive, said):
    web.answers["/birds.tar"] = archive
    with pytest.raises(FetchError, match=said):
        fetch(web.uri("/birds.tar"))
    assert cached(tmp_path) == []
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "cache" / "evil").exists()


def test_the_checksum_that_is_demanded(web, tmp_path):
    web.answers["/birds.tar"] = archive = tar_of(FILES)
    uri, digest = web.uri("/birds.tar"), hashlib.sha256(archive).hexdigest()
    with pytest.raises(FetchError, match=rf"has SHA-256 {digest}, expected 0{{64}}"):
        fetch(f"{uri}#sha256={'0' * 64}")
    assert cached(tmp_path) == []
    first = fetch(uri)
    assert pinned(uri) == f"{uri}#sha256={digest}"
    assert fetch(pinned(uri)) == first
    assert len(web.requests) == 2


def test_a_source_that_changes_is_fetched_as_it_was_or_not_at_all(web, tmp_path, monkeypatch):
    web.answers["/birds.tar"] = tar_of(FILES)
    demanded = pinned(web.uri("/birds.tar"))
    web.answers["/birds.tar"] = tar_of(FILES | {"birds/bee/3.jpg": b"three"})
    fetch(demanded)  # this node has it
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "of another node"))
    with pytest.raises(FetchError, match="It has changed"):
        fetch(demanded)


def test_a_folder_by_its_uri(web, tmp_path):
    folder = tmp_path / "a folder"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    uri = folder.as_uri()
    assert content(fetch(uri)) == {"ant/1.jpg": b"one", "bee/2.jpg": b"two"}
    listing = subprocess.run(
        "find birds -type f | LC_ALL=C sort | xargs sha256sum | sha256sum", cwd=folder, shell=True, capture_output=True
    )
    assert pinned(uri).endswith("#sha256=" + listing.stdout.decode().split()[0])


def test_a_folder_that_is_missing_or_empty(web, tmp_path):
    with pytest.raises(FetchError, match="There is nothing at file:///"):
        fetch((tmp_path / "none").as_uri())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FetchError, match="There are no files in"):
        fetch((tmp_path / "empty").as_uri())


def test_a_full_or_forbidden_disk_is_named(web, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "file"))
    web.answers["/birds.tar"] = tar_of(FILES)
    with pytest.raises(FetchError, match="FINETUNE_SEARCH_CACHE"):
        fetch(web.uri("/birds.tar"))


@pytest.mark.parametrize(("uri", "said"), [
    ("ftp://host/x.tar", "begins with https://"),
    ("https://host/x.tar#md5=00", "expected sha256= and 64"),
])  # fmt: skip
def test_addresses_that_are_refused(uri, said):
    with pytest.raises(FetchError, match=said):
        fetch(uri)


def test_what_is_shown_of_a_uri_has_no_secret():
    assert shown("s3://key:secret@bucket/a.tar?region=x#sha256=00") == "s3://bucket/a.tar"
