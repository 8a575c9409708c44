# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

r"""
Evaluates generated images: FID, sFID, Inception score, precision and recall as ADM's evaluator defines them, the Fréchet
distance in the features of the pipeline's own image encoder (FD-DINOv2), and two things that a memory makes necessary: how
near the images come to the training images, and what becomes of the metrics with memories that training has not seen.

    accelerate launch examples/evaluate_gmem.py --samples samples --reference VIRTUAL_imagenet256_labeled.npz \
        --model org/gmem-in256 --output_dir evaluation

On a CPU, from the pipeline and pictures of `make quickstart` and `examples/sample_gmem.py`, without Inception's weights:

    accelerate launch examples/evaluate_gmem.py --samples quickstart/samples --reference quickstart/data/train \
        --model quickstart/pipeline --features encoder --train_data_dir quickstart/data/train \
        --held_out_dir quickstart/data/held_out --output_dir quickstart/evaluation

Into `output_dir` go

- `evaluation.json`: `results`, which `GMemPipeline.push_to_hub(card={"evaluation": results})` puts on the model card,
  everything else that was found, and how;
- `evaluation.md`: the same as tables;
- `closest_snippets.png`, `closest_images.png`: generated images beside the training images that they are most similar to.

Memorisation needs `--model` (the bank's snippets, and its images if `--train_data_dir` holds them) or `--train_data_dir`
(the images, by their Inception features, with which the bank has nothing to do). `--held_out_dir` holds images that
training has not seen: how similar those are to training images is what to compare with.

Generalisation needs `--held_out_samples`: what `sample_gmem.py --memory_bank BANK` makes from a bank of held-out images. They
are compared with equally many of `--samples`, as a Fréchet distance depends on the number of images.
"""

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

import diffusers_gmem
from diffusers_gmem import GMemMemoryBank, GMemPipeline
from diffusers_gmem.data import ImageSource, encode_pixel_values
from diffusers_gmem.evaluation import (
    CroppedImages,
    FeatureStatistics,
    GeneratedImages,
    NearestImages,
    draw_pairs,
    frechet_distance,
    inception_score,
    load_inception,
    precision_recall,
    read_published_statistics,
    similarity_percentiles,
)
from diffusers_gmem.files import atomic_path, flush, write_json, write_text
from diffusers_gmem.models.fingerprint import fingerprint


logger = get_logger(__name__)

