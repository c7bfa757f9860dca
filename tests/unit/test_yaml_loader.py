"""Configurations are YAML 1.2."""

from __future__ import annotations

import math

import pytest
import yaml

from nvembed_mcore.cli import yaml_loader


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("7", 7),
        ("-7", -7),
        ("0123", "0123"),
        ("1e-5", 1e-5),
        ("2E5", 2e5),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1e", "1e"),
        ("v1.0", "v1.0"),
        ("[q, off]", ["q", "off"]),
        ("a: {b: off}", {"a": {"b": "off"}}),
    ],
)
def test_values(text, value):
    found = yaml_loader.load(text)
    assert (found, type(found)) == (value, type(value))


def test_no_objects():
    with pytest.raises(yaml.YAMLError):
        yaml_loader.load("!!python/object/apply:os.getcwd []")
    assert yaml.safe_load("off") is False  # the library's own loader is as it was
