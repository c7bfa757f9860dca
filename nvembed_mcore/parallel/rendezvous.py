"""How the processes of a run find each other: the store that they meet at, and the addresses that they listen on.

Where all of them are on one host, nothing listens beyond it: connections are not authenticated. `torchrun` hosts the
store itself, on all interfaces; started without it, rank 0 hosts the store.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from nvembed_mcore.config import ConfigError
from nvembed_mcore.exits import Exit

_LOOPBACK = "127.0.0.1"


class RendezvousError(ConnectionError):
    """The processes could not meet; another attempt may work."""

    exit_status = Exit.CRASHED


@dataclass(frozen=True)
class Place:
    """This process among the others, as a launcher's variables say it."""

    rank: int
    world_size: int
    host: str
    port: int
    is_single_node: bool
    has_agent: bool
    """Whether `torchrun`'s agent hosts the store."""


def place() -> Place | None:
    """What the launcher says; None where there is none. Some clusters set WORLD_SIZE for every process, launched or
    not; RANK comes only from a launcher.

    Raises:
        ConfigError: a variable is missing or is not a number.
    """
    if "RANK" not in os.environ:
        return None
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        raise ConfigError("RANK is set, but MASTER_ADDR is not: it names the host of rank 0")
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return Place(
        rank=rank,
        world_size=world_size,
        host=host,
        port=_number("MASTER_PORT"),
        is_single_node=local == str(world_size) or _is_loopback(host),
        has_agent=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _number(name: str) -> int:
    text = os.environ.get(name)
    if text is None or not text.isdecimal():
        raise ConfigError(f"RANK is set, so {name} must be a number, got {text!r}")
    return int(text)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen_on_loopback_only() -> None:
    """Gloo and NCCL take the loopback interface, unless the user has named another."""
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def open_store(here: Place, timeout: timedelta, *, wait_for_all: bool = True) -> dist.TCPStore:
    """The store that all processes of the run meet at.

    Args:
        wait_for_all: False: rank 0 gets the store although others are still to come.

    Raises:
        ConfigError: MASTER_ADDR does not resolve.
        RendezvousError: MASTER_PORT is taken, or the others did not come within `timeout`.
    """
    hosts = here.rank == 0 and not here.has_agent
    # On one host rank 0 listens on the loopback address, whatever the name of the host means.
    address = _LOOPBACK if here.is_single_node and not here.has_agent else here.host
    try:
        socket.getaddrinfo(address, here.port)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {here.host!r} does not resolve on {socket.gethostname()}: {error}") from error
    listener = _listener(here.port) if hosts and here.is_single_node else None
    try:
        return dist.TCPStore(
            address,
            here.port,
            here.world_size,
            is_master=hosts,
            timeout=timeout,
            wait_for_workers=wait_for_all,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except RuntimeError as error:
        raise RendezvousError(
            f"rank {here.rank} of {here.world_size} could not meet the others at MASTER_ADDR:MASTER_PORT = "
            f"{here.host}:{here.port}: {str(error).splitlines()[0]}"
        ) from error


def _listener(port: int) -> socket.socket:
    """A socket that listens on the loopback address alone; torch's own server would listen on all."""
    try:
        return socket.create_server((_LOOPBACK, port), backlog=4096)
    except OSError as error:
        raise RendezvousError(f"rank 0 cannot listen on MASTER_PORT {port} of {_LOOPBACK}: {error}") from error
