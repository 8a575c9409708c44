# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_2d_sincos_pos_embed,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.torch_utils import maybe_allow_in_graph


@dataclass
class GMemTransformer2DModelOutput(BaseOutput):
    """
    The output of [`GMemTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
            The predicted velocity, data minus noise.
        alignment (`torch.Tensor` of shape `(batch_size, num_tokens, alignment_dim)`, *optional*):
            The projected tokens after block `alignment_layer`, only with `return_alignment=True`.
    """

    sample: torch.Tensor
    alignment: torch.Tensor | None = None


class GMemTimestepEmbedding(TimestepEmbedding):
    """The time embedding's MLP, in float32 also when the model is cast or under autocast: t in [0, 1] needs the digits."""

    def _apply(self, fn, recurse=True):
        def move_without_casting(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(move_without_casting, recurse)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        if not torch.amp.is_autocast_available(sample.device.type):  # "meta"
            return super().forward(sample)
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample)


class GMemRMSNorm(nn.RMSNorm):
    """RMSNorm whose input may be float32 when the weight is not: torch has a fused kernel only for equal dtypes."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


class GMemRotaryPosEmbed(nn.Module):
    """
    2D rotary tables: the first half of a head's channels turns with the row, the second half with the column.

    They are made in float32 in every forward, which costs little, so that no cast of the model can reach them.
    """

    def __init__(self, attention_head_dim: int, theta: float = 10000.0):
        super().__init__()
        self.axis_dim = attention_head_dim // 2
        self.theta = theta

    def forward(self, height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(height, device=device, dtype=torch.float32).repeat_interleave(width)
        columns = torch.arange(width, device=device, dtype=torch.float32).repeat(height)
        row_cos, row_sin = get_1d_rotary_pos_embed(self.axis_dim, rows, theta=self.theta, use_real=True)
        column_cos, column_sin = get_1d_rotary_pos_embed(self.axis_dim, columns, theta=self.theta, use_real=True)
        return torch.cat([row_cos, column_cos], dim=-1), torch.cat([row_sin, column_sin], dim=-1)


class GMemAttnProcessor:
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "GMemAttention",
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)

        query = query.unflatten(-1, (attn.heads, -1))
        key = key.unflatten(-1, (attn.heads, -1))
        value = value.unflatten(-1, (attn.heads, -1))

        if attn.norm_q is not None:
            # under autocast the weights are float32 and the projections are not
            query = attn.norm_q(query.to(attn.norm_q.weight.dtype)).to(value.dtype)
            key = attn.norm_k(key.to(attn.norm_k.weight.dtype)).to(value.dtype)

        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        return attn.to_out[0](hidden_states)


class GMemAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = GMemAttnProcessor
    _available_processors = [GMemAttnProcessor]

    def __init__(self, dim: int, heads: int, head_dim: int, norm_type: str, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.is_cross_attention = False

        inner_dim = heads * head_dim
        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim)])

        self.norm_q = self.norm_k = None
        if qk_norm and norm_type == "rms_norm":
            self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
            self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        elif qk_norm:
            self.norm_q = nn.LayerNorm(head_dim, eps=1e-5)
            self.norm_k = nn.LayerNorm(head_dim, eps=1e-5)

        self.set_processor(self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, image_rotary_emb)


class GMemFeedForward(nn.Module):
    """SwiGLU of inner width 2/3 * mlp_ratio * dim (LightningDiT), or a tanh-GELU MLP of width mlp_ratio * dim (SiT)."""

    def __init__(self, dim: int, mlp_ratio: float, ffn_type: str):
        super().__init__()
        self.ffn_type = ffn_type
        inner_dim = int(dim * mlp_ratio)
        if ffn_type == "swiglu":
            inner_dim = inner_dim * 2 // 3
            self.linear_in = nn.Linear(dim, 2 * inner_dim)
        else:
            self.linear_in = nn.Linear(dim, inner_dim)
        self.linear_out = nn.Linear(inner_dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.linear_in(hidden_states)
        if self.ffn_type == "swiglu":
            gate, hidden_states = hidden_states.chunk(2, dim=-1)
            hidden_states = F.silu(gate) * hidden_states
        else:
            hidden_states = F.gelu(hidden_states, approximate="tanh")
        return self.linear_out(hidden_states)


def _make_norm(norm_type: str, dim: int) -> nn.Module:
    if norm_type == "rms_norm":
        return GMemRMSNorm(dim, eps=1e-6)
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def _modulate(hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    if shift is None:
        return hidden_states * (1 + scale)
    return torch.addcmul(shift, hidden_states, 1 + scale)


@maybe_allow_in_graph
class GMemTransformerBlock(nn.Module):
    """
    `hidden_states`, the sum of what the blocks add, is float32 whatever the dtype of the weights: its rounding would be
    the largest error of bfloat16, and the first overflow of float16. `conditioning` has the dtype to compute in.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        norm_type: str,
        ffn_type: str,
        qk_norm: bool,
        adaln_shift: bool,
    ):
        super().__init__()
        self.adaln_shift = adaln_shift
        self.adaln_linear = nn.Linear(dim, (6 if adaln_shift else 4) * dim)
        self.norm1 = _make_norm(norm_type, dim)
        self.attn = GMemAttention(dim, num_attention_heads, attention_head_dim, norm_type, qk_norm)
        self.norm2 = _make_norm(norm_type, dim)
        self.ff = GMemFeedForward(dim, mlp_ratio, ffn_type)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        modulation = self.adaln_linear(conditioning).unsqueeze(1)
        if self.adaln_shift:
            shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)
        else:
            scale_attn, gate_attn, scale_ff, gate_ff = modulation.chunk(4, dim=-1)
            shift_attn = shift_ff = None

        norm_hidden_states = _modulate(self.norm1(hidden_states), scale_attn, shift_attn).to(conditioning.dtype)
        hidden_states = torch.addcmul(hidden_states, gate_attn, self.attn(norm_hidden_states, image_rotary_emb))

        norm_hidden_states = _modulate(self.norm2(hidden_states), scale_ff, shift_ff).to(conditioning.dtype)
        hidden_states = torch.addcmul(hidden_states, gate_ff, self.ff(norm_hidden_states))
        return hidden_states


