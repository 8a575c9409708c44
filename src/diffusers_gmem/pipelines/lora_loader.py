# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin, _fetch_state_dict
from diffusers.utils.peft_utils import require_peft_backend

from ..files import atomic_path


class GMemLoraLoaderMixin(LoraBaseMixin):
    r"""
    Loads LoRA layers into [`GMemTransformer2DModel`] and saves them, as the pipelines of diffusers do. From
    [`LoraBaseMixin`] come `set_adapters`, `delete_adapters`, `unload_lora_weights`, `enable_lora`, `disable_lora`,
    `get_active_adapters` and `get_list_adapters`.

    Files are safetensors only, with keys that start with `transformer.`. The scale of a single call is
    `pipe(attention_kwargs={"scale": 0.5})`.
    """

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        return_lora_metadata: bool = False,
        **kwargs,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """
        Reads LoRA layers.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `Path` or `dict` of `torch.Tensor`):
                A safetensors file, a folder or a repository of the Hub that has one, or the tensors themselves.
            return_lora_metadata (`bool`, defaults to `False`):
                Whether to return `(state_dict, metadata)`; the metadata is that of `save_lora_weights`, or `None`.
            kwargs:
                `weight_name` (name of the file in the folder or repository), `subfolder`, `revision`, `token`,
                `cache_dir`, `force_download`, `local_files_only`, `proxies`.

        Raises:
            ValueError: if the file is not of safetensors, or a key is not that of a LoRA layer.
        """
        source = pretrained_model_name_or_path_or_dict
        options = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")
        if unknown := kwargs.keys() - {"weight_name", *options}:
            raise TypeError(f"`load_lora_weights` got unknown arguments {sorted(unknown)}.")
        weight_name = kwargs.get("weight_name")
        file = weight_name
        if weight_name is None and not isinstance(source, dict) and Path(source).is_file():
            file = source
        if file is not None and Path(file).suffix != ".safetensors":
            raise ValueError(f"LoRA weights are read from safetensors files only, got {str(file)!r}.")

        state_dict, metadata = _fetch_state_dict(
            source,
            weight_name=weight_name,
            use_safetensors=True,
            allow_pickle=False,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            **{name: kwargs.get(name) for name in options},
        )
        foreign = [key for key in state_dict if "lora" not in key]
        if foreign:
            raise ValueError(f"These are not LoRA layers (no 'lora' in their names): {foreign}.")
        return (state_dict, metadata) if return_lora_metadata else state_dict

    @require_peft_backend
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ) -> None:
        """
        Adds the LoRA layers of a file to the transformer and activates them.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `Path` or `dict` of `torch.Tensor`):
                See `lora_state_dict`. Keys that do not start with `transformer.` are left out; where none does, a
                warning says so.
            adapter_name (`str`, *optional*):
                Name for `set_adapters` and the like; `default_<number>` if not given.
            hotswap (`bool`, defaults to `False`):
                Put the layers in the place of those of the adapter `adapter_name`, which a compiled model does not
                notice. See [`PeftAdapterMixin.load_lora_adapter`].
            low_cpu_mem_usage (`bool`, defaults to `True`):
                Do not draw initial weights for the new layers.
            kwargs: those of `lora_state_dict`.

        Raises:
            ValueError: as `lora_state_dict` does, and if the name is in use (or, with `hotswap`, is not).
        """
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        self.transformer.load_lora_adapter(
            state_dict,
            prefix=self.transformer_name,
            adapter_name=adapter_name,
            metadata=metadata,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
            _pipeline=self,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor],
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        safe_serialization: bool = True,
    ) -> None:
        """
        Saves LoRA layers for `load_lora_weights`, as a safetensors file.

        Args:
            save_directory (`str` or `Path`): folder to write to; created if needed.
            transformer_lora_layers (`dict` of `torch.Tensor`):
                The layers, as `peft.get_peft_model_state_dict(transformer)` gives them.
            transformer_lora_adapter_metadata (`dict`, *optional*):
                The adapter's configuration, `transformer.peft_config[adapter_name].to_dict()`. Without it, loading
                takes alpha to be the rank.
            weight_name (`str`, defaults to `"pytorch_lora_weights.safetensors"`): name of the file.
            safe_serialization (`bool`, defaults to `True`): nothing else is accepted; a pickle is never written.

        Raises:
            ValueError: if there are no layers, or the file would not be of safetensors.
        """
        if not transformer_lora_layers:
            raise ValueError("`transformer_lora_layers` holds no layers to save.")
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` would write a pickle; LoRA weights are saved as safetensors.")
        if not weight_name.endswith(".safetensors"):
            raise ValueError(f"`weight_name` must end in '.safetensors', got {weight_name!r}.")
        path = Path(save_directory, weight_name)
        with atomic_path(path) as temporary:
            cls._save_lora_weights(
                save_directory=path.parent,
                lora_layers={cls.transformer_name: transformer_lora_layers},
                lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
                weight_name=temporary.name,
            )

    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """
        Adds the LoRA layers to the weights they belong to, so that they cost nothing any more.

        Args:
            components (sequence of `str`, defaults to `("transformer",)`): components with LoRA layers.
            lora_scale (`float`, defaults to 1.0): factor of the layers.
            safe_fusing (`bool`, defaults to `False`): refuse layers that make a weight NaN.
            adapter_names (`list[str]`, *optional*): adapters to fuse; the active ones if not given.
        """
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """
        Undoes `fuse_lora`.

        Args:
            components (sequence of `str`, defaults to `("transformer",)`): components with fused LoRA layers.
        """
        super().unfuse_lora(components)
