"""Runs that are tracked, the wandb of the library's trackers, and a server that answers nothing of use."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from nvembed_mcore.config import RunConfig

KEY = "CANARY0123456789abcdef0123456789abcdef01"  # as long as one of W&B


@contextmanager
def broken_server() -> Iterator[tuple[str, list[str]]]:
    """Its address and what it was asked for: W&B's, or a proxy that everything sent by HTTP goes through."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_error(500)

        do_GET = do_CONNECT = do_HEAD = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def services() -> list[psutil.Process]:
    """Of wandb that this process has started."""
    return [one for one in psutil.Process().children(recursive=True) if one.name() == "wandb-core"]


@contextmanager
def surroundings(variables: Mapping[str, str], leave_out: Sequence[str] = ()) -> Iterator[None]:
    """Variables of the environment, and after the block neither these nor what wandb started in it."""
    before = dict(os.environ)
    os.environ.update(variables)
    for name in leave_out:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        running = services()
        if running:
            sys.modules["wandb"].teardown()
            psutil.wait_procs(running, timeout=20)
        os.environ.clear()
        os.environ.update(before)


def train_tracked(configs: list[RunConfig], variables: Mapping[str, str], seconds: float = 30.0) -> dict[str, Any]:
    """Train one after another in this process, with these variables in its environment.

    Args:
        seconds: that W&B's server has to answer.

    Returns:
        the messages about trackers (`said`), and whether wandb's service ran (Megatron-Core imports wandb always).
    """
    from nvembed_mcore import trackers
    from nvembed_mcore.train import train

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("nvembed_mcore.trackers").addHandler(handler)
    seconds_before, trackers.STARTING_SECONDS = trackers.STARTING_SECONDS, seconds
    try:
        with surroundings(variables):
            for config in configs:
                train(config)
            return {"said": said, "served": bool(services())}
    finally:
        logging.getLogger("nvembed_mcore.trackers").removeHandler(handler)
        trackers.STARTING_SECONDS = seconds_before


def run_commands(lines: Sequence[str], folder: Path) -> list[int]:
    """`nvembed ...`, one after another in a folder, as from a shell; the exit status of each."""
    from nvembed_mcore.cli import main
    from nvembed_mcore.log import close_logging

    before = Path.cwd()
    os.chdir(folder)
    try:
        with surroundings({}, leave_out=("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
            return [int(main(shlex.split(line)[1:])) for line in lines]
    finally:
        os.chdir(before)
        close_logging()


def records_of(folder: Path) -> list[dict[str, Any]]:
    """What W&B's own reader finds in the folder of one of its runs."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
