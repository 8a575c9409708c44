# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import math
import pickle
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from reference_cases import assert_matches, case_state_dict, case_tensors, reference_cases
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_gmem.conversion.transformer import convert_transformer
from diffusers_gmem.models.transformer_gmem import GMemAttnProcessor, GMemTransformer2DModel


MODEL_CASES = reference_cases("model_forward")
each_model_case = pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: case["id"])

BACKBONES = {
    "lightning_dit": {},
    "sit": {"norm_type": "layer_norm", "ffn_type": "gelu", "use_rope": False, "patch_size": 2, "learn_sigma": True},
    "qk_norm": {"qk_norm": True, "adaln_shift": False},
}
each_backbone = pytest.mark.parametrize("options", BACKBONES.values(), ids=BACKBONES.keys())


def make_model(**options):
    """A tiny LightningDiT with random weights everywhere, so that no zero or one hides a mistake."""
    config = {
        "sample_size": 4,
        "in_channels": 3,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "memory_dim": 12,
        "alignment_layer": 2,
        "alignment_dim": 5,
        "alignment_hidden_dim": 7,
        "patch_size": 1,
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GMemTransformer2DModel(**config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_inputs(batch_size=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch_size, 3, 4, 4, generator=generator),
        "timestep": torch.rand(batch_size, generator=generator),
        "memory": torch.randn(batch_size, 12, generator=generator),
    }


def relative_error(actual, expected):
    return ((actual.float() - expected).norm() / expected.norm()).item()


def load_case(case):
    options = case.get("options", {})
    heads = options.get("num_heads") or next(
        other["options"]["num_heads"] for other in MODEL_CASES if other["file"] == case["weights_from"]
    )
    return convert_transformer(case_state_dict(case), heads)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *args: calls.append(args))
    return calls


def loss_and_gradients(model, **kwargs):
    model.zero_grad()
    output = model(**make_inputs(), return_alignment=True, **kwargs)
    loss = output.sample.square().mean() + output.alignment.square().mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# Reference vectors


@each_model_case
def test_reference_forward(case):
    tensors, model = case_tensors(case), load_case(case)
    with torch.no_grad():
        output = model(tensors["x"], tensors["t"], tensors["c"], return_alignment=True)
    assert_matches(case, "v_eval", output.sample, tensors["v_eval"])
    assert_matches(case, "z_train", output.alignment, tensors["z_train"])
    # only the strict tolerance tells an epsilon of 1e-5 in the blocks' norms from 1e-6
    torch.testing.assert_close(output.sample, tensors["v_eval"], **case["tolerance_strict"]["v"])
    torch.testing.assert_close(output.alignment, tensors["z_train"], **case["tolerance_strict"]["z"])


@each_model_case
def test_reference_intermediates(case):
    tensors, model = case_tensors(case), load_case(case)
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.update({name: output})

    model.transformer_blocks[0].register_forward_pre_hook(lambda module, args: seen.update({"tokens_in": args[0]}))
    model.timestep_embedder.register_forward_hook(keep("t_emb"))
    model.memory_embedder.register_forward_hook(keep("c_emb"))
    model.proj_out.register_forward_hook(keep("tokens_out"))
    for index, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(keep(f"after_block_{index}"))
    with torch.no_grad():
        model(tensors["x"], tensors["t"], tensors["c"])

    expected = {name.removeprefix("inter/"): tensors[name] for name in tensors if name.startswith("inter/")}
    assert expected.keys() == seen.keys()
    for name, tensor in expected.items():
        assert_matches(case, "v", seen[name], tensor)


