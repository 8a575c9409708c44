# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The public reference implementation's state dict <-> [`GMemTransformer2DModel`]."""

import math
import re
from collections.abc import Mapping

import torch
from diffusers.utils import logging

from ..models.transformer_gmem import GMemTransformer2DModel
from .checkpoint import check_names_and_shapes, strip_wrapper_prefixes


logger = logging.get_logger(__name__)

# Our modules -> the original's, where the names differ
_TOP_LEVEL_NAMES = {
    "x_embedder": "x_embedder.proj",
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "memory_embedder": "condition_projection.linear",
    "alignment_projector.0": "projector.0.0",
    "alignment_projector.2": "projector.0.2",
    "alignment_projector.4": "projector.0.4",
    "norm_out": "final_layer.norm_final",
    "proj_out": "final_layer.linear",
    "adaln_out": "final_layer.adaLN_modulation.1",
}
_BLOCK_NAMES = {
    "attn.to_q": "attn.qkv",
    "attn.to_k": "attn.qkv",
    "attn.to_v": "attn.qkv",
    "attn.norm_q": "attn.q_norm",
    "attn.norm_k": "attn.k_norm",
    "attn.to_out.0": "attn.proj",
    "adaln_linear": "adaLN_modulation.1",
}
_FEED_FORWARD_NAMES = {
    "swiglu": {"ff.linear_in": "mlp.w12", "ff.linear_out": "mlp.w3"},
    "gelu": {"ff.linear_in": "mlp.fc1", "ff.linear_out": "mlp.fc2"},
}
_ROTARY_TABLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
# The original taps the projector after a fixed block; the paper's first version, which calls it `projectors`, later.
_ALIGNMENT_LAYER = 4
_FIRST_VERSION_ALIGNMENT_LAYER = 8


def _original_name(name: str, ffn_type: str) -> str:
    """The original name of one of our tensors. Query, key and value are the thirds of one original tensor."""
    prefix, names = "", _TOP_LEVEL_NAMES
    block = re.match(r"transformer_blocks\.(\d+)\.", name)
    if block:
        prefix, name, names = f"blocks.{block[1]}.", name[block.end() :], _BLOCK_NAMES | _FEED_FORWARD_NAMES[ffn_type]
    module, dot, parameter = name.rpartition(".")
    return prefix + names.get(module, module) + dot + parameter


def _query_key_or_value(name: str) -> int | None:
    """Which third of the original tensor one of our tensors is, if it is one."""
    part = re.search(r"\.attn\.to_([qkv])\.", name)
    return None if part is None else "qkv".index(part[1])