# diffusers' caches and the guiders that skip layers ask here what a block takes and returns. The registry is private:
# should it move, they refuse the block by name, and all else works.
with contextlib.suppress(ImportError):
    from diffusers.hooks._helpers import (
        AttentionProcessorMetadata,
        AttentionProcessorRegistry,
        TransformerBlockMetadata,
        TransformerBlockRegistry,
    )

    TransformerBlockRegistry.register(GMemTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
    AttentionProcessorRegistry.register(
        GMemAttnProcessor,
        AttentionProcessorMetadata(
            skip_processor_output_fn=lambda attn, hidden_states, *args, **kwargs: hidden_states
        ),
    )


class GMemTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    r"""
    The velocity network of GMem ([arXiv 2412.08781](https://huggingface.co/papers/2412.08781)): a LightningDiT or SiT
    whose class label is replaced by a memory snippet. Time is the paper's: t = 0 is noise, t = 1 is data.

    The defaults are the published LightningDiT-XL/1 for 16x16x32 VA-VAE latents. SiT is `norm_type="layer_norm",
    ffn_type="gelu", use_rope=False`.

    In whatever dtype the model is, its time embedding, its rotary tables and the sum of its blocks are float32.

    Args:
        sample_size (`int`, defaults to 16):
            Height and width of the input in latent (or pixel) units. Fixed, as the positions are.
        patch_size (`int`, defaults to 1):
            Side of the square patch that becomes one token; divides `sample_size`.
        in_channels (`int`, defaults to 32):
            Channels of the input and of the velocity.
        num_layers (`int`, defaults to 28):
            Number of transformer blocks.
        num_attention_heads (`int`, defaults to 16):
            Number of attention heads.
        attention_head_dim (`int`, defaults to 72):
            Channels of a head; the width of the model is `num_attention_heads * attention_head_dim`. A multiple of 4
            with `use_rope`.
        mlp_ratio (`float`, defaults to 4.0):
            Inner width of the feed-forward over the model's width. A SwiGLU has 2/3 of it, rounded down.
        memory_dim (`int`, defaults to 768):
            Dimension of a snippet.
        memory_dropout (`float`, defaults to 0.4):
            Probability, in train mode, with which each entry of a snippet is zeroed; the others grow by 1 / (1 - p).
        norm_type (`"rms_norm"` or `"layer_norm"`, defaults to `"rms_norm"`):
            RMSNorm with weight, or LayerNorm without parameters.
        ffn_type (`"swiglu"` or `"gelu"`, defaults to `"swiglu"`):
            The feed-forward.
        use_rope (`bool`, defaults to `True`):
            2D rotary embedding in the attention, beside the fixed sine-cosine positions that are always added.
        qk_norm (`bool`, defaults to `False`):
            Normalise queries and keys per head.
        adaln_shift (`bool`, defaults to `True`):
            Whether the blocks' adaptive norms shift as well as scale.
        learn_sigma (`bool`, defaults to `False`):
            The output layer has twice the channels, of which the second half is dropped (some SiT checkpoints).
        alignment_layer (`int`, *optional*, defaults to 4):
            The alignment (REPA) projector reads the tokens after this many blocks. `None`: there is no projector.
        alignment_dim (`int`, defaults to 768):
            Dimension of the features that the projector predicts.
        alignment_hidden_dim (`int`, defaults to 2048):
            Inner width of the projector.

    Raises:
        ValueError: for values outside what is said above.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["GMemTransformerBlock"]
    _repeated_blocks = ["GMemTransformerBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "pos_embed", "timestep_embedder", "memory_embedder", "norm"]
    _keep_in_fp32_modules = ["timestep_embedder"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        memory_dim: int = 768,
        memory_dropout: float = 0.4,
        norm_type: str = "rms_norm",
        ffn_type: str = "swiglu",
        use_rope: bool = True,
        qk_norm: bool = False,
        adaln_shift: bool = True,
        learn_sigma: bool = False,
        alignment_layer: int | None = 4,
        alignment_dim: int = 768,
        alignment_hidden_dim: int = 2048,
    ):
        super().__init__()
        hidden_size = num_attention_heads * attention_head_dim
        if sample_size % patch_size != 0:
            raise ValueError(f"`patch_size` must divide `sample_size` ({sample_size}), got {patch_size}.")
        if norm_type not in ("rms_norm", "layer_norm"):
            raise ValueError(f"`norm_type` must be 'rms_norm' or 'layer_norm', got {norm_type!r}.")
        if ffn_type not in ("swiglu", "gelu"):
            raise ValueError(f"`ffn_type` must be 'swiglu' or 'gelu', got {ffn_type!r}.")
        if use_rope and attention_head_dim % 4 != 0:
            raise ValueError(
                f"`attention_head_dim` must be a multiple of 4 with `use_rope`, got {attention_head_dim}."
            )
        if hidden_size % 4 != 0:
            raise ValueError(
                "`num_attention_heads * attention_head_dim` must be a multiple of 4 (sine-cosine positions), got "
                f"{num_attention_heads} * {attention_head_dim}."
            )
        if not 0.0 <= memory_dropout < 1.0:
            raise ValueError(f"`memory_dropout` must be in [0, 1), got {memory_dropout}.")
        if alignment_layer is not None and not 1 <= alignment_layer <= num_layers:
            raise ValueError(
                f"`alignment_layer` must be None or in 1..{num_layers} (`num_layers`), got {alignment_layer}."
            )

        grid_size = sample_size // patch_size

        # 1. Tokens and positions. The positions are saved with the weights: the EMA of the original training moves
        # them by rounding, and published checkpoints carry the moved ones.
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        pos_embed = get_2d_sincos_pos_embed(hidden_size, grid_size, base_size=grid_size, output_type="pt")
        self.register_buffer("pos_embed", pos_embed.float().unsqueeze(0))
        self.rotary_embedder = GMemRotaryPosEmbed(attention_head_dim) if use_rope else None

        # 2. Time and memory
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = GMemTimestepEmbedding(256, hidden_size)
        self.memory_embedder = nn.Linear(memory_dim, hidden_size)

        # 3. Blocks
        self.transformer_blocks = nn.ModuleList(
            [
                GMemTransformerBlock(
                    dim=hidden_size,
                    num_attention_heads=num_attention_heads,
                    attention_head_dim=attention_head_dim,
                    mlp_ratio=mlp_ratio,
                    norm_type=norm_type,
                    ffn_type=ffn_type,
                    qk_norm=qk_norm,
                    adaln_shift=adaln_shift,
                )
                for _ in range(num_layers)
            ]
        )

        # 4. Alignment projector (REPA, arXiv 2410.06940), needed in training only
        self.alignment_projector = None
        if alignment_layer is not None:
            self.alignment_projector = nn.Sequential(
                nn.Linear(hidden_size, alignment_hidden_dim),
                nn.SiLU(),
                nn.Linear(alignment_hidden_dim, alignment_hidden_dim),
                nn.SiLU(),
                nn.Linear(alignment_hidden_dim, alignment_dim),
            )

        # 5. Output
        self.norm_out = _make_norm(norm_type, hidden_size)
        self.adaln_out = nn.Linear(hidden_size, 2 * hidden_size)
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """
        The published initialisation: Xavier-uniform matrices, zero biases, time MLP normal with standard deviation
        0.02. Unlike DiT's, neither the adaptive norms nor the output start at zero.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.timestep_embedder.linear_2.weight, std=0.02)

    def load_lora_adapter(self, *args, **kwargs) -> None:
        """[`PeftAdapterMixin.load_lora_adapter`]; the new layers are in the mode (train or eval) of the model."""
        super().load_lora_adapter(*args, **kwargs)
        self.train(self.training)  # diffusers leaves them in train mode, in which their dropout acts

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        memory: torch.Tensor | None = None,
        return_alignment: bool = False,
        memory_dropout_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> GMemTransformer2DModelOutput | tuple[torch.Tensor, ...]:
        """
        Predicts the velocity (data minus noise) of noised latents.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                Noised latents x_t.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`):
                The paper's time in [0, 1]: 0 is noise, 1 is data. (Not diffusers' 1000 * sigma; the pipeline converts.)
            memory (`torch.Tensor` of shape `(batch_size, memory_dim)`, *optional*):
                One snippet per sample, of any length: it is brought to unit length here, in float32. A row of zeros
                is the null memory; `None` is the null memory for all.
            return_alignment (`bool`, defaults to `False`):
                Also compute the alignment projector's output.
            memory_dropout_mask (`torch.Tensor` of shape `(batch_size, memory_dim)`, *optional*):
                Which entries of the snippets to keep (1 or True) and which to drop (0 or False), instead of drawing
                them; applied in eval mode too.
            attention_kwargs (`dict`, *optional*):
                `{"scale": float}` is the LoRA scale.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`GMemTransformer2DModelOutput`] or a tuple `(sample,)` or `(sample, alignment)`.

        Raises:
            ValueError: if a shape does not fit, or `return_alignment` is asked of a model without a projector.
        """
        batch_size, channels, height, width = hidden_states.shape
        expected_shape = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if (channels, height, width) != expected_shape:
            raise ValueError(
                f"`hidden_states` must have shape (batch_size, {', '.join(map(str, expected_shape))}), got "
                f"{tuple(hidden_states.shape)}."
            )
        if timestep.shape not in ((), (batch_size,)):
            raise ValueError(f"`timestep` must have shape () or ({batch_size},), got {tuple(timestep.shape)}.")
        if memory is None:
            memory = hidden_states.new_zeros(batch_size, self.config.memory_dim)
        if memory.shape != (batch_size, self.config.memory_dim):
            raise ValueError(
                f"`memory` must have shape (batch_size, memory_dim) = {(batch_size, self.config.memory_dim)}, got "
                f"{tuple(memory.shape)}."
            )
        if memory_dropout_mask is not None and memory_dropout_mask.shape != memory.shape:
            raise ValueError(
                f"`memory_dropout_mask` must have the shape of `memory`, {tuple(memory.shape)}, got "
                f"{tuple(memory_dropout_mask.shape)}."
            )
        if return_alignment and self.alignment_projector is None:
            raise ValueError("`return_alignment=True` needs a model with a projector (`alignment_layer` is None).")

        # 1. Tokens
        # Contiguous: of a transposed input, blocks compiled by torch 2.13 for the CPU get a wrong gradient
        hidden_states = self.x_embedder(hidden_states).flatten(2).transpose(1, 2).contiguous()
        dtype = hidden_states.dtype
        hidden_states = hidden_states.float() + self.pos_embed
        grid_height, grid_width = height // self.config.patch_size, width // self.config.patch_size
        image_rotary_emb = None
        if self.rotary_embedder is not None:
            image_rotary_emb = self.rotary_embedder(grid_height, grid_width, device=hidden_states.device)

        # 2. Conditioning
        memory = F.normalize(memory.float(), dim=-1)
        if memory_dropout_mask is not None:
            memory = memory * memory_dropout_mask / (1 - self.config.memory_dropout)
        else:
            memory = F.dropout(memory, self.config.memory_dropout, training=self.training)
        time_embedding = self.timestep_embedder(self.time_proj(timestep.expand(batch_size)))
        memory_embedding = self.memory_embedder(memory.to(dtype))
        conditioning = F.silu(time_embedding + memory_embedding).to(dtype)

        # 3. Blocks
        alignment = None
        for index, block in enumerate(self.transformer_blocks, start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning, image_rotary_emb)
            else:
                hidden_states = block(hidden_states, conditioning, image_rotary_emb)
            if return_alignment and index == self.config.alignment_layer:
                alignment = self.alignment_projector(hidden_states.to(dtype))

        # 4. Output: tokens back to an image, (patch row, patch column, channel) within a token
        shift, scale = self.adaln_out(conditioning).unsqueeze(1).chunk(2, dim=-1)
        hidden_states = _modulate(self.norm_out(hidden_states), scale, shift)
        hidden_states = self.proj_out(hidden_states.to(dtype))
        patch_size = self.config.patch_size
        hidden_states = hidden_states.reshape(batch_size, grid_height, grid_width, patch_size, patch_size, -1)
        sample = hidden_states.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, -1, height, width)
        sample = sample[:, : self.config.in_channels]

        if not return_dict:
            return (sample, alignment) if return_alignment else (sample,)
        return GMemTransformer2DModelOutput(sample=sample, alignment=alignment)
