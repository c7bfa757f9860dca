"""A run's configuration from a YAML file and options, for the subcommands that read one."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from nvembed_mcore.cli import yaml_loader
from nvembed_mcore.cli.parser import meant
from nvembed_mcore.config import ConfigError, RunConfig


def read_run_config(arguments: list[str]) -> RunConfig:
    """`[CONFIG.yaml] [--field.of.the.tree value ...]` as a configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: a field is unknown, missing, or has a value that cannot work.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_loader, set_parsing_settings

    set_loader("yaml", yaml_loader.load)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="nvembed train",
        usage="nvembed train CONFIG.yaml [--field value ...]",
        description="Train one stage. With several processes: torchrun --nproc-per-node N -m nvembed_mcore train ...",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; the first argument may be it as well")
    parser.add_class_arguments(RunConfig)
    if arguments and not arguments[0].startswith("-"):
        if not os.path.isfile(arguments[0]):
            raise FileNotFoundError(f"no configuration file at {arguments[0]}")
        arguments = ["--config", *arguments]
    for file in _files(arguments):
        _check_shape(RunConfig, _tree(file), file)
    source = f"{arguments[1]} or the options" if arguments[:1] == ["--config"] else "the options"
    try:
        fields = parser.instantiate(parser.parse_args(arguments)).as_dict()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{error}\n(in {source})") from error
    except ArgumentError as error:
        options = {option for action in parser._actions for option in action.option_strings}
        options -= {option.rpartition(".")[0] for option in options}  # a group's takes a file: nobody means that
        likely = meant(re.findall(r"(?<!\S)--[^\s=]+", str(error)), options)
        raise ConfigError(f"{error}{likely}\n(in {source}; `nvembed train --help` lists all fields)") from error
    fields.pop("config")
    return RunConfig(**fields)


def _files(arguments: list[str]) -> Iterator[str]:
    """The files that the options name, so far as they are there."""
    for option, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, joined = option.partition("=")
        if name == "--config" and os.path.isfile(joined or value):
            yield joined or value


def _tree(file: str) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is none: then the parser, which is more lenient, must not see it.
    """
    try:
        return yaml_loader.load(Path(file).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{error}\n(in {file})") from error


def _check_shape(kind: Any, value: Any, file: str, field: str = "") -> None:
    """Refuse anything but fields where a file has a part of the tree.

    jsonargparse takes a text there, or what stands under `class_path`, for the name of a class, and imports its module
    before it says that it wants another class.

    Args:
        kind: type of the field.
        field: its name in the tree.

    Raises:
        ConfigError: it names the file and the field.
    """
    where = f"{file}: {field or 'a configuration'}"
    if dataclasses.is_dataclass(kind) and value is not None:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must hold fields with their values, got {value!r}")
        for name in ("class_path", "init_args", "config" if not field else "dict_kwargs"):
            if name in value:
                raise ConfigError(f"{where} has no field {name!r} (a file cannot name classes or other files)")
        kinds = get_type_hints(kind)
        for name in value.keys() - kinds.keys():
            if "." not in str(name):
                raise ConfigError(f"{where} has no field {name!r}{meant([str(name)], kinds)}")
        for name in kinds.keys() & value.keys():
            _check_shape(kinds[name], value[name], file, f"{field}.{name}" if field else name)
    elif isinstance(value, list) and any(map(dataclasses.is_dataclass, get_args(kind))):
        for number, one in enumerate(value):
            _check_shape(get_args(kind)[0], one, file, f"{field}.{number}")
