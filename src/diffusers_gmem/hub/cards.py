# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Cards of models, memory banks and Spaces for the Hub. What is not known is said to be "not recorded"."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    ModelCard,
    ModelCardData,
    SpaceCard,
    SpaceCardData,
)


if TYPE_CHECKING:
    from ..models.memory_bank import GMemMemoryBank
    from ..pipelines.pipeline_gmem import GMemPipeline


UNKNOWN = "not recorded"
MAX_CLASSES = 20
PYTHON_VERSION = "3.11"  # of Spaces, whose own default is too old
_TASK = "unconditional-image-generation"
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}


def memory_bank_card(
    bank: "GMemMemoryBank", repo_id: str, license: str | None = None, pretty_name: str | None = None
) -> DatasetCard:
    """
    The card of a memory bank's data set repository. Its metadata names `metadata.parquet` for `datasets.load_dataset` and
    the Hub's viewer. All rows are read once, for their lengths.

    Args:
        bank ([`GMemMemoryBank`]): The bank.
        repo_id (`str`): The repository that the card is for.
        license (`str`, *optional*): Of the source data, as the Hub names it (such as `"cc-by-4.0"`).
        pretty_name (`str`, *optional*): The title; the name of the repository by default.
    """
    count = len(bank)
    has_metadata = bank.metadata is not None
    data = DatasetCardData(
        license=license,
        pretty_name=pretty_name,
        size_categories=[next((name for limit, name in _SIZES.items() if count < limit), "10M<n<100M")],
        tags=["gmem", "memory-bank", "diffusers"],
        # Without a table the viewer would show `config.json`
        **(
            {"configs": [{"config_name": "default", "data_files": "metadata.parquet"}]}
            if has_metadata
            else {"viewer": False}
        ),
    )

    norms = _row_norms(bank)
    stored = str(bank.dtype).removeprefix("torch.")
    if bank.rank is not None:
        stored += f", {bank.rank} coefficients of a common basis for each snippet"
    facts = {
        "snippets": f"{count:,}",
        "dimension": bank.dim,
        "stored as": stored,
        "relative reconstruction error": bank.reconstruction_error,
        "size of the rows": f"{count * (bank.rank or bank.dim) * bank.dtype.itemsize:,} bytes",
        "length of a snippet (L2 norm)": "smallest {:.4g}, mean {:.4g}, largest {:.4g}".format(*norms),
        "scaled to unit length": "yes" if bank.normalized else "no",
        "columns of the metadata": ", ".join(bank.metadata.column_names) if has_metadata else "none",
        "text keys": "none",
        "fingerprint": f"`{bank.fingerprint}`",
    }
    text_model = bank.text_model
    if text_model is not None:
        made_by = f"{_cell(_public(text_model['name']))}, revision {_cell(text_model['revision'])}"
        facts["text keys"] = f"{text_model['dim']} numbers for each snippet, by {made_by}"
    if bank.approximate_index is not None:
        facts["approximate index"] = (
            "{num_probes} of {num_lists} lists are searched, which finds {recall:.3f} of the {k} nearest".format(
                **bank.approximate_index
            )
        )
    if bank.reconstruction_error is None:
        del facts["relative reconstruction error"]
    classes = []
    if bank.labels is not None:
        labels, counts = bank.labels.unique(return_counts=True)
        names = bank.id2label or {}
        rows = zip(labels.tolist(), counts.tolist(), strict=True)
        classes = [(label, _cell(names.get(label)), number) for label, number in rows]
        facts["classes"] = f"{len(classes):,}"
    return DatasetCard.from_template(
        data,
        template_str=_template("memory_bank_card.md"),
        title=pretty_name or repo_id.split("/")[-1],
        repo_id=repo_id,
        has_metadata=has_metadata,
        has_text_keys=text_model is not None,
        has_thumbnails=has_metadata and "thumbnail" in bank.metadata.column_names,
        facts=_rows(facts),
        classes=classes[:MAX_CLASSES],
        more_classes=max(0, len(classes) - MAX_CLASSES),
        encoder=_cell(_public(bank.encoder)),
        encoder_revision=_cell(bank.encoder_revision),
        preprocessing=_cell(bank.preprocessing),
        source_dataset=_cell(_public(bank.source_dataset)),
        license=_cell(license),
        history=[_cell(", ".join(f"{name}: {value}" for name, value in edit.items())) for edit in bank.history],
    )


