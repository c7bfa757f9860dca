"""Train NV-Embed-class text embedding models on Megatron-Core (arXiv 2405.17428).

The names of `__all__` are those to build on (docs/how-to/python-api.md). They are loaded when they are asked for:
importing the package takes no torch, and neither do the classes of the configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvembed_mcore.api import (
        CheckpointError,
        DataError,
        Embedder,
        ExportedEncoder,
        Mining,
        Record,
        Rules,
        WeightsError,
        encode_file,
        evaluate_beir,
        export_hf,
        import_hf,
        mine,
        open_embedder,
        open_shards,
        read_metrics,
        read_records,
        read_run_config,
        search_files,
        train_model,
        write_records,
    )
    from nvembed_mcore.config import (
        CheckpointConfig,
        ConfigError,
        DataConfig,
        DatasetConfig,
        DistillationConfig,
        EvalConfig,
        EvalSetConfig,
        LogConfig,
        LoraConfig,
        LossConfig,
        ModelConfig,
        OptimConfig,
        ParallelConfig,
        PoolingConfig,
        PrecisionConfig,
        RunConfig,
        StepConfig,
        WandbConfig,
    )

__version__ = "0.1.0"

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DatasetConfig",
    "DistillationConfig",
    "Embedder",
    "EvalConfig",
    "EvalSetConfig",
    "ExportedEncoder",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "Mining",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PoolingConfig",
    "PrecisionConfig",
    "Record",
    "Rules",
    "RunConfig",
    "StepConfig",
    "WandbConfig",
    "WeightsError",
    "encode_file",
    "evaluate_beir",
    "export_hf",
    "import_hf",
    "mine",
    "open_embedder",
    "open_shards",
    "read_metrics",
    "read_records",
    "read_run_config",
    "search_files",
    "train_model",
    "write_records",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("Config") or name == "ConfigError":
        from nvembed_mcore import config as room
    else:
        from nvembed_mcore import api as room
    return getattr(room, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
