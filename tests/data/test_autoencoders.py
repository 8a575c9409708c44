import pytest
import torch
from tiny_training import make_autoencoder

from diffusers_gmem.data import encode_images, load_autoencoder


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC", "AutoencoderRAE", "AutoencoderTiny"])
def test_an_autoencoder_is_chosen_by_name_alone(tmp_path, kind):
    original = make_autoencoder(kind).eval()
    original.save_pretrained(tmp_path / "vae")
    autoencoder = load_autoencoder(str(tmp_path), subfolder="vae")
    assert type(autoencoder).__name__ == kind
    assert not autoencoder.training

    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents, logvar = encode_images(autoencoder, images)
    with torch.no_grad():
        if kind == "AutoencoderKL":
            posterior = original.encode(images).latent_dist
            torch.testing.assert_close(latents, posterior.mean)
            torch.testing.assert_close(logvar, posterior.logvar)
        else:
            # RAE's images are in [0, 1], as its encoder's mean and standard deviation say
            images = images / 2 + 0.5 if kind == "AutoencoderRAE" else images
            torch.testing.assert_close(latents, original.encode(images, return_dict=False)[0])
            assert logvar is None
    assert latents.ndim == 4


def test_something_else_is_refused(tmp_path):
    from diffusers import UNet2DModel

    UNet2DModel(
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=2,
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be an autoencoder, got a UNet2DModel"):
        load_autoencoder(str(tmp_path))
