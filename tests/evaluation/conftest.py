import pytest
import torch

from diffusers_gmem.evaluation import InceptionV3


@pytest.fixture(scope="session")
def inception():
    """Inception with random weights whose activations neither vanish nor explode."""
    torch.manual_seed(0)
    model = InceptionV3().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics of the one batch that comes
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        model(make_images(3, 16))
    return model.eval().requires_grad_(False)


def make_images(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
