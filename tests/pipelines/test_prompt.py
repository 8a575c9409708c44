# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from tiny_clip import fit, make_image_processor, make_model, make_tokenizer
from tiny_pipeline import make_bank, make_picture, make_pipeline, make_vae, quiet, record_evaluations, run, seed
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_gmem import GMemPipeline
from diffusers_gmem.data import encode_text_keys


PROMPTS = ["a red mug", "two dogs", "the sea at night", "a cat on a mat", "snow", "an old tree", "z"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Text keys of seven rows, and the text half of the model, loaded as for a pipeline."""
    folder = tmp_path_factory.mktemp("clip")
    images = [make_picture(k) for k in range(7)]
    model = fit(make_model(), PROMPTS, images)
    model.save_pretrained(folder)
    keys = encode_text_keys(model, make_image_processor()(images=images, return_tensors="pt").pixel_values)
    return keys, {"text_encoder": CLIPTextModelWithProjection.from_pretrained(folder), "tokenizer": make_tokenizer()}


@pytest.fixture(scope="module")
def keyed_bank(words):
    return make_bank().with_text_keys(words[0], "org/clip", "abc", "clip")


@pytest.fixture
def pipe(keyed_bank, words):
    return make_pipeline(vae=make_vae(), memory_bank=keyed_bank, **words[1])


@pytest.mark.parametrize("number", range(7))
def test_a_prompt_stands_for_the_row_that_matches_it(pipe, number):
    output = run(pipe, prompt=PROMPTS[number])
    assert output.memory_indices == [number]
    assert np.array_equal(output.images, run(pipe, memory_indices=number).images)


def test_the_best_matches_of_each_prompt_in_order(pipe, keyed_bank, words):
    output = run(pipe, prompt=PROMPTS[2:4], num_images=3, num_images_per_memory=2, output_type="latent")
    keys = torch.nn.functional.normalize(words[0], dim=1)
    best = (keys[2:4] @ keys.T).argsort(descending=True)[:, :3].flatten().tolist()
    assert best[0] == 2 and best[3] == 3
    assert output.memory_indices == [row for row in best for _ in range(2)]
    expected = run(pipe, memory_indices=best, num_images_per_memory=2, output_type="latent")
    assert torch.equal(output.images, expected.images)


def test_a_prompt_goes_with_everything_else(pipe, keyed_bank):
    evaluations = record_evaluations(pipe)
    options = {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.7), "generator": [seed(k) for k in range(4)]}
    output = run(pipe, prompt=PROMPTS[:2], num_images_per_memory=2, **options)
    assert output.memory_indices == [0, 0, 1, 1] and len(output.images) == 4
    memory = torch.cat([keyed_bank[[0, 0, 1, 1]], torch.zeros(4, keyed_bank.dim)])
    assert torch.equal(evaluations[0]["memory"], memory)
    options["generator"] = [seed(k) for k in range(4)]
    assert np.array_equal(output.images, run(pipe, memory_indices=[0, 0, 1, 1], **options).images)


def error(message, **arguments):
    return pytest.param(arguments, message, id=message[:40])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        error("Only one of .*`image` and `prompt` .* got `class_labels` and `prompt`", prompt="a", class_labels=0),
        error("Only one of .* got `memory` and `prompt`", prompt="a", memory=torch.ones(16)),
        error("`prompt` must be a text or a sequence of at least one of them, got 3", prompt=3),
        error("`prompt` must be a text .*, got \\[\\]", prompt=[]),
        error("`prompt` must be a text .*, got \\['a', None\\]", prompt=["a", None]),
        error("`num_images` must be at most 7, the snippets of the bank, got 8", prompt="a", num_images=8),
        error("`num_images` must be an integer of at least 1, got 0", prompt="a", num_images=0),
    ],
)
def test_wrong_prompts(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **arguments)


def test_what_is_missing_for_a_prompt(words, keyed_bank):
    with pytest.raises(ValueError, match=r"no text keys.* `examples/build_memory_bank.py --text_keys <model>`"):
        run(make_pipeline(memory_bank=make_bank(), **words[1]), prompt="a")
    with pytest.raises(ValueError, match=r"no text keys.* `examples/build_memory_bank.py --text_keys <model>`"):
        run(make_pipeline(memory_bank=make_bank()), prompt="a")
    for name in ("text_encoder", "tokenizer"):
        with pytest.raises(ValueError, match="needs a pipeline with a `text_encoder` and a `tokenizer`.* org/clip to"):
            run(make_pipeline(memory_bank=keyed_bank, **{name: words[1][name]}), prompt="a")
    with pytest.raises(ValueError, match="This pipeline has no memory bank"):
        run(make_pipeline(**words[1]), prompt="a")
    other = keyed_bank.with_text_keys(words[0][:, :5])
    with pytest.raises(ValueError, match="'dim': 12.*but the text keys of this bank are of .*'dim': 5"):
        run(make_pipeline(memory_bank=other, **words[1]), prompt="a")


# Saving and loading


@pytest.fixture(scope="module")
def saved(keyed_bank, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe = make_pipeline(vae=make_vae(), memory_bank=keyed_bank, **words[1])
    pipe.save_pretrained(folder)
    return folder, run(pipe, prompt=PROMPTS[:2]).images


def test_layout(saved):
    folder, _ = saved
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert {"config.json", "model.safetensors"} == {path.name for path in (folder / "text_encoder").iterdir()}


@pytest.mark.parametrize("cls", [GMemPipeline, DiffusionPipeline])
def test_round_trip(saved, cls):
    folder, expected = saved
    pipe = quiet(cls.from_pretrained(folder))
    output = run(pipe, prompt=PROMPTS[:2])
    assert output.memory_indices == [0, 1]
    np.testing.assert_allclose(output.images, expected, rtol=0, atol=1e-5)
    for twin in (GMemPipeline(**pipe.components), GMemPipeline.from_pipe(pipe)):
        assert twin.text_encoder is pipe.text_encoder and twin.tokenizer is pipe.tokenizer
        assert run(quiet(twin), prompt=PROMPTS[5]).memory_indices == [5]


def test_bfloat16_and_offload(saved):
    folder, expected = saved
    pipe = quiet(GMemPipeline.from_pretrained(folder, dtype=torch.bfloat16))
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert run(pipe, prompt=PROMPTS[1]).memory_indices[0] in range(7)
    for method in ("enable_model_cpu_offload", "enable_group_offload"):
        pipe = quiet(GMemPipeline.from_pretrained(folder))
        options = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
        getattr(pipe, method)(**({"device": "cpu"} if method == "enable_model_cpu_offload" else options))
        output = run(pipe, prompt=PROMPTS[:2])
        assert output.memory_indices == [0, 1]
        np.testing.assert_allclose(output.images, expected, rtol=0, atol=1e-5)


def test_training_mode_is_left(words):
    words[1]["text_encoder"].train()
    assert not make_pipeline(**words[1]).text_encoder.training


# The Hub


def test_push_and_load(hub, pipe, saved):
    pipe.push_to_hub("me/words")
    loaded = quiet(GMemPipeline.from_pretrained("me/words"))
    assert isinstance(loaded.tokenizer, CLIPTokenizer)
    output = run(loaded, prompt=PROMPTS[:2])
    assert output.memory_indices == [0, 1]
    np.testing.assert_allclose(output.images, saved[1], rtol=0, atol=1e-5)
    assert "| text encoder for `prompt=` | CLIPTextModelWithProjection" in ModelCard.load("me/words").text


PROGRAM = """
import sys
sys.modules["diffusers_gmem"] = None
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("me/words", revision="remote-code", trust_remote_code=True)
assert pipe(prompt=["two dogs", "z"], num_inference_steps=2, output_type="np").memory_indices == [1, 6]
"""


@pytest.mark.slow
def test_a_prompt_without_the_package(hub, pipe):
    pipe.push_to_hub("me/words", include_code=True)
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_keys_that_were_added_to_a_bank_elsewhere_are_saved(hub, words, tmp_path):
    make_pipeline(memory_bank=make_bank()).push_to_hub("me/model", bank_repo_id="me/bank")
    pipe = quiet(GMemPipeline.from_pretrained("me/model", **words[1]))
    pipe.load_memory_bank()
    pipe.save_pretrained(tmp_path / "pointer")
    assert not (tmp_path / "pointer" / "bank").exists()
    pipe.memory_bank = pipe.memory_bank.with_text_keys(words[0])
    pipe.save_pretrained(tmp_path / "whole")
    loaded = quiet(GMemPipeline.from_pretrained(tmp_path / "whole"))
    assert torch.equal(loaded.memory_bank.text_keys, words[0])
    assert run(loaded, prompt=PROMPTS[4]).memory_indices == [4]