STANDARD_NUM_IMAGES = 50_000
# In a protocol of sample_gmem.py, beside what draws the memories
SAMPLING_SETTINGS = ("num_inference_steps", "guidance_scale", "guidance_interval", "scheduler", "dtype")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate generated images.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--samples",
        type=str,
        required=True,
        help="Generated images: a folder of PNG files as sample_gmem.py writes it, or .npz as for ADM's evaluator.",
    )
    images.add_argument(
        "--reference",
        type=str,
        help="Real images: a folder, or .npz as for ADM's evaluator, with its statistics if any.",
    )
    images.add_argument("--dataset_name", type=str, help="Instead of --reference, a data set for `datasets`.")
    images.add_argument("--dataset_config_name", type=str, help="Configuration of the data set.")
    images.add_argument("--split", type=str, default="train", help="Split of the data set.")
    images.add_argument("--image_column", type=str, default="image", help="Column of the images.")
    images.add_argument(
        "--resolution", type=int, help="Real images are cropped to this side, in pixels. Default: that of the samples."
    )
    images.add_argument("--cache_dir", type=str, help="Where `datasets` and the Hub keep their files.")

    features = parser.add_argument_group("features")
    features.add_argument("--model", type=str, help="The GMemPipeline of the samples, by name on the Hub or folder.")
    features.add_argument("--revision", type=str, help="Its revision.")
    features.add_argument(
        "--features",
        choices=["inception", "encoder"],
        nargs="+",
        help="inception: FID, sFID, Inception score, precision, recall. encoder: Fréchet distance with the pipeline's own "
        "encoder. Default: inception, and with --model both.",
    )
    features.add_argument(
        "--inception_weights",
        type=str,
        help="File pt_inception-2015-12-05-6726825d.pth of mseitzer/pytorch-fid, or the same as .safetensors. Default: "
        "download.",
    )
    features.add_argument(
        "--num_precision_recall_images",
        type=int,
        default=10_000,
        help="Reference images for precision and recall, drawn at random from a larger set.",
    )
    features.add_argument(
        "--reference_cache", type=str, help="Folder in which features of the reference are kept for the next time."
    )

    memory = parser.add_argument_group("memorisation and generalisation")
    memory.add_argument("--train_data_dir", type=str, help="The training images.")
    memory.add_argument("--held_out_dir", type=str, help="Images that neither training nor bank has seen.")
    memory.add_argument(
        "--held_out_samples", type=str, help="Images generated from a bank of held-out images, as --samples."
    )
    memory.add_argument("--num_pairs", type=int, default=16, help="Closest pairs to show.")

    work = parser.add_argument_group("work")
    work.add_argument("--output_dir", type=str, required=True, help="Where everything is written.")
    work.add_argument("--batch_size", type=int, default=64, help="Images per device at a time.")
    work.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that read images, per device.")

    args = parser.parse_args(input_args)
    if (args.reference is None) == (args.dataset_name is None):
        parser.error("Give either --reference or --dataset_name.")
    if args.features is None:
        args.features = ["inception"] if args.model is None else ["inception", "encoder"]
    if "encoder" in args.features and args.model is None:
        parser.error("--features encoder needs --model.")
    if "inception" not in args.features and args.inception_weights is not None:
        parser.error("--inception_weights is of no use without --features inception.")
    for name in ("samples", "held_out_samples"):
        folder = getattr(args, name)
        if folder is not None and Path(args.output_dir).resolve().is_relative_to(Path(folder).resolve()):
            parser.error(
                f"--output_dir must not lie in --{name}: its pictures would be taken for samples the next time."
            )
    for name in ("batch_size", "num_pairs", "num_precision_recall_images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    return args


# From uint8 images of shape (batch_size, 3, height, width) to named features of shape (batch_size, dim)
Network = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@dataclass
class Reference:
    """
    What samples are compared with: statistics of `pool`, `spatial` and `snippet` features, and for precision and recall
    `pool` features themselves, each if known.
    """

    name: str
    num_images: int
    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    pool: torch.Tensor | None = None


class FeatureReader:
    """Runs the networks over sets of images, on all processes together, and keeps what the reference gave."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        self.args = args
        self.accelerator = accelerator
        self.pipe = None
        self.networks: dict[str, Network] = {}
        self.fingerprints: dict[str, str] = {}
        with accelerator.main_process_first():
            if args.model is not None:
                self.pipe = GMemPipeline.from_pretrained(args.model, revision=args.revision, cache_dir=args.cache_dir)
                if self.pipe.load_memory_bank() is None:
                    logger.warning(f"{args.model} has no memory bank: nearest snippets are not looked for.")
            if "inception" in args.features:
                self._add_inception(load_inception(args.inception_weights))
            if "encoder" in args.features:
                self._add_encoder(self.pipe.image_encoder, self.pipe.image_processor)

    def _add_inception(self, inception: torch.nn.Module) -> None:
        # Convolutions run up to twice as fast in this layout
        self.inception = inception.to(self.accelerator.device, memory_format=torch.channels_last)
        self.networks["inception"] = lambda images: self.inception(images)._asdict()
        self.fingerprints["inception"] = fingerprint(inception)

    def _add_encoder(self, encoder: torch.nn.Module | None, processor) -> None:
        if encoder is None:
            raise ValueError(
                f"{self.args.model} has no image encoder for --features encoder: name --features inception alone."
            )
        encoder.to(self.accelerator.device, memory_format=torch.channels_last).eval()

        def snippets(images: torch.Tensor) -> dict[str, torch.Tensor]:
            pictures = [to_picture(image) for image in images.cpu()]
            pixel_values = processor(images=pictures, return_tensors="pt").pixel_values
            return {"snippet": encode_pixel_values(encoder, pixel_values)[0]}

        self.distance_name = "FD-" + type(encoder).__name__.removesuffix("Model").replace("Dinov2", "DINOv2")
        self.networks["encoder"] = snippets
        self.fingerprints["encoder"] = f"{fingerprint(encoder)} {processor.to_json_string()}"

    @torch.no_grad()
    def batches(self, images, description: str, networks: list[str]) -> Iterator[dict[str, torch.Tensor]]:
        """The features of all images in their order, batch by batch, on every process."""
        loader = self.accelerator.prepare(
            torch.utils.data.DataLoader(
                images, batch_size=self.args.batch_size, num_workers=self.args.dataloader_num_workers
            )
        )
        is_main = self.accelerator.is_main_process
        with tqdm(total=len(images), desc=description, unit="images", disable=not is_main) as progress_bar:
            for batch in loader:
                features = {}
                for network in networks:
                    features |= self.networks[network](batch)
                features = self.accelerator.gather_for_metrics(features)
                progress_bar.update(len(next(iter(features.values()))))
                yield {name: tensor.float().cpu() for name, tensor in features.items()}

    def all_features(self, images, description: str) -> dict[str, torch.Tensor]:
        """The features of all images, `(num_images, dim)` each."""
        batches = list(self.batches(images, description, list(self.networks)))
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def reference(self, images, name: str, identity: Any, published: dict[str, FeatureStatistics]) -> Reference:
        """Statistics of all images, but for those that are published, from the cache if they are there."""
        reference = Reference(name, len(images))
        for network in self.networks:
            folder = None
            if self.args.reference_cache is not None:
                settings = [identity, self.fingerprints[network], self.args.num_precision_recall_images]
                key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
                folder = Path(self.args.reference_cache, f"{network}-{key}")
            # One process looks: what the others see of a shared disk may be old
            is_there = [folder is not None and folder.is_dir()]
            if not broadcast_object_list(is_there)[0]:
                statistics, pool = self._read_reference(images, name, network)
                if folder is not None and self.accelerator.is_main_process:
                    write_reference(folder, statistics, pool)
            else:
                statistics, pool = read_reference(folder)
                logger.info(f"{network} features of {name}: taken from {folder}.")
            reference.statistics |= statistics
            reference.pool = pool if pool is not None else reference.pool
        reference.statistics |= published
        return reference

    def _read_reference(
        self, images, name: str, network: str
    ) -> tuple[dict[str, FeatureStatistics], torch.Tensor | None]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        is_kept = torch.zeros(len(images), dtype=torch.bool)
        is_kept[order[: self.args.num_precision_recall_images]] = True
        statistics, pool, start = {}, [], 0
        for features in self.batches(images, f"{name}: {network}", [network]):
            if not self.accelerator.is_main_process:
                continue
            for kind, tensor in features.items():
                statistics.setdefault(kind, FeatureStatistics(tensor.shape[1])).update(tensor)
            if "pool" in features:
                pool.append(features["pool"][is_kept[start : start + len(features["pool"])]])
                start += len(features["pool"])
        return statistics, torch.cat(pool) if pool else None


def write_reference(folder: Path, statistics: dict[str, FeatureStatistics], pool: torch.Tensor | None) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    for kind, moments in statistics.items():
        moments.save(temporary / f"statistics_{kind}.safetensors")
    if pool is not None:
        save_file({"pool": pool}, temporary / "pool.safetensors")
        flush(temporary / "pool.safetensors")
    os.replace(temporary, folder)


def read_reference(folder: Path) -> tuple[dict[str, FeatureStatistics], torch.Tensor | None]:
    paths = {path.stem.removeprefix("statistics_"): path for path in folder.glob("statistics_*.safetensors")}
    statistics = {kind: FeatureStatistics.load(path) for kind, path in paths.items()}
    pool = folder / "pool.safetensors"
    return statistics, load_file(pool)["pool"] if pool.is_file() else None


def statistics_of(features: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for batch in features.split(1024):
        statistics.update(batch)
    return statistics


def to_picture(image: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(image.permute(1, 2, 0).numpy())


def compute_metrics(
    features: dict[str, torch.Tensor], reference: Reference, reader: FeatureReader
) -> dict[str, float]:
    """All metrics that the features allow, by name."""
    names = {"pool": "FID", "spatial": "sFID"}
    if "snippet" in features:
        names["snippet"] = reader.distance_name
    metrics = {
        name: frechet_distance(statistics_of(features[kind]), reference.statistics[kind])
        for kind, name in names.items()
        if kind in features and kind in reference.statistics
    }
    if "pool" in features:
        device = reader.accelerator.device
        logits = [reader.inception.logits(pool.to(device)).cpu() for pool in features["pool"].split(1024)]
        metrics["Inception score"] = inception_score(torch.cat(logits))
        if reference.pool is not None:
            metrics["precision"], metrics["recall"] = precision_recall(reference.pool, features["pool"], device=device)
    return metrics


def open_reference(args: argparse.Namespace, resolution: int, reader: FeatureReader) -> Reference:
    if args.reference is not None and Path(args.reference).is_file():
        name, published = Path(args.reference).name, read_published_statistics(args.reference)
        with np.load(args.reference) as file:
            has_images = "arr_0" in file
        if published and not has_images:
            logger.warning(f"{name} holds statistics alone: no precision, no recall, no distance of encoder features.")
            return Reference(name, 0, published)
        stat = Path(args.reference).stat()
        identity = [name, stat.st_size, stat.st_mtime_ns]
        name = f"{name} with its published statistics" if published else name
        return reader.reference(GeneratedImages(args.reference), name, identity, published)
    source = ImageSource(
        args.reference,
        args.dataset_name,
        args.dataset_config_name,
        args.split,
        args.image_column,
        label_column="",  # labels play no part
        cache_dir=args.cache_dir,
    )
    # Of the files, their dates included
    identity = [source.dataset._fingerprint, resolution]
    return reader.reference(CroppedImages(source, resolution), source.name, identity, {})


def read_protocol(images: GeneratedImages) -> dict[str, Any] | None:
    """The `protocol.json` of sample_gmem.py, beside the images."""
    path = (images.path if images.path.is_dir() else images.path.parent) / "protocol.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def describe_protocol(protocol: dict[str, Any] | None, reference: Reference, resolution: int) -> str:
    """One sentence for the model card."""
    sampling = "sampling not recorded"
    if protocol is not None:
        sampling = (
            f"{protocol['scheduler']['_class_name']}, {protocol['num_inference_steps']} steps, guidance "
            f"{protocol['guidance_scale']:g} in {protocol['guidance_interval']}, {protocol['draws']} draws "
            f"{'with' if protocol['replacement'] else 'without'} replacement from {protocol['memory_bank']['num_snippets']:,} "
            f"snippets, {protocol['dtype']}, seed {protocol['seed']}"
        )
    count = f"{reference.num_images:,} images" if reference.num_images > 0 else "statistics alone"
    return (
        f"{resolution} x {resolution}; {sampling}; against {reference.name} ({count}); "
        f"diffusers_gmem {diffusers_gmem.__version__}"
    )


def nearest_snippets(bank: GMemMemoryBank, snippets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity and row of the snippet of the bank that is nearest to each."""
    found = [bank.nearest(batch, 1) for batch in tqdm(snippets.split(1000), desc="Nearest snippets")]
    return torch.cat([scores[:, 0] for scores, _ in found]), torch.cat([rows[:, 0] for _, rows in found])


def summarize(similarities: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Percentiles of each set of images, and how many samples are nearer than nearly all held-out images."""
    summary = {name: similarity_percentiles(values) for name, values in similarities.items()}
    if "held-out images" in summary:
        limit = summary["held-out images"]["99%"]
        share = (similarities["samples"] > limit).double().mean().item()
        summary["share of samples above 99% of the held-out images"] = share
    return summary


def compare_own_memory(samples: GeneratedImages, bank: GMemMemoryBank, snippets: torch.Tensor, rows: torch.Tensor):
    """Whether the nearest snippet is the one that an image was made from, where sample_gmem.py noted that."""
    path = (samples.path if samples.path.is_dir() else samples.path.parent) / "memory_indices.npy"
    protocol = read_protocol(samples)
    if not path.is_file() or protocol is None or protocol["memory_bank"]["fingerprint"] != bank.fingerprint:
        return None
    own = torch.from_numpy(np.load(path))
    if len(own) != len(samples):
        logger.warning(
            f"{path} is of {len(own)} images, not of {len(samples)}: it does not say which is made from what."
        )
        return None
    similarities = [
        F.cosine_similarity(batch, bank[numbers.tolist()].float())
        for batch, numbers in zip(snippets.split(1000), own.split(1000), strict=True)
    ]
    return {
        "share whose nearest snippet is their own": (rows == own).double().mean().item(),
        "similarity to their own": similarity_percentiles(torch.cat(similarities)),
    }


def closest_pairs(
    samples: GeneratedImages, train: CroppedImages, similarities: torch.Tensor, indices: torch.Tensor, count: int
) -> list[tuple[PIL.Image.Image, str, PIL.Image.Image, str, float]]:
    best = similarities.argsort(descending=True, stable=True)[:count].tolist()
    return [
        (
            to_picture(samples[k]),
            f"sample {k}",
            to_picture(train[int(indices[k])]),
            train.images.image_name(int(indices[k])),
            similarities[k].item(),
        )
        for k in best
    ]


def images_of_rows(bank: GMemMemoryBank, train: CroppedImages, rows: torch.Tensor) -> torch.Tensor | None:
    """The numbers of the training images that rows of a bank were made from, by their names."""
    if bank.metadata is None or "image" not in bank.metadata.column_names:
        return None
    names = [bank.metadata["image"][row].as_py() for row in rows.tolist()]
    numbers = {}
    for index in range(len(train)):
        name = train.images.image_name(index)
        if name in names:
            numbers[name] = index
    return torch.tensor([numbers[name] for name in names]) if set(names) == numbers.keys() else None


def evaluate_memorisation(
    sets: dict[str, dict[str, torch.Tensor]], samples: GeneratedImages, reader: FeatureReader, resolution: int
) -> tuple[dict[str, Any], dict[str, PIL.Image.Image]]:
    """Similarities to the nearest training snippets and images, and pictures of the closest pairs."""
    args, is_main = reader.args, reader.accelerator.is_main_process
    bank = None if reader.pipe is None else reader.pipe.memory_bank
    train = None
    if args.train_data_dir is not None:
        train = CroppedImages(ImageSource(args.train_data_dir, cache_dir=args.cache_dir), resolution)
    found, pictures = {}, {}

    if train is not None and "inception" in reader.networks:
        searches = {
            name: NearestImages(features["pool"].to(reader.accelerator.device)) for name, features in sets.items()
        }
        for features in reader.batches(train, "Training images", ["inception"]):
            for search in searches.values():
                search.update(features["pool"])
        found["nearest training image, cosine of Inception features"] = summarize(
            {name: search.similarities.cpu() for name, search in searches.items()}
        )
        if is_main:
            nearest = searches["samples"]
            pairs = closest_pairs(samples, train, nearest.similarities.cpu(), nearest.indices.cpu(), args.num_pairs)
            pictures["closest_images.png"] = draw_pairs(
                pairs, "Samples and their nearest training images (Inception features)"
            )

    if is_main and bank is not None and "encoder" in reader.networks:
        nearest = {name: nearest_snippets(bank, features["snippet"]) for name, features in sets.items()}
        similarities, rows = nearest["samples"]
        summary = summarize({name: scores for name, (scores, _) in nearest.items()})
        own = compare_own_memory(samples, bank, sets["samples"]["snippet"], rows)
        if own is not None:
            summary["samples and the snippets that they were made from"] = own
        found["nearest snippet of the bank, cosine"] = summary
        best = similarities.argsort(descending=True, stable=True)[: args.num_pairs]
        numbers = None if train is None else images_of_rows(bank, train, rows[best])
        if train is not None and numbers is None:
            logger.warning(
                f"The images of the closest snippets are not in {args.train_data_dir}: no closest_snippets.png."
            )
        if numbers is not None:
            indices = torch.zeros_like(rows).index_put((best,), numbers)
            pairs = closest_pairs(samples, train, similarities, indices, args.num_pairs)
            pictures["closest_snippets.png"] = draw_pairs(
                pairs, "Samples and the training images of their nearest snippets"
            )
    return found, pictures


def evaluate_generalisation(
    sets: dict[str, dict[str, torch.Tensor]], reference: Reference, reader: FeatureReader
) -> dict[str, Any]:
    """The metrics of equally many images from training memories and from held-out memories."""
    generated = {"training memories": sets["samples"], "held-out memories": sets["held-out samples"]}
    count = min(len(next(iter(features.values()))) for features in generated.values())
    references = [reference]
    if "held-out images" in sets:
        held_out = sets["held-out images"]
        statistics = {kind: statistics_of(features) for kind, features in held_out.items()}
        number = next(iter(statistics.values())).count
        references.append(Reference("the held-out images", number, statistics, held_out.get("pool")))
    return {
        "num_images": count,
        "metrics": {
            f"{name}, against {other.name}": compute_metrics(
                {kind: tensor[:count] for kind, tensor in features.items()}, other, reader
            )
            for other in references
            for name, features in generated.items()
        },
    }


def find_warnings(
    protocols: list[dict[str, Any] | None], reference: Reference, features: dict[str, torch.Tensor]
) -> list[str]:
    """What keeps the numbers from meaning what they seem to; `protocols` of the samples, and of those held out if any."""
    warnings = []
    num_images = len(next(iter(features.values())))
    if num_images != STANDARD_NUM_IMAGES:
        warnings.append(
            f"{num_images:,} samples instead of the standard {STANDARD_NUM_IMAGES:,}: not comparable with published values "
            "(Fréchet distances grow as images get fewer)."
        )
    known = [protocol for protocol in protocols if protocol is not None]
    if not all(protocol["complete"] for protocol in known):
        warnings.append("The sampling is not finished, as protocol.json says.")
    if len(known) == 2:
        if known[0]["memory_bank"]["fingerprint"] == known[1]["memory_bank"]["fingerprint"]:
            warnings.append("The samples from held-out memories were made from the same bank as the others.")
        differences = [name for name in SAMPLING_SETTINGS if known[0][name] != known[1][name]]
        if differences:
            warnings.append(f"The samples from held-out memories were made with another {', '.join(differences)}.")
    for kind, tensor in features.items():
        counts = [len(tensor)] + [reference.statistics[kind].count] * (kind in reference.statistics)
        if min(counts) <= tensor.shape[1]:
            warnings.append(
                f"{min(counts):,} images for {kind} features of {tensor.shape[1]} dimensions: their covariance is singular, "
                "and the Fréchet distance is mainly that of too few images."
            )
    return warnings


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    cells = [header, ["---"] * len(header)]
    cells += [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in cells)


def to_markdown(report: dict[str, Any]) -> str:
    columns = ["metric", "value", "num_images", "protocol"]
    text = "## Evaluation\n\n" + markdown_table(columns, [[row[key] for key in columns] for row in report["results"]])
    for warning in report["warnings"]:
        text += f"\n**Note:** {warning}\n"
    if report["memorisation"]:
        text += "\n## Memorisation\n"
    for title, found in report["memorisation"].items():
        sets = {name: values for name, values in found.items() if isinstance(values, dict) and "max" in values}
        header = ["similarity", *next(iter(sets.values()))]
        text += f"\nSimilarity to the {title}:\n\n"
        text += markdown_table(header, [[name, *values.values()] for name, values in sets.items()])
        for name, value in found.items():
            if isinstance(value, float):
                text += f"\n{name}: {value:.2%}\n"
        own = found.get("samples and the snippets that they were made from")
        if own is not None:
            share = own["share whose nearest snippet is their own"]
            text += f"\nSamples whose nearest snippet is the one that they were made from: {share:.2%}\n"
    if report["generalisation"] is not None:
        metrics = report["generalisation"]["metrics"]
        names = list(dict.fromkeys(name for values in metrics.values() for name in values))
        rows = [[title, *(values.get(name, "") for name in names)] for title, values in metrics.items()]
        text += f"\n## Generalisation\n\n{report['generalisation']['num_images']:,} images of each:\n\n"
        text += markdown_table(["samples from", *names], rows)
    return text


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Features of full precision, as on a CPU
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    # 1. Images and networks
    samples = GeneratedImages(args.samples)
    protocols = [read_protocol(samples)]
    resolution = args.resolution or min(samples.size)
    reader = FeatureReader(args, accelerator)

    # 2. Features
    reference = open_reference(args, resolution, reader)
    sets = {"samples": reader.all_features(samples, "Samples")}
    if args.held_out_dir is not None:
        source = ImageSource(args.held_out_dir, cache_dir=args.cache_dir)
        sets["held-out images"] = reader.all_features(CroppedImages(source, resolution), "Held-out images")
    if args.held_out_samples is not None:
        held_out_samples = GeneratedImages(args.held_out_samples)
        protocols.append(read_protocol(held_out_samples))
        sets["held-out samples"] = reader.all_features(held_out_samples, "Samples from held-out memories")
    memorisation, pictures = evaluate_memorisation(sets, samples, reader, resolution)

    # 3. Metrics
    if accelerator.is_main_process:
        sentence = describe_protocol(protocols[0], reference, resolution)
        results = [
            {
                "metric": name,
                "value": float(f"{value:.6g}"),
                "num_images": len(samples),
                # FD-... is not among ADM's metrics
                "protocol": sentence if name.startswith("FD-") else f"{sentence}, definitions of ADM's evaluator",
            }
            for name, value in compute_metrics(sets["samples"], reference, reader).items()
        ]
        report = {
            "results": results,
            "warnings": find_warnings(protocols, reference, sets["samples"]),
            "memorisation": memorisation,
            "generalisation": None
            if args.held_out_samples is None
            else evaluate_generalisation(sets, reference, reader),
            "samples": {"num_images": len(samples), "size": list(samples.size), "protocol": protocols[0]},
            "reference": {
                "name": reference.name,
                "num_images": reference.num_images,
                "num_precision_recall_images": 0 if reference.pool is None else len(reference.pool),
            },
            "num_processes": accelerator.num_processes,
            "settings": vars(args) | {"resolution": resolution},
            "versions": {
                "diffusers_gmem": diffusers_gmem.__version__,
                **{name: version(name) for name in ("diffusers", "torch", "numpy", "pillow")},
            },
        }
        for warning in report["warnings"]:
            logger.warning(warning)

        # 4. Files
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            with atomic_path(folder / name) as temporary:
                picture.save(temporary, format="PNG")
        write_json(folder / "evaluation.json", report)
        text = to_markdown(report)
        write_text(folder / "evaluation.md", text)
        print(f"\n{text}\nWritten to {folder}.")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
