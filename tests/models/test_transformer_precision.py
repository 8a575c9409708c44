# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""What stays in float32, what it costs in accuracy that the rest does not, and that nothing is ever in float64."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from reference_cases import case_state_dict, case_tensors, reference_cases
from tiny_transformer import count_calls, each_backbone, make_inputs, make_model, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_gmem import GMemTransformer2DModel
from diffusers_gmem.conversion.transformer import convert_transformer


each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("factor", [1, 10])
@each_dtype
@pytest.mark.parametrize("case", reference_cases("model_forward"), ids=lambda case: case["id"])
def test_half_precision_is_close_to_float32(case, dtype, factor, autocast):
    tensors = case_tensors(case)
    model = convert_transformer(case_state_dict(case), case["options"]["num_heads"])
    x, t, memory = factor * tensors["x"], tensors["t"], factor * tensors["c"]
    with torch.no_grad():
        expected = model(x, t, memory, return_alignment=True)
        if not autocast:
            model, x, memory = model.to(dtype), x.to(dtype), memory.to(dtype)
        with torch.autocast("cpu", dtype, enabled=autocast):
            output = model(x, t, memory, return_alignment=True)
    assert output.sample.dtype == output.alignment.dtype == dtype
    assert relative_error(output.sample, expected.sample) < 2e-2
    assert relative_error(output.alignment, expected.alignment) < 2e-2


@each_backbone
@each_dtype
def test_sum_of_the_blocks_is_float32(options, dtype):
    model = make_model(**options)
    with torch.no_grad():
        # each block adds 60,000; float16 ends at 65,504
        for block in model.transformer_blocks:
            block.adaln_linear.weight.zero_()
            block.adaln_linear.bias.fill_(1.0)
            block.ff.linear_out.bias.fill_(6e4)
        calls = count_calls(model.transformer_blocks[-1])
        model.to(dtype)
        output = model(**make_inputs() | {"hidden_states": make_inputs()["hidden_states"].to(dtype)})
    assert calls[0][2].dtype == torch.float32
    assert calls[0][2].mean() > 1.7e5
    assert output.sample.isfinite().all()


class FailOnFloat64(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            assert not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.float64, func
        return result


@each_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_float64(options, dtype):
    model = make_model(**options).train().to(dtype)
    inputs = make_inputs() | {"hidden_states": make_inputs()["hidden_states"].to(dtype)}
    with FailOnFloat64() as mode:
        output = model(**inputs, return_alignment=True)
        forward_operations = mode.operations
        (output.sample.mean() + output.alignment.mean()).backward()
    assert forward_operations > 100
    assert mode.operations > 2 * forward_operations
    with pytest.raises(AssertionError), FailOnFloat64():
        torch.zeros(1) + torch.zeros(1, dtype=torch.float64)


@pytest.fixture
def warn_always():
    torch.set_warn_always(True)  # torch gives many of its warnings once per process
    yield
    torch.set_warn_always(False)


@each_backbone
@each_dtype
def test_half_precision_runs_without_warnings(options, dtype, warn_always):
    model = make_model(**options).to(dtype)
    inputs = make_inputs() | {"hidden_states": make_inputs()["hidden_states"].to(dtype)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, return_alignment=True)


@each_backbone
def test_autocast_trains_without_warnings(options, warn_always):
    model = make_model(**options).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**make_inputs(), return_alignment=True)
        (output.sample.float().square().mean() + output.alignment.float().square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


def cast_by_layers(storage_dtype):
    def cast(model, dtype):
        model.to(dtype).enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=dtype)
        return model

    return cast


CASTS = {
    "to": lambda model, dtype: model.to(dtype),
    "to_device_and_dtype": lambda model, dtype: model.to("cpu", dtype),
    "half": lambda model, dtype: model.half().to(dtype),
    "bfloat16": lambda model, dtype: model.bfloat16().to(dtype),
    "back_and_forth": lambda model, dtype: model.to(dtype).float().to(dtype),
    "layerwise_float8": cast_by_layers(torch.float8_e4m3fn),
    "layerwise_bfloat16": cast_by_layers(torch.bfloat16),
}


def assert_float32_islands(model, dtype, time_weights):
    """Time embedding and rotary tables of a forward pass, and the weights it runs with, are those of float32."""
    computed = {}
    model.timestep_embedder.register_forward_hook(lambda module, args, output: computed.update(time=(args[0], output)))
    model.rotary_embedder.register_forward_hook(lambda module, args, output: computed.update(rotary=output))
    for name in ("linear_1", "linear_2"):
        # while it runs: casting layer by layer casts back after it
        getattr(model.timestep_embedder, name).register_forward_hook(
            lambda module, args, output, name=name: computed.update({name: module.weight.clone()})
        )
    timestep = torch.tensor([0.9, 0.9001, 0.9002])  # the same in bfloat16
    inputs = make_inputs() | {"hidden_states": make_inputs()["hidden_states"].to(dtype), "timestep": timestep}
    assert model(**inputs).sample.dtype == dtype

    for name in ("linear_1", "linear_2"):
        assert computed[name].dtype == torch.float32 and torch.equal(computed[name], time_weights[f"{name}.weight"])
    for name, tensor in model.timestep_embedder.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, time_weights[name]), name

    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = timestep[:, None] * frequencies
    features, embedding = computed["time"]
    torch.testing.assert_close(features, torch.cat([angles.cos(), angles.sin()], dim=1))
    expected = F.linear(features, time_weights["linear_1.weight"], time_weights["linear_1.bias"])
    expected = F.linear(F.silu(expected), time_weights["linear_2.weight"], time_weights["linear_2.bias"])
    torch.testing.assert_close(embedding, expected)

    rows = torch.arange(4.0).repeat_interleave(4)
    cos, sin = computed["rotary"]
    # of the first pair of channels, which turn with the row, by one radian each
    torch.testing.assert_close(cos[:, 0], rows.cos())
    torch.testing.assert_close(sin[:, 0], rows.sin())


@each_dtype
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_casting_leaves_time_and_rotary_tables_in_float32(cast, dtype):
    model = make_model()
    time_weights = copy.deepcopy(model.timestep_embedder.state_dict())
    model = cast(model, dtype)
    assert model.transformer_blocks[0].attn.to_q.weight.dtype != torch.float32
    assert model.dtype == dtype
    assert_float32_islands(model, dtype, time_weights)


@each_dtype
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["plain", "device_map"])
def test_loading_leaves_time_and_rotary_tables_in_float32(options, dtype, tmp_path):
    model = make_model()
    time_weights = copy.deepcopy(model.timestep_embedder.state_dict())
    model.save_pretrained(tmp_path / "float32")
    loaded = GMemTransformer2DModel.from_pretrained(tmp_path / "float32", dtype=dtype, **options)
    others = {tensor.dtype for name, tensor in loaded.state_dict().items() if "timestep_embedder" not in name}
    assert others == {dtype}
    assert_float32_islands(loaded, dtype, time_weights)

    loaded.save_pretrained(tmp_path / "half")
    again = GMemTransformer2DModel.from_pretrained(tmp_path / "half", dtype=dtype, **options)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype


def test_time_embedding_stays_float32_under_autocast():
    model, inputs = make_model(), make_inputs()
    calls = count_calls(model.timestep_embedder)
    model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    assert torch.equal(calls[0][2], calls[1][2])