@each_model_case
def test_reference_training(case):
    tensors, state_dict, model = case_tensors(case), case_state_dict(case), load_case(case).train()
    # the vectors were made with the dropout switched off
    model.register_to_config(memory_dropout=0.0)
    output = model(tensors["x"], tensors["t"], tensors["c"], return_alignment=True)
    assert_matches(case, "v_train", output.sample, tensors["v_train"])
    assert_matches(case, "z_train", output.alignment, tensors["z_train"])

    loss = F.mse_loss(output.sample, tensors["loss_target_v"])
    loss = loss + 0.5 * F.mse_loss(output.alignment, tensors["loss_target_z"])
    loss.backward()
    torch.testing.assert_close(loss, tensors["loss"].squeeze(), rtol=1e-4, atol=0)
    grad_norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    torch.testing.assert_close(grad_norm, tensors["grad_norm"].squeeze(), rtol=1e-4, atol=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == case["n_trainable"]

    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state_dict.items()}
    names = [name.removeprefix("grad/") for name in tensors if name.startswith("grad/")]
    assert names
    for name in names:
        # the conversion says where a gradient, put in the place of its parameter, goes
        original = {**zeros, name: tensors[f"grad/{name}"]}
        expected = convert_transformer(original, case["options"]["num_heads"]).state_dict()
        expected = {ours: tensor for ours, tensor in expected.items() if tensor.any()}
        assert sum(tensor.numel() for tensor in expected.values()) == tensors[f"grad/{name}"].numel()
        for ours, tensor in expected.items():
            assert_matches(case, f"grad/{name}", gradients[ours], tensor)


@pytest.mark.parametrize("case", reference_cases("memory_dropout"), ids=lambda case: case["id"])
def test_reference_memory_dropout(case):
    inputs = case_tensors(next(other for other in MODEL_CASES if other["file"] == case["weights_from"]))
    tensors, model = case_tensors(case), load_case(case)
    assert model.config.memory_dropout == case["options"]["p"]
    calls = count_calls(model.memory_embedder)
    with torch.no_grad():
        output = model(
            inputs["x"], inputs["t"], inputs["c"], return_alignment=True, memory_dropout_mask=tensors["keep"]
        )
    torch.testing.assert_close(calls[0][1][0], tensors["c_after"])
    assert_matches(case, "v_train", output.sample, tensors["v_train"])
    assert_matches(case, "z_train", output.alignment, tensors["z_train"])


@pytest.mark.parametrize("case", reference_cases("forward_with_cfg"), ids=lambda case: case["id"])
def test_reference_null_memory(case):
    tensors, model = case_tensors(case), load_case(case)
    model_case = next(other for other in MODEL_CASES if other["file"] == case["weights_from"])
    size = case["B"]
    x, t, memory, null = tensors["x"][:size], tensors["t"][:size], tensors["c"][:size], tensors["c"][size:]
    with torch.no_grad():
        assert_matches(model_case, "v", model(x, t, memory).sample, tensors["cond"])
        uncond = model(x, t).sample
        assert_matches(model_case, "v", uncond, tensors["uncond"])
        assert torch.equal(model(x, t, null).sample, uncond)


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_is_normalised_in_float32(dtype):
    model, inputs = make_model(), make_inputs()
    calls = count_calls(model.memory_embedder)
    memory = (2.0**10 * inputs.pop("memory")).to(dtype)
    output = model(**inputs, memory=memory).sample
    # the squares overflow in float16
    torch.testing.assert_close(calls[0][1][0], F.normalize(memory.double(), dim=-1).float())
    torch.testing.assert_close(output, model(**inputs, memory=memory / 64).sample)


def test_zero_memory_is_the_null_memory_row_by_row():
    model, inputs = make_model(), make_inputs()
    conditional = model(**inputs).sample
    null = model(inputs["hidden_states"], inputs["timestep"]).sample
    assert torch.equal(model(**{**inputs, "memory": torch.zeros(3, 12)}).sample, null)
    inputs["memory"][1] = 0
    mixed = model(**inputs).sample
    torch.testing.assert_close(mixed, torch.stack([conditional[0], null[1], conditional[2]]))
    assert (conditional - null).abs().max() > 1e-2


