import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from tiny_pipeline import MEMORY_DIM, make_image_encoder, make_pipeline

from diffusers_gmem import GMemMemoryBank
from diffusers_gmem.evaluation import (
    FeatureStatistics,
    InceptionV3,
    frechet_distance,
    inception_score,
    precision_recall,
)
from diffusers_gmem.hub import model_card


SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate_gmem.py"
SIZE = 16
COUNTS = {"train": 24, "held_out": 9, "samples": 11, "held_out_samples": 8}
COPIED = 7  # sample 0 is this training image
ROWS = [COPIED, 3, 3, 0, 5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_gmem", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures():
    """Scikit-learn's digits for each set, all different but for the copied one."""
    digits = iter(load_digits().images)
    pictures = {
        name: [
            PIL.Image.fromarray((next(digits) * 15.9).astype(np.uint8)).resize((SIZE, SIZE)).convert("RGB")
            for _ in range(count)
        ]
        for name, count in COUNTS.items()
    }
    pictures["samples"][0] = pictures["train"][COPIED]
    return pictures


@pytest.fixture(scope="module")
def pipe():
    components = make_image_encoder()
    with torch.no_grad():
        # So that random weights tell digits apart
        components["image_encoder"].embeddings.patch_embeddings.projection.weight.mul_(40)
    return make_pipeline(**components)


@pytest.fixture(scope="module")
def features(pipe, pictures):
    with torch.no_grad():
        return {name: pipe.encode_image(images) for name, images in pictures.items()}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, pictures, pipe, features):
    folder = tmp_path_factory.mktemp("evaluate_gmem")
    for name, images in pictures.items():
        for k, image in enumerate(images):
            # Real images in a folder per class, generated ones as sample_gmem.py writes them
            path = folder / name / ("00000" if "samples" in name else f"class_{k % 2}") / f"{k:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    # Real images are numbered by their paths
    order = sorted(range(COUNTS["train"]), key=lambda k: (k % 2, k))
    bank = GMemMemoryBank(
        features["train"], metadata={"image": [f"class_{k % 2}/{k:06d}.png" for k in range(COUNTS["train"])]}
    )
    assert order != list(range(COUNTS["train"]))
    pipe.memory_bank = bank
    pipe.save_pretrained(folder / "pipeline")
    protocol = {
        "num_images": COUNTS["samples"],
        "seed": 3,
        "memory_bank": {"fingerprint": bank.fingerprint, "num_snippets": len(bank)},
        "draws": "uniform",
        "replacement": True,
        "num_inference_steps": 20,
        "guidance_scale": 1.5,
        "guidance_interval": [0.0, 1.0],
        "scheduler": {"_class_name": "GMemFlowMatchScheduler"},
        "dtype": "float32",
        "complete": True,
    }
    (folder / "samples" / "protocol.json").write_text(json.dumps(protocol))
    protocol["memory_bank"]["fingerprint"] = "sha256:of the held-out images"
    (folder / "held_out_samples" / "protocol.json").write_text(json.dumps(protocol))
    np.save(folder / "samples" / "memory_indices.npy", np.array(ROWS))
    return folder


def arguments(workplace, output_dir, *flags, **overrides):
    values = {
        "samples": workplace / "samples",
        "reference": workplace / "train",
        "model": workplace / "pipeline",
        "cache_dir": workplace / "cache",
        "batch_size": 5,
        "output_dir": output_dir,
        **overrides,
    }
    return [str(item) for name, value in values.items() for item in (f"--{name}", value)] + [*map(str, flags)]


def run(script, *args, **overrides):
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    args = script.parse_args(arguments(*args, **overrides))
    script.main(args)
    return json.loads((Path(args.output_dir) / "evaluation.json").read_text())


def distance(a, b):
    statistics = []
    for features in (a, b):
        statistics.append(FeatureStatistics(features.shape[1]))
        statistics[-1].update(features)
    return frechet_distance(*statistics)


