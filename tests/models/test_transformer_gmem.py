# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes
from reference_cases import assert_matches, case_state_dict, case_tensors, reference_cases
from tiny_transformer import BACKBONES, count_calls, each_backbone, make_inputs, make_model

from diffusers_gmem.conversion.transformer import convert_transformer
from diffusers_gmem.models.transformer_gmem import GMemTransformer2DModel


MODEL_CASES = reference_cases("model_forward")
each_model_case = pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: case["id"])


def load_case(case):
    options = case.get("options", {})
    heads = options.get("num_heads") or next(
        other["options"]["num_heads"] for other in MODEL_CASES if other["file"] == case["weights_from"]
    )
    return convert_transformer(case_state_dict(case), heads)


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
    # the rotary tables are checked and not converted
    zeros = {name: tensor if "freqs" in name else torch.zeros_like(tensor) for name, tensor in state_dict.items()}
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


@each_backbone
def test_forward_on_the_meta_device(options):
    with torch.device("meta"):
        model = make_model(**options)
    output = model(**{name: tensor.to("meta") for name, tensor in make_inputs().items()}, return_alignment=True)
    assert output.sample.is_meta and output.sample.shape == (3, 3, 4, 4)
    assert output.alignment.is_meta


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


@each_backbone
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_map(options, place, tmp_path):
    model = make_model(**options)
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    device_map |= {f"transformer_blocks.{index}": place if index == 1 else "cpu" for index in range(3)}
    device_map["pos_embed"] = "cpu"
    loaded = GMemTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.transformer_blocks[1].attn.to_q.weight.is_meta == (place == "disk")
    assert torch.equal(loaded(**make_inputs()).sample, model(**make_inputs()).sample)


def test_automatic_device_map(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    for device_map in ("cpu", "auto"):
        loaded = GMemTransformer2DModel.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(loaded(**make_inputs()).sample, model(**make_inputs()).sample)


def test_blocks_are_not_split_over_devices():
    with torch.device("meta"):
        model = make_model()
    size = compute_module_sizes(model)[""]
    device_map = infer_auto_device_map(
        model, max_memory={0: size // 2, "cpu": size}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {0, "cpu"}
    inside_of_blocks = {name.split(".")[2:] != [] for name in device_map if name.startswith("transformer_blocks")}
    assert inside_of_blocks == {False}


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