def test_memory_dropout_is_element_wise_and_only_in_train_mode():
    model = make_model(memory_dim=4000, memory_dropout=0.4)
    calls = count_calls(model.memory_embedder)
    inputs = make_inputs() | {"memory": torch.randn(3, 4000).abs() + 0.1}
    normalised = F.normalize(inputs["memory"], dim=-1)

    model(**inputs)
    torch.testing.assert_close(calls[-1][1][0], normalised)

    model.train()
    torch.manual_seed(5)
    first = model(**inputs).sample
    embedded = calls[-1][1][0]
    dropped = embedded == 0
    torch.testing.assert_close(embedded[~dropped], (normalised / 0.6)[~dropped])
    assert (dropped.float().mean(dim=1) - 0.4).abs().max() < 0.05
    assert not torch.equal(dropped[0], dropped[1])

    torch.manual_seed(5)
    assert torch.equal(model(**inputs).sample, first)
    assert not torch.equal(model(**inputs).sample, first)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_memory_dropout_mask_replaces_the_draw(mode, dtype):
    model, inputs = make_model().train(mode), make_inputs()
    keep = torch.rand(3, 12) > 0.4
    calls = count_calls(model.memory_embedder)
    state = torch.get_rng_state()
    model(**inputs, memory_dropout_mask=keep.to(dtype))
    torch.testing.assert_close(calls[0][1][0], F.normalize(inputs["memory"], dim=-1) * keep / 0.6)
    assert torch.equal(torch.get_rng_state(), state)


# Forward


