"""Train NV-Embed-class text embedding models on Megatron-Core (arXiv 2405.17428)."""

__version__ = "0.1.0"
