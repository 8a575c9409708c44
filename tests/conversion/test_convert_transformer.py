# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import re

import pytest
import torch
from reference_cases import assert_matches, case_state_dict, case_tensors, reference_cases

from diffusers_gmem import GMemTransformer2DModel
from diffusers_gmem.conversion import convert_transformer, export_transformer
from diffusers_gmem.models.transformer_gmem import GMemRotaryPosEmbed


def tells_heads(case):
    return case["options"]["use_rope"] or case["options"]["use_qknorm"]


CASES = {case["id"].removeprefix("model/"): case for case in reference_cases("model_forward")}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
ROPE_CASE = next(case for case in CASES.values() if case["options"]["use_rope"])
PLAIN_CASE = next(case for case in CASES.values() if not tells_heads(case))


def make_state_dict(
    hidden_size=24, patch_size=2, num_layers=2, inner_dim=64, swiglu=True, projector=True, in_channels=3, head_dim=12
):
    """An original state dict of any size, without norms' weights: LayerNorm, rotary tables, 6 modulations."""
    shapes = {
        "pos_embed": (1, 9, hidden_size),
        "x_embedder.proj": (hidden_size, in_channels, patch_size, patch_size),
        "t_embedder.mlp.0": (hidden_size, 256),
        "t_embedder.mlp.2": (hidden_size, hidden_size),
        "condition_projection.linear": (hidden_size, 10),
        "final_layer.linear": (in_channels * patch_size**2, hidden_size),
        "final_layer.adaLN_modulation.1": (2 * hidden_size, hidden_size),
    }
    for index in range(num_layers):
        mlp = {"w12": (2 * inner_dim, hidden_size), "w3": (hidden_size, inner_dim)}
        if not swiglu:
            mlp = {"fc1": (inner_dim, hidden_size), "fc2": (hidden_size, inner_dim)}
        shapes |= {
            f"blocks.{index}.attn.qkv": (3 * hidden_size, hidden_size),
            f"blocks.{index}.attn.proj": (hidden_size, hidden_size),
            f"blocks.{index}.adaLN_modulation.1": (6 * hidden_size, hidden_size),
            **{f"blocks.{index}.mlp.{name}": shape for name, shape in mlp.items()},
        }
    if projector:
        shapes |= {"projector.0.0": (7, hidden_size), "projector.0.2": (7, 7), "projector.0.4": (5, 7)}

    generator = torch.Generator().manual_seed(0)
    state_dict = {}
    for name, shape in shapes.items():
        if name == "pos_embed":
            state_dict[name] = torch.randn(shape, generator=generator)
        else:
            state_dict[f"{name}.weight"] = torch.randn(shape, generator=generator)
            state_dict[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    tables = GMemRotaryPosEmbed(head_dim)(3, 3, torch.device("cpu"))
    return state_dict | dict(zip(("feat_rope.freqs_cos", "feat_rope.freqs_sin"), tables, strict=True))


def assert_same_state_dict(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@each_case
def test_configuration_follows_from_the_tensors(case):
    options = case["options"]
    model = convert_transformer(case_state_dict(case), None if tells_heads(case) else options["num_heads"])
    expected = {
        "sample_size": options["input_size"],
        "patch_size": options["patch_size"],
        "in_channels": options["in_channels"],
        "num_layers": options["depth"],
        "num_attention_heads": options["num_heads"],
        "attention_head_dim": case["head_dim"],
        "memory_dim": options["memory_dim"],
        "memory_dropout": 0.4,
        "norm_type": "rms_norm" if options["use_rmsnorm"] else "layer_norm",
        "ffn_type": "swiglu" if options["use_swiglu"] else "gelu",
        "use_rope": options["use_rope"],
        "qk_norm": options["use_qknorm"],
        "adaln_shift": not options["wo_shift"],
        "learn_sigma": options["learn_sigma"],
        "alignment_layer": options["encoder_depth"],
        "alignment_dim": options["z_dim"],
        "alignment_hidden_dim": options["projector_dim"],
    }
    assert {name: model.config[name] for name in expected} == expected
    # rounding down hides the exact `mlp_ratio`
    inner_dim = int(options["hidden_size"] * options["mlp_ratio"])
    inner_dim = int(2 / 3 * inner_dim) if options["use_swiglu"] else inner_dim
    assert model.transformer_blocks[0].ff.linear_out.in_features == inner_dim
    assert model.config.mlp_ratio == pytest.approx(options["mlp_ratio"], abs=2 / options["hidden_size"])
    assert not model.training


@each_case
def test_trainable_is_what_the_original_trains(case):
    model = convert_transformer(case_state_dict(case), case["options"]["num_heads"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == case["n_trainable"]
    assert "pos_embed" in dict(model.named_buffers())


@each_case
def test_every_number_of_the_state_dict_arrives(case):
    state_dict = case_state_dict(case)
    model = convert_transformer(state_dict, case["options"]["num_heads"])
    original = [tensor for name, tensor in state_dict.items() if not name.startswith("feat_rope")]
    converted = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
    original = torch.cat([tensor.flatten() for tensor in original])
    assert torch.equal(converted.sort().values, original.sort().values)


def test_the_order_of_the_tensors_does_not_matter():
    state_dict = case_state_dict(ROPE_CASE)
    model = convert_transformer(dict(reversed(state_dict.items())))
    for name, tensor in convert_transformer(state_dict).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_tensors_are_not_changed_and_not_copied():
    state_dict = case_state_dict(ROPE_CASE)
    before = copy.deepcopy(state_dict)
    model = convert_transformer(state_dict)
    assert_same_state_dict(state_dict, before)
    storages = {tensor.untyped_storage().data_ptr() for tensor in state_dict.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()} <= storages


def test_weights_that_are_not_contiguous_can_be_saved(tmp_path):
    state_dict = {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
        for name, tensor in case_state_dict(ROPE_CASE).items()
    }
    model = convert_transformer(state_dict)
    model.save_pretrained(tmp_path)
    assert_same_state_dict(GMemTransformer2DModel.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_state_dict(dtype):
    state_dict = {name: tensor.to(dtype) for name, tensor in case_state_dict(ROPE_CASE).items()}
    model = convert_transformer(state_dict)
    assert {tensor.dtype for tensor in model.timestep_embedder.state_dict().values()} == {torch.float32}
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == model.dtype == dtype
    tensors = case_tensors(ROPE_CASE)
    sample = model(tensors["x"].to(dtype), tensors["t"], tensors["c"]).sample.float()
    assert (sample - tensors["v_eval"]).norm() < 2e-2 * tensors["v_eval"].norm()


def test_positions_come_from_the_state_dict():
    state_dict = case_state_dict(ROPE_CASE)
    state_dict["pos_embed"] += 1e-4
    assert torch.equal(convert_transformer(state_dict).pos_embed, state_dict["pos_embed"])


def test_without_projector():
    state_dict = {name: tensor for name, tensor in case_state_dict(ROPE_CASE).items() if "projector" not in name}
    model, tensors = convert_transformer(state_dict), case_tensors(ROPE_CASE)
    assert model.config.alignment_layer is None
    sample = model(tensors["x"], tensors["t"], tensors["c"]).sample
    assert_matches(ROPE_CASE, "v_eval", sample, tensors["v_eval"])


@pytest.mark.parametrize("num_layers", [1, 3])
def test_projector_of_a_model_of_fewer_than_four_blocks_is_left_out_with_a_warning(num_layers, caplog):
    model = convert_transformer(make_state_dict(num_layers=num_layers))
    assert model.config.alignment_layer is None
    assert model.alignment_projector is None
    message = f"after block 4, but there are only {num_layers} blocks: it was never trained and is left out"
    assert message in caplog.text
    assert "projector.0.4.bias" in caplog.text

    caplog.clear()
    convert_transformer(make_state_dict(num_layers=num_layers, projector=False))
    assert not caplog.records


def test_four_blocks_keep_their_projector(caplog):
    model = convert_transformer(make_state_dict(num_layers=4))
    assert model.config.alignment_layer == 4
    assert (model.config.alignment_hidden_dim, model.config.alignment_dim) == (7, 5)
    assert not caplog.records


@pytest.mark.parametrize(
    "inner_dim, swiglu, ratio",
    [
        (64, True, 4.0),
        (63, True, 3.96),  # 24 * 3.96 = 95.04; two thirds of 95 are 63
        (40, True, 2.5),
        (96, False, 4.0),
        (60, False, 2.5),
        (1, False, 0.042),
    ],
)
def test_mlp_ratio(inner_dim, swiglu, ratio):
    model = convert_transformer(make_state_dict(inner_dim=inner_dim, swiglu=swiglu))
    assert model.config.mlp_ratio == ratio
    assert model.transformer_blocks[0].ff.linear_out.in_features == inner_dim


@pytest.mark.parametrize("swiglu, inner_dim", [(False, 123), (True, 82)])
def test_mlp_ratio_where_the_quotient_falls_short_of_the_width(swiglu, inner_dim):
    assert int(60 * (123 / 60)) == 122
    state_dict = make_state_dict(hidden_size=60, inner_dim=inner_dim, swiglu=swiglu, head_dim=12)
    assert convert_transformer(state_dict).transformer_blocks[0].ff.linear_out.in_features == inner_dim


@pytest.mark.parametrize("hidden_size, inner_dim", [(1152, 3072), (768, 2048), (1024, 2730), (384, 1024), (40, 106)])
def test_mlp_ratio_of_the_published_widths_is_four(hidden_size, inner_dim):
    state_dict = make_state_dict(hidden_size=hidden_size, inner_dim=inner_dim, num_layers=1, head_dim=hidden_size // 2)
    assert convert_transformer(state_dict).config.mlp_ratio == 4.0


# Heads


def test_heads_are_asked_for_where_the_tensors_do_not_tell_them():
    with pytest.raises(ValueError, match=r"pass `num_attention_heads` \(SiT: 6 for S, 12 for B, 16 for L and XL\)"):
        convert_transformer(case_state_dict(PLAIN_CASE))
    width = PLAIN_CASE["options"]["hidden_size"]
    with pytest.raises(ValueError, match=f"`num_attention_heads` must divide the width {width}, got 7"):
        convert_transformer(case_state_dict(PLAIN_CASE), num_attention_heads=7)
    # another number of heads is another model with the same tensors
    heads, tensors = PLAIN_CASE["options"]["num_heads"], case_tensors(PLAIN_CASE)
    samples = [
        convert_transformer(case_state_dict(PLAIN_CASE), number)(tensors["x"], tensors["t"], tensors["c"]).sample
        for number in (heads, width // 4)
    ]
    assert not torch.allclose(*samples, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [case for case in CASES.values() if tells_heads(case)], ids=lambda case: case["id"])
def test_heads_that_contradict_the_tensors(case):
    heads = case["options"]["num_heads"]
    assert convert_transformer(case_state_dict(case), heads).config.num_attention_heads == heads
    message = f"`num_attention_heads={2 * heads}` contradicts .* heads of {case['head_dim']}: {heads} heads"
    with pytest.raises(ValueError, match=message):
        convert_transformer(case_state_dict(case), 2 * heads)


# Errors


def test_other_files_are_refused():
    with pytest.raises(ValueError, match=r"Not a state dict of the GMem .* no x_embedder\.proj\.weight, pos_embed, "):
        convert_transformer({"model": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"Not a state dict of the GMem .* no x_embedder\.proj\.weight, pos_embed, "):
        convert_transformer({})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix):
    state_dict = case_state_dict(ROPE_CASE)
    model = convert_transformer({prefix + name: tensor for name, tensor in state_dict.items()})
    assert_same_state_dict(export_transformer(model), state_dict)

    # not every name has it
    state_dict = {f"{prefix}pos_embed": state_dict.pop("pos_embed")} | state_dict
    with pytest.raises(ValueError, match="Not a state dict of the GMem .* no pos_embed"):
        convert_transformer(state_dict)


def test_class_conditional_models_are_refused():
    state_dict = case_state_dict(ROPE_CASE)
    for name in ("weight", "bias"):
        state_dict.pop(f"condition_projection.linear.{name}")
    with pytest.raises(
        ValueError, match="no `condition_projection.linear.weight`: it is not memory-conditioned. What"
    ):
        convert_transformer(state_dict)
    state_dict["y_embedder.embedding_table.weight"] = torch.zeros(11, 8)
    with pytest.raises(
        ValueError,
        match="no `condition_projection.linear.weight`, but the `y_embedder` of a class-conditional SiT or LightningDiT: it is not",
    ):
        convert_transformer(state_dict)


@each_case
def test_every_missing_tensor_is_named(case):
    complete = case_state_dict(case)
    for name in complete:
        if re.match(r"blocks\.[1-9]", name):
            continue
        state_dict = {other: tensor for other, tensor in complete.items() if other != name}
        with pytest.raises(ValueError, match="missing|it has no|The state dict has no") as error:
            convert_transformer(state_dict, case["options"]["num_heads"])
        assert name in str(error.value)


def test_missing_unexpected_and_misshapen_tensors_are_all_named():
    state_dict = case_state_dict(ROPE_CASE)
    state_dict.pop("blocks.1.mlp.w3.bias")
    state_dict.pop("blocks.2.attn.qkv.bias")
    state_dict["blocks.0.attn.bonus"] = torch.zeros(1)
    state_dict["t_embedder.mlp.2.bias"] = torch.zeros(3)
    state_dict["blocks.3.attn.qkv.weight"] = torch.zeros(6, 2)
    width = ROPE_CASE["options"]["hidden_size"]
    with pytest.raises(ValueError) as error:
        convert_transformer(state_dict)
    for problem in (
        "missing blocks.1.mlp.w3.bias",
        "missing blocks.2.attn.qkv.bias",
        "unexpected blocks.0.attn.bonus",
        f"t_embedder.mlp.2.bias has shape (3,) instead of ({width},)",
        f"blocks.3.attn.qkv.weight has shape (6, 2) instead of ({3 * width}, {width})",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize("name", ["feat_rope.freqs_cos", "feat_rope.freqs_sin"])
def test_another_rotary_embedding_is_refused(name):
    state_dict = case_state_dict(ROPE_CASE)
    grid_size = ROPE_CASE["options"]["input_size"] // ROPE_CASE["options"]["patch_size"]
    tables = GMemRotaryPosEmbed(ROPE_CASE["head_dim"], theta=100.0)(grid_size, grid_size, torch.device("cpu"))
    state_dict[name] = tables[name == "feat_rope.freqs_sin"]
    with pytest.raises(ValueError, match=f"{name} is not the table of a rotary embedding with base 10000"):
        convert_transformer(state_dict)


# The paper's first version


@pytest.mark.parametrize("num_layers, alignment_layer", [(8, 8), (7, None)])
def test_first_version_counts_time_the_other_way(num_layers, alignment_layer):
    state_dict = make_state_dict(num_layers=num_layers)
    first_version = {name.replace("projector.", "projectors."): tensor for name, tensor in state_dict.items()}
    later, first = convert_transformer(state_dict), convert_transformer(first_version)
    assert (later.config.alignment_layer, first.config.alignment_layer) == (4, alignment_layer)

    generator = torch.Generator().manual_seed(1)
    x, c = torch.randn(5, 3, 6, 6, generator=generator), torch.randn(5, 10, generator=generator)
    t = torch.tensor([0.0, 0.1, 0.5, 0.93, 1.0])
    with torch.no_grad():
        expected = -later(x, 1 - t, c).sample
        torch.testing.assert_close(first(x, t, c).sample, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(first_version["final_layer.linear.bias"], state_dict["final_layer.linear.bias"])


def test_first_version_with_several_projectors_is_refused():
    state_dict = {name.replace("projector.", "projectors."): x for name, x in make_state_dict(num_layers=8).items()}
    state_dict["projectors.1.0.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="unexpected projector.1.0.weight"):
        convert_transformer(state_dict)


# The way back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each_case
def test_original_to_ours_and_back(case, dtype, tmp_path):
    state_dict = {name: tensor.to(dtype) for name, tensor in case_state_dict(case).items()}
    model = convert_transformer(state_dict, case["options"]["num_heads"])
    assert_same_state_dict(export_transformer(model), state_dict)

    model.save_pretrained(tmp_path)
    model = GMemTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
    assert_same_state_dict(export_transformer(model), state_dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_type": "layer_norm", "qk_norm": True, "adaln_shift": False, "learn_sigma": True},
        {"ffn_type": "gelu", "use_rope": False, "alignment_layer": None},
    ],
)
def test_ours_to_original_and_back(options, dtype):
    torch.manual_seed(0)
    config = {"sample_size": 4, "in_channels": 3, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
    config |= {"memory_dim": 6, "alignment_dim": 5, "alignment_hidden_dim": 7}
    model = GMemTransformer2DModel(**config | options).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    again = convert_transformer(export_transformer(model), num_attention_heads=2)
    assert_same_state_dict(again.state_dict(), model.state_dict())
    for name in ("mlp_ratio", "learn_sigma", "adaln_shift", "alignment_layer", "sample_size", "norm_type", "use_rope"):
        assert again.config[name] == model.config[name]


def test_positions_that_training_moved_come_back():
    state_dict = case_state_dict(ROPE_CASE)
    state_dict["pos_embed"] = state_dict["pos_embed"] + 1e-4
    assert_same_state_dict(export_transformer(convert_transformer(state_dict)), state_dict)


def test_adapters_and_fused_projections_are_not_exported():
    model = convert_transformer(case_state_dict(ROPE_CASE))
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"unfuse projections first: .* transformer_blocks\.0\.attn\.to_qkv\.bias"):
        export_transformer(model)
    model.unfuse_qkv_projections()
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"Merge adapters .* transformer_blocks\.0\.attn\.to_q\.base_layer\.weight"):
        export_transformer(model)
