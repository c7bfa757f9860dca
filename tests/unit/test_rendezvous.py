"""How processes find each other, and what is said when they do not."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from nvembed_mcore.config import ConfigError
from nvembed_mcore.parallel import rendezvous

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SOON = timedelta(seconds=1)


@pytest.fixture
def launched(monkeypatch):
    for name in (*LAUNCHED, "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)

    def set_variables(**changes: str | None) -> None:
        for name, value in {**LAUNCHED, **changes}.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_variables


def test_without_a_launcher_there_is_no_place(launched, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rendezvous.place() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "RANK is set, but MASTER_ADDR is not"),
        ({"MASTER_PORT": None}, "MASTER_PORT must be a number, got None"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
    ],
)
def test_a_launcher_says_all_or_the_variable_is_named(launched, changes, message):
    launched(**changes)
    with pytest.raises(ConfigError, match=message):
        rendezvous.place()


@pytest.mark.parametrize(
    ("changes", "is_single"),
    [
        ({}, True),
        ({"MASTER_ADDR": "localhost"}, True),
        ({"MASTER_ADDR": "n1", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"MASTER_ADDR": "n1", "LOCAL_WORLD_SIZE": "1"}, False),
        ({"MASTER_ADDR": "n1"}, False),
    ],
)
def test_one_host_is_recognised(launched, changes, is_single):
    launched(**changes)
    assert rendezvous.place().is_single_node is is_single


def test_a_host_that_does_not_resolve_is_named(launched):
    launched(MASTER_ADDR="no-such-host.invalid", LOCAL_WORLD_SIZE="1")
    with pytest.raises(ConfigError, match="MASTER_ADDR 'no-such-host.invalid' does not resolve on"):
        rendezvous.open_store(rendezvous.place(), SOON)


@pytest.mark.parametrize("local_world_size", ["2", "1"])
def test_a_port_that_is_taken_is_named(launched, local_world_size):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        host = "127.0.0.1" if local_world_size == "2" else socket.gethostname()
        launched(MASTER_ADDR=host, MASTER_PORT=str(port), LOCAL_WORLD_SIZE=local_world_size)
        with pytest.raises(rendezvous.RendezvousError, match=f"{port}.*[Aa]ddress already in use"):
            rendezvous.open_store(rendezvous.place(), SOON)


def test_ranks_that_do_not_come_are_missed(launched):
    launched(MASTER_PORT="0")
    with pytest.raises(rendezvous.RendezvousError, match="rank 0 of 2 could not meet the others.*1/2 clients joined"):
        rendezvous.open_store(rendezvous.place(), SOON)


def test_the_users_own_interface_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    rendezvous.listen_on_loopback_only()
    import os

    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
