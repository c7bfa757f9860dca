"""A run's configuration from a YAML file and options, for the subcommands that read one."""

from __future__ import annotations

import os

from nvembed_mcore.config import ConfigError, RunConfig


def read_run_config(arguments: list[str]) -> RunConfig:
    """`[CONFIG.yaml] [--field.of.the.tree value ...]` as a configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: a field is unknown, missing, or has a value that cannot work.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

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
    source = f"{arguments[1]} or the options" if arguments[:1] == ["--config"] else "the options"
    try:
        fields = parser.instantiate(parser.parse_args(arguments)).as_dict()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{error}\n(in {source})") from error
    except ArgumentError as error:
        raise ConfigError(f"{error}\n(in {source}; `nvembed train --help` lists all fields)") from error
    fields.pop("config")
    return RunConfig(**fields)
