"""`nvembed train CONFIG.yaml [--field.of.the.tree value ...]`: the configuration tree as options."""

from __future__ import annotations

from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.stop import StopRequests


def train(arguments: list[str], stops: StopRequests) -> None:
    """`nvembed train CONFIG.yaml [--field.of.the.tree value ...]`."""
    config = read_run_config(arguments)
    from nvembed_mcore.train import train as run

    run(config, stops)
