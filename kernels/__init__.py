"""Kernels, each with a plain PyTorch reference. Installed as `nvembed_mcore.kernels`."""