def moments(features):
    """The mean, and a matrix F with `F F^T` = covariance, of a few features of many dimensions."""
    features = features.double().numpy()
    mean = features.mean(axis=0)
    return mean, (features - mean).T / np.sqrt(len(features) - 1)


def distance_by_factors(mean_a, factor_a, mean_b, factor_b):
    root = np.linalg.svd(factor_a.T @ factor_b, compute_uv=False).sum()
    return ((mean_a - mean_b) ** 2).sum() + (factor_a**2).sum() + (factor_b**2).sum() - 2 * root


@pytest.fixture(scope="module")
def report(script, workplace):
    return run(
        script,
        workplace,
        workplace / "everything",
        *("--features", "encoder"),
        train_data_dir=workplace / "train",
        held_out_dir=workplace / "held_out",
        held_out_samples=workplace / "held_out_samples",
        num_pairs=5,
    )


def test_distance_of_encoder_features(report, features):
    (result,) = report["results"]
    assert result["metric"] == "FD-DINOv2" and result["num_images"] == COUNTS["samples"]
    assert result["value"] == pytest.approx(distance(features["samples"], features["train"]), rel=1e-5)


def test_the_protocol_is_told(report, workplace, pipe):
    sentence = report["results"][0]["protocol"]
    for part in (
        "16 x 16",
        "GMemFlowMatchScheduler, 20 steps, guidance 1.5",
        "uniform draws with replacement from 24 snippets",
        "seed 3",
        "against train (24 images)",
    ):
        assert part in sentence
    assert report["samples"]["protocol"]["seed"] == 3
    assert report["settings"]["resolution"] == SIZE
    card = str(model_card(pipe, "me/model", evaluation=report["results"]))
    assert f"| FD-DINOv2 | {report['results'][0]['value']} | 11 | 16 x 16; " in card


def test_similarities_to_snippets(report, workplace, pipe, features):
    found = report["memorisation"]["nearest snippet of the bank, cosine"]
    scores = {}
    for title, name in (
        ("samples", "samples"),
        ("held-out images", "held_out"),
        ("held-out samples", "held_out_samples"),
    ):
        cosines = torch.nn.functional.cosine_similarity(features[name][:, None], features["train"], dim=2)
        scores[title], rows = cosines.max(dim=1)
        expected = {"mean": scores[title].mean(), "50%": scores[title].quantile(0.5), "max": scores[title].max()}
        for key, value in expected.items():
            assert found[title][key] == pytest.approx(value.item(), abs=1e-5)
        if title == "samples":
            own = found["samples and the snippets that they were made from"]
            share = own["share whose nearest snippet is their own"]
            assert share == pytest.approx((rows == torch.tensor(ROWS)).float().mean().item())
            assert 0 < share < 1
            to_own = cosines[torch.arange(len(ROWS)), ROWS]
            assert own["similarity to their own"]["mean"] == pytest.approx(to_own.mean().item(), abs=1e-5)
    limit = scores["held-out images"].quantile(0.99)
    share = (scores["samples"] > limit).float().mean().item()
    assert found["share of samples above 99% of the held-out images"] == pytest.approx(share)


def test_the_closest_pair_is_the_copy(report, workplace, script):
    picture = np.array(PIL.Image.open(workplace / "everything" / "closest_snippets.png"))
    left, right = picture[60:220, 16:176], picture[60:220, 176:336]
    np.testing.assert_array_equal(left, right)
    copy = PIL.Image.open(workplace / "train" / f"class_{COPIED % 2}" / f"{COPIED:06d}.png")
    np.testing.assert_array_equal(left, np.array(copy.resize((160, 160), PIL.Image.Resampling.BICUBIC)))
    assert len(picture) == 40 + 2 * 216 + 16  # five pairs in two rows


def test_generalisation_compares_equally_many(report, features):
    found = report["generalisation"]
    count = found["num_images"]
    assert count == COUNTS["held_out_samples"]
    expected = {
        "training memories, against train": distance(features["samples"][:count], features["train"]),
        "held-out memories, against train": distance(features["held_out_samples"], features["train"]),
        "training memories, against the held-out images": distance(features["samples"][:count], features["held_out"]),
        "held-out memories, against the held-out images": distance(features["held_out_samples"], features["held_out"]),
    }
    assert {name: metrics["FD-DINOv2"] for name, metrics in found["metrics"].items()} == pytest.approx(
        expected, rel=1e-4
    )


