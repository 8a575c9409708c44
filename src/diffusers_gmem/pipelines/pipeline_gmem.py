# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderRAE,
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    SchedulerMixin,
)
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import CommitInfo
from PIL.PngImagePlugin import PngInfo

from ..files import atomic_path
from ..hub.locate import locate_pipeline
from ..hub.transfer import HubRepo
from ..models.image_encoder import GMemImageEncoder
from ..models.latent_normalization import decode_latents, spatial_compression_ratio
from ..models.memory_bank import GMemMemoryBank
from ..models.snippet_sources import SnippetSources, attach_sources, sources_of
from ..models.transformer_gmem import GMemTransformer2DModel
from ..schedulers.scheduling_gmem_flow_match import GMemFlowMatchScheduler
from .image_inputs import ImageInput, is_one_image, open_image_inputs
from .lora_loader import GMemLoraLoaderMixin
from .provenance import (
    PROVENANCE_VERSION,
    call_arguments,
    describe_generator,
    encode_tensor,
    png_info,
    publishable,
)


logger = logging.get_logger(__name__)

# Folder of the bank inside a saved pipeline. Not the component's name: diffusers' downloader rejects a repository that
# has safetensors of a foreign name in a component's folder.
MEMORY_BANK_FOLDER = "bank"

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_gmem import GMemPipeline

        >>> pipe = GMemPipeline.from_pretrained("quickstart/pipeline")
        >>> output = pipe(num_images=8, generator=torch.Generator().manual_seed(0))
        >>> output.images[0].save("draw.png")
        >>> output.memory_indices  # which snippet made which image
        ```
"""


@dataclass
class GMemPipelineOutput(BaseOutput):
    """
    Output of [`GMemPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images: a list of PIL images, an array of shape `(n, height, width, channels)` in [0, 1] ("np"), a
            tensor of shape `(n, channels, height, width)` in [0, 1] ("pt"), or the denoised latents ("latent").
        memory_indices (`list[int]`, *optional*):
            For each image, the row of the memory bank whose snippet made it; `None` if the snippets did not come from
            the bank.
        sources (`list[list[dict] | None]`, *optional*):
            For each image, what its snippet came from: a dict for each part. A row of a bank has its number `index`, its
            metadata, and its `label` and `label_name` if it has them ([`GMemMemoryBank.describe_rows`]); a part that is
            not known has `index=None`; an image of the caller has its name as `image`, which is `None` for one without.
            `weight` is 1, or the weight in a mixture: that of `GMemMemoryBank.mix`, the share of
            `GMemMemoryBank.interpolate`. `None` for a snippet of which nothing is known.

    Attributes:
        provenance (`list[dict]`, *optional*):
            For each image all that is known of how it was made, for JSON, without paths of this machine: `sources`, the
            `memory_index`, the `prompt` that found it, the `seed`, the number `image` of the image in its call and the
            `batch_size` of that, the `settings` (arguments) of the call, the state of its `generator` (or of each),
            the `tensors` among the arguments (the snippet, if it did not come from a bank, and `latents` and
            `negative_memory`; float32 in base64), `scheduler` and `guider` with their configuration, the `model`
            (name, commit, dtype, device, LoRA adapters, cache), and the fingerprint of the `memory_bank`.
            `repeatable` is false for an image that a callback changed or whose run was ended early. It is put
            together when it is first read, as the fingerprint of a bank that is not from a file takes a pass over all
            rows.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    memory_indices: list[int] | None = None
    sources: list[list[dict[str, Any]] | None] | None = None

    def __post_init__(self):
        super().__post_init__()
        self._complete_provenance: Callable[[], list[dict[str, Any]]] | None = None

    @cached_property
    def provenance(self) -> list[dict[str, Any]] | None:
        provenance = None if self._complete_provenance is None else self._complete_provenance()
        self._complete_provenance = None  # it holds on to the bank
        return provenance

    def __reduce__(self):
        _ = self.provenance  # what completes it cannot be pickled
        return super().__reduce__()

    def png_metadata(self, k: int) -> PngInfo:
        """The provenance of image k for `image.save("image.png", pnginfo=...)`: JSON, as the text "gmem"."""
        return png_info(self.provenance[k])

    def save_images(self, directory: str | Path, prefix: str = "image") -> list[Path]:
        """
        Writes the images as PNG files that say how they were made ([`~diffusers_gmem.read_provenance`] reads it). Each
        file appears as a whole, and replaces one of its name.

        Args:
            directory (`str` or `Path`): Folder to write to; made where it does not exist.
            prefix (`str`, defaults to `"image"`): The files are `<prefix>-00000.png` and so on.

        Returns:
            `list[Path]`: The files.

        Raises:
            ValueError: if these are latents, not images.
        """
        images = self.images
        if isinstance(images, torch.Tensor):
            images = VaeImageProcessor.pt_to_numpy(images)
        if isinstance(images, np.ndarray):
            if images.shape[-1] not in (1, 3) or not 0 <= images.min() <= images.max() <= 1:
                raise ValueError(f"Latents of shape {tuple(self.images.shape)} cannot be saved as images.")
            images = VaeImageProcessor.numpy_to_pil(images)
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{prefix}-{k:05d}.png" for k in range(len(images))]
        for k, path in enumerate(paths):
            with atomic_path(path) as temporary:
                images[k].save(temporary, format="PNG", pnginfo=self.png_metadata(k))
        return paths


