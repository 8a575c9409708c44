import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE, AutoencoderTiny

from diffusers_gmem.data import encode_images, load_autoencoder


def make(kind):
    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=2,
            norm_num_groups=4,
        )
    if kind == "AutoencoderDC":
        channels = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
        layers = {f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")}
        scales = {f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")}
        return AutoencoderDC(latent_channels=4, attention_head_dim=4, **channels, **layers, **scales)
    if kind == "AutoencoderTiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    return AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        patch_size=4,
        encoder_input_size=28,
    )


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC", "AutoencoderRAE", "AutoencoderTiny"])
def test_an_autoencoder_is_chosen_by_name_alone(tmp_path, kind):
    original = make(kind).eval()
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
