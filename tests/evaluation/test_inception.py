import hashlib
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import diffusers_gmem.evaluation.inception as inception_module
from diffusers_gmem.evaluation import InceptionV3, load_inception
from diffusers_gmem.evaluation.inception import resize_like_tensorflow


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (2, 3, 20, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def run(inception, images):
    """The features of the images, and what went into and came out of each module."""
    inputs, outputs, hooks = {}, {}, []
    for name, module in inception.named_modules():

        def note(module, args, output, name=name):
            inputs[name], outputs[name] = args[0], output

        hooks.append(module.register_forward_hook(note))
    features = inception(images)
    for hook in hooks:
        hook.remove()
    return features, inputs, outputs


def test_the_weights_are_those_of_the_port(inception):
    state_dict = inception.state_dict()
    # torchvision's network without the auxiliary classifier, and 1008 instead of 1000 classes
    assert sum(p.numel() for p in inception.parameters()) == 27_161_264 - 3_326_696 + 8 * 2049
    assert len(state_dict) == 94 * 6 + 2
    assert list(dict.fromkeys(name.split(".")[0] for name in state_dict)) == [
        *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
        *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
        *("Mixed_7a", "Mixed_7b", "Mixed_7c", "fc"),
    ]
    shapes = {
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch3x3dbl_3.bn.running_var": (96,),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_4.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
    }
    assert {name: tuple(state_dict[name].shape) for name in shapes} == shapes


def test_the_grids_are_those_of_the_graph(run):
    _, _, outputs = run
    shapes = {
        "Conv2d_1a_3x3": (32, 149),
        "Conv2d_2a_3x3": (32, 147),
        "Conv2d_2b_3x3": (64, 147),
        "Conv2d_3b_1x1": (80, 73),
        "Conv2d_4a_3x3": (192, 71),
        "Mixed_5b": (256, 35),
        "Mixed_5d": (288, 35),
        "Mixed_6a": (768, 17),
        "Mixed_6e": (768, 17),
        "Mixed_7a": (1280, 8),
        "Mixed_7c": (2048, 8),
    }
    assert {name: tuple(outputs[name].shape[1:3]) for name in shapes} == shapes


def test_the_features_are_those_that_adm_takes(inception, run):
    features, _, outputs = run
    assert features.pool.shape == (2, InceptionV3.pool_dim) and features.spatial.shape == (2, InceptionV3.spatial_dim)
    torch.testing.assert_close(features.pool, F.adaptive_avg_pool2d(outputs["Mixed_7c"], 1).flatten(1))
    # "mixed_6/conv", channels last
    branch = outputs["Mixed_6d.branch1x1"]
    assert branch.min() == 0
    expected = branch[:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    torch.testing.assert_close(features.spatial, expected, rtol=0, atol=0)
    logits = inception.logits(features.pool)
    torch.testing.assert_close(logits, features.pool @ inception.fc.weight.T)


def test_values_are_brought_to_minus_one_to_one(inception, run):
    _, inputs, _ = run
    images = torch.tensor([0.0, 128.0, 255.0]).view(1, 3, 1, 1).expand(1, 3, 299, 299)
    seen = []
    hook = inception.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inception(images)
    hook.remove()
    assert seen[0][0, :, 0, 0].tolist() == [-1, 0, 127 / 128]
    assert inputs["Conv2d_1a_3x3"].shape == (2, 3, 299, 299)


def test_bytes_and_floats_are_the_same(inception, images, run):
    torch.testing.assert_close(inception(images.float()).pool, run[0].pool, rtol=0, atol=0)


def test_pooling_is_that_of_the_graph(inception, run):
    _, inputs, outputs = run
    for name in ("Mixed_5b", "Mixed_6d", "Mixed_7b"):
        hidden_states = inputs[name]
        # A sum over nine pixels, of which the border has fewer
        total = F.avg_pool2d(hidden_states, 3, stride=1, padding=1, divisor_override=1)
        number = F.avg_pool2d(torch.ones_like(hidden_states), 3, stride=1, padding=1, divisor_override=1)
        torch.testing.assert_close(inputs[f"{name}.branch_pool"], total / number, rtol=1e-4, atol=1e-5)
    expected = F.max_pool2d(inputs["Mixed_7c"], 3, stride=1, padding=1)
    torch.testing.assert_close(inputs["Mixed_7c.branch_pool"], expected, rtol=0, atol=0)
    for name in ("Mixed_6a", "Mixed_7a"):
        pooled = F.max_pool2d(inputs[name], 3, stride=2)
        torch.testing.assert_close(outputs[name][:, -pooled.shape[1] :], pooled, rtol=0, atol=0)


@pytest.mark.parametrize("height, width", [(5, 7), (299, 299), (320, 301)])
def test_resizing_is_that_of_tensorflow_1(height, width):
    image = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(0)) * 255
    pixels, expected = image[0].numpy().astype(np.float64), np.empty((2, 299, 299))
    rows, columns = (np.arange(299) * (length / 299) for length in (height, width))
    for i, y in enumerate(rows):
        y0, y1 = int(y), min(int(y) + 1, height - 1)
        for j, x in enumerate(columns):
            x0, x1 = int(x), min(int(x) + 1, width - 1)
            top = pixels[:, y0, x0] * (1 - x % 1) + pixels[:, y0, x1] * (x % 1)
            bottom = pixels[:, y1, x0] * (1 - x % 1) + pixels[:, y1, x1] * (x % 1)
            expected[:, i, j] = top * (1 - y % 1) + bottom * (y % 1)
    np.testing.assert_allclose(resize_like_tensorflow(image, 299)[0], expected, atol=0.02)


def test_other_shapes_are_refused(inception):
    with pytest.raises(ValueError, match=r"\(batch_size, 3, height, width\), got \(1, 8, 8, 3\)"):
        inception(torch.zeros(1, 8, 8, 3))


def test_weights_come_from_files_and_checked_downloads(inception, tmp_path, monkeypatch):
    def assert_loaded(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        for name, tensor in inception.state_dict().items():
            if "num_batches_tracked" not in name:
                assert model.state_dict()[name].equal(tensor), name

    # Of the time before BatchNorm counted its batches, as the published file may be
    state_dict = {k: v for k, v in inception.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(state_dict, tmp_path / "weights.pth")
    assert_loaded(load_inception(tmp_path / "weights.pth"))
    save_file(inception.state_dict(), tmp_path / "weights.safetensors")
    assert_loaded(load_inception(str(tmp_path / "weights.safetensors")))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    sha256 = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    for digits in (sha256[:8], "0" * 8):
        (tmp_path / f"weights-{digits}.pth").hardlink_to(tmp_path / "weights.pth")
    monkeypatch.setattr(inception_module, "WEIGHTS_URL", (tmp_path / f"weights-{sha256[:8]}.pth").as_uri())
    assert_loaded(load_inception())
    monkeypatch.setattr(inception_module, "WEIGHTS_URL", (tmp_path / f"weights-{'0' * 8}.pth").as_uri())
    with pytest.raises(RuntimeError, match="invalid hash value"):
        load_inception()


def test_other_weights_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_inception(tmp_path / "other.pth")
    torch.save(InceptionV3, tmp_path / "class.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_inception(tmp_path / "class.pth")
    with pytest.raises(FileNotFoundError):
        load_inception(tmp_path / "missing.pth")
