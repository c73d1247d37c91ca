"""`--address` where no search can be joined to a cluster: one paragraph, in seconds. Real clusters: test_clusters."""

import os
import socket
import time

import pytest

from search.cluster import reach
from search.cluster.connect import check_address, prepare_environment


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Nobody's cluster and nobody's token."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(reach, "RAY_TIMEOUTS", dict.fromkeys(reach.RAY_TIMEOUTS, "1"))


@pytest.fixture
def silent():
    """Something that listens and is no Ray."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def refused(address: str, seconds: float = 15) -> str:
    started = time.monotonic()
    with pytest.raises(ValueError) as error:
        check_address(address)
    assert time.monotonic() - started < seconds
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "address", ["", "local", "localhost:", ":6379", "http://127.0.0.1:8265", "10.0.0.5:99999", "10.0.0.5:80", "h:x"]
)
def test_what_is_no_address_is_refused_with_those_that_are(address):
    said = refused(address, seconds=1)
    assert said.startswith(f"--address {address} is not an address of a Ray cluster. Expected auto, or host:port")


def test_auto_where_no_cluster_runs_is_refused(monkeypatch):
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # those of others on this machine
    assert reach.main("auto") == f"Ray is not running on this machine. {reach.ADDRESS}"


def test_the_cluster_of_an_environment_that_is_gone_is_refused_by_its_name(monkeypatch):
    with socket.create_server(("", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", gone)
    said = refused("auto")
    assert f"RAY_ADDRESS={gone}: no Ray cluster answers at" in said and "refused" in said


def test_the_cluster_of_an_environment_is_left_alone_without_address(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "127.0.0.1:9"})
    prepare_environment(None)
    assert "RAY_ADDRESS" not in os.environ
    assert capsys.readouterr().out.startswith("RAY_ADDRESS=127.0.0.1:9 is ignored")


def test_what_listens_and_is_no_ray_is_refused(silent):
    assert "is not a Ray cluster (Timed out" in refused(f"localhost:{silent}")


def test_a_host_that_nobody_knows_is_refused():
    assert "no Ray cluster answers at nowhere.invalid:6379" in refused("nowhere.invalid:6379")


def test_a_missing_token_is_refused_with_where_it_goes(silent, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    said = refused(f"127.0.0.1:{silent}")
    assert "expects a different token" in said and "RAY_AUTH_TOKEN" in said