def model_card(
    pipe: "GMemPipeline",
    repo_id: str,
    *,
    bank_source: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    license: str | None = None,
    training: Mapping[str, Any] | None = None,
    evaluation: Sequence[Mapping[str, Any]] = (),
    sample_grid: str | None = None,
    has_code: bool = False,
) -> ModelCard:
    """
    The card of a pipeline's model repository.

    Args:
        pipe ([`GMemPipeline`]): The pipeline.
        repo_id (`str`): The repository that the card is for.
        bank_source (`dict`, *optional*):
            Where the pipeline finds its bank, as it was saved: `repo_id` and `revision`, or `subfolder`; and `fingerprint`.
        dataset (`str`, *optional*): The training data.
        license (`str`, *optional*): Of the model, as the Hub names it (such as `"apache-2.0"`).
        training (`dict`, *optional*):
            The settings. `steps`, `global_batch_size` (all processes and accumulated steps together), `num_images` and
            `epochs` are put into words, everything else into a table.
        evaluation (sequence of `dict`, *optional*):
            Results: `metric`, `value` and `protocol` (data, sampler, steps, guidance, implementation), and `num_images`.
        sample_grid (`str`, *optional*): The file in the repository that shows generated images.
        has_code (`bool`, defaults to `False`): Whether the branch `remote-code` holds the code as well.

    Raises:
        `ValueError`: a result lacks its metric, value or protocol.
    """
    for result in evaluation:
        missing = {"metric", "value", "protocol"} - result.keys()
        if missing:
            raise ValueError(f"`evaluation` holds {dict(result)}, which lacks {', '.join(sorted(missing))}.")
    bank_source = bank_source or {}
    title = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_TASK,
        license=license,
        tags=["gmem", "memory-bank", f"diffusers:{type(pipe).__name__}"],
        datasets=[bank_source["repo_id"]] if "repo_id" in bank_source else None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type=_TASK,
                dataset_type=dataset or UNKNOWN,
                dataset_name=dataset or UNKNOWN,
                metric_type=result["metric"].lower(),
                metric_name=result["metric"],
                metric_value=result["value"],
            )
            for result in evaluation
        ]
        or None,
    )

    transformer, config = pipe.transformer, pipe.transformer.config
    size = config.sample_size * pipe.vae_scale_factor
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    facts = {
        "images": f"{size} x {size} pixels",
        "network": f"{type(transformer).__name__}, {config.num_layers} blocks, {parameters:,} parameters",
        "works on": "pixels" if pipe.vae is None else f"latents of {_name(pipe.vae)}, patches of {config.patch_size}",
        "dimension of a snippet": config.memory_dim,
        "scheduler": type(pipe.scheduler).__name__,
        "image encoder for `image=`": "none" if pipe.image_encoder is None else _name(pipe.image_encoder),
        "text encoder for `prompt=`": "none" if pipe.text_encoder is None else _name(pipe.text_encoder),
    }
    bank = pipe.memory_bank
    bank_facts = {}
    if bank is not None or bank_source:
        where = "in the folder `{}` of this repository".format(bank_source.get("subfolder", UNKNOWN))
        if "repo_id" in bank_source:
            name, revision = bank_source["repo_id"], bank_source.get("revision")
            where = f"[{name}](https://huggingface.co/datasets/{name}), revision {_cell(revision)}"
        bank_facts = {
            "where": where,
            "fingerprint": f"`{bank_source.get('fingerprint') or bank.fingerprint}`",
            "snippets": None if bank is None else f"{len(bank):,}",
            "image encoder": None if bank is None else _public(bank.encoder),
            "revision of the encoder": None if bank is None else bank.encoder_revision,
        }
    settings = {name: _public(value) if isinstance(value, str) else value for name, value in (training or {}).items()}
    return ModelCard.from_template(
        data,
        template_str=_template("model_card.md"),
        title=title,
        repo_id=repo_id,
        example_arguments=f"memory=torch.randn(8, {config.memory_dim})" if not bank_facts else "num_images=8",
        facts=_rows(facts),
        bank=_rows(bank_facts),
        dataset=_cell(_public(dataset)),
        license=_cell(license),
        training_sentence=_training_sentence(
            *(settings.pop(name, None) for name in ("steps", "global_batch_size", "num_images", "epochs"))
        ),
        training=_rows(settings),
        evaluation=[
            {name: _cell(result.get(name)) for name in ("metric", "value", "num_images", "protocol")}
            for result in evaluation
        ],
        sample_grid=sample_grid,
        has_code=has_code,
    )