def _infer_mlp_ratio(hidden_size: int, inner_dim: int, swiglu: bool) -> float:
    """The roundest ratio that gives this inner width (a SwiGLU's was rounded down, which loses the exact ratio)."""
    width = -(-inner_dim * 3 // 2) if swiglu else inner_dim
    for digits in range(16):
        ratio = round(width / hidden_size, digits)
        rounded_width = int(hidden_size * ratio)
        if (rounded_width * 2 // 3 if swiglu else rounded_width) == inner_dim:
            return ratio
    # the product with width / hidden_size can fall short of width by rounding
    return (width + 0.5) / hidden_size


def _infer_config(
    state_dict: Mapping[str, torch.Tensor], num_attention_heads: int | None, alignment_layer: int
) -> dict:
    def has(part: str) -> bool:
        return any(part in name for name in state_dict)

    hidden_size, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    num_tokens = state_dict["pos_embed"].shape[1]
    num_layers = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    use_rope = has("feat_rope.")
    qk_norm = has(".attn.q_norm.")
    swiglu = has(".mlp.w12.")
    has_projector = has("projector.") and num_layers >= alignment_layer
    proj_out_dim = state_dict["final_layer.linear.weight"].shape[0]

    head_dim = None
    if use_rope:
        head_dim = state_dict["feat_rope.freqs_cos"].shape[1]
    elif qk_norm:
        head_dim = state_dict["blocks.0.attn.q_norm.weight"].shape[0]
    if head_dim is not None and num_attention_heads not in (None, hidden_size // head_dim):
        raise ValueError(
            f"`num_attention_heads={num_attention_heads}` contradicts the state dict, whose {hidden_size} channels are "
            f"cut into heads of {head_dim}: {hidden_size // head_dim} heads."
        )
    if head_dim is None:
        if num_attention_heads is None:
            raise ValueError(
                "A state dict without rotary tables and query/key norms does not say how many heads its attention has: "
                "pass `num_attention_heads` (SiT: 6 for S, 12 for B, 16 for L and XL)."
            )
        if hidden_size % num_attention_heads != 0:
            raise ValueError(f"`num_attention_heads` must divide the width {hidden_size}, got {num_attention_heads}.")
        head_dim = hidden_size // num_attention_heads

    if swiglu:
        inner_dim = state_dict["blocks.0.mlp.w3.weight"].shape[1]
    else:
        inner_dim = state_dict["blocks.0.mlp.fc2.weight"].shape[1]
    config = {
        "sample_size": round(num_tokens**0.5) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": num_layers,
        "num_attention_heads": hidden_size // head_dim,
        "attention_head_dim": head_dim,
        "mlp_ratio": _infer_mlp_ratio(hidden_size, inner_dim, swiglu),
        "memory_dim": state_dict["condition_projection.linear.weight"].shape[1],
        "norm_type": "rms_norm" if has(".norm1.") else "layer_norm",
        "ffn_type": "swiglu" if swiglu else "gelu",
        "use_rope": use_rope,
        "qk_norm": qk_norm,
        "adaln_shift": state_dict["blocks.0.adaLN_modulation.1.weight"].shape[0] == 6 * hidden_size,
        "learn_sigma": proj_out_dim == 2 * in_channels * patch_size**2,
        "alignment_layer": alignment_layer if has_projector else None,
    }
    if has_projector:
        config["alignment_dim"] = state_dict["projector.0.4.weight"].shape[0]
        config["alignment_hidden_dim"] = state_dict["projector.0.0.weight"].shape[0]
    return config


def convert_transformer(
    state_dict: Mapping[str, torch.Tensor], num_attention_heads: int | None = None
) -> GMemTransformer2DModel:
    """
    Builds a [`GMemTransformer2DModel`] from a state dict of the public reference implementation (LINs-lab/GMem).

    The configuration follows from the names and shapes of the tensors. What they cannot tell takes the published
    value: `memory_dropout` 0.4, alignment after the fourth block. With fewer blocks the original never uses its
    projector, not even in training; it is then left out with a warning.

    The SiT of the paper's first version (its projector is called `projectors`) counts time the other way, with noise at
    t = 1, and predicts noise minus data. The converted model is the same function of the paper's later time: the time
    features of 1 - t are those of t turned by fixed angles, which the first time layer takes over, and the output layer
    changes its sign. Its alignment is after the eighth block.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            LightningDiT- or SiT-style weights; a prefix `module.` or `_orig_mod.` of all names is removed. The tensors
            are not changed, but the model shares their memory, so that a memory-mapped file stays one.
        num_attention_heads (`int`, *optional*):
            Only needed for a model without rotary embedding and query/key norms, whose tensors do not tell it.

    Returns:
        [`GMemTransformer2DModel`]: in eval mode, in the state dict's dtype (the time embedding in float32).

    Raises:
        ValueError: if tensors are missing, left over or of the wrong shape (they are named), the rotary tables are not
            the standard ones, the model is class-conditional, or `num_attention_heads` is missing or wrong.
    """
    state_dict = strip_wrapper_prefixes(state_dict)
    first_version = any(name.startswith("projectors.") for name in state_dict)
    if first_version:
        state_dict = {re.sub(r"^projectors\.", "projector.", name): tensor for name, tensor in state_dict.items()}
    alignment_layer = _FIRST_VERSION_ALIGNMENT_LAYER if first_version else _ALIGNMENT_LAYER

    needed = ("x_embedder.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "final_layer.linear.weight")
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"Not a state dict of the GMem reference implementation: it has no {', '.join(missing)}.")
    if "condition_projection.linear.weight" not in state_dict:
        class_conditional = any(name.startswith("y_embedder.") for name in state_dict)
        found = ", but the `y_embedder` of a class-conditional SiT or LightningDiT" if class_conditional else ""
        raise ValueError(
            f"The state dict has no `condition_projection.linear.weight`{found}: it is not memory-conditioned. What is "
            "missing is the layer that takes a memory snippet, which only training as a GMem gives."
        )

    try:
        config = _infer_config(state_dict, num_attention_heads, alignment_layer)
    except KeyError as error:
        raise ValueError(f"The state dict does not fit: missing {error.args[0]}.") from error
    with torch.device("meta"):
        model = GMemTransformer2DModel(**config)

    unused = []
    if config["num_layers"] < alignment_layer:
        unused = [name for name in state_dict if name.startswith("projector.")]
        if unused:
            logger.warning(
                f"The projector would read the tokens after block {alignment_layer}, but there are only "
                f"{config['num_layers']} blocks: it was never trained and is left out ({', '.join(unused)})."
            )

    names = {name: _original_name(name, config["ffn_type"]) for name in model.state_dict()}
    shapes = {}
    for name, tensor in model.state_dict().items():
        rows = tensor.shape[0] if _query_key_or_value(name) is None else 3 * tensor.shape[0]
        shapes[names[name]] = (rows, *tensor.shape[1:])
    rotary_tables = _rotary_tables(model)
    shapes |= {name: table.shape for name, table in rotary_tables.items()}
    check_names_and_shapes(state_dict, shapes, ignored=unused)
    for name, table in rotary_tables.items():
        # half precision rounds by less than this; another base or scale of the positions is far off
        if not torch.allclose(state_dict[name].cpu().float(), table, rtol=0, atol=1e-2):
            raise ValueError(
                f"{name} is not the table of a rotary embedding with base 10000 at positions 0, 1, 2, ..."
            )

    converted = {}
    for name, original in names.items():
        tensor, part = state_dict[original].detach(), _query_key_or_value(name)
        if part is not None:
            tensor = tensor.chunk(3)[part]
        converted[name] = tensor.float() if name.startswith("timestep_embedder.") else tensor
    if first_version:
        _reverse_time(converted)
    model.load_state_dict(converted, assign=True)
    return model.eval()


def _rotary_tables(model: GMemTransformer2DModel) -> dict[str, torch.Tensor]:
    """The tables that the original keeps in its state dict, in float32; empty without rotary embedding."""
    if model.rotary_embedder is None:
        return {}
    grid_size = model.config.sample_size // model.config.patch_size
    return dict(zip(_ROTARY_TABLES, model.rotary_embedder(grid_size, grid_size, torch.device("cpu")), strict=True))


def _reverse_time(converted: dict[str, torch.Tensor]) -> None:
    """
    Makes a model of (1 - t, noise - data) one of (t, data - noise). With the time features cos(f t), sin(f t):

        cos(f (1 - t)) = cos(f) cos(f t) + sin(f) sin(f t),   sin(f (1 - t)) = sin(f) cos(f t) - cos(f) sin(f t)
    """
    weight = converted["timestep_embedder.linear_1.weight"]
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    cos, sin = frequencies.cos(), frequencies.sin()
    converted["timestep_embedder.linear_1.weight"] = torch.cat(
        [of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1
    ).float()
    for name in ("proj_out.weight", "proj_out.bias"):
        converted[name] = -converted[name]


def export_transformer(model: GMemTransformer2DModel) -> dict[str, torch.Tensor]:
    """
    The way back: the state dict that the public reference implementation loads, to the bit what
    [`convert_transformer`] was given, fixed positions and rotary tables included.

    Two things do not come back. The projector of an original with fewer than four blocks was left out. A model of the
    paper's first version comes back as the equal model in the later form, whose time layer is rounded to float32.
    `memory_dropout`, `alignment_layer` and (without rotary embedding and query/key norms) the number of heads have no
    place in a state dict.

    Args:
        model ([`GMemTransformer2DModel`]): On any device, in any dtype.

    Returns:
        `dict[str, torch.Tensor]`: In the model's dtype; the time embedding is in float32 unless the model's dtype holds
        every bit of it. The tensors share the model's memory where they are not made of several.

    Raises:
        ValueError: if the model has tensors that a [`GMemTransformer2DModel`] as configured has not, such as adapters
            or fused projections (they are named).
    """
    with torch.device("meta"):
        expected = GMemTransformer2DModel.from_config(model.config).state_dict().keys()
    tensors = model.state_dict()
    unknown = sorted(tensors.keys() - expected)
    if unknown:
        raise ValueError(
            f"Merge adapters and unfuse projections first: the model has the tensors {', '.join(unknown)}."
        )

    state_dict, qkv = {}, {}
    for name, tensor in tensors.items():
        original = _original_name(name, model.config.ffn_type)
        if _query_key_or_value(name) is not None:
            qkv.setdefault(original, []).append(tensor)
            continue
        # the time embedding, which stays in float32 when the model is cast
        if tensor.dtype != model.dtype and torch.equal(tensor.to(model.dtype).to(tensor.dtype), tensor):
            tensor = tensor.to(model.dtype)
        state_dict[original] = tensor
    state_dict |= {original: torch.cat(parts) for original, parts in qkv.items()}
    state_dict |= {name: table.to(model.device, model.dtype) for name, table in _rotary_tables(model).items()}
    return state_dict
