"""Hosting Megatron-Core on a CPU must leave everything else as it was."""

import torch

from nvembed_mcore import device


def test_models_built_on_the_meta_device_stay_there():
    device.prepare()
    with torch.device("meta"):
        made = [torch.tensor([1.0]), torch.zeros(2), torch.empty(2), torch.ones(2), torch.full((2,), 3.0)]
    assert all(tensor.is_meta for tensor in made)


def test_cuda_means_cpu_without_cuda():
    device.prepare()
    if not device.has_cuda():
        assert torch.zeros(1, device="cuda").device == torch.device("cpu")
        assert torch.tensor([1], device=torch.device("cuda", 0)).device == torch.device("cpu")
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
