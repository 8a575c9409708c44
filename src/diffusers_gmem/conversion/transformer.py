# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The public reference implementation's state dict -> [`GMemTransformer2DModel`]."""

import re

import torch
from diffusers.utils import logging

from ..models.transformer_gmem import GMemTransformer2DModel


logger = logging.get_logger(__name__)

# Original name -> ours, where it is only a name. `{}` is the number of the block.
_TOP_LEVEL_NAMES = {
    "x_embedder.proj": "x_embedder",
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "condition_projection.linear": "memory_embedder",
    "projector.0.": "alignment_projector.",
    "final_layer.norm_final": "norm_out",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "adaln_out",
}
_BLOCK_NAMES = {
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "attn.proj": "attn.to_out.0",
    "mlp.w12": "ff.linear_in",
    "mlp.w3": "ff.linear_out",
    "mlp.fc1": "ff.linear_in",
    "mlp.fc2": "ff.linear_out",
    "adaLN_modulation.1": "adaln_linear",
}
_ROTARY_TABLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
# The original taps the projector after a fixed block.
_ALIGNMENT_LAYER = 4


def _convert_name(name: str) -> str:
    block = re.match(r"blocks\.(\d+)\.(.+)", name)
    prefix, rest, names = (
        (f"transformer_blocks.{block[1]}.", block[2], _BLOCK_NAMES) if block else ("", name, _TOP_LEVEL_NAMES)
    )
    for original, ours in names.items():
        if rest.startswith(original):
            rest = ours + rest.removeprefix(original)
            break
    return prefix + rest


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


def _infer_config(state_dict: dict[str, torch.Tensor], num_attention_heads: int | None) -> dict:
    def has(part: str) -> bool:
        return any(part in name for name in state_dict)

    hidden_size, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    num_tokens = state_dict["pos_embed"].shape[1]
    num_layers = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    use_rope = has("feat_rope.")
    qk_norm = has(".attn.q_norm.")
    swiglu = has(".mlp.w12.")
    has_projector = has("projector.") and num_layers >= _ALIGNMENT_LAYER
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
        "alignment_layer": _ALIGNMENT_LAYER if has_projector else None,
    }
    if has_projector:
        config["alignment_dim"] = state_dict["projector.0.4.weight"].shape[0]
        config["alignment_hidden_dim"] = state_dict["projector.0.0.weight"].shape[0]
    return config


def convert_transformer(
    state_dict: dict[str, torch.Tensor], num_attention_heads: int | None = None
) -> GMemTransformer2DModel:
    """
    Builds a [`GMemTransformer2DModel`] from a state dict of the public reference implementation (LINs-lab/GMem).

    The configuration follows from the names and shapes of the tensors. What they cannot tell takes the published
    value: `memory_dropout` 0.4, alignment after the fourth block. With fewer blocks the original never uses its
    projector, not even in training; it is then left out with a warning.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            LightningDiT- or SiT-style weights, without a prefix. The tensors are neither changed nor kept.
        num_attention_heads (`int`, *optional*):
            Only needed for a model without rotary embedding and query/key norms, whose tensors do not tell it.

    Returns:
        [`GMemTransformer2DModel`]: in eval mode, in the state dict's dtype (the time embedding in float32).

    Raises:
        ValueError: if tensors are missing, left over or of the wrong shape (they are named), or `num_attention_heads` is missing or wrong.
    """
    needed = ("x_embedder.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "final_layer.linear.weight")
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"Not a state dict of the GMem reference implementation: it has no {', '.join(missing)}.")
    if "condition_projection.linear.weight" not in state_dict:
        raise ValueError(
            "The state dict has no `condition_projection.linear.weight`: it is not memory-conditioned (a "
            "class-conditional SiT or LightningDiT has `y_embedder` instead)."
        )

    try:
        config = _infer_config(state_dict, num_attention_heads)
    except KeyError as error:
        raise ValueError(f"The state dict does not fit: missing {error.args[0]} (original name).") from error
    with torch.device("meta"):
        model = GMemTransformer2DModel(**config)

    unused = list(_ROTARY_TABLES)
    if config["num_layers"] < _ALIGNMENT_LAYER:
        projector = [name for name in state_dict if name.startswith("projector.")]
        unused += projector
        if projector:
            logger.warning(
                f"The projector would read the tokens after block {_ALIGNMENT_LAYER}, but there are only "
                f"{config['num_layers']} blocks: it was never trained and is left out ({', '.join(projector)})."
            )

    converted = {}
    for name, tensor in state_dict.items():
        qkv = re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.(weight|bias)", name)
        if qkv:
            for part, chunk in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                converted[_convert_name(f"{qkv[1]}{part}.{qkv[2]}")] = chunk
        elif name not in unused:
            converted[_convert_name(name)] = tensor

    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected.keys() - converted.keys()]
    problems += [f"unexpected {name}" for name in converted.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in converted.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"The state dict does not fit (names after conversion): {'; '.join(sorted(problems))}.")

    # `assign` keeps the state dict's dtype; the copy keeps the caller's tensors out of the model
    for name, tensor in converted.items():
        dtype = torch.float32 if name.startswith("timestep_embedder.") else tensor.dtype
        converted[name] = tensor.to(dtype, copy=True)
    model.load_state_dict(converted, assign=True)
    return model.eval()
