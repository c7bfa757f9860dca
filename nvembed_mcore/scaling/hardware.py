"""Devices, links and clusters, read from data files that give a source for every number.

`hardware/<name>.yaml` is a device, `hardware/links.yaml` has the links, `hardware/fitted*.yaml` the constants of the
time model, which `tools/scaling/validate.py --fit` writes. Numbers of a device or link are `{value, source}`, fitted
ones `{value, low, high}` with one source for the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from nvembed_mcore.config_data import ConfigError

FOLDER = Path(__file__).parent / "hardware"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator. Rates are per second."""

    name: str
    peak_flops: dict[str, float]
    """Data sheet without sparsity, by data type: `float32`, `bfloat16`, `fp8`. float32 is that of plain cores."""
    matmul_flops: dict[str, float]
    """The fastest large matrix product that somebody measured, by data type."""
    reference_flops: float
    """Rate of the product for which the constant `matmul_half` holds."""
    attention_flops: tuple[float, float]
    """What fused attention over long texts reaches, forward and backward."""
    attention_half: tuple[float, float]
    """Length of a text at which it reaches half of that, forward and backward."""
    memory_bytes: float
    """Bytes that a process can use."""
    memory_bandwidth: float
    """Bytes of its memory, data sheet."""
    gpus_per_node: int
    """Devices that the fast link connects."""
    intra_node: str
    """Name of the fast link."""
    inter_node: str
    """Name of the network between nodes, a port for each device."""
    constants: str
    """Which file of fitted constants is its own."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one device can send over a link."""

    name: str
    bandwidth: float
    """Bytes a second in one direction, as large collectives reach it."""
    latency: float
    """Seconds that a message of no size takes to the next device."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A fitted number and the range in which it may lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What the time model does not know from data sheets (seconds.py says where each one enters)."""

    matmul_share: Constant
    """Share of the fastest measured product that the products of a step reach, when they are large."""
    matmul_half: Constant
    """Rows, inputs or outputs of a product at which it reaches half of that."""
    memory_share: Constant
    """Share of the memory's bandwidth that norms, activations and casts reach."""
    host_layer: Constant
    """Seconds until the host has queued one layer's forward pass."""
    host_step: Constant
    """Seconds of a step in which the host alone works: the plan, packs, calls of the optimizer."""
    exposed: Constant
    """Share of overlapped communication that stays visible."""
    unexplained: Constant
    """Factor on the whole, 1: its range is the spread of what the terms leave unexplained."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of one kind of device."""

    device: Device
    intra_node: Link
    inter_node: Link
    constants: Constants

    def with_constants(self, **values: float) -> Cluster:
        """The same with other values of constants, for fits and for the ends of a range."""
        changed = {name: replace(getattr(self.constants, name), value=value) for name, value in values.items()}
        return replace(self, constants=replace(self.constants, **changed))


def device_names() -> list[str]:
    """Names that `cluster` takes."""
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [name for name in known if name != "links" and not name.startswith("fitted")]


@lru_cache
def cluster(name: str) -> Cluster:
    """A cluster of devices by their name, `h200` for example.

    Raises:
        ConfigError: no data file has that name.
    """
    if name.lower() not in device_names():
        raise ConfigError(f"no device {name!r}; there are {', '.join(device_names())}")
    raw = _read(name.lower())
    device = Device(
        name=name.lower(),
        peak_flops={dtype: number(entry) for dtype, entry in raw["peak_flops"].items()},
        matmul_flops={dtype: number(entry) for dtype, entry in raw["matmul_flops"].items()},
        reference_flops=number(raw["reference_flops"]),
        attention_flops=tuple(number(raw["attention"][way]["flops"]) for way in ("forward", "backward")),
        attention_half=tuple(number(raw["attention"][way]["half"]) for way in ("forward", "backward")),
        memory_bytes=number(raw["memory_bytes"]),
        memory_bandwidth=number(raw["memory_bandwidth"]),
        gpus_per_node=int(number(raw["gpus_per_node"])),
        intra_node=raw["intra_node"],
        inter_node=raw["inter_node"],
        constants=raw["constants"],
    )
    return Cluster(
        device=device,
        intra_node=link(device.intra_node),
        inter_node=link(device.inter_node),
        constants=constants(device.constants),
    )


def link(name: str) -> Link:
    """A link of `links.yaml`."""
    raw = _read("links")[name]
    return Link(name=name, bandwidth=number(raw["bandwidth"]), latency=number(raw["latency"]))


def constants(name: str) -> Constants:
    """The fitted constants in a file."""
    raw = _read(name)["constants"]
    return Constants(
        **{key: Constant(**{end: float(one) for end, one in entry.items()}) for key, entry in raw.items()}
    )


def peak_flops(device_name: str) -> float | None:
    """Peak of one device in FLOP/s for bfloat16 and float16 without sparsity, or None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, for example `NVIDIA H100 80GB HBM3`.
    """
    words = set(re.findall(r"[A-Z0-9]+", device_name.upper()))
    # A MIG slice bears the name of the whole device but has only a part of its cores.
    if "MIG" in words:
        return None
    return next((peak for needed, peak in _named_peaks() if needed <= words), None)


@lru_cache
def _named_peaks() -> list[tuple[frozenset[str], float]]:
    """(words that a device's name must have, peak); names with more words come first."""
    models = [model for name in device_names() for model in _read(name).get("models", [])]
    rows = [(frozenset(model["words"]), number(model["bfloat16"])) for model in models]
    return sorted(rows, key=lambda row: -len(row[0]))


def number(entry: dict[str, Any]) -> float:
    """The value of an entry that says where it comes from."""
    assert entry.keys() == {"value", "source"} and entry["source"], entry
    return float(entry["value"])


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
