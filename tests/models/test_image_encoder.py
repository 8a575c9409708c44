import pytest
import torch
from tiny_transformer import relative_error
from transformers import Dinov2Config, Dinov2Model, EfficientNetConfig, EfficientNetModel

from diffusers_gmem.models.image_encoder import GMemImageEncoder


def tiny_dinov2():
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7)
    return Dinov2Model(config).eval()


def tiny_efficientnet():
    torch.manual_seed(0)
    config = EfficientNetConfig(
        image_size=32,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        in_channels=[32, 8],
        out_channels=[8, 16],
        kernel_sizes=[3, 3],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 2],
    )
    return EfficientNetModel(config).eval()


@pytest.fixture(params=[tiny_dinov2, tiny_efficientnet], ids=["dinov2", "efficientnet"])
def backbone(request):
    return request.param()


def images(num_images, backbone):
    size = backbone.config.image_size
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_features_are_the_pooled_output_and_cell_means(backbone):
    encoder = GMemImageEncoder.from_backbone(backbone, hidden_layers=[1, 2], grid_size=2)
    pixel_values = images(2, backbone)
    output = backbone(pixel_values, output_hidden_states=True)
    hidden_states = output.hidden_states[2]
    if hidden_states.ndim == 3:
        hidden_states = hidden_states[:, 1:].transpose(1, 2).reshape(2, -1, 4, 4)
    side = hidden_states.shape[-1]
    first_cell = hidden_states[:, :, : side // 2, : side // 2].mean(dim=(2, 3))

    features = encoder(pixel_values=pixel_values).pooler_output
    groups = features.split(encoder.config.feature_dims, dim=1)
    torch.testing.assert_close(groups[0], output.pooler_output)
    torch.testing.assert_close(groups[2][:, ::4], first_cell)
    assert features.shape == (2, sum(encoder.config.feature_dims))


@torch.no_grad()
@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_snippets_are_centred_uncorrelated_and_ordered(backbone, whitening):
    encoder = GMemImageEncoder.from_backbone(backbone, hidden_layers=[1])
    # features of a chosen spectrum: with the random backbones' own, which is nearly flat, float32 would decide
    generator = torch.Generator().manual_seed(0)
    width = sum(encoder.config.feature_dims)
    scales = 0.5 ** torch.arange(8.0)
    features = torch.randn(40, 8, generator=generator) * scales @ torch.randn(8, width, generator=generator) + 3.0
    encoder.fit_projection(features, snippet_dim=4, whitening=whitening)
    snippets = encoder.project(features).double()

    covariance = snippets.T @ snippets / len(snippets)
    variances = covariance.diag()
    torch.testing.assert_close(snippets.mean(dim=0), torch.zeros(4).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(covariance, variances.diag(), rtol=0, atol=1e-3)
    if whitening == 1.0:
        torch.testing.assert_close(variances, torch.ones(4).double(), rtol=0, atol=1e-3)
    else:
        assert (variances.diff() < 0).all()


@torch.no_grad()
def test_groups_weigh_the_same_whatever_their_scale():
    encoder = GMemImageEncoder.from_backbone(tiny_dinov2(), hidden_layers=[1])
    features = torch.randn(30, sum(encoder.config.feature_dims), generator=torch.Generator().manual_seed(0))
    encoder.fit_projection(features, snippet_dim=5)
    snippets = encoder.project(features)
    features[:, encoder.config.feature_dims[0] :] *= 100
    encoder.fit_projection(features, snippet_dim=5)
    torch.testing.assert_close(encoder.project(features), snippets, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_round_trip_is_exact(backbone, tmp_path):
    encoder = GMemImageEncoder.from_backbone(backbone, hidden_layers=[2])
    pixel_values = images(6, backbone)
    features = encoder(pixel_values).pooler_output
    encoder.fit_projection(features, snippet_dim=3)
    snippets = encoder(pixel_values).pooler_output
    assert snippets.shape == (6, 3)
    torch.testing.assert_close(snippets, encoder.project(features))

    encoder.save_pretrained(tmp_path)
    loaded = GMemImageEncoder.from_pretrained(tmp_path)
    assert loaded.config.snippet_dim == 3
    assert torch.equal(loaded(pixel_values).pooler_output, snippets)
    assert loaded.to(torch.bfloat16)(pixel_values.bfloat16()).pooler_output.dtype == torch.bfloat16


def fitted(backbone):
    encoder = GMemImageEncoder.from_backbone(backbone, hidden_layers=[1])
    width = sum(encoder.config.feature_dims)
    encoder.fit_projection(torch.randn(9, width, generator=torch.Generator().manual_seed(0)), snippet_dim=4)
    return encoder


@torch.no_grad()
@pytest.mark.parametrize(
    "save, load",
    [
        ({"max_shard_size": "5KB"}, {}),
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({}, {"device_map": "cpu"}),
        ({}, {"low_cpu_mem_usage": False}),
    ],
    ids=["shards", "variant", "device_map", "without_meta_device"],
)
def test_ways_of_saving_and_loading(backbone, save, load, tmp_path):
    encoder, pixel_values = fitted(backbone), images(2, backbone)
    encoder.save_pretrained(tmp_path, **save)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in save)
    loaded = GMemImageEncoder.from_pretrained(tmp_path, **load)
    assert torch.equal(loaded(pixel_values).pooler_output, encoder(pixel_values).pooler_output)
    assert GMemImageEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16, **load).projection.dtype == torch.bfloat16


@torch.no_grad()
def test_output_as_a_tuple(backbone):
    encoder, pixel_values = fitted(backbone), images(2, backbone)
    (snippets,) = encoder(pixel_values, return_dict=False)
    assert torch.equal(snippets, encoder(pixel_values).pooler_output)


@torch.no_grad()
def test_group_offload_and_layerwise_casting(backbone):
    encoder, pixel_values = fitted(backbone), images(2, backbone)
    expected = encoder(pixel_values).pooler_output
    encoder.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(encoder(pixel_values).pooler_output, expected)
    encoder.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert torch.bfloat16 in {parameter.dtype for parameter in encoder.parameters()}
    assert relative_error(encoder(pixel_values).pooler_output, expected) < 5e-2


def test_wrong_arguments_are_named(backbone):
    with pytest.raises(ValueError, match="hidden_layers.*got 9"):
        GMemImageEncoder.from_backbone(backbone, hidden_layers=[9])
    encoder = GMemImageEncoder.from_backbone(backbone)
    width = sum(encoder.config.feature_dims)
    with pytest.raises(ValueError, match="`features` must have shape"):
        encoder.fit_projection(torch.zeros(4, width + 1), snippet_dim=2)
    with pytest.raises(ValueError, match="`snippet_dim` must be in 1..3 .* got 4"):
        encoder.fit_projection(torch.zeros(4, width), snippet_dim=4)