def test_few_images_are_warned_of(report):
    assert len(report["warnings"]) == 2
    assert "11 samples instead of the standard 50,000" in report["warnings"][0]
    assert f"11 images for snippet features of {MEMORY_DIM} dimensions" in report["warnings"][1]


def test_samples_that_cannot_be_compared_are_warned_of(script, workplace, tmp_path):
    for name in ("samples", "held_out_samples"):
        shutil.copytree(workplace / name, tmp_path / name)
    protocol = json.loads((tmp_path / "samples" / "protocol.json").read_text())
    protocol |= {"guidance_scale": 2.0, "complete": False}
    (tmp_path / "held_out_samples" / "protocol.json").write_text(json.dumps(protocol))
    sets = {name: tmp_path / name for name in ("samples", "held_out_samples")}
    warnings = run(script, workplace, tmp_path / "out", "--features", "encoder", **sets)["warnings"]
    assert warnings[1:-1] == [
        "The sampling is not finished, as protocol.json says.",
        "The samples from held-out memories were made from the same bank as the others.",
        "The samples from held-out memories were made with another guidance_scale.",
    ]


def test_tables(report, workplace):
    text = (workplace / "everything" / "evaluation.md").read_text()
    assert f"| FD-DINOv2 | {report['results'][0]['value']:.4g} | 11 | 16 x 16; " in text
    for part in (
        "## Memorisation",
        "| held-out images | ",
        "## Generalisation",
        "8 images of each",
        "**Note:** 11 samples",
    ):
        assert part in text
    assert sorted(path.name for path in (workplace / "everything").iterdir()) == [
        "closest_snippets.png",
        "evaluation.json",
        "evaluation.md",
    ]


def test_the_reference_is_kept(script, workplace, tmp_path, caplog):
    caplog.set_level("INFO")
    shutil.copytree(workplace / "train", tmp_path / "images")

    def evaluate(**options):
        caplog.clear()
        options = {"reference": tmp_path / "images", "reference_cache": tmp_path / "kept", **options}
        result = run(script, workplace, tmp_path / "out", "--features", "encoder", **options)["results"]
        return result, "taken from" in caplog.text

    first, is_kept = evaluate()
    assert not is_kept
    assert evaluate() == (first, True)
    assert evaluate(resolution=12)[1] is False
    # Other images, under the same names
    PIL.Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / "images" / "class_0" / "000000.png")
    second, is_kept = evaluate()
    assert not is_kept and second != first
    assert len(list((tmp_path / "kept").iterdir())) == 3


