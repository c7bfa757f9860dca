"""Packaging. `kernels/` stays at the top of the tree but installs as `nvembed_mcore.kernels`."""

from setuptools import find_packages, setup

setup(
    name="nvembed_mcore",
    version="0.1.0",
    description="Train NV-Embed-class text embedding models on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["nvembed_mcore*"]), "nvembed_mcore.kernels"],
    package_dir={"nvembed_mcore.kernels": "kernels"},
    package_data={
        "nvembed_mcore.checkpoint": ["hf_files/*"],
        "nvembed_mcore.data.synthetic": ["templates/*"],
        "nvembed_mcore.scaling": ["*.yaml", "hardware/*.yaml"],
    },
    install_requires=[
        "torch>=2.11,<2.15",
        "megatron-core>=0.16.1,<0.17",
        "transformers>=5.0,<6",
        "tokenizers>=0.22",
        "datasets>=4.0,<6",
        "numpy>=1.26,<3",
        "safetensors>=0.5",
        "psutil>=5.9",
        "jsonargparse[signatures]>=4.40,<5",
        "rich>=13.7",
        "pyyaml>=6",
        "mistral-common>=1.8,<2",
        "matplotlib>=3.8",
        "bm25s>=0.2.6",
        "pyarrow>=15",
        "xxhash>=3.4,<4",
    ],
    extras_require={
        "gpu": ["triton"],
        "eval": ["sentence-transformers>=5.1,<7"],
        "mine": ["faiss-cpu>=1.8"],
        "track": ["tensorboard>=2.16"],
        "test": [
            "faiss-cpu>=1.8",
            "peft>=0.17,<0.22",
            "pytest>=8",
            "pytest-xdist>=3.7,<4",
            "ruff>=0.15,<0.18",
            "sentencepiece>=0.2",
            "sentence-transformers>=5.1,<7",
            "tensorboard>=2.16",
            "triton>=3.2",
        ],
    },
    entry_points={"console_scripts": ["nvembed=nvembed_mcore.cli:main"]},
)
