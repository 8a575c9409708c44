# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import logging
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

import PIL.Image
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData

from ..hub.transfer import HubRepo
from ..models.transformer_gmem import GMemTransformer2DModel
from ..pipelines.pipeline_gmem import GMemPipeline
from .weights import has_lora, save_weights


logger = logging.getLogger(__name__)

LORA_CARD = """---
{{ card_data }}
---

# {{ repo_id.split("/")[-1] }}

LoRA layers for the pipeline `{{ base }}`, with the package `diffusers_gmem` installed:

```python
from diffusers_gmem import GMemMemoryBank, GMemPipeline

pipe = GMemPipeline.from_pretrained("{{ base }}")
{%- if bank %}
pipe.memory_bank = GMemMemoryBank.from_pretrained("{{ bank.repo_id }}", revision="{{ bank.revision }}")
{%- endif %}
pipe.load_lora_weights("{{ repo_id }}")
images = pipe(num_images=8).images
```

## Training

{{ training.steps }} optimizer steps, each with a global batch of {{ training.global_batch_size }} images:
{{ "%.4g" % training.epochs }} epochs of the {{ training.num_images }} images of {{ dataset }}.

| setting | value |
| --- | --- |
{% for name, value in training.items() if name not in ("steps", "global_batch_size", "num_images", "epochs") -%}
| {{ name }} | {{ value }} |
{% endfor %}"""


class HubPusher:
    """
    Pushes checkpoints and the result to the Hub. Checkpoints go in the background: one at a time, and of those that wait only
    the newest. A failure is logged; the next push brings what is missing. A process that is to end does not wait for them.

    The repositories are made here, before the training, which also shows whether the token may do so.

    Args:
        model_id (`str`): repository of the model, `user/name`, or `name` for one of the token's user.
        bank_id (`str`, *optional*): the same for the memory bank, as a data set. Without it, the model's holds the bank.
        base_model (`str`, *optional*):
            The pipeline, on the Hub or in a folder, of which LoRA layers are trained. They alone are pushed.
        private (`bool`, *optional*): whether new repositories are private. Default: as the Hub's settings say.
        token (`str`, *optional*): of the Hub. Default: that of `hf auth login`.

    Raises:
        PermissionError: if the token may not write to a repository.
    """

    def __init__(
        self,
        model_id: str,
        bank_id: str | None = None,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | None = None,
    ):
        self.options = {"private": private, "token": token}
        self.base_model = base_model
        self.model_id = self._make_repository(model_id, "model")
        self.bank_id = None if bank_id is None else self._make_repository(bank_id, "dataset")
        self.bank_source: dict[str, str] | None = None
        self.waiting: deque[tuple[GMemPipeline, dict[str, Any], PIL.Image.Image | None]] = deque(maxlen=1)
        self.is_pushing = threading.Lock()

    def _make_repository(self, name: str, repo_type: str) -> str:
        if "/" not in name:
            name = f"{HfApi(token=self.options['token']).whoami()['name']}/{name}"
        HubRepo(name, repo_type, token=self.options["token"]).upload({}, "Start", private=self.options["private"])
        return name

    def push_in_background(
        self, pipeline: GMemPipeline, training: dict[str, Any], grid: PIL.Image.Image | None
    ) -> None:
        """Pushes a pipeline that nobody changes any more; `training` and `grid` are for its card."""
        if self.waiting:
            logger.info("The Hub is slow: the checkpoint that waits for its push is passed over for this newer one.")
        self.waiting.append((pipeline, training, grid))
        self.thread = threading.Thread(target=self._push_waiting, daemon=True)
        self.thread.start()

    def _push_waiting(self) -> None:
        with self.is_pushing:
            if self.waiting:
                pipeline, training, grid = self.waiting.pop()
                try:
                    self.push(pipeline, training, grid)
                except Exception as error:
                    logger.warning(f"Step {training['steps']} was not pushed to the Hub: {error}")

    def finish(self, pipeline: GMemPipeline, training: dict[str, Any], grid: PIL.Image.Image | None) -> None:
        """Pushes the result, after the push that is under way."""
        self.waiting.clear()
        with self.is_pushing:
            self.push(pipeline, training, grid)

    def push(self, pipeline: GMemPipeline, training: dict[str, Any], grid: PIL.Image.Image | None) -> None:
        bank = pipeline.memory_bank
        if self.bank_id is not None and self.bank_source is None:
            commit = bank.push_to_hub(self.bank_id, **self.options)
            self.bank_source = {"repo_id": self.bank_id, "revision": commit.oid}
        message = f"Step {training['steps']}"
        if has_lora(pipeline.transformer):
            commit = self._push_lora(pipeline.transformer, bank.source_dataset, training, message)
        else:
            commit = pipeline.push_to_hub(
                self.model_id,
                commit_message=message,
                memory_bank_source=self.bank_source,
                card={"dataset": bank.source_dataset, "training": training},
                sample_grid=grid,
                **self.options,
            )
        logger.info(f"Pushed step {training['steps']}: {commit.commit_url}")

    def _push_lora(
        self, transformer: GMemTransformer2DModel, dataset: str, training: dict[str, Any], message: str
    ) -> CommitInfo:
        data = ModelCardData(
            library_name="diffusers",
            # The Hub takes no other name than that of a repository
            base_model=None if Path(self.base_model).is_dir() else self.base_model,
            datasets=None if self.bank_id is None else [self.bank_id],
            tags=["gmem", "lora", "diffusers"],
        )
        card = ModelCard.from_template(
            data,
            template_str=LORA_CARD,
            repo_id=self.model_id,
            base=self.base_model,
            bank=self.bank_source,
            dataset=dataset,
            training=training,
        )
        with tempfile.TemporaryDirectory() as folder:
            save_weights(transformer, folder)
            files = {path.name: path for path in Path(folder).iterdir()} | {"README.md": str(card).encode()}
            repo = HubRepo(self.model_id, "model", token=self.options["token"])
            return repo.upload(files, message, private=self.options["private"])