def space_card(
    title: str,
    model_id: str,
    bank_id: str | None = None,
    sdk_version: str | None = None,
    license: str | None = None,
) -> SpaceCard:
    """
    The card of a Gradio Space that draws with a pipeline; the Hub starts its `app.py`.

    Args:
        title (`str`): The title of the Space.
        model_id (`str`): The repository of the pipeline.
        bank_id (`str`, *optional*): The data set repository of its bank, if it has one of its own.
        sdk_version (`str`, *optional*): The version of Gradio; the Hub's newest by default.
        license (`str`, *optional*): Of the Space's code, as the Hub names it.
    """
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=sdk_version,
        python_version=PYTHON_VERSION,
        app_file="app.py",
        license=license,
        models=[model_id],
        datasets=None if bank_id is None else [bank_id],
        tags=["gmem"],
    )
    return SpaceCard.from_template(
        data, template_str=_template("space_card.md"), title=title, model_id=model_id, bank_id=bank_id
    )


def _template(name: str) -> str:
    return resources.files("diffusers_gmem.hub").joinpath("templates", name).read_text(encoding="utf-8")


def _cell(value: Any) -> str:
    """A value as it can stand in a table."""
    return UNKNOWN if value is None or value == "" else " ".join(str(value).replace("|", "\\|").split())


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(_cell(name), _cell(value)) for name, value in facts.items()]


def _public(name: str | None) -> str | None:
    """The name of a model or data set. Of a local path only the last part: the rest is nobody else's business."""
    if name and (Path(name).is_absolute() or Path(name).exists()):
        return f"a local path, `{Path(name).name}`"
    return name


def _name(model) -> str:
    source = model.config.get("_name_or_path") if isinstance(model.config, Mapping) else model.config._name_or_path
    source = _public(source)
    return f"{type(model).__name__} ({source})" if source else type(model).__name__


def _training_sentence(
    steps: int | None, global_batch_size: int | None, num_images: int | None, epochs: float | None
) -> str:
    if steps is None:
        return "Not recorded."
    batch = "a global batch whose size is not recorded"
    if global_batch_size is not None:
        batch = f"a global batch of {global_batch_size:,} images (all processes and accumulated steps together)"
    images = "a data set whose size is not recorded" if num_images is None else f"{num_images:,} images"
    length = "an unrecorded number of epochs" if epochs is None else f"{epochs:.4g} epochs"
    return f"{steps:,} optimizer steps, each with {batch}: {length} of {images}."


def _row_norms(bank: "GMemMemoryBank", piece: int = 65_536) -> tuple[float, float, float]:
    """The smallest, mean and largest L2 norm of the snippets."""
    smallest, total, largest = float("inf"), 0.0, 0.0
    for start in range(0, len(bank), piece):
        norms = bank[start : start + piece].double().norm(dim=1)
        smallest, largest = min(smallest, norms.min().item()), max(largest, norms.max().item())
        total += norms.sum().item()
    return smallest, total / len(bank), largest
