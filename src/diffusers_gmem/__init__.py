# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Memory-conditioned image generation (GMem, arXiv 2412.08781) for Hugging Face diffusers."""

import sys
from typing import Any

import diffusers

# diffusers looks these two names up in the namespace of a component's module when it loads a pipeline
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401

from .models.image_encoder import GMemImageEncoder
from .models.memory_bank import GMemMemoryBank
from .models.transformer_gmem import GMemTransformer2DModel
from .pipelines.pipeline_gmem import GMemPipeline, GMemPipelineOutput
from .pipelines.provenance import read_provenance
from .schedulers.scheduling_gmem_flow_match import GMemFlowMatchScheduler


__version__ = "0.1.0.dev0"

__all__ = [
    "GMemFlowMatchScheduler",
    "GMemImageEncoder",
    "GMemImageProcessor",
    "GMemMemoryBank",
    "GMemPipeline",
    "GMemPipelineOutput",
    "GMemTransformer2DModel",
    "read_provenance",
]

# Published pipelines record the module of each component. The short name keeps our file layout out of them, and as an
# attribute of `diffusers.pipelines` it is taken for one of diffusers' own pipeline modules, so that both
# `GMemPipeline.from_pretrained` and `DiffusionPipeline.from_pretrained` find the classes.
for _cls in (GMemFlowMatchScheduler, GMemImageEncoder, GMemMemoryBank, GMemPipeline, GMemTransformer2DModel):
    _cls.__module__ = __name__
setattr(diffusers.pipelines, __name__, sys.modules[__name__])
diffusers.GMemPipeline = GMemPipeline
# Schedulers list their compatible ones by looking the names up here
diffusers.GMemFlowMatchScheduler = GMemFlowMatchScheduler


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: it needs transformers
    if name == "GMemImageProcessor":
        from .data.image_processor import GMemImageProcessor

        return GMemImageProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