@each_backbone
def test_alignment_is_computed_only_where_asked_for(options):
    model, inputs = make_model(**options), make_inputs()
    calls = count_calls(model.alignment_projector)
    blocks = count_calls(model.transformer_blocks[1])
    for mode in (True, False):
        output = model.train(mode)(**inputs)
        assert output.alignment is None
        assert len(model(**inputs, return_dict=False)) == 1
    assert not calls

    output = model(**inputs, return_alignment=True)
    assert len(calls) == 1
    assert calls[0][1][0] is blocks[-1][2]
    assert output.alignment.shape == (3, 16 // model.config.patch_size**2, 5)
    assert torch.equal(output.sample, model(**inputs).sample)
    sample, alignment = model(**inputs, return_alignment=True, return_dict=False)
    assert torch.equal(sample, output.sample)
    assert torch.equal(alignment, output.alignment)


def test_model_without_projector():
    model = make_model(alignment_layer=None)
    assert not any("alignment" in name for name in model.state_dict())
    assert model(**make_inputs()).sample.shape == (3, 3, 4, 4)


@each_backbone
def test_samples_do_not_depend_on_their_batch(options):
    model, inputs = make_model(**options), make_inputs()
    whole = model(**inputs).sample
    for index in range(3):
        single = model(**{name: tensor[index : index + 1] for name, tensor in inputs.items()}).sample
        torch.testing.assert_close(single, whole[index : index + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm_type, qk_epsilon", [("rms_norm", 1e-6), ("layer_norm", 1e-5)])
def test_epsilons_of_the_norms(norm_type, qk_epsilon):
    # of a size at which the epsilon counts
    tokens = 1e-3 * torch.randn(4, 16)
    model = make_model(norm_type=norm_type, qk_norm=True)
    block = model.transformer_blocks[0]
    for norm, epsilon in (
        (block.norm1, 1e-6),
        (block.norm2, 1e-6),
        (model.norm_out, 1e-6),
        (block.attn.norm_q, qk_epsilon),
        (block.attn.norm_k, qk_epsilon),
    ):
        inputs = tokens[:, : norm.normalized_shape[0]]
        centred = inputs if norm_type == "rms_norm" else inputs - inputs.mean(dim=-1, keepdim=True)
        expected = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + epsilon)
        if norm.weight is not None:
            expected = expected * norm.weight + getattr(norm, "bias", torch.zeros(()))
        torch.testing.assert_close(norm(inputs), expected)


def test_timestep_may_be_a_scalar_and_any_float_dtype():
    model, inputs = make_model(), make_inputs()
    expected = model(**{**inputs, "timestep": torch.full((3,), 0.3125)}).sample
    assert not torch.allclose(expected, model(**{**inputs, "timestep": torch.full((3,), 0.3135)}).sample, rtol=0)
    assert torch.equal(model(**{**inputs, "timestep": torch.tensor(0.3125)}).sample, expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(model(**{**inputs, "timestep": torch.full((3,), 0.3125, dtype=dtype)}).sample, expected)


def test_rows_and_columns_are_told_apart():
    # a transposed image is another image to the model, through the positions as through the rotary tables
    model, inputs = make_model(), make_inputs()
    transposed = {**inputs, "hidden_states": inputs["hidden_states"].transpose(2, 3)}
    difference = model(**transposed).sample.transpose(2, 3) - model(**inputs).sample
    assert difference.abs().max() > 1e-2

    cos, sin = model.rotary_embedder(2, 3, torch.device("cpu"))
    assert cos.shape == sin.shape == (6, 8)
    rows, columns = torch.tensor([0, 0, 0, 1, 1, 1.0]), torch.tensor([0, 1, 2, 0, 1, 2.0])
    frequencies = torch.tensor([1.0, 1.0, 0.01, 0.01])
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_initialisation():
    torch.manual_seed(0)
    model = GMemTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        num_attention_heads=4,
        attention_head_dim=32,
        qk_norm=True,
        alignment_layer=1,
    )
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        assert not module.bias.any(), name
        weight = module.weight.flatten(1)
        if name.startswith("timestep_embedder"):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.99 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name


# Published sizes: trainable parameters of the original models
PUBLISHED_SIZES = {
    "S/1": ({"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}, 39_356_320),
    "B/1": ({"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64}, 137_526_304),
    "B/2": ({"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, "patch_size": 2}, 137_673_856),
    "L/2": ({"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64, "patch_size": 2}, 465_719_136),
    "XL/1": ({}, 682_825_888),
    "XL/2": ({"patch_size": 2}, 683_047_168),
    "1.0B/1": ({"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64}, 1_037_569_312),
    "1.6B/1": ({"num_layers": 28, "num_attention_heads": 28, "attention_head_dim": 64}, 1_640_334_672),
    "SiT-XL/2": (
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "norm_type": "layer_norm",
            "ffn_type": "gelu",
            "use_rope": False,
        },
        682_680_336,
    ),
}


@pytest.mark.parametrize("options, expected", PUBLISHED_SIZES.values(), ids=PUBLISHED_SIZES.keys())
def test_published_sizes(options, expected):
    with torch.device("meta"):
        model = GMemTransformer2DModel(**options)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == expected
    assert model.pos_embed.device.type == "meta"


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 3}, r"`patch_size` must divide `sample_size` \(4\), got 3"),
        ({"norm_type": "rms"}, "`norm_type` must be 'rms_norm' or 'layer_norm', got 'rms'"),
        ({"ffn_type": "relu"}, "`ffn_type` must be 'swiglu' or 'gelu', got 'relu'"),
        ({"attention_head_dim": 6}, "`attention_head_dim` must be a multiple of 4 with `use_rope`, got 6"),
        (
            {"attention_head_dim": 3, "use_rope": False},
            r"`num_attention_heads \* attention_head_dim` must be a multiple of 4 .*, got 2 \* 3",
        ),
        ({"memory_dropout": 1.0}, r"`memory_dropout` must be in \[0, 1\), got 1.0"),
        ({"memory_dropout": -0.1}, r"`memory_dropout` must be in \[0, 1\), got -0.1"),
        ({"alignment_layer": 4}, r"`alignment_layer` must be None or in 1..3 \(`num_layers`\), got 4"),
        ({"alignment_layer": 0}, r"`alignment_layer` must be None or in 1..3 \(`num_layers`\), got 0"),
    ],
)
def test_wrong_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (
            {"hidden_states": torch.zeros(3, 3, 4, 6)},
            r"`hidden_states` must have shape \(batch_size, 3, 4, 4\), got \(3, 3, 4, 6\)",
        ),
        (
            {"hidden_states": torch.zeros(3, 4, 4, 4)},
            r"`hidden_states` must have shape \(batch_size, 3, 4, 4\), got \(3, 4, 4, 4\)",
        ),
        ({"timestep": torch.zeros(2)}, r"`timestep` must have shape \(\) or \(3,\), got \(2,\)"),
        (
            {"memory": torch.zeros(3, 11)},
            r"`memory` must have shape \(batch_size, memory_dim\) = \(3, 12\), got \(3, 11\)",
        ),
        (
            {"memory": torch.zeros(1, 12)},
            r"`memory` must have shape \(batch_size, memory_dim\) = \(3, 12\), got \(1, 12\)",
        ),
        (
            {"memory_dropout_mask": torch.ones(3, 1)},
            r"`memory_dropout_mask` must have the shape of `memory`, \(3, 12\), got \(3, 1\)",
        ),
    ],
)
def test_wrong_input(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{**make_inputs(), **inputs})


def test_alignment_of_a_model_without_projector():
    with pytest.raises(ValueError, match="`return_alignment=True` needs a model with a projector"):
        make_model(alignment_layer=None)(**make_inputs(), return_alignment=True)


# Number formats


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


@each_model_case
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_bfloat16_is_close_to_float32(case, autocast):
    tensors, model = case_tensors(case), load_case(case)
    x, t, memory = tensors["x"], tensors["t"], tensors["c"]
    if not autocast:
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x, t, memory, return_alignment=True)
    assert output.sample.dtype == output.alignment.dtype == torch.bfloat16
    assert relative_error(output.sample, tensors["v_eval"]) < 2e-2
    assert relative_error(output.alignment, tensors["z_train"]) < 2e-2


@pytest.fixture
def warn_always():
    torch.set_warn_always(True)  # torch gives many of its warnings once per process
    yield
    torch.set_warn_always(False)


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


def assert_float32_islands(model, dtype):
    embeddings = count_calls(model.timestep_embedder)
    rotary = count_calls(model.rotary_embedder)
    timestep = torch.tensor([0.9, 0.9001, 0.9002])  # the same in bfloat16
    inputs = make_inputs() | {"hidden_states": make_inputs()["hidden_states"].to(dtype), "timestep": timestep}
    sample = model(**inputs).sample
    assert sample.dtype == dtype
    assert embeddings[0][2].dtype == torch.float32
    assert (embeddings[0][2].diff(dim=0).norm(dim=1) > 0).all()
    assert [table.dtype for table in rotary[0][2]] == [torch.float32, torch.float32]
    assert {parameter.dtype for parameter in model.timestep_embedder.parameters()} == {torch.float32}
    others = {tensor.dtype for name, tensor in model.state_dict().items() if "timestep_embedder" not in name}
    assert others == {dtype}
    assert model.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_leaves_time_and_rotary_tables_in_float32(dtype, tmp_path):
    model = make_model()
    time_weights = {name: tensor.clone() for name, tensor in model.timestep_embedder.state_dict().items()}
    model.save_pretrained(tmp_path)
    for cast in (
        copy.deepcopy(model).to(dtype),
        copy.deepcopy(model).half().to(dtype=dtype),
        GMemTransformer2DModel.from_pretrained(tmp_path, dtype=dtype),
    ):
        assert_float32_islands(cast, dtype)
        for name, tensor in cast.timestep_embedder.state_dict().items():
            assert torch.equal(tensor, time_weights[name])

    cast.save_pretrained(tmp_path / "cast")
    again = GMemTransformer2DModel.from_pretrained(tmp_path / "cast", dtype=dtype)
    for name, tensor in cast.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype


def test_time_embedding_stays_float32_under_autocast():
    model, inputs = make_model(), make_inputs()
    calls = count_calls(model.timestep_embedder)
    model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    assert torch.equal(calls[0][2], calls[1][2])


# Saving and loading


@each_backbone
@pytest.mark.parametrize(
    "save", [{}, {"max_shard_size": "4KB"}, {"variant": "fp16"}], ids=["one", "shards", "variant"]
)
def test_save_and_load(options, save, tmp_path):
    model = make_model(**options)
    expected = model(**make_inputs(), return_alignment=True)
    model.save_pretrained(tmp_path, **save)
    weights = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(weights) > 3 if "max_shard_size" in save else len(weights) == 1
    assert all(".fp16" in name for name in weights) or "variant" not in save
    assert not list(tmp_path.glob("*.bin"))

    loaded, info = GMemTransformer2DModel.from_pretrained(
        tmp_path, variant=save.get("variant"), output_loading_info=True
    )
    assert not any(info.values())
    public = [name for name in model.config if not name.startswith("_")]
    assert {name: loaded.config[name] for name in public} == {name: model.config[name] for name in public}
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    output = loaded(**make_inputs(), return_alignment=True)
    assert torch.equal(output.sample, expected.sample)
    assert torch.equal(output.alignment, expected.alignment)


def test_positions_are_loaded_from_the_file(tmp_path):
    model = make_model()
    model.pos_embed += 1e-4
    model.save_pretrained(tmp_path)
    assert torch.equal(GMemTransformer2DModel.from_pretrained(tmp_path).pos_embed, model.pos_embed)


def test_from_config_restores_the_architecture():
    model = make_model(**BACKBONES["sit"])
    again = GMemTransformer2DModel.from_config(model.config)
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


def test_device_map(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = GMemTransformer2DModel.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(loaded(**make_inputs()).sample, model(**make_inputs()).sample)


@each_backbone
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(options, copied):
    model = make_model(**options)
    expected = model(**make_inputs()).sample
    other = copied(model)
    assert torch.equal(other(**make_inputs()).sample, expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(**make_inputs()).sample, expected)


# Training


@each_backbone
def test_gradient_checkpointing_changes_nothing(options):
    model = make_model(**options).train()
    torch.manual_seed(3)
    loss, gradients = loss_and_gradients(model)
    model.enable_gradient_checkpointing()
    calls = count_calls(model.transformer_blocks[0].attn)
    torch.manual_seed(3)
    checkpointed_loss, checkpointed_gradients = loss_and_gradients(model)
    assert len(calls) == 2  # the block ran again in the backward pass
    assert torch.equal(loss, checkpointed_loss)
    assert gradients.keys() == checkpointed_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert torch.equal(gradient, checkpointed_gradients[name]), name


def test_null_memory_can_be_trained():
    model = make_model().train()
    model(make_inputs()["hidden_states"], make_inputs()["timestep"]).sample.square().mean().backward()
    assert model.memory_embedder.bias.grad.any()
    assert not model.memory_embedder.weight.grad.any()


# torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_backbone
def test_compile_has_no_graph_break(options, dynamo):
    model = make_model(num_layers=1, alignment_layer=1, **options).train()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch_size in (3, 5, 4, 6):
        inputs = make_inputs(batch_size)
        outputs = []
        for forward in (model, compiled):
            torch.manual_seed(batch_size)  # of the memory dropout
            outputs.append(forward(**inputs, return_alignment=True))
        torch.testing.assert_close(outputs[0].sample, outputs[1].sample)
        torch.testing.assert_close(outputs[0].alignment, outputs[1].alignment)
    assert counter.frame_count == 2  # the first batch size, and then any


def test_compile_in_eval_mode_with_and_without_memory(dynamo):
    model = make_model(num_layers=1, alignment_layer=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for memory in (make_inputs()["memory"], None):
        inputs = make_inputs() | {"memory": memory}
        torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample)


def test_compile_under_autocast_and_gradient_checkpointing(dynamo):
    model = make_model(num_layers=1, alignment_layer=1).train()
    model.enable_gradient_checkpointing()
    inputs, mask = make_inputs(), torch.ones(3, 12)
    losses, gradients = [], []
    for forward in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            sample = forward(**inputs, memory_dropout_mask=mask).sample
        losses.append(sample.float().square().mean())
        losses[-1].backward()
        gradients.append(model.memory_embedder.weight.grad.clone())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs a C++ compiler")
def test_compile_with_inductor(dynamo):
    model = make_model(num_layers=1, alignment_layer=1)
    inputs = make_inputs()
    expected = model(**inputs, return_alignment=True)
    output = torch.compile(model, fullgraph=True)(**inputs, return_alignment=True)
    torch.testing.assert_close(output.sample, expected.sample)
    torch.testing.assert_close(output.alignment, expected.alignment)


def test_compile_repeated_blocks(dynamo):
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(model(**inputs).sample, expected)
    assert counter.frame_count == 1  # one graph serves all blocks


# Attention


@each_backbone
def test_attention_backends(options):
    model, inputs = make_model(**options), make_inputs()
    expected = model(**inputs).sample
    for backend in ("native", "_native_math"):
        model.set_attention_backend(backend)
        assert model.transformer_blocks[0].attn.processor._attention_backend == backend
        torch.testing.assert_close(model(**inputs).sample, expected)
    model.reset_attention_backend()
    with pytest.raises(ValueError, match="backend"):
        model.set_attention_backend("no_such_backend")


class RecordOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_models_own_backend_wins_over_the_active_one():
    model = make_model()
    names = {}
    for backend in ("native", "_native_math"):
        model.set_attention_backend(backend)
        with torch.no_grad(), attention_backend("native"), RecordOperations() as operations:
            model(**make_inputs())
        names[backend] = operations.names
    model.reset_attention_backend()
    assert any("scaled_dot_product" in name for name in names["native"])
    assert not any("scaled_dot_product" in name for name in names["_native_math"])


def test_attention_processors():
    model, inputs = make_model(), make_inputs()
    assert list(model.attn_processors) == [f"transformer_blocks.{i}.attn.processor" for i in range(3)]

    class SelfOnly(GMemAttnProcessor):
        def __call__(self, attn, hidden_states, image_rotary_emb=None):
            return attn.to_out[0](attn.to_v(hidden_states))

    expected = model(**inputs).sample
    model.set_attn_processor(SelfOnly())
    assert not torch.allclose(model(**inputs).sample, expected)
    model.set_attn_processor(GMemAttnProcessor())
    assert torch.equal(model(**inputs).sample, expected)


@each_backbone
def test_fused_projections(options):
    model, inputs = make_model(**options), make_inputs()
    expected = model(**inputs).sample
    separate = count_calls(model.transformer_blocks[0].attn.to_q)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, expected)
    assert not separate
    model.unfuse_qkv_projections()
    assert torch.equal(model(**inputs).sample, expected)
    assert len(separate) == 1


# Memory savers, caches and adapters of diffusers


@each_backbone
@pytest.mark.parametrize("storage_dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting(options, storage_dtype):
    model, inputs = make_model(**options), make_inputs()
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=torch.float32)
    block = model.transformer_blocks[0]
    assert block.attn.to_q.weight.dtype == block.ff.linear_in.weight.dtype == storage_dtype
    for kept in (model.x_embedder, model.timestep_embedder, model.memory_embedder, block.norm1, block.attn.norm_q):
        assert kept is None or {parameter.dtype for parameter in kept.parameters()} <= {torch.float32}
    error = relative_error(model(**inputs).sample, expected)
    assert 0 < error < (0.2 if storage_dtype == torch.float8_e4m3fn else 0.02)
    assert block.attn.to_q.weight.dtype == storage_dtype


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(offload_type):
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs, return_alignment=True)
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
    )
    output = model(**inputs, return_alignment=True)
    assert torch.equal(output.sample, expected.sample)
    assert torch.equal(output.alignment, expected.alignment)


def test_pyramid_attention_broadcast():
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 900),
            current_timestep_callback=lambda: 500,
        )
    )
    calls = count_calls(model.transformer_blocks[0].attn.to_q)
    with model.cache_context("cond"):
        for _ in range(4):
            torch.testing.assert_close(model(**inputs).sample, expected)
    assert len(calls) < 4
    model.disable_cache()
    torch.testing.assert_close(model(**inputs).sample, expected)


LORA = {"r": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "init_lora_weights": False}


def test_lora_is_saved_and_loaded(tmp_path):
    model, inputs = make_model(), make_inputs()
    plain = model(**inputs).sample
    model.add_adapter(LoraConfig(**LORA))
    expected = model(**inputs).sample
    assert not torch.allclose(expected, plain)
    model.save_lora_adapter(tmp_path)

    other = make_model()
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(other(**inputs).sample, expected)
    torch.testing.assert_close(other(**inputs, attention_kwargs={"scale": 0.0}).sample, plain)
    other.disable_adapters()
    torch.testing.assert_close(other(**inputs).sample, plain)
    other.enable_adapters()
    other.fuse_lora()
    other.unload_lora()
    torch.testing.assert_close(other(**inputs).sample, expected)


def test_only_lora_weights_train():
    model = make_model().train()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(**LORA))
    model.enable_gradient_checkpointing()
    model(**make_inputs()).sample.square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * 4 * 3
    assert all("lora_" in name for name in trained)