class GMemPipeline(DiffusionPipeline, GMemLoraLoaderMixin):
    r"""
    Generates images from memory snippets (GMem, [arXiv 2412.08781](https://huggingface.co/papers/2412.08781)).

    Inherits from [`DiffusionPipeline`]: see there for saving, loading, devices and offloading; for LoRA see
    [`GMemLoraLoaderMixin`].

    Args:
        transformer ([`GMemTransformer2DModel`]):
            The network, which predicts the velocity, or what the scheduler's `prediction_type` says. The pipeline puts
            it in eval mode, and refuses to run one that is in train mode.
        scheduler ([`SchedulerMixin`]):
            [`GMemFlowMatchScheduler`], or a scheduler of diffusers that is configured for flow matching
            ([`FlowMatchEulerDiscreteScheduler`], [`FlowMatchHeunDiscreteScheduler`], or UniPC or DPM++ with
            `use_flow_sigmas=True, prediction_type="flow_prediction"`).
        vae (`ModelMixin`, *optional*):
            Decodes the latents: [`AutoencoderKL`], [`AutoencoderDC`], [`AutoencoderRAE`] or [`AutoencoderTiny`]. `None`:
            the transformer works on pixels in [-1, 1].
        memory_bank ([`GMemMemoryBank`], *optional*):
            Where snippets are drawn from. It stays memory-mapped on the CPU, whatever the pipeline's device and dtype;
            only the rows in use travel.
        image_encoder (`torch.nn.Module`, *optional*):
            Vision model (of transformers, or [`GMemImageEncoder`]) whose `pooler_output` is an image's snippet. The
            pipeline puts it in eval mode.
        image_processor (`transformers` image processor, *optional*):
            Makes the `pixel_values` that `image_encoder` reads.
        text_encoder (`torch.nn.Module`, *optional*):
            Text half of the CLIP or SigLIP model that made the bank's text keys (`CLIPTextModelWithProjection`,
            `SiglipTextModel`), for `prompt`. The pipeline puts it in eval mode.
        tokenizer (`transformers` tokenizer, *optional*):
            That of `text_encoder`.
        guider ([`BaseGuidance`], *optional*):
            Guidance other than `guidance_scale`, for every call: see `guider` there.
        memory_bank_source (`dict`, *optional*):
            Where a saved pipeline finds its bank (`subfolder`, or `repo_id` and `revision` on the Hub), the bank's
            `fingerprint`, and what is known of the bank of the training (`trained_with`). Written by `save_pretrained`.
    """

    _optional_components = [
        "vae",
        "memory_bank",
        "image_encoder",
        "image_processor",
        "text_encoder",
        "tokenizer",
        "guider",
    ]
    _callback_tensor_inputs = ["latents", "memory"]
    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae"

    _hub_repo: HubRepo | None = None  # where `from_pretrained` found the pipeline
    _checked_memory_bank: GMemMemoryBank | None = None
    _checked_preprocessing: tuple | None = None

    def __init__(
        self,
        transformer: GMemTransformer2DModel,
        scheduler: SchedulerMixin,
        # `from_pipe` carries over diffusers' models only where their very class is named
        vae: AutoencoderKL | AutoencoderDC | AutoencoderRAE | AutoencoderTiny | None = None,
        memory_bank: GMemMemoryBank | None = None,
        image_encoder: GMemImageEncoder | torch.nn.Module | None = None,
        image_processor=None,
        text_encoder: torch.nn.Module | None = None,
        tokenizer=None,
        guider: BaseGuidance | None = None,
        memory_bank_source: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            memory_bank=None,
            image_encoder=image_encoder,
            image_processor=image_processor,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            guider=guider,
        )
        self.register_to_config(memory_bank_source=memory_bank_source)
        # Assigned, not registered: diffusers then never casts, moves or saves it. `save_pretrained` below does.
        self.memory_bank = memory_bank
        self.vae_scale_factor = 1 if vae is None else spatial_compression_ratio(vae)
        self.vae_image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        # A model that was built, not loaded, is in train mode, in which dropout would act
        for model in (transformer, image_encoder, text_encoder):
            if model is not None:
                model.eval()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The scheduler's timestep while `__call__` runs (diffusers' caches ask for it), else `None`."""
        return self._current_timestep

    @property
    def num_timesteps(self) -> int:
        """Model evaluations of the last call (a guided one counts once). An adaptive solver adds to them as it goes."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "GMemPipeline":
        """
        [`DiffusionPipeline.from_pretrained`], from safetensors alone and, on the Hub, from one commit.

        A bank that lies in the local folder is opened too (memory-mapped, so at no cost), unless `memory_bank=` is passed.
        One on the Hub is downloaded when `__call__` needs it: see `load_memory_bank`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: see [`~diffusers_gmem.hub.HubRepo.download`].
            ValueError: if the repository holds another pipeline.
        """
        hub_kwargs = {
            key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs
        }
        repo = HubRepo(str(pretrained_model_name_or_path), "model", **hub_kwargs)
        is_local = Path(pretrained_model_name_or_path).is_dir()
        if not is_local:
            repo = locate_pipeline(repo)
            kwargs["revision"] = repo.revision
        pipe = super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})
        pipe._hub_repo = repo
        source = pipe.config.memory_bank_source or {}
        if is_local and "memory_bank" not in kwargs and "subfolder" in source:
            if Path(pretrained_model_name_or_path, source["subfolder"]).is_dir():
                pipe.load_memory_bank()
        return pipe

    def load_memory_bank(self, **hub_kwargs) -> GMemMemoryBank | None:
        """
        Opens the bank that the pipeline was saved with, if it has one and none is open yet: from the pipeline's own folder
        or repository (there at the same commit), or from the data set repository that it names. `__call__` does so where
        it needs a bank.

        Args:
            hub_kwargs: `cache_dir`, `token` and `local_files_only` of [`GMemMemoryBank.from_pretrained`], by default those
                of `GMemPipeline.from_pretrained`. The token of `DiffusionPipeline.from_pretrained` is not known here.

        Raises:
            ValueError: if the bank that is found is not the one that the pipeline was saved with.
            FileNotFoundError, PermissionError, ConnectionError: see [`GMemMemoryBank.from_pretrained`].
        """
        source = self.config.memory_bank_source
        if self.memory_bank is None and source is not None:
            name = self.config.get("_name_or_path")
            if "subfolder" in source and Path(name).is_dir():
                where = Path(name, source["subfolder"])
                bank = GMemMemoryBank.from_pretrained(where)
            else:
                where = self._own_repo()
                if "repo_id" in source:
                    where = replace(where, repo_id=source["repo_id"], repo_type="dataset", revision=source["revision"])
                repo = asdict(where)
                bank = GMemMemoryBank.from_pretrained(
                    repo.pop("repo_id"), source.get("subfolder"), **{**repo, **hub_kwargs}
                )
            if bank.fingerprint != source["fingerprint"]:
                raise ValueError(
                    f"The memory bank in {where} has the fingerprint {bank.fingerprint}; this pipeline was saved with "
                    f"the bank {source['fingerprint']}. To use another bank, pass `memory_bank=`."
                )
            self.memory_bank = bank
        return self.memory_bank

    def _memory_bank_for_use(self) -> GMemMemoryBank:
        bank = self.load_memory_bank()
        if bank is None:
            raise ValueError(
                "This pipeline has no memory bank: pass snippets as `memory` (or an `image`), or load the pipeline "
                "with `memory_bank=GMemMemoryBank.from_pretrained(...)`."
            )
        self._check_memory_bank(bank)
        return bank

    def _own_repo(self) -> HubRepo:
        """The repository and the commit that the pipeline was loaded from, and how it was reached."""
        if self._hub_repo is not None:
            return self._hub_repo
        # `DiffusionPipeline.from_pretrained` notes the name alone; the commit is in the paths of components
        name = self.config.get("_name_or_path")
        for component in self.components.values():
            path = getattr(getattr(component, "config", None), "_name_or_path", None)
            repo = HubRepo.of_snapshot(Path(path).parent) if path else None
            if repo is not None and repo.repo_id == name:
                return repo
        return HubRepo(name, "model")

    def _check_memory_bank(self, bank: GMemMemoryBank) -> None:
        """
        Compares a bank that is used with the one of the training, once. Nothing is said about a bank that edits made from
        that one.

        Raises:
            ValueError: if it is of another encoder, preprocessing or dimension.
        """
        trained_with = (self.config.memory_bank_source or {}).get("trained_with")
        if trained_with is None or bank is self._checked_memory_bank:
            return
        for name in ("encoder", "preprocessing", "dim"):
            value, expected = getattr(bank, name), trained_with[name]
            if value != expected and None not in (value, expected):  # `None`: not recorded
                raise ValueError(
                    f"This pipeline was trained with the memory bank {trained_with['fingerprint']}, whose `{name}` is "
                    f"{expected!r}. The `{name}` of {bank} ({bank.fingerprint}) is {value!r}: its snippets do not fit."
                )
        if not bank.descends_from(trained_with["fingerprint"]):
            logger.warning(
                f"This pipeline was trained with the memory bank {trained_with['fingerprint']} and now uses another one, "
                f"{bank.fingerprint}: {bank}."
            )
        self._checked_memory_bank = bank

    def save_pretrained(
        self, save_directory: str | Path, memory_bank_source: dict[str, str] | None = None, **kwargs
    ) -> None:
        """
        [`DiffusionPipeline.save_pretrained`], plus the memory bank in the folder `bank` or a pointer to it. A bank that a
        pipeline without one there finds in that folder stays, with a warning, and is not taken for its own.

        Args:
            save_directory (`str` or `Path`): folder to write to; created if needed.
            memory_bank_source (`dict`, *optional*):
                `{"subfolder": "bank"}` writes the bank; `{"repo_id": ..., "revision": ...}` points to the data set
                repository on the Hub, and the commit or tag there, that hold it. By default the bank is written, unless
                the pipeline was loaded with a pointer to it, which then stays (unless text keys or an index were added since).
            kwargs: those of [`DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: if `memory_bank_source` is something else, or the pipeline has no bank for it.
        """
        source = self.config.memory_bank_source
        bank = self.memory_bank
        keeps_pointer = memory_bank_source is None and source is not None and "repo_id" in source
        if keeps_pointer and bank is not None:
            keeps_pointer = bank.fingerprint == source["fingerprint"] and not bank.has_additions
        if keeps_pointer:
            saved_source = source
        else:
            bank = self.load_memory_bank()
            saved_source = self._source_to_save(bank, memory_bank_source)

        folder = Path(save_directory, MEMORY_BANK_FOLDER)
        if saved_source is not None and "subfolder" in saved_source:
            bank.save_pretrained(folder)
        elif folder.exists():
            own = "no memory bank" if saved_source is None else "its memory bank elsewhere"
            logger.warning(f"This pipeline has {own}; the one in {folder} stays there and does not belong to it.")

        # Our own source stays where we were loaded from
        self.register_to_config(memory_bank_source=saved_source)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.register_to_config(memory_bank_source=source)

    def _source_to_save(self, bank: GMemMemoryBank | None, place: dict[str, str] | None) -> dict[str, Any] | None:
        """`memory_bank_source` of a pipeline that is saved with a bank at a place."""
        folder = {"subfolder": MEMORY_BANK_FOLDER}
        if place not in (None, folder) and not (
            place.keys() == {"repo_id", "revision"} and all(isinstance(value, str) for value in place.values())
        ):
            raise ValueError(
                f'`memory_bank_source` must be {folder} or {{"repo_id": ..., "revision": ...}}, two strings, got {place!r}.'
            )
        if bank is None:
            if place is not None:
                raise ValueError(f"`memory_bank_source` is {place!r}, but this pipeline has no memory bank.")
            return None
        trained_with = (self.config.memory_bank_source or {}).get("trained_with")
        if trained_with is None:
            trained_with = {name: getattr(bank, name) for name in ("fingerprint", "encoder", "preprocessing", "dim")}
        return {**(place or folder), "fingerprint": bank.fingerprint, "trained_with": trained_with}

    def push_to_hub(self, repo_id: str, **kwargs) -> CommitInfo:
        """
        Puts the pipeline, its bank or a pointer to it, and a model card into a repository of the Hub, with one commit.

        Args:
            repo_id (`str`): Such as `"me/my-model"`; made where it does not exist.
            kwargs: those of [`~diffusers_gmem.hub.push_pipeline`]: `bank_repo_id` (a data set repository for the bank),
                `include_code`, `private`, `revision`, `create_pr`, `commit_message`, `token` and others, and those of
                `save_pretrained`.
        """
        from ..hub.push import push_pipeline

        return push_pipeline(self, repo_id, **kwargs)

    @torch.no_grad()
    def encode_image(self, image: ImageInput | list[ImageInput]) -> torch.Tensor:
        """
        The snippets of images: `pooler_output` of `image_encoder` on what `image_processor` makes of them.

        Args:
            image (`str`, `Path`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                Paths, http(s) URLs (of up to 50 MB) and PIL images; arrays of shape `([n,] height, width, channels)`
                and tensors of shape `([n,] channels, height, width)`, uint8 or in [0, 1]. As in training, they are
                turned upright by their EXIF orientation, and transparency is laid on white.

        Returns:
            `torch.Tensor` of shape `(n, memory_dim)`, in float32.

        Raises:
            ValueError: if the pipeline has no image encoder; `image` is something else, an empty list or a file that is no
                image; or `image_processor` is not the one that the bank records.
            FileNotFoundError: if a path does not exist.
            ConnectionError: if a URL cannot be fetched.
        """
        if self.image_encoder is None or self.image_processor is None:
            raise ValueError(
                "`image` needs a pipeline with an `image_encoder` and an `image_processor`; this one has none. Pass "
                "them to `from_pretrained` (`diffusers_gmem.data.load_bank_encoder` loads those of a bank), or pass "
                "snippets as `memory`."
            )
        self._check_image_processor()
        pictures, names = open_image_inputs(image)
        pixel_values = self.image_processor(images=pictures, return_tensors="pt").pixel_values
        pixel_values = pixel_values.to(device=self._execution_device, dtype=self.image_encoder.dtype)
        snippets = self.image_encoder(pixel_values).pooler_output.float()
        return attach_sources(snippets, SnippetSources([[({"image": name}, 1.0)] for name in names]))

    def _check_image_processor(self) -> None:
        """
        Compares image processor and encoder with what is recorded of those that made the snippets of the training, or else
        those of the bank.

        Raises:
            ValueError: if they differ: the snippets would be others.
        """
        trained_with = (self.config.memory_bank_source or {}).get("trained_with") or {}
        recorded = trained_with.get("preprocessing") or (self.memory_bank and self.memory_bank.preprocessing)
        checked = (self.image_processor, self.image_encoder, recorded)
        if not recorded or checked == self._checked_preprocessing:
            return
        own = json.loads(json.dumps(self.image_processor.to_dict()))
        if "image_processor_type" not in recorded:
            logger.warning(
                f"Whether {own['image_processor_type']} prepares images as the bank records it cannot be told: {recorded}."
            )
        names = sorted(recorded.keys() & own.keys() - {"image_processor_type"})
        wrong = [f"`{name}` is {own[name]!r}, not {recorded[name]!r}" for name in names if own[name] != recorded[name]]
        types = [record.get("image_processor_type", "") for record in (own, recorded)]
        # transformers has the same processor as ...Pil and as ...Fast
        if types[1] and len({name.removesuffix("Pil").removesuffix("Fast") for name in types}) > 1:
            wrong.append(f"its type is {types[0]}, not {types[1]}")
        if wrong:
            raise ValueError(
                f"The `image_processor` is not the one that made the snippets of the bank: {'; '.join(wrong)}. "
                "`diffusers_gmem.data.load_bank_encoder` loads that one."
            )
        grid = recorded.get("position_embedding", {}).get("grid")
        config = self.image_encoder.config
        if grid is not None and grid != [config.image_size // config.patch_size] * 2:
            raise ValueError(
                f"The snippets of the bank were made with a position table of {grid[0]}x{grid[1]} that was resampled by "
                f"{recorded['position_embedding']['resample']}; the `image_encoder` has one for images of "
                f"{config.image_size} pixels. `diffusers_gmem.data.load_bank_encoder` loads an encoder with that table."
            )
        self._checked_preprocessing = checked

    def explain(self, image, k: int = 5, metric: str = "cosine") -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """
        The memories that are nearest to an image, whether this pipeline made it or not.

        Args:
            image: One image or a list of them, see `encode_image`.
            k (`int`, defaults to 5): How many, 1 to `len(bank)`.
            metric (`str`, defaults to `"cosine"`): See [`GMemMemoryBank.nearest`].

        Returns:
            `list[dict]`: the nearest first, each with its number `index`, its `score`, and what else the bank knows of it
            ([`GMemMemoryBank.describe_rows`]). For a list of images a list of such lists.

        Raises:
            ValueError: if the pipeline has no bank or no image encoder, or `k` or `metric` is not accepted.
        """
        bank = self._memory_bank_for_use()
        scores, rows = bank.nearest(self.encode_image(image), k, metric)
        found = [
            [{**row, "score": score} for row, score in zip(bank.describe_rows(indices), values, strict=True)]
            for indices, values in zip(rows, scores.tolist(), strict=True)
        ]
        return found[0] if is_one_image(image) else found

    def check_inputs(
        self,
        memory,
        memory_indices,
        class_labels,
        image,
        prompt,
        num_images,
        num_images_per_memory,
        num_inference_steps,
        guidance_scale,
        guidance_interval,
        guider,
        generator,
        output_type,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        if self.transformer.training:
            raise ValueError(
                "The transformer is in train mode, in which memory dropout acts: call `pipe.transformer.eval()` first."
            )
        if not isinstance(self.scheduler, GMemFlowMatchScheduler):
            name, config = type(self.scheduler).__name__, self.scheduler.config
            if not isinstance(
                self.scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
            ) and not config.get("use_flow_sigmas"):
                raise ValueError(
                    f"{name}, as configured, does not sample flow-matching models. Use GMemFlowMatchScheduler, "
                    "FlowMatchEulerDiscreteScheduler or FlowMatchHeunDiscreteScheduler, or UniPC or DPM++ made by "
                    "`from_config(pipe.scheduler.config, use_flow_sigmas=True)` of one of these."
                )
            # From the config of another scheduler come the arguments that this one does not know, too
            path_type, prediction_type = config.get("path_type", "linear"), self._prediction_type
            if path_type != "linear" or prediction_type != "flow_prediction":
                raise ValueError(
                    f"{name} samples the linear path with prediction_type='flow_prediction' only; its config says "
                    f"path_type={path_type!r}, prediction_type={prediction_type!r}. Use GMemFlowMatchScheduler."
                )

        sources = {
            "memory": memory,
            "memory_indices": memory_indices,
            "class_labels": class_labels,
            "image": image,
            "prompt": prompt,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"Only one of `memory`, `memory_indices`, `class_labels`, `image` and `prompt` can say what to generate, got "
                f"{' and '.join(f'`{name}`' for name in given)}."
            )
        for name, value in {
            "num_images": num_images,
            "num_images_per_memory": num_images_per_memory,
            "num_inference_steps": num_inference_steps,
        }.items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if given and prompt is None and num_images != 1:
            raise ValueError(
                f"`num_images` is the number of draws from the bank or of matches of a prompt and does not go with `{given[0]}` "
                f"(got {num_images}); for several images of each snippet use `num_images_per_memory`."
            )
        if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, got {guidance_scale!r}.")
        if (
            not isinstance(guidance_interval, (tuple, list))
            or len(guidance_interval) != 2
            or not all(isinstance(bound, Real) for bound in guidance_interval)
            or not 0.0 <= guidance_interval[0] <= guidance_interval[1] <= 1.0
        ):
            raise ValueError(
                "`guidance_interval` must be (start, end) with 0 <= start <= end <= 1, in the paper's time (0 is noise, "
                f"1 is data), got {guidance_interval!r}."
            )
        if guider is not None:
            if not isinstance(guider, BaseGuidance):
                raise ValueError(f"`guider` must be one of diffusers' guiders, got {guider!r}.")
            unknown = set(guider._input_predictions) - {"pred_cond", "pred_uncond", "pred_cond_skip"}
            if unknown:
                raise ValueError(f"{type(guider).__name__} needs {sorted(unknown)}, which this pipeline cannot make.")
            if guidance_scale != 1.0 or tuple(guidance_interval) != (0.0, 1.0):
                raise ValueError(
                    "`guidance_scale` and `guidance_interval` do not go with a guider: set its own `guidance_scale`, "
                    f"`start` and `stop`. Got guidance_scale={guidance_scale!r}, guidance_interval="
                    f"{guidance_interval!r} and {type(guider).__name__}."
                )
            if isinstance(self.scheduler, GMemFlowMatchScheduler) and self.scheduler.config.solver == "dopri5":
                raise ValueError(
                    f"{type(guider).__name__} counts steps, and the solver 'dopri5' does not know their number: use "
                    "another solver, or `guidance_scale` and `guidance_interval`."
                )
            if isinstance(self.transformer._cache_config, PyramidAttentionBroadcastConfig):
                raise ValueError(
                    f"Pyramid attention broadcast would give one prediction of {type(guider).__name__} the attention of "
                    "another: use another cache, or `guidance_scale` and `guidance_interval`."
                )
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(item, torch.Generator) for item in generators):
            raise ValueError(f"`generator` must be a torch.Generator or a list of one per image, got {generator!r}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        if not isinstance(callback_on_step_end_tensor_inputs, (tuple, list)) or not all(
            name in self._callback_tensor_inputs for name in callback_on_step_end_tensor_inputs
        ):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be a list of some of {self._callback_tensor_inputs}, got "
                f"{callback_on_step_end_tensor_inputs!r}."
            )

    def prepare_memory(
        self,
        memory: torch.Tensor | None,
        memory_indices: int | Sequence[int] | np.ndarray | torch.Tensor | None,
        class_labels: int | str | Sequence[int | str] | np.ndarray | torch.Tensor | None,
        image,
        prompt: str | Sequence[str] | None,
        num_images: int,
        num_images_per_memory: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, list[int] | None, SnippetSources | None]:
        """
        The snippets, one row per image, of shape `(batch_size, memory_dim)`, their rows in the bank, and what is known of
        their sources.
        """
        indices = None
        if image is not None:
            memory = self.encode_image(image)
            sources = sources_of(memory)
        elif memory is not None:
            sources = sources_of(memory)
            memory = _as_rows("memory", memory)
        else:
            bank = self._memory_bank_for_use()
            if memory_indices is not None:
                indices = _as_list("memory_indices", memory_indices, Integral)
                wrong = [index for index in indices if not 0 <= index < len(bank)]
                if wrong:
                    raise ValueError(f"`memory_indices` must be in 0..{len(bank) - 1} for this bank, got {wrong}.")
            elif prompt is not None:
                indices = self._find_indices(bank, _as_list("prompt", prompt, str), num_images)
            else:
                if class_labels is None:
                    wanted = [None] * num_images
                else:
                    wanted = _as_list("class_labels", class_labels, Integral | str)
                indices = self._draw_indices(bank, wanted, num_images_per_memory, generator)
            memory = bank[indices]
            sources = SnippetSources([[(index, 1.0)] for index in indices], bank)

        if memory.shape[-1] != self.transformer.config.memory_dim:
            raise ValueError(
                f"The transformer takes snippets of dimension {self.transformer.config.memory_dim} (`memory_dim`), got "
                f"dimension {memory.shape[-1]}."
            )
        if len(memory) == 0:
            raise ValueError(f"`memory` must have at least one row, got shape {tuple(memory.shape)}.")
        memory = memory.to(device=device, dtype=torch.float32)
        if not memory.isfinite().all():
            raise ValueError("The snippets hold NaN or infinity.")
        memory = memory.repeat_interleave(num_images_per_memory, dim=0)
        if indices is not None:
            indices = [index for index in indices for _ in range(num_images_per_memory)]
        if sources is not None:
            sources = replace(sources, parts=[parts for parts in sources.parts for _ in range(num_images_per_memory)])
        return memory, indices, sources

    def _find_indices(self, bank: GMemMemoryBank, prompts: list[str], num_images: int) -> list[int]:
        """The rows of the bank that match best, `num_images` for each prompt."""
        if bank.text_model is not None and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError(
                "`prompt` needs a pipeline with a `text_encoder` and a `tokenizer`; this one has none. Pass those of "
                f"{bank.text_model['name'] or 'the model that made the text keys'} to `from_pretrained`: of CLIP a "
                "CLIPTextModelWithProjection, of SigLIP a SiglipTextModel."
            )
        if num_images > len(bank):
            raise ValueError(f"`num_images` must be at most {len(bank)}, the snippets of the bank, got {num_images}.")
        return bank.search_text(prompts, num_images, self.text_encoder, self.tokenizer)[1].flatten().tolist()

    def _draw_indices(
        self,
        bank: GMemMemoryBank,
        wanted: list[int | str | None],
        num_images_per_memory: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> list[int]:
        """One row of the bank for each wanted label (`None`: any), drawn by the generator of its first image."""
        if isinstance(generator, list):
            _check_generators(generator, len(wanted) * num_images_per_memory)
            generators = generator[::num_images_per_memory]
        else:
            generators = [generator] * len(wanted)
        return [
            bank.sample(1, generator=row_generator, class_labels=label)[1].item()
            for label, row_generator in zip(wanted, generators, strict=True)
        ]

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """The initial noise of shape `(batch_size, in_channels, sample_size, sample_size)`, in float32."""
        config = self.transformer.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list):
            _check_generators(generator, batch_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif not isinstance(latents, torch.Tensor) or latents.shape != shape:
            raise ValueError(
                f"`latents` must be a tensor of shape {shape} (standard normal noise), got {_describe(latents)}."
            )
        return latents.to(device=device, dtype=torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _times(self) -> list[float]:
        """The paper's time of every evaluation; from the sigmas, as some schedulers round their timesteps to integers."""
        self._num_timesteps = len(self.scheduler.timesteps)
        return (1.0 - self.scheduler.sigmas[: self._num_timesteps].cpu().double()).tolist()

    @property
    def _prediction_type(self) -> str:
        return self.scheduler.config.get("prediction_type", "flow_prediction")

    def _predict(self, latents: torch.Tensor, memory: torch.Tensor, time: float, context: str) -> torch.Tensor:
        """
        One model evaluation at the paper's time `time`, in float32: what the scheduler calls the model output. For
        diffusers' caches `context` names the kind of evaluation.
        """
        with self.transformer.cache_context(context):
            output = self.transformer(
                hidden_states=latents.to(self.transformer.dtype),
                timestep=torch.full((len(latents),), time, dtype=torch.float32, device=latents.device),
                memory=memory,
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )[0].float()
        # Our velocity is data minus noise, diffusers' noise minus data
        return -output if self._prediction_type == "flow_prediction" else output

    def _predict_with_guider(
        self,
        guider: BaseGuidance,
        latents: torch.Tensor,
        memory: torch.Tensor,
        negative_memory: torch.Tensor,
        time: float,
    ) -> torch.Tensor:
        """The guider's combination of the predictions that it asks for, each an evaluation of its own."""
        batches = guider.prepare_inputs({"memory": (memory, negative_memory)})
        contexts = [getattr(batch, guider._identifier_key) for batch in batches]
        if "pred_cond_skip" in contexts and "pred_uncond" not in contexts:
            raise ValueError(
                f"{type(guider).__name__} skips no layers where classifier-free guidance is off: let its "
                "`guidance_scale` be other than 1, and its `start` and `stop` enclose those of the skipping."
            )
        for batch, context in zip(batches, contexts, strict=True):
            guider.prepare_models(self.transformer)
            try:
                batch.noise_pred = self._predict(latents, batch.memory, time, context)
            finally:  # layers that the guider makes the transformer skip must not stay so
                guider.cleanup_models(self.transformer)
        return guider(batches).pred

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in about [-1, 1], in float32."""
        if self.vae is None:
            return latents
        # Many VAEs overflow in float16, and say so
        needs_upcasting = self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast", False)
        if needs_upcasting:
            self.vae.to(torch.float32)
        images = decode_latents(self.vae, latents)
        if needs_upcasting:
            self.vae.to(torch.float16)
        return images

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        memory: torch.Tensor | None = None,
        memory_indices: int | Sequence[int] | np.ndarray | torch.Tensor | None = None,
        class_labels: int | str | Sequence[int | str] | np.ndarray | torch.Tensor | None = None,
        image: ImageInput | list[ImageInput] | None = None,
        prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        num_images_per_memory: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_memory: torch.Tensor | None = None,
        guider: BaseGuidance | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["GMemPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_kwargs: dict[str, Any] | None = None,
    ) -> GMemPipelineOutput | tuple:
        r"""
        Generates images: of the given snippets, or of snippets drawn from the bank.

        Args:
            memory (`torch.Tensor` of shape `(n, memory_dim)` or `(memory_dim,)`, *optional*):
                Snippets, of any length (the transformer normalises them).
            memory_indices (`int`, or a sequence, array or 1-D tensor of `int`, *optional*):
                Rows of the bank, 0 to `len(bank) - 1`.
            class_labels (`int`, `str`, or a sequence, array or 1-D tensor of them, *optional*):
                One row of the bank is drawn for each label (a number, or a name of the bank's `id2label`).
            image (`str`, `Path`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Images, or their paths or URLs, whose snippets the image encoder makes (see `encode_image`).
            prompt (`str` or `list[str]`, *optional*):
                What the images are to show. Of each prompt the `num_images` snippets are taken whose text keys match it
                best ([`GMemMemoryBank.search_text`]), the best first; nothing else of the prompt reaches the network.
            num_images (`int`, defaults to 1):
                Number of snippets: for each prompt, the different ones that match it best; when none of the above is given,
                drawn from the bank, uniformly and with replacement.
            num_images_per_memory (`int`, defaults to 1):
                Images of each snippet.
            num_inference_steps (`int`, defaults to 50):
                Number of steps, the last one included. The scheduler says how many model evaluations a step takes.
            guidance_scale (`float`, defaults to 1.0):
                `unconditional + scale * (conditional - unconditional)`; 1 is no guidance and costs nothing.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                Closed interval of the paper's time t (0 is noise, 1 is data) in which guidance acts. Outside, the
                output is the conditional one and the unconditional branch is not computed.
            negative_memory (`torch.Tensor` of shape `(memory_dim,)`, `(1, memory_dim)` or `(batch_size, memory_dim)`, *optional*):
                What guidance steers away from, instead of the null memory. Without guidance it has no effect.
            guider ([`BaseGuidance`], *optional*):
                One of diffusers' guiders to use instead of `guidance_scale` (and instead of the pipeline's own
                guider): for example `ClassifierFreeGuidance(7.75, start=0.5)`, `AdaptiveProjectedGuidance()`, or
                `AutoGuidance(auto_guidance_config=LayerSkipConfig([8], dropout=1.0))` with `negative_memory=memory`
                (a lower dropout draws from torch's global generator).
                Its predictions are those of the scheduler (`noise - data`), each evaluated in a batch of its own; its
                `start` and `stop` are fractions of the model evaluations.
            generator (`torch.Generator` or a list of one per image, *optional*):
                Draws the snippets, the initial noise and the scheduler's noise; by default a new one, which torch's
                global generator seeds. With a list, image k depends on
                generator k alone, whatever the batch (a snippet of several images is drawn by the first one's).
            latents (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`, *optional*):
                Standard normal noise to start from, instead of drawing it. The scheduler's `init_noise_sigma` scales it.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`, see [`GMemPipelineOutput`].
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`GMemPipelineOutput`] or a tuple `(images, memory_indices)`.
            callback_on_step_end (`Callable`, *optional*):
                Called after every model evaluation as `callback(pipe, index, timestep, callback_kwargs)`; returns a
                dict, whose tensors replace the pipeline's. It may set `pipe._interrupt = True` to end the run.
            callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`):
                Which tensors the callback gets: "latents", "memory".
            attention_kwargs (`dict`, *optional*):
                `{"scale": float}` is the LoRA scale.

        Examples:

        Returns:
            [`GMemPipelineOutput`] or `tuple`.

        Raises:
            ValueError: for any argument outside what is said above, and where a bank, its text keys, an image encoder or
                a text encoder is needed and the pipeline has none.
        """
        # 1. Check inputs
        guider = self.guider if guider is None else guider
        self.check_inputs(
            memory,
            memory_indices,
            class_labels,
            image,
            prompt,
            num_images,
            num_images_per_memory,
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            guider,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device
        if generator is None:
            # Its seed can be told, so that the images can be made again
            generator = torch.Generator().manual_seed(torch.randint(2**63 - 1, ()).item())

        # For the provenance: what the call was asked for, and generators before they draw
        settings = {
            "num_images_per_memory": int(num_images_per_memory),
            "num_inference_steps": int(num_inference_steps),
            "guidance_scale": float(guidance_scale),
            "guidance_interval": [float(bound) for bound in guidance_interval],
            "attention_kwargs": publishable(attention_kwargs),
        }
        if class_labels is not None:
            settings["class_labels"] = _as_list("class_labels", class_labels, Integral | str)
        elif all(value is None for value in (memory, memory_indices, image, prompt)):
            settings["num_images"] = int(num_images)
        is_list = isinstance(generator, list)
        generator_record = (
            [describe_generator(item) for item in generator] if is_list else describe_generator(generator)
        )
        prompts = [None] if prompt is None else _as_list("prompt", prompt, str)
        given_tensors = {"latents": latents}
        repeatable = True

        # 2. Snippets
        memory, memory_indices, sources = self.prepare_memory(
            memory, memory_indices, class_labels, image, prompt, num_images, num_images_per_memory, generator, device
        )
        batch_size = memory.shape[0]
        if memory_indices is None:
            given_tensors["memory"] = memory
        elif not settings.keys() & {"class_labels", "num_images"}:
            settings["memory_indices"] = memory_indices[::num_images_per_memory]
        if negative_memory is None:
            negative_memory = torch.zeros_like(memory)
        else:
            if guidance_scale == 1.0 and guider is None:
                logger.warning("`negative_memory` has no effect: `guidance_scale` is 1, which is no guidance.")
            negative_memory = _as_rows("negative_memory", negative_memory).to(memory)
            if tuple(negative_memory.shape) not in ((1, memory.shape[1]), tuple(memory.shape)):
                raise ValueError(
                    f"`negative_memory` must have shape {(1, memory.shape[1])} or {tuple(memory.shape)}, got "
                    f"{tuple(negative_memory.shape)}."
                )
            if not negative_memory.isfinite().all():
                raise ValueError("`negative_memory` holds NaN or infinity.")
            negative_memory = given_tensors["negative_memory"] = negative_memory.expand_as(memory)

        # 3. Timesteps. diffusers' flow-matching Euler wants the sigmas from outside; its own grid ends with a step of
        # 1 / num_train_timesteps.
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.scheduler.set_begin_index(0)
        times = self._times()

        # 4. Initial noise, after the timesteps, on which its standard deviation depends
        latents = self.prepare_latents(batch_size, generator, device, latents)

        step_kwargs = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator

        # 5. Denoising loop, by index: an adaptive solver appends evaluations as it goes
        i, was_guided = 0, False
        with self.progress_bar(total=len(times)) as progress_bar:
            while i < len(times) and not self.interrupt:
                timestep, time = self.scheduler.timesteps[i], times[i]
                self._current_timestep = timestep

                # float32 rounding moves a grid time off the border by up to 1e-7
                within_interval = guidance_interval[0] - 1e-6 <= time <= guidance_interval[1] + 1e-6
                guided = self.guidance_scale != 1.0 and within_interval
                if guided != was_guided and self.transformer.is_cache_enabled:
                    # What a cache of diffusers keeps is of another batch size, or of steps long ago
                    self.transformer._reset_stateful_cache()
                was_guided = guided

                if guider is not None:
                    guider.set_state(step=i, num_inference_steps=len(times), timestep=timestep)
                    model_output = self._predict_with_guider(guider, latents, memory, negative_memory, time)
                elif guided:
                    both_memories = torch.cat([memory, negative_memory])
                    model_output = self._predict(torch.cat([latents, latents]), both_memories, time, "guided")
                    conditional, unconditional = model_output.chunk(2)
                    model_output = unconditional + self.guidance_scale * (conditional - unconditional)
                else:
                    model_output = self._predict(latents, memory, time, "cond")

                latents = self.scheduler.step(model_output, timestep, latents, return_dict=False, **step_kwargs)[0]

                if len(self.scheduler.timesteps) > len(times):
                    times = self._times()
                    progress_bar.total = len(times)

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "memory": memory}
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, i, timestep, callback_kwargs)
                    if not isinstance(callback_outputs, dict):
                        raise ValueError(
                            "`callback_on_step_end` must return a dict of the tensors to replace, which may be empty, "
                            f"got {callback_outputs!r}."
                        )
                    latents = callback_outputs.pop("latents", latents)
                    memory = callback_outputs.pop("memory", memory)
                    repeatable &= latents is tensors["latents"] and memory is tensors["memory"]

                progress_bar.update()
                i += 1
        self._current_timestep = None
        repeatable &= i == len(times)

        # 6. Decode
        if output_type == "latent":
            images = latents
        else:
            images = self.vae_image_processor.postprocess(self._decode(latents), output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, memory_indices)

        # 7. Provenance
        described_sources = [None] * batch_size if sources is None else sources.describe()
        common = {
            "format_version": PROVENANCE_VERSION,
            "batch_size": batch_size,
            "settings": settings,
            "generator": generator_record,
            "repeatable": repeatable,
            **self._describe(guider),
        }
        # Copies, as the caller may go on to change his own
        given_tensors = {name: tensor.float().clone() for name, tensor in given_tensors.items() if tensor is not None}
        bank = None if sources is None else sources.bank

        def complete_provenance() -> list[dict[str, Any]]:
            fingerprint = None if bank is None else bank.fingerprint
            return [
                {
                    "image": k,
                    "memory_index": None if memory_indices is None else memory_indices[k],
                    "prompt": prompts[k * len(prompts) // batch_size],
                    "sources": publishable(described_sources[k]),
                    "seed": (generator_record[k] if is_list else generator_record)["seed"],
                    "tensors": {name: encode_tensor(tensor[k]) for name, tensor in given_tensors.items()},
                    **common,
                    "memory_bank": fingerprint,
                }
                for k in range(batch_size)
            ]

        output = GMemPipelineOutput(images, memory_indices, described_sources)
        output._complete_provenance = complete_provenance
        return output

    def _describe(self, guider: BaseGuidance | None) -> dict[str, Any]:
        """What images depend on beside the arguments of a call, for their provenance."""

        def configuration(component):
            config = {name: value for name, value in component.config.items() if not name.startswith("_")}
            return {"class_name": type(component).__name__, **publishable(config)}

        repo, cache = self._own_repo(), self.transformer._cache_config
        name = repo.repo_id
        if name is not None and repo.revision is None:  # a folder
            name = Path(name).resolve().name
        return {
            "model": {
                "name": name,
                "revision": repo.revision,
                "dtype": str(self.transformer.dtype).removeprefix("torch."),
                "device": self._execution_device.type,
                "adapters": sorted(getattr(self.transformer, "peft_config", {})),
                "cache": None if cache is None else type(cache).__name__,
            },
            "scheduler": configuration(self.scheduler),
            "guider": None if guider is None else configuration(guider),
        }

    def remake(self, provenance: dict[str, Any]) -> PIL.Image.Image:
        """
        Makes an image again from what its file says. All images of its call are made, as their noise may be that of one
        generator; on the same kind of device the image is the same to the bit.

        Args:
            provenance (`dict`): From [`~diffusers_gmem.read_provenance`] or [`GMemPipelineOutput`].

        Raises:
            ValueError: if this pipeline has another scheduler, guider or, where it matters, memory bank, or a callback
                changed the image or its run was ended early. Another model, dtype or device is only warned of.
        """
        if not provenance["repeatable"]:
            raise ValueError("The image cannot be made again: a callback changed it, or its run was ended early.")
        uses_bank = provenance["memory_index"] is not None
        found = self._describe(self.guider)
        if uses_bank:
            found["memory_bank"] = self._memory_bank_for_use().fingerprint
        for name in found.keys() - {"model"}:
            if found[name] != provenance[name]:
                raise ValueError(f"The image was made with the {name} {provenance[name]}; this one is {found[name]}.")
        if found["model"] != provenance["model"]:
            logger.warning(f"The image was made with the model {provenance['model']}; this one is {found['model']}.")
        return self(**call_arguments(provenance)).images[provenance["image"]]


# `DiffusionPipeline.from_pretrained` ignores a component that is passed to it if the argument here has a default
_signature = inspect.signature(GMemPipeline.__init__)
GMemPipeline.__init__.__signature__ = _signature.replace(
    parameters=[
        parameter.replace(default=parameter.empty) if name in GMemPipeline._optional_components else parameter
        for name, parameter in _signature.parameters.items()
    ]
)


def _describe(value) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _as_rows(name: str, snippets: torch.Tensor) -> torch.Tensor:
    if not isinstance(snippets, torch.Tensor) or snippets.ndim not in (1, 2):
        raise ValueError(
            f"`{name}` must be a tensor of shape (n, memory_dim) or (memory_dim,), got {_describe(snippets)}."
        )
    return torch.atleast_2d(snippets)


def _as_list(name: str, values, accepted: type) -> list:
    """The argument `name`, one value or a sequence of them, as a list of Python integers and strings."""
    items = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
    items = items if isinstance(items, Sequence) and not isinstance(items, str) else [items]
    if len(items) == 0 or not all(isinstance(item, accepted) and not isinstance(item, bool) for item in items):
        what = {Integral: "an integer", str: "a text"}.get(accepted, "an integer, a name")
        raise ValueError(f"`{name}` must be {what} or a sequence of at least one of them, got {values!r}.")
    return [item if isinstance(item, str) else int(item) for item in items]


def _check_generators(generators: list[torch.Generator], batch_size: int) -> None:
    if len(generators) != batch_size:
        raise ValueError(f"A list of generators must have one per image, {batch_size}; got {len(generators)}.")