@pytest.mark.slow
def test_inception_metrics(script, workplace, pictures, tmp_path):
    torch.manual_seed(0)
    inception = InceptionV3()
    for module in inception.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None

    def stack(name, count):
        return torch.from_numpy(np.stack([np.array(image) for image in pictures[name][:count]]))

    reference, samples = stack("train", 5), stack("samples", 6)
    with torch.no_grad():
        inception(stack("held_out", 3).permute(0, 3, 1, 2))
        inception.eval()
        real, generated = (inception(images.permute(0, 3, 1, 2)) for images in (reference, samples))
        score = inception_score(inception.logits(generated.pool))
    save_file(inception.state_dict(), tmp_path / "inception.safetensors")
    np.savez(tmp_path / "samples.npz", samples.numpy())
    # Published statistics for FID, none for sFID
    mean, scale = np.linspace(0, 1, InceptionV3.pool_dim), np.linspace(1, 2, InceptionV3.pool_dim)
    np.savez(tmp_path / "reference.npz", arr_0=reference.numpy(), mu=mean, sigma=np.diag(scale**2))
    (tmp_path / "train").mkdir()
    for k in (1, COPIED, 2):
        pictures["train"][k].save(tmp_path / "train" / f"{k}.png")

    args = script.parse_args(
        [
            *("--samples", f"{tmp_path}/samples.npz", "--reference", f"{tmp_path}/reference.npz"),
            *("--inception_weights", f"{tmp_path}/inception.safetensors", "--train_data_dir", f"{tmp_path}/train"),
            *("--cache_dir", f"{workplace}/cache", "--batch_size", "4", "--output_dir", f"{tmp_path}/out"),
        ]
    )
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    script.main(args)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())

    found = {result["metric"]: result["value"] for result in report["results"]}
    precision, recall = precision_recall(real.pool, generated.pool)
    assert found == pytest.approx(
        {
            "FID": distance_by_factors(*moments(generated.pool), mean, np.diag(scale)),
            "sFID": distance_by_factors(*moments(generated.spatial), *moments(real.spatial)),
            "Inception score": score,
            "precision": precision,
            "recall": recall,
        },
        rel=1e-4,
    )
    assert "with its published statistics (5 images)" in report["results"][0]["protocol"]
    assert "sampling not recorded" in report["results"][0]["protocol"]
    similarities = report["memorisation"]["nearest training image, cosine of Inception features"]["samples"]
    assert similarities["max"] == pytest.approx(1, abs=1e-4)
    picture = np.array(PIL.Image.open(tmp_path / "out" / "closest_images.png"))
    np.testing.assert_array_equal(picture[60:220, 16:176], picture[60:220, 176:336])


@pytest.mark.slow
def test_two_processes_find_the_same(workplace, report, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    options = {name: workplace / name for name in ("held_out_samples",)}
    options |= {"train_data_dir": workplace / "train", "held_out_dir": workplace / "held_out"}
    flags = ("--features", "encoder")
    result = subprocess.run(
        [*command, str(SCRIPT), *arguments(workplace, tmp_path, *flags, **options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["num_processes"] == 2 and report["num_processes"] == 1
    assert found["results"][0]["value"] == pytest.approx(report["results"][0]["value"], rel=1e-4)
    for name, value in report["generalisation"]["metrics"].items():
        assert found["generalisation"]["metrics"][name] == pytest.approx(value, rel=1e-4)
    for name, value in report["memorisation"]["nearest snippet of the bank, cosine"].items():
        if name in ("samples", "held-out images"):
            assert found["memorisation"]["nearest snippet of the bank, cosine"][name] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset_name", "x", "--reference", "y"], "Give either --reference or --dataset_name"),
        ([], "Give either --reference or --dataset_name"),
        (["--reference", "y", "--features", "encoder"], "--features encoder needs --model"),
        (["--reference", "y", "--num_pairs", "0"], "--num_pairs must be at least 1, got 0"),
        (["--reference", "y", "--samples", "s", "--output_dir", "./s/e"], "--output_dir must not lie in --samples"),
        (
            ["--reference", "y", "--model", "z", "--features", "encoder", "--inception_weights", "w"],
            "of no use without --features inception",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(script, capsys, flags, message):
    with pytest.raises(SystemExit):
        script.parse_args(["--samples", "s", "--output_dir", "o", *flags])
    assert message in capsys.readouterr().err


def test_rows_of_other_samples_are_not_compared(script, workplace, pipe, caplog):
    images = script.GeneratedImages(workplace / "samples")
    rows = torch.zeros(COUNTS["samples"], dtype=torch.long)
    assert script.compare_own_memory(images, pipe.memory_bank, torch.ones(len(rows), MEMORY_DIM), rows) is not None
    images._files.pop()
    assert script.compare_own_memory(images, pipe.memory_bank, torch.ones(len(rows) - 1, MEMORY_DIM), rows[1:]) is None
    assert f"is of {len(rows)} images, not of {len(rows) - 1}" in caplog.text


def test_a_pipeline_without_an_encoder_is_refused(script, workplace, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="has no image encoder for --features encoder"):
        run(script, workplace, tmp_path / "out", "--features", "encoder", model=tmp_path / "pipeline")
