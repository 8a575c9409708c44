# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from reference_cases import assert_matches, case_state_dict, case_tensors, reference_cases
from tiny_pipeline import (
    LABELS,
    MEMORY_DIM,
    batch_sizes,
    make_bank,
    make_image_encoder,
    make_picture,
    make_pipeline,
    make_transformer,
    make_vae,
    quiet,
    record_evaluations,
    run,
    seed,
)
from tiny_training import make_autoencoder

from diffusers_gmem import (
    GMemFlowMatchScheduler,
    GMemImageEncoder,
    GMemImageProcessor,
    GMemMemoryBank,
    GMemPipeline,
    GMemPipelineOutput,
    GMemTransformer2DModel,
)
from diffusers_gmem.conversion import convert_transformer


@pytest.fixture
def pipe():
    return make_pipeline(make_transformer(in_channels=3), memory_bank=make_bank())


@pytest.fixture
def latent_pipe():
    return make_pipeline(vae=make_vae(), memory_bank=make_bank(), **make_image_encoder())


# Against the reference


def reference_transformer(case):
    model_case = next(other for other in reference_cases("model_forward") if other["file"] == case["weights_from"])
    options = model_case["options"]
    plain = not options["use_rope"] and not options["use_qknorm"]
    return convert_transformer(case_state_dict(case), options["num_heads"] if plain else None)


class GivenNoise(GMemFlowMatchScheduler):
    """Takes the draws of `step` from a list."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        index = self.step_index or 0
        noise = self.draws.pop(0) if self.draws and (self.order == 1 or index % 2 == 1) else None
        return super().step(model_output, timestep, sample, variance_noise=noise, return_dict=return_dict)


def reference_scheduler(options):
    """The scheduler of a sampler case, without its draws, and its number of steps."""
    prediction = {"velocity": "flow_prediction", "noise": "epsilon", "score": "score"}[options["prediction"]]
    config = {"path_type": options["path"].lower(), "prediction_type": prediction}
    if options["sample_eps"] is not None:
        config["sample_eps"] = options["sample_eps"]
    if options["mode"] == "ODE":
        shift = options["timestep_shift"]
        config |= {
            "stochastic": False,
            "solver": options["sampling_method"].removesuffix("2"),
            "shift": 1 / shift if shift > 0 else 1.0,
            "atol": 1e-7,
            "rtol": 1e-7,
        }
        return GivenNoise(**config), options["num_steps"] - 1
    last_step = options["last_step"]
    config |= {
        "solver": options["sampling_method"].lower(),
        "diffusion_form": options["diffusion_form"].lower().replace("inccreasing", "increasing"),
        "diffusion_norm": options["diffusion_norm"],
        "last_step": last_step and last_step.lower(),
        "last_step_size": options["last_step_size"],
    }
    return GivenNoise(**config), options["num_steps"] - (last_step is None)


END_TO_END = [case for case in reference_cases("sampler") if "weights_from" in case]


@pytest.mark.parametrize("case", END_TO_END, ids=lambda case: case["id"])
def test_reference_run(case):
    tensors, options = case_tensors(case), case["options"]
    batch_size = case["B"]
    latents = tensors["x_init"][:batch_size]
    scheduler, num_steps = reference_scheduler(options)
    scheduler.draws = list(tensors["noise"][:, :batch_size]) if "noise" in tensors else []
    if scheduler.config.stochastic and scheduler.order == 2:
        # Given noise for the first step, in place of what `init_noise_sigma` makes of one draw
        scheduler.set_timesteps(num_steps)
        latents = scheduler.add_step_noise(latents, scheduler.timesteps[0], variance_noise=scheduler.draws.pop(0))
        latents = latents / scheduler.init_noise_sigma

    guidance = {}
    if case["cfg"] is not None:
        interval = (case["cfg"]["cfg_interval_start"], 1.0) if case["cfg"]["cfg_interval"] else (0.0, 1.0)
        guidance = {"guidance_scale": case["cfg"]["cfg_scale"], "guidance_interval": interval}

    pipe = make_pipeline(reference_transformer(case), scheduler)
    evaluations = record_evaluations(pipe)
    output = pipe(
        memory=tensors["c"][:batch_size],
        latents=latents,
        num_inference_steps=num_steps,
        output_type="latent",
        **guidance,
    )

    assert len(evaluations) == pipe.num_timesteps
    if options["sampling_method"] == "dopri5":  # that of the reference is less accurate
        torch.testing.assert_close(output.images, tensors["xs_tight"][-1, :batch_size], rtol=1e-4, atol=1e-4)
    else:
        assert_matches(case, "xs", output.images, tensors["xs"][-1, :batch_size])
        assert len(evaluations) == case["model_evals_needed"]
    for evaluation in evaluations:
        time = evaluation["timestep"][0].item()
        guided = guidance and interval[0] - 1e-6 <= time <= interval[1] + 1e-6
        assert len(evaluation["hidden_states"]) == (2 if guided else 1) * batch_size
    if guidance:
        assert len(set(batch_sizes(evaluations))) == (2 if interval[0] > 0 else 1)


class VelocityAt(GMemFlowMatchScheduler):
    """Evaluates the model once, at the paper's time `time`, and returns the velocity as the sample."""

    def set_timesteps(self, num_inference_steps, device=None):
        sigma = 1 - torch.as_tensor(self.time, dtype=torch.float32)
        self.timesteps, self.sigmas = sigma.reshape(1) * 1000, torch.stack([sigma, torch.zeros(())])

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return (-model_output,)


def velocity_at(pipe, time, **arguments):
    pipe.scheduler = VelocityAt(stochastic=False)
    pipe.scheduler.time = time
    return pipe(output_type="latent", num_inference_steps=1, **arguments).images


@pytest.mark.parametrize("case", reference_cases("forward_with_cfg"), ids=lambda case: case["id"])
def test_reference_guidance(case):
    # The reference decides by the first time of a batch and gives the unconditional output above the interval. Here
    # every image is a batch of its own, and outside the interval the output is the conditional one.
    tensors, options = case_tensors(case), case["options"]
    scale, interval = options["cfg_scale"], (0.0, 1.0)
    if options["cfg_interval"]:
        end = options["cfg_interval_end"]
        interval = (options["cfg_interval_start"], 1.0 if end is None else end)
    pipe = make_pipeline(reference_transformer(case))
    evaluations = record_evaluations(pipe)

    for i in range(case["B"]):
        velocity = velocity_at(
            pipe,
            tensors["t"][i],
            memory=tensors["c"][i],
            latents=tensors["x"][i : i + 1],
            guidance_scale=scale,
            guidance_interval=interval,
        )
        conditional, unconditional = tensors["cond"][i : i + 1], tensors["uncond"][i : i + 1]
        guided = interval[0] <= tensors["t"][i] <= torch.tensor(interval[1])  # float32, as the reference compares
        expected = unconditional + scale * (conditional - unconditional) if guided else conditional
        assert_matches(case, "out", velocity, expected)
        if "quirk" not in case:
            assert_matches(case, "out", velocity, tensors["out"][i : i + 1])
        assert len(evaluations.pop()["hidden_states"]) == (2 if guided else 1)
    assert not evaluations


# Guidance


@pytest.mark.parametrize("border", [0.3, 0.89, 1 / 3, 0.7])
def test_guidance_interval_is_closed(border):
    pipe = make_pipeline()
    evaluations = record_evaluations(pipe)
    arguments = {"memory": torch.randn(1, MEMORY_DIM, generator=seed(0)), "guidance_scale": 2.0}
    for interval in [(border, 1.0), (0.0, border), (border, border)]:
        velocity_at(pipe, border, guidance_interval=interval, **arguments)
        assert batch_sizes(evaluations)[-1] == 2
    for interval in [(border + 1e-3, 1.0), (0.0, border - 1e-3)]:
        velocity_at(pipe, border, guidance_interval=interval, **arguments)
        assert batch_sizes(evaluations)[-1] == 1


@pytest.mark.parametrize(
    "make_scheduler",
    [
        partial(GMemFlowMatchScheduler, stochastic=False, solver="euler"),
        FlowMatchEulerDiscreteScheduler,
        partial(UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=["gmem", "euler", "unipc"],
)
def test_guidance_interval_is_in_the_papers_time(make_scheduler):
    pipe = make_pipeline(make_transformer(in_channels=3), make_scheduler())
    evaluations = record_evaluations(pipe)
    run(
        pipe,
        memory=torch.ones(MEMORY_DIM),
        num_inference_steps=10,
        guidance_scale=3.0,
        guidance_interval=(0.3, 0.6),
    )
    times = torch.tensor([evaluation["timestep"][0] for evaluation in evaluations])
    torch.testing.assert_close(times, torch.arange(10) / 10, atol=2e-3, rtol=0)
    # The grids of diffusers' multistep solvers are not exactly the tenths: 0.3 and 0.6 may fall on either side
    sizes = batch_sizes(evaluations)
    assert sizes[:3] == [1, 1, 1] and sizes[4:6] == [2, 2] and sizes[7:] == [1, 1, 1]
    if not isinstance(pipe.scheduler, UniPCMultistepScheduler):
        assert sizes == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]


def test_scale_one_evaluates_no_unconditional_branch(pipe):
    evaluations = record_evaluations(pipe)
    run(pipe, memory_indices=[1, 2], guidance_scale=1.0)
    assert batch_sizes(evaluations) == [2] * 5
    assert pipe.guidance_scale == 1.0


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.5])
def test_guidance_formula(scale):
    pipe = make_pipeline()
    memory, other = torch.randn(2, MEMORY_DIM, generator=seed(0))
    latents = torch.randn(1, 4, 8, 8, generator=seed(1))
    at = partial(velocity_at, pipe, 0.4, latents=latents)
    conditional, null = at(memory=memory), at(memory=torch.zeros(MEMORY_DIM))
    torch.testing.assert_close(at(memory=memory, guidance_scale=scale), null + scale * (conditional - null))

    negative = at(memory=other)
    assert not torch.allclose(negative, null, atol=1e-2)
    guided = at(memory=memory, negative_memory=other, guidance_scale=scale)
    torch.testing.assert_close(guided, negative + scale * (conditional - negative))


@pytest.mark.parametrize("shape", [(MEMORY_DIM,), (1, MEMORY_DIM), (3, MEMORY_DIM)])
def test_negative_memory_shapes(pipe, shape):
    evaluations = record_evaluations(pipe)
    negative = torch.randn(shape, generator=seed(1))
    run(pipe, memory_indices=[0, 1, 2], negative_memory=negative, guidance_scale=2.0)
    expected = torch.cat([pipe.memory_bank[:3], negative.expand(3, MEMORY_DIM)])
    assert all(torch.equal(evaluation["memory"], expected) for evaluation in evaluations)


def test_negative_memory_without_guidance_warns(pipe, warnings):
    run(pipe, memory_indices=0, negative_memory=torch.ones(MEMORY_DIM))
    assert "`negative_memory` has no effect" in warnings.text


# What to generate


SOURCES = {
    "int": ({"memory_indices": 3}, [3]),
    "list": ({"memory_indices": [3, 0, 3]}, [3, 0, 3]),
    "list of one": ({"memory_indices": [5]}, [5]),
    "tuple": ({"memory_indices": (6, 1)}, [6, 1]),
    "range": ({"memory_indices": range(2, 4)}, [2, 3]),
    "array": ({"memory_indices": np.array([4, 2])}, [4, 2]),
    "numpy integer": ({"memory_indices": np.int64(4)}, [4]),
    "0-D tensor": ({"memory_indices": torch.tensor(2)}, [2]),
    "tensor of one": ({"memory_indices": torch.tensor([2])}, [2]),
    "tensor": ({"memory_indices": torch.tensor([2, 6], dtype=torch.int32)}, [2, 6]),
}


@pytest.mark.parametrize(("arguments", "indices"), SOURCES.values(), ids=SOURCES.keys())
def test_memory_indices(pipe, arguments, indices):
    evaluations = record_evaluations(pipe)
    output = run(pipe, **arguments)
    assert output.memory_indices == indices
    assert all(type(index) is int for index in output.memory_indices)
    assert output.images.shape == (len(indices), 8, 8, 3)
    assert all(torch.equal(evaluation["memory"], pipe.memory_bank[indices]) for evaluation in evaluations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory(pipe, dtype):
    evaluations = record_evaluations(pipe)
    snippets = torch.randn(2, MEMORY_DIM, generator=seed(0)).to(dtype)
    for memory in (snippets, snippets[0]):
        output = run(pipe, memory=memory)
        assert output.memory_indices is None
        expected = memory.float().reshape(-1, MEMORY_DIM)
        assert output.images.shape == (len(expected), 8, 8, 3)
        assert torch.equal(evaluations[-1]["memory"], expected)


def test_memory_needs_no_bank():
    pipe = make_pipeline(make_transformer(in_channels=3))
    assert run(pipe, memory=torch.ones(2, MEMORY_DIM)).images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("class_labels", "expected"),
    [
        (1, [1]),
        ("dog", [1]),
        (["fish", 0, "cat"], [2, 0, 0]),
        ((2,), [2]),
        (np.array([1, 0]), [1, 0]),
        (np.int64(2), [2]),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor(0), [0]),
    ],
    ids=str,
)
def test_class_labels(pipe, class_labels, expected):
    drawn = set()
    for number in range(6):
        output = run(pipe, class_labels=class_labels, generator=seed(number), num_inference_steps=2)
        assert [LABELS[index] for index in output.memory_indices] == expected
        drawn.add(tuple(output.memory_indices))
    assert len(drawn) > 1  # the row is drawn among those of the label


def test_draws_from_the_bank(pipe):
    evaluations = record_evaluations(pipe)
    output = run(pipe, num_images=40, num_inference_steps=2)
    assert len(output.memory_indices) == len(output.images) == 40
    assert set(output.memory_indices) == set(range(len(LABELS)))
    assert torch.equal(evaluations[0]["memory"], pipe.memory_bank[output.memory_indices])
    assert len(run(pipe).memory_indices) == 1


def test_image(latent_pipe):
    evaluations = record_evaluations(latent_pipe)
    pictures = [make_picture(0), make_picture(1)]
    pixel_values = latent_pipe.image_processor(images=pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = latent_pipe.image_encoder(pixel_values).pooler_output
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)

    output = run(latent_pipe, image=pictures)
    assert output.memory_indices is None and len(output.images) == 2
    torch.testing.assert_close(evaluations[-1]["memory"], expected)
    for picture in (pictures[1], [pictures[1]], np.array(pictures[1]), torch.tensor(np.array(pictures[1]))):
        if isinstance(picture, torch.Tensor):
            picture = picture.permute(2, 0, 1)
        assert len(run(latent_pipe, image=picture).images) == 1
        torch.testing.assert_close(evaluations[-1]["memory"], expected[1:])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1"])
def test_image_of_any_mode(latent_pipe, mode):
    picture = make_picture().convert(mode)
    expected = latent_pipe.encode_image(picture.convert("RGB"))
    torch.testing.assert_close(latent_pipe.encode_image(picture), expected, rtol=0, atol=0)


def test_transparent_image_is_laid_on_white(latent_pipe):
    transparent = make_picture().convert("RGBA")
    transparent.putalpha(0)
    white = latent_pipe.encode_image(PIL.Image.new("RGB", transparent.size, "white"))
    assert torch.equal(latent_pipe.encode_image(transparent), white)
    assert not torch.allclose(latent_pipe.encode_image(make_picture()), white, atol=1e-2)


def test_num_images_per_memory(pipe):
    evaluations = record_evaluations(pipe)
    output = run(pipe, memory_indices=[4, 1], num_images_per_memory=3)
    assert output.memory_indices == [4, 4, 4, 1, 1, 1]
    assert torch.equal(evaluations[0]["memory"], pipe.memory_bank[[4, 4, 4, 1, 1, 1]])
    assert not np.allclose(output.images[0], output.images[1])

    indices = run(pipe, num_images=2, num_images_per_memory=2).memory_indices
    assert indices[0] == indices[1] and indices[2] == indices[3]
    labels = [LABELS[i] for i in run(pipe, class_labels=["dog", 2], num_images_per_memory=2).memory_indices]
    assert labels == [1, 1, 2, 2]
    assert len(run(pipe, memory=torch.ones(MEMORY_DIM), num_images_per_memory=2).images) == 2


# Randomness


def test_one_generator_determines_everything(latent_pipe):
    first = run(latent_pipe, num_images=3, generator=seed(7))
    torch.manual_seed(99)
    again = run(latent_pipe, num_images=3, generator=seed(7))
    other = run(latent_pipe, num_images=3, generator=seed(8))
    assert np.array_equal(first.images, again.images) and first.memory_indices == again.memory_indices
    assert not np.allclose(first.images, other.images)


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("arguments", [{}, {"class_labels": "fish"}], ids=["draws", "labels"])
def test_image_k_is_the_same_whatever_the_batch(latent_pipe, solver, arguments):
    latent_pipe.scheduler = GMemFlowMatchScheduler(solver=solver)
    evaluations = record_evaluations(latent_pipe)

    def generate(numbers):
        evaluations.clear()
        batch = {"class_labels": ["fish"] * len(numbers)} if arguments else {"num_images": len(numbers)}
        generators = [seed(number) for number in numbers]
        output = run(latent_pipe, generator=generators, **batch)
        states = [generator.get_state() for generator in generators]
        images = zip(output.memory_indices, evaluations[0]["hidden_states"], output.images, states, strict=True)
        return dict(zip(numbers, images, strict=True))

    together = generate([11, 12, 13, 14])
    for numbers in ([13], [14, 11], [12, 13, 11]):
        for number, (index, noise, image, state) in generate(numbers).items():
            expected_index, expected_noise, expected_image, expected_state = together[number]
            assert index == expected_index
            assert torch.equal(noise, expected_noise)
            np.testing.assert_allclose(image, expected_image, rtol=0, atol=1e-4)
            assert torch.equal(state, expected_state)
    assert len({index for index, *_ in together.values()}) > 1


def test_noise_of_the_sde_is_bit_for_bit_the_same_whatever_the_batch(pipe):
    # With a velocity of exactly zero only the noise is left, and nothing depends on how matrices are multiplied
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    together = run(pipe, num_images=3, generator=[seed(1), seed(2), seed(3)], output_type="latent").images
    alone = run(pipe, num_images=1, generator=[seed(2)], output_type="latent").images
    assert torch.equal(alone[0], together[1])
    # and it is there: each step's draw comes from the image's generator
    noise = run(pipe, memory_indices=0, generator=seed(2), num_inference_steps=2, output_type="latent").images
    assert not torch.equal(noise, alone)


def test_generators_and_num_images_per_memory(pipe):
    generators = [seed(1), seed(2), seed(3), seed(4)]
    together = run(pipe, num_images=2, num_images_per_memory=2, generator=generators)
    first = run(pipe, num_images=1, num_images_per_memory=2, generator=[seed(1), seed(2)])
    assert first.memory_indices == together.memory_indices[:2]
    np.testing.assert_allclose(first.images, together.images[:2], rtol=0, atol=1e-4)


def test_latents(pipe):
    evaluations = record_evaluations(pipe)
    latents = torch.randn(2, 3, 8, 8, generator=seed(5))
    given = latents.clone()
    run(pipe, memory_indices=[0, 1], latents=latents)
    pipe.scheduler.set_timesteps(3)
    assert pipe.scheduler.init_noise_sigma > 1.1
    torch.testing.assert_close(evaluations[0]["hidden_states"], latents * pipe.scheduler.init_noise_sigma)
    assert torch.equal(latents, given)

    pipe.scheduler = GMemFlowMatchScheduler(stochastic=False)
    arguments = {"memory_indices": [0, 1], "latents": latents}
    first = run(pipe, generator=seed(1), **arguments).images
    assert np.array_equal(first, run(pipe, generator=None, **arguments).images)


# Outputs


def test_output_types(latent_pipe):
    latents = run(latent_pipe, num_images=2, output_type="latent").images
    assert latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float32
    config = latent_pipe.vae.config
    mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        decoded = latent_pipe.vae.decode(latents * std / config.scaling_factor + mean).sample

    tensor = run(latent_pipe, num_images=2, output_type="pt").images
    torch.testing.assert_close(tensor, (decoded / 2 + 0.5).clamp(0, 1))
    assert tensor.shape == (2, 3, 16, 16) and 0.05 < tensor.std()
    array = run(latent_pipe, num_images=2, output_type="np").images
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = run(latent_pipe, num_images=2, output_type="pil").images
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    assert np.array_equal(np.stack([np.array(picture) for picture in pictures]), (array * 255).round().astype("uint8"))


def test_output_types_in_pixel_space(pipe):
    latents = run(pipe, num_images=2, output_type="latent").images
    assert latents.shape == (2, 3, 8, 8)
    tensor = run(pipe, num_images=2, output_type="pt").images
    torch.testing.assert_close(tensor, (latents / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(run(pipe, num_images=2).images, tensor.permute(0, 2, 3, 1).numpy())
    assert run(pipe, num_images=2, output_type="pil").images[1].size == (8, 8)


@pytest.mark.parametrize("force_upcast", [True, False])
def test_vae_of_half_precision(force_upcast):
    vae = make_vae()
    vae.register_to_config(force_upcast=force_upcast)
    pipe = make_pipeline(vae=vae, memory_bank=make_bank())
    expected = run(pipe, memory_indices=[1, 2]).images
    vae.to(torch.float16)
    decoded = []
    vae.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append((inputs[0].dtype, vae.dtype)))
    images = run(pipe, memory_indices=[1, 2]).images
    dtype = torch.float32 if force_upcast else torch.float16
    assert decoded == [(dtype, dtype)] and vae.dtype == torch.float16
    np.testing.assert_allclose(images, expected, rtol=0, atol=5e-3)


def test_default_output_is_pil():
    pipe = make_pipeline(make_transformer(in_channels=3), memory_bank=make_bank())
    output = pipe(num_inference_steps=2)
    assert isinstance(output, GMemPipelineOutput)
    assert isinstance(output.images, list) and isinstance(output.images[0], PIL.Image.Image)


def test_return_dict(pipe):
    output = run(pipe, num_images=2)
    images, memory_indices = run(pipe, num_images=2, return_dict=False)
    assert np.array_equal(images, output.images) and memory_indices == output.memory_indices
    assert output["images"] is output.images and output[1] == output.memory_indices


# Callback, progress, modes


def test_callback_sees_every_evaluation(pipe):
    seen = []

    def callback(callback_pipe, index, timestep, tensors):
        assert callback_pipe is pipe
        seen.append((index, timestep.item(), sorted(tensors), pipe.current_timestep.item()))
        return tensors

    expected = run(pipe, memory_indices=[1, 2]).images
    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "memory"]}
    assert np.array_equal(run(pipe, memory_indices=[1, 2], **arguments).images, expected)
    timesteps = pipe.scheduler.timesteps.tolist()
    assert seen == [(i, timestep, ["latents", "memory"], timestep) for i, timestep in enumerate(timesteps)]
    assert pipe.num_timesteps == len(seen) == 5
    assert pipe.current_timestep is None


def test_callback_changes_latents(pipe):
    def callback(pipe, index, timestep, tensors):
        assert list(tensors) == ["latents"]
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if index == pipe.num_timesteps - 1 else {}

    output = run(pipe, memory_indices=[1, 2], callback_on_step_end=callback, output_type="latent")
    assert (output.images == 0.25).all()


def test_callback_changes_memory(pipe):
    def callback(pipe, index, timestep, tensors):
        return {"memory": tensors["memory"].flip(0)} if index == 1 else {}

    evaluations = record_evaluations(pipe)
    run(
        pipe,
        memory_indices=[1, 2],
        guidance_scale=2.0,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["memory"],
    )
    first, flipped = pipe.memory_bank[[1, 2]], pipe.memory_bank[[2, 1]]
    assert [torch.equal(evaluation["memory"][:2], first) for evaluation in evaluations] == [True] * 2 + [False] * 3
    assert all(torch.equal(evaluation["memory"][:2], flipped) for evaluation in evaluations[2:])


def test_callback_changes_guidance(pipe):
    def callback(pipe, index, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    evaluations = record_evaluations(pipe)
    run(pipe, memory_indices=[1], guidance_scale=0.0, callback_on_step_end=callback)
    assert batch_sizes(evaluations) == [2, 1, 2, 2, 2]  # 1 is no guidance
    assert pipe.guidance_scale == pipe.num_timesteps == 5
    constant = run(pipe, memory_indices=[1], guidance_scale=2.0).images
    growing = run(pipe, memory_indices=[1], guidance_scale=2.0, callback_on_step_end=callback).images
    assert np.abs(growing - constant).max() > 0.01


def test_interrupt(pipe):
    def callback(pipe, index, timestep, tensors):
        pipe._interrupt = index == 1
        return tensors

    evaluations = record_evaluations(pipe)
    output = run(pipe, memory_indices=0, num_inference_steps=5, callback_on_step_end=callback)
    assert len(evaluations) == 2 and pipe.interrupt
    assert output.images.shape == (1, 8, 8, 3)
    # the next call starts afresh
    evaluations.clear()
    first = run(pipe, memory_indices=0).images
    assert len(evaluations) == 5 and not pipe.interrupt
    assert np.array_equal(
        run(make_pipeline(pipe.transformer, memory_bank=make_bank()), memory_indices=0).images, first
    )


def test_progress_bar(pipe, capfd):
    run(pipe)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    run(pipe)
    assert "5/5" in capfd.readouterr().err


def test_models_that_were_built_are_put_in_eval_mode():
    transformer, encoder = make_transformer(in_channels=3), make_image_encoder()
    transformer.train()
    encoder["image_encoder"].train()
    pipe = make_pipeline(transformer, memory_bank=make_bank(), **encoder)
    assert not pipe.transformer.training and not pipe.image_encoder.training
    assert np.array_equal(run(pipe, memory_indices=0).images, run(pipe, memory_indices=0).images)


def test_transformer_in_train_mode_is_refused(pipe):
    pipe.transformer.train()
    with pytest.raises(ValueError, match=r"train mode.*pipe\.transformer\.eval\(\)"):
        run(pipe, memory_indices=0)


def test_no_gradient_is_recorded(pipe):
    memory = torch.ones(1, MEMORY_DIM, requires_grad=True)
    assert not run(pipe, memory=memory, output_type="latent").images.requires_grad


def test_attention_kwargs_reach_the_transformer(pipe):
    evaluations = record_evaluations(pipe)
    run(pipe, memory_indices=0, attention_kwargs={"scale": 0.5})
    assert pipe.attention_kwargs == {"scale": 0.5}
    assert all(evaluation["attention_kwargs"] == {"scale": 0.5} for evaluation in evaluations)


CACHES = {
    "pyramid attention broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    "magnitude": lambda pipe: MagCacheConfig(num_inference_steps=15, mag_ratios=torch.ones(15)),
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2),
}


@pytest.mark.parametrize("make_config", CACHES.values(), ids=CACHES.keys())
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)], ids=["all", "interval"])
def test_caches_of_diffusers(pipe, make_config, interval):
    # They keep what they know from evaluation to evaluation, while guidance in an interval changes the batch size
    arguments = {"memory_indices": [0, 1], "guidance_scale": 2.0, "guidance_interval": interval}
    exact = run(pipe, num_inference_steps=8, **arguments).images
    pipe.transformer.enable_cache(make_config(pipe))
    cached = run(pipe, num_inference_steps=8, **arguments).images
    assert not np.array_equal(cached, exact)
    np.testing.assert_allclose(cached, exact, atol=0.1)
    assert np.array_equal(run(pipe, num_inference_steps=8, **arguments).images, cached)
    pipe.transformer.disable_cache()
    assert np.array_equal(run(pipe, num_inference_steps=8, **arguments).images, exact)


def test_docstring_has_the_example():
    assert ">>> from diffusers_gmem import GMemPipeline" in GMemPipeline.__call__.__doc__


# For data ~ N(MEAN, STD^2) the velocity is known, and the exact ODE takes z to MEAN + STD * z


MEAN, STD = 0.5, 0.4


class GaussianTransformer(GMemTransformer2DModel):
    path_type, prediction_type = "linear", "flow_prediction"

    def forward(self, hidden_states, timestep, memory=None, attention_kwargs=None, return_dict=True):
        t = timestep.double().view(-1, 1, 1, 1)
        if self.path_type == "linear":
            alpha, sigma, alpha_slope, sigma_slope = t, 1 - t, 1, -1
        else:
            angle = torch.pi / 2 * t
            alpha, sigma = angle.sin(), angle.cos()
            alpha_slope, sigma_slope = torch.pi / 2 * sigma, -torch.pi / 2 * alpha
        deviation = (hidden_states.double() - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        output = {
            "flow_prediction": alpha_slope * (MEAN + alpha * STD**2 * deviation) + sigma_slope * sigma * deviation,
            "epsilon": sigma * deviation,
            "score": -deviation,
        }[self.prediction_type]
        return (output.float(),)


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "epsilon", "score"])
@pytest.mark.parametrize("path_type", ["linear", "gvp"])
def test_every_path_and_prediction(path_type, prediction_type):
    transformer = make_transformer(GaussianTransformer, num_layers=1)
    transformer.path_type, transformer.prediction_type = path_type, prediction_type
    scheduler = GMemFlowMatchScheduler(
        path_type=path_type, prediction_type=prediction_type, stochastic=False, solver="rk4"
    )
    pipe = make_pipeline(transformer, scheduler)
    evaluations = record_evaluations(pipe)
    latents = torch.randn(4, 4, 8, 8, generator=seed(0))
    output = pipe(memory=torch.ones(4, MEMORY_DIM), latents=latents, num_inference_steps=40, output_type="latent")
    torch.testing.assert_close(output.images, MEAN + STD * latents, rtol=0, atol=5e-3)
    assert len(evaluations) == pipe.num_timesteps == 160
    times = torch.stack([evaluation["timestep"][0] for evaluation in evaluations])
    torch.testing.assert_close(times, 1 - scheduler.sigmas[:-1])


def test_adaptive_solver(capfd):
    scheduler = GMemFlowMatchScheduler(stochastic=False, solver="dopri5", rtol=1e-5)
    pipe = make_pipeline(make_transformer(GaussianTransformer, num_layers=1), scheduler)
    pipe.set_progress_bar_config(disable=False)
    evaluations = record_evaluations(pipe)
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append((index, timestep.item(), index == pipe.num_timesteps - 1))
        return tensors

    latents = torch.randn(4, 4, 8, 8, generator=seed(0))
    output = pipe(
        memory=torch.ones(4, MEMORY_DIM),
        latents=latents,
        num_inference_steps=5,
        guidance_scale=2.0,  # changes nothing here: the model does not look at the memory
        guidance_interval=(0.5, 1.0),
        output_type="latent",
        callback_on_step_end=callback,
    )
    torch.testing.assert_close(output.images, MEAN + STD * latents, rtol=0, atol=1e-4)
    count = len(evaluations)
    assert count == pipe.num_timesteps == len(scheduler.timesteps) > 13
    assert seen == [(i, scheduler.timesteps[i].item(), i == count - 1) for i in range(count)]
    assert batch_sizes(evaluations) == [8 if sigma <= 0.5 + 1e-6 else 4 for sigma in scheduler.sigmas[:-1]]
    assert f"{count}/{count}" in capfd.readouterr().err


FLOW_SCHEDULERS = {
    # of 100 steps: a first-order solver, second-order ones, and multistep ones on diffusers' own grids
    "gmem ode euler": (lambda config: GMemFlowMatchScheduler(stochastic=False, solver="euler"), 0.03),
    "gmem ode heun": (lambda config: GMemFlowMatchScheduler(stochastic=False), 2e-4),
    "euler": (FlowMatchEulerDiscreteScheduler.from_config, 0.03),
    "euler shift": (partial(FlowMatchEulerDiscreteScheduler.from_config, shift=3.0), 0.06),
    "heun": (FlowMatchHeunDiscreteScheduler.from_config, 2e-4),
    "unipc": (partial(UniPCMultistepScheduler.from_config, use_flow_sigmas=True), 2e-3),
    "unipc shift": (partial(UniPCMultistepScheduler.from_config, use_flow_sigmas=True, flow_shift=3.0), 5e-3),
    "dpm++": (partial(DPMSolverMultistepScheduler.from_config, use_flow_sigmas=True), 8e-3),
    "dpm++ shift": (partial(DPMSolverMultistepScheduler.from_config, use_flow_sigmas=True, flow_shift=3.0), 0.02),
}
each_flow_scheduler = pytest.mark.parametrize(
    ("from_config", "bound"), FLOW_SCHEDULERS.values(), ids=FLOW_SCHEDULERS.keys()
)


@each_flow_scheduler
def test_flow_schedulers_solve_the_ode(from_config, bound):
    pipe = make_pipeline(make_transformer(GaussianTransformer, num_layers=1))
    pipe.scheduler = from_config(pipe.scheduler.config)
    latents = torch.randn(4, 4, 8, 8, generator=seed(0))
    output = pipe(memory=torch.ones(4, MEMORY_DIM), latents=latents, num_inference_steps=100, output_type="latent")
    torch.testing.assert_close(output.images, MEAN + STD * latents, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "from_config",
    [
        lambda config: GMemFlowMatchScheduler(),
        lambda config: GMemFlowMatchScheduler(solver="euler"),
        partial(DPMSolverMultistepScheduler.from_config, use_flow_sigmas=True, algorithm_type="sde-dpmsolver++"),
    ],
    ids=["gmem sde heun", "gmem sde euler", "dpm++ sde"],
)
def test_stochastic_schedulers_have_the_distribution_of_the_data(from_config):
    pipe = make_pipeline(make_transformer(GaussianTransformer, num_layers=1))
    pipe.scheduler = from_config(pipe.scheduler.config)
    output = run(pipe, memory=torch.ones(40, MEMORY_DIM), num_inference_steps=100, output_type="latent")
    # 10,240 numbers: the mean is known to 0.004, the standard deviation to 0.003
    assert output.images.mean().item() == pytest.approx(MEAN, abs=0.016)
    assert output.images.std().item() == pytest.approx(STD, abs=0.016)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_equal_timesteps_do_not_hide_the_first_step(pipe, scheduler):
    # These schedulers round their timesteps: with a large shift the first two are both 999
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True, flow_shift=20.0)
    evaluations = record_evaluations(pipe)
    run(pipe, memory_indices=0, num_inference_steps=100)
    assert pipe.scheduler.timesteps[0] == pipe.scheduler.timesteps[1]
    assert pipe.scheduler.step_index == 100
    times = [evaluation["timestep"][0].item() for evaluation in evaluations]
    assert times == sorted(set(times))


@each_flow_scheduler
def test_flow_schedulers_run_unchanged_with_everything(latent_pipe, from_config, bound):
    latent_pipe.scheduler = from_config(latent_pipe.scheduler.config)
    arguments = {"class_labels": ["cat", "fish"], "guidance_scale": 2.0, "guidance_interval": (0.2, 0.7)}
    first = run(latent_pipe, num_inference_steps=4, **arguments).images
    assert first.shape == (2, 16, 16, 3) and np.isfinite(first).all()
    # several runs on one object, and one generator per image
    assert np.array_equal(run(latent_pipe, num_inference_steps=4, **arguments).images, first)
    run(latent_pipe, num_inference_steps=4, generator=[seed(0), seed(1)], **arguments)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        EulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction"),
        DPMSolverMultistepScheduler(),
        FlowMatchLCMScheduler(),
    ],
    ids=["ddim", "euler", "unipc without flow sigmas", "dpm++", "lcm"],
)
def test_other_schedulers_are_refused_by_name(pipe, scheduler):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"^{type(scheduler).__name__}, .*GMemFlowMatchScheduler.*use_flow_sigmas"):
        run(pipe, memory_indices=0)


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"path_type": "gvp"}, "path_type='gvp', prediction_type='flow_prediction'"),
        ({"path_type": "vp"}, "path_type='vp'"),
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon'"),
        ({"prediction_type": "epsilon", "path_type": "gvp"}, "path_type='gvp', prediction_type='epsilon'"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "from_config",
    [
        FlowMatchEulerDiscreteScheduler.from_config,
        FlowMatchHeunDiscreteScheduler.from_config,
        partial(UniPCMultistepScheduler.from_config, use_flow_sigmas=True),
        partial(DPMSolverMultistepScheduler.from_config, use_flow_sigmas=True),
    ],
    ids=["euler", "heun", "unipc", "dpm++"],
)
def test_schedulers_of_diffusers_sample_flows_on_the_linear_path_only(pipe, tmp_path, from_config, config, shown):
    scheduler = from_config(GMemFlowMatchScheduler(**config).config)
    scheduler.save_pretrained(tmp_path)  # what the scheduler does not know itself is saved with it
    for pipe.scheduler in (scheduler, type(scheduler).from_pretrained(tmp_path)):
        name = type(scheduler).__name__
        with pytest.raises(ValueError, match=f"^{name} samples the linear path .*{shown}.*Use GMemFlowMatchScheduler"):
            run(pipe, memory_indices=0)


# Wrong arguments


def error(pattern, **arguments):
    return pytest.param(arguments, pattern, id=f"{next(iter(arguments))}: {pattern}"[:60])


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        error("Only one of .* got `memory` and `memory_indices`", memory=torch.ones(16), memory_indices=1),
        error("got `memory_indices` and `class_labels`", class_labels="cat", memory_indices=1),
        error("got `class_labels` and `image`", class_labels="cat", image=make_picture()),
        # rows
        error(r"must be in 0\.\.6 for this bank, got \[7\]", memory_indices=[0, 7, 1]),
        error(r"must be in 0\.\.6 for this bank, got \[-1\]", memory_indices=-1),
        error("`memory_indices` must be an integer or a sequence .* got 1.0", memory_indices=1.0),
        error(r"`memory_indices` must be an integer .* got tensor\(\[0.5", memory_indices=torch.tensor([0.5])),
        error(r"`memory_indices` must be .* at least one of them, got \[\]", memory_indices=[]),
        error("`memory_indices` must be .* got '3'", memory_indices="3"),
        error("`memory_indices` must be .* got True", memory_indices=True),
        error(r"`memory_indices` must be .* got \[\[0, 1\]\]", memory_indices=[[0, 1]]),
        error(r"`memory_indices` must be .* got \{1\}", memory_indices={1}),
        # labels
        error("holds 9, but no row of this bank carries it: its 3 labels are 0, 1, 2", class_labels=[0, 9]),
        error("holds 'dig', which is not in this bank's `id2label`: close to it are 'dog'", class_labels="dig"),
        error(r"`class_labels` must be an integer, a name .* at least one of them, got \[\]", class_labels=[]),
        error("`class_labels` must be an integer, a name .* got 0.5", class_labels=0.5),
        error(r"`class_labels` must be .* got \[None\]", class_labels=[None]),
        # snippets
        error(r"`memory` must be a tensor of shape \(n, memory_dim\) or .* got list", memory=[1.0] * 16),
        error(r"`memory` must be a tensor of shape .* got shape \(1, 1, 16\)", memory=torch.ones(1, 1, 16)),
        error(r"`memory` must be a tensor of shape .* got shape \(\)", memory=torch.tensor(1.0)),
        error("snippets of dimension 16 .* got dimension 12", memory=torch.ones(2, 12)),
        error("snippets of dimension 16 .* got dimension 0", memory=torch.ones(0)),
        error(r"`memory` must have at least one row, got shape \(0, 16\)", memory=torch.ones(0, 16)),
        error("NaN or infinity", memory=torch.full((16,), torch.nan)),
        error("NaN or infinity", memory=torch.full((16,), 1e300, dtype=torch.float64)),
        # images
        error("`image` must be a PIL image, .* got 7", image=7),
        error(r"`image` must be a PIL image, .* got \[\]", image=[]),
        error("`image` must be a PIL image, .* got 5", image=5),
        # numbers
        error("`num_images` is the number of draws .* does not go with `memory_indices` .got 2", memory_indices=0, num_images=2),
        error("`num_images` is the number of draws .* does not go with `class_labels` .got 2", class_labels=0, num_images=2),
        error("`num_images` must be an integer of at least 1, got 0", num_images=0),
        error("`num_images` must be an integer of at least 1, got 2.0", num_images=2.0),
        error("`num_images_per_memory` must be an integer of at least 1, got -1", num_images_per_memory=-1),
        error("`num_inference_steps` must be an integer of at least 1, got None", num_inference_steps=None),
        error("`num_inference_steps` must be at least 2 with `stochastic=True`, .* got 1", num_inference_steps=1),
        # guidance
        *[
            error(rf"`guidance_interval` must be \(start, end\) .* got {re.escape(repr(interval))}", guidance_interval=interval)
            for interval in [(0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (0.5,), 0.5, None, (0.0, float("nan")), ("0", "1")]
        ],
        error("`guidance_scale` must be a finite number, got nan", guidance_scale=float("nan")),
        error("`guidance_scale` must be a finite number, got None", guidance_scale=None),
        error(r"`negative_memory` must have shape \(1, 16\) or \(3, 16\), got \(2, 16\)", negative_memory=torch.ones(2, 16), num_images=3),
        error(r"`negative_memory` must have shape .* got \(1, 12\)", negative_memory=torch.ones(12)),
        error("`negative_memory` must be a tensor .* got str", negative_memory="blur"),
        error("`negative_memory` holds NaN", negative_memory=torch.full((16,), torch.inf)),
        # generators and noise
        error("list of generators must have one per image, 2; got 3", num_images=2, generator=[seed(0)] * 3),
        error("list of generators must have one per image, 4; got 2", memory_indices=[0, 1], num_images_per_memory=2, generator=[seed(0)] * 2),
        error("list of generators must have one per image, 1; got 0", generator=[]),
        error("`generator` must be a torch.Generator or a list of one per image, got 42", generator=42),
        error(r"`generator` must be .* got \(<torch", generator=(seed(0),)),
        error(r"`latents` must be a tensor of shape \(2, 3, 8, 8\) .* got shape \(1, 3, 8, 8\)", num_images=2, latents=torch.ones(1, 3, 8, 8)),
        error(r"`latents` must be a tensor of shape \(1, 3, 8, 8\) .* got ndarray", latents=np.ones((1, 3, 8, 8))),
        # outputs
        error("`output_type` must be 'pil', 'np', 'pt' or 'latent', got 'jpeg'", output_type="jpeg"),
        error(r"must be a list of some of \['latents', 'memory'\], got \['noise'\]", callback_on_step_end_tensor_inputs=["noise"]),
        error("must be a list of some of .* got 'latents'", callback_on_step_end_tensor_inputs="latents"),
        error("must be a list of some of .* got None", callback_on_step_end_tensor_inputs=None),
        error("must return a dict .* got None", callback_on_step_end=lambda *arguments: None),
    ],
)  # fmt: skip
def test_wrong_argument(pipe, arguments, pattern):
    pipe.register_modules(**make_image_encoder())
    with pytest.raises(ValueError, match=pattern):
        run(pipe, **arguments)


def test_labels_of_a_bank_without_labels(pipe):
    pipe.memory_bank = GMemMemoryBank(torch.randn(4, MEMORY_DIM))
    with pytest.raises(ValueError, match="`class_labels` is 'cat', but this bank has no labels"):
        run(pipe, class_labels="cat")
    pipe.memory_bank = GMemMemoryBank(torch.randn(4, MEMORY_DIM), labels=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="holds the name 'cat', but this bank has no `id2label`"):
        run(pipe, class_labels="cat")


def test_bank_of_another_dimension(pipe):
    pipe.memory_bank = make_bank(dim=12)
    with pytest.raises(ValueError, match="snippets of dimension 16 .* got dimension 12"):
        run(pipe)


@pytest.mark.parametrize("arguments", [{}, {"memory_indices": 0}, {"class_labels": 0}], ids=str)
def test_missing_bank(arguments):
    pipe = make_pipeline(make_transformer(in_channels=3))
    with pytest.raises(ValueError, match="no memory bank: pass snippets as `memory` .* or load .* `memory_bank=`?"):
        run(pipe, **arguments)


def test_missing_image_encoder(pipe):
    with pytest.raises(ValueError, match="`image` needs a pipeline with an `image_encoder` and an `image_processor`"):
        run(pipe, image=make_picture())


# Saving and loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a pipeline that has every component, and an image that it made."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = make_pipeline(vae=make_vae(), memory_bank=make_bank(), **make_image_encoder())
    pipe.save_pretrained(folder)
    return folder, run(pipe, num_images=2).images


def load(folder, cls=GMemPipeline, **arguments):
    return quiet(cls.from_pretrained(folder, **arguments))


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def index_of(folder):
    return json.loads(Path(folder, "model_index.json").read_text())


def assert_same_files(folder, other):
    assert files_of(folder) == files_of(other)
    for file in files_of(folder):
        content, expected = Path(folder, file).read_bytes(), Path(other, file).read_bytes()
        if file.endswith(".json"):  # diffusers notes where a component was loaded from
            content, expected = ({**json.loads(text), "_name_or_path": None} for text in (content, expected))
        assert content == expected, file


def assert_same_images(images, expected):
    # Loaded weights are mapped from the file, where they lie at odd addresses, which torch's CPU kernels for one row
    # answer in the last bit. `test_round_trip_is_exact` looks at the bits.
    np.testing.assert_allclose(images, expected, rtol=0, atol=2e-6)


def move_weights_out_of_the_file(pipe):
    for model in (pipe.transformer, pipe.vae, pipe.image_encoder):
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def test_layout(saved):
    folder, _ = saved
    files = files_of(folder)
    banks = [file for file in files if file.startswith("bank/")]
    assert [file for file in files if file not in banks] == [
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "image_processor/preprocessor_config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert "bank/config.json" in banks and all(file.endswith((".json", ".safetensors")) for file in banks)
    assert GMemMemoryBank.from_pretrained(folder, subfolder="bank").fingerprint == make_bank().fingerprint

    index = index_of(folder)
    assert index["_class_name"] == "GMemPipeline"
    assert index["transformer"] == ["diffusers_gmem", "GMemTransformer2DModel"]
    assert index["scheduler"] == ["diffusers_gmem", "GMemFlowMatchScheduler"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["image_encoder"] == ["transformers", "Dinov2Model"]
    assert index["memory_bank"] == [None, None]
    fingerprint = make_bank().fingerprint
    assert index["memory_bank_source"] == {
        "subfolder": "bank",
        "fingerprint": fingerprint,
        "trained_with": {"fingerprint": fingerprint, "encoder": None, "preprocessing": None, "dim": MEMORY_DIM},
    }


@pytest.mark.parametrize("cls", [GMemPipeline, DiffusionPipeline])
def test_round_trip_is_exact(saved, cls, warnings):
    folder, expected = saved
    pipe = load(folder, cls)
    assert not warnings.records
    assert type(pipe) is GMemPipeline
    assert type(pipe.scheduler) is GMemFlowMatchScheduler and type(pipe.transformer) is GMemTransformer2DModel
    assert_same_images(run(pipe, num_images=2).images, expected)
    assert pipe.memory_bank.fingerprint == make_bank().fingerprint  # with the base class, opened on first use

    original = make_pipeline(vae=make_vae(), memory_bank=make_bank(), **make_image_encoder())
    assert all(pipe.scheduler.config[key] == value for key, value in original.scheduler.config.items())
    assert torch.equal(pipe.memory_bank[:], original.memory_bank[:])
    for name in ("transformer", "vae", "image_encoder"):
        loaded, built = getattr(pipe, name).state_dict(), getattr(original, name).state_dict()
        assert loaded.keys() == built.keys()
        assert all(torch.equal(loaded[key], built[key]) for key in built)

    move_weights_out_of_the_file(pipe)
    assert np.array_equal(run(pipe, num_images=2).images, expected)
    assert np.array_equal(run(pipe).images, run(original).images)
    picture = make_picture()
    assert np.array_equal(run(pipe, image=picture).images, run(original, image=picture).images)


def test_bank_is_opened_at_loading_and_mapped(saved):
    folder, _ = saved
    assert "memory-mapped" in repr(load(folder).memory_bank)


LOAD_IN_NEW_PROCESS = """
import sys
import numpy as np
import torch
import diffusers_gmem
from diffusers import DiffusionPipeline
for cls in (diffusers_gmem.GMemPipeline, DiffusionPipeline):
    pipe = cls.from_pretrained(sys.argv[1])
    output = pipe(num_images=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
    np.save(f"{sys.argv[2]}/{cls.__name__}.npy", output.images)
"""


def test_new_process_makes_the_same_images(saved, tmp_path):
    folder, expected = saved
    subprocess.run([sys.executable, "-c", LOAD_IN_NEW_PROCESS, folder, tmp_path], check=True, capture_output=True)
    for name in ("GMemPipeline", "DiffusionPipeline"):
        assert_same_images(np.load(tmp_path / f"{name}.npy"), expected)


def test_saving_again_elsewhere(saved, tmp_path, warnings):
    folder, _ = saved
    load(folder).save_pretrained(tmp_path / "again")
    assert not warnings.records
    assert_same_files(tmp_path / "again", folder)


def test_saving_does_not_tie_the_pipeline_to_the_new_folder(saved, tmp_path, warnings):
    folder, expected = saved
    pipe = load(folder, memory_bank=make_bank(generator=6))
    pipe.save_pretrained(tmp_path / "loaded")
    pipe.memory_bank = None  # then the one that it was loaded with is opened again
    assert_same_images(run(pipe, num_images=2).images, expected)

    pipe = make_pipeline(make_transformer(in_channels=3), memory_bank=make_bank())
    pipe.save_pretrained(tmp_path / "built")
    pipe.memory_bank = None
    with pytest.raises(ValueError, match="no memory bank"):
        run(pipe)
    assert not warnings.records


@pytest.mark.parametrize("cls", [GMemPipeline, DiffusionPipeline])
def test_saving_in_place(saved, tmp_path, cls):
    original, expected = saved
    folder = tmp_path / "pipeline"
    shutil.copytree(original, folder)
    pipe = load(folder, cls)  # weights and bank are mapped from the files that are written over
    for _ in range(2):
        pipe.save_pretrained(folder)
        assert_same_files(folder, original)
        assert_same_images(run(pipe, num_images=2).images, expected)


def test_saving_in_place_with_another_bank(saved, tmp_path):
    original, _ = saved
    folder = tmp_path / "pipeline"
    shutil.copytree(original, folder)
    pipe = load(folder)
    old = pipe.memory_bank
    pipe.memory_bank = make_bank(generator=5)
    expected = run(pipe, num_images=2).images
    pipe.save_pretrained(folder)
    assert len(files_of(folder)) == len(files_of(original))
    assert_same_images(run(load(folder), num_images=2).images, expected)
    assert torch.equal(old[:], make_bank()[:])  # the rows of the old bank stay readable


def test_without_optional_components(tmp_path):
    pipe = make_pipeline(make_transformer(in_channels=3))
    pipe.save_pretrained(tmp_path)
    assert {file.split("/")[0] for file in files_of(tmp_path)} == {"model_index.json", "scheduler", "transformer"}
    index = index_of(tmp_path)
    assert index["memory_bank_source"] is None
    assert index["vae"] == index["image_encoder"] == index["memory_bank"] == [None, None]

    loaded = load(tmp_path)
    memory = torch.ones(2, MEMORY_DIM)
    assert_same_images(run(loaded, memory=memory).images, run(pipe, memory=memory).images)
    with pytest.raises(ValueError, match="no memory bank"):
        run(loaded)


def test_stale_bank_is_not_picked_up(saved, tmp_path, warnings):
    original, _ = saved
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    make_pipeline(vae=make_vae()).save_pretrained(tmp_path)
    assert f"no memory bank; the one in {tmp_path / 'bank'} stays there and does not belong to it" in warnings.text
    assert GMemMemoryBank.from_pretrained(tmp_path / "bank").fingerprint == make_bank().fingerprint

    for cls in (GMemPipeline, DiffusionPipeline):
        loaded = load(tmp_path, cls)
        assert loaded.memory_bank is None
        with pytest.raises(ValueError, match="no memory bank"):
            run(loaded)


def test_passing_a_bank(saved, tmp_path):
    folder, _ = saved
    bank = make_bank(generator=6)
    for cls in (GMemPipeline, DiffusionPipeline):
        pipe = load(folder, cls, memory_bank=bank)
        assert pipe.memory_bank is bank
        evaluations = record_evaluations(pipe)
        run(pipe, memory_indices=[2, 3])
        assert torch.equal(evaluations[0]["memory"], bank[[2, 3]])

    pipe.save_pretrained(tmp_path)
    assert load(tmp_path).memory_bank.fingerprint == bank.fingerprint
    assert GMemMemoryBank.from_pretrained(folder / "bank").fingerprint == make_bank().fingerprint


def test_passing_a_component(saved):
    folder, expected = saved
    transformer = make_transformer()
    torch.nn.init.ones_(transformer.proj_out.bias)
    pipe = load(folder, transformer=transformer.train(), vae=None)
    assert pipe.transformer is transformer and pipe.vae is None
    assert not transformer.training
    assert run(pipe, num_images=2, output_type="latent").images.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("how", ["at loading", "afterwards"])
def test_bfloat16(saved, how):
    folder, expected = saved
    pipe = load(folder, dtype=torch.bfloat16) if how == "at loading" else load(folder).to(torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.image_encoder.dtype == torch.bfloat16
    assert pipe.transformer.timestep_embedder.linear_1.weight.dtype == torch.float32
    assert pipe.memory_bank.dtype == torch.float32 and "memory-mapped" in repr(pipe.memory_bank)
    # Latents, and all that is drawn, are float32 whatever the model's dtype
    images = run(pipe, num_images=2).images
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, expected, atol=0.1)
    latents = run(pipe, image=make_picture(), output_type="latent").images
    assert latents.dtype == torch.float32 and latents.isfinite().all()

    reference = load(folder)
    for model in (pipe.transformer, reference.transformer):  # a velocity of zero leaves the noise
        model.proj_out.weight.data = torch.zeros_like(model.proj_out.weight)
    noise, expected = (run(either, num_images=2, output_type="latent").images for either in (pipe, reference))
    assert torch.equal(noise, expected)


def test_components_and_from_pipe(saved):
    folder, expected = saved
    pipe = load(folder)
    names = {"transformer", "scheduler", "vae", "memory_bank", "image_encoder", "image_processor", "guider"}
    names |= {"text_encoder", "tokenizer"}
    assert pipe.components.keys() == names
    for twin in (GMemPipeline(**pipe.components), GMemPipeline.from_pipe(pipe)):
        assert twin.memory_bank is pipe.memory_bank and twin.transformer is pipe.transformer
        assert_same_images(run(quiet(twin), num_images=2).images, expected)

    unopened = load(folder, DiffusionPipeline)
    assert unopened.memory_bank is None
    assert_same_images(run(quiet(GMemPipeline.from_pipe(unopened)), num_images=2).images, expected)


def test_model_cpu_offload(saved):
    folder, expected = saved
    pipe = load(folder)
    bank = pipe.memory_bank
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert_same_images(run(pipe, num_images=2).images, expected)
    assert len(run(pipe, image=make_picture()).images) == 1
    assert pipe.memory_bank is bank


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(saved, offload_type):
    folder, expected = saved
    pipe = load(folder)
    pipe.enable_group_offload(torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1)
    for _ in range(2):
        assert_same_images(run(pipe, num_images=2).images, expected)


def test_layerwise_casting(saved):
    folder, expected = saved
    pipe = load(folder)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.transformer.transformer_blocks[0].ff.linear_in.weight.dtype == torch.float8_e4m3fn
    images = run(pipe, num_images=2).images
    assert np.abs(images - expected).mean() < 0.03


def test_variant(saved, tmp_path):
    folder, expected = saved
    load(folder).save_pretrained(tmp_path, variant="fp16")
    weights = [file for file in files_of(tmp_path) if "fp16" in file]
    assert weights == [
        "image_encoder/model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert_same_images(run(load(tmp_path, variant="fp16"), num_images=2).images, expected)
    with pytest.raises(ValueError, match="`variant=fp16`"):
        load(folder, variant="fp16")


def test_dtype_of_each_component(saved):
    pipe = load(saved[0], dtype={"transformer": torch.bfloat16, "default": torch.float16})
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == pipe.image_encoder.dtype == torch.float16
    assert np.isfinite(run(pipe, num_images=2).images).all()


def test_folder_of_before_there_were_guiders(saved, tmp_path):
    folder, expected = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    index = index_of(tmp_path)
    del index["guider"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe = load(tmp_path)
    assert pipe.guider is None
    assert_same_images(run(pipe, num_images=2).images, expected)


@pytest.mark.parametrize("cls", [GMemPipeline, DiffusionPipeline])
def test_swapped_bank_is_refused(saved, tmp_path, cls):
    original, _ = saved
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    other = make_bank(generator=9)
    other.save_pretrained(tmp_path / "bank")
    with pytest.raises(ValueError) as error:
        run(load(tmp_path, cls))  # refused when it is opened: at loading, or with the base class on first use
    for part in (str(tmp_path / "bank"), other.fingerprint, make_bank().fingerprint, "memory_bank="):
        assert part in str(error.value)
    assert load(tmp_path, memory_bank=other).memory_bank is other


def test_bank_that_is_gone(saved, tmp_path):
    original, _ = saved
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "bank")
    pipe = load(tmp_path)
    assert len(run(pipe, memory=torch.ones(MEMORY_DIM)).images) == 1
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "bank"))):
        run(pipe)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_saving_with_a_scheduler_of_diffusers(tmp_path, name):
    pipe = make_pipeline(make_transformer(in_channels=3), memory_bank=make_bank())
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, use_flow_sigmas=True)
    expected = run(pipe).images
    pipe.save_pretrained(tmp_path)
    assert index_of(tmp_path)["scheduler"] == ["diffusers", name]
    assert_same_images(run(load(tmp_path)).images, expected)


def test_image_encoder_of_this_package(tmp_path, warnings):
    components = make_image_encoder()
    encoder = GMemImageEncoder.from_backbone(components["image_encoder"], hidden_layers=[1])
    features = torch.randn(40, sum(encoder.config.feature_dims), generator=seed(0))
    encoder.fit_projection(features, snippet_dim=MEMORY_DIM)
    pipe = make_pipeline(image_encoder=encoder, image_processor=components["image_processor"])
    pipe.save_pretrained(tmp_path)
    assert index_of(tmp_path)["image_encoder"] == ["diffusers_gmem", "GMemImageEncoder"]

    for cls in (GMemPipeline, DiffusionPipeline):
        loaded = load(tmp_path, cls)
        assert type(loaded.image_encoder) is GMemImageEncoder and not loaded.image_encoder.training
        snippets = loaded.encode_image([make_picture(0), make_picture(1)])
        assert snippets.shape == (2, MEMORY_DIM)
        torch.testing.assert_close(snippets, pipe.encode_image([make_picture(0), make_picture(1)]))
        assert len(run(loaded, image=make_picture()).images) == 1
    assert not warnings.records
    assert GMemPipeline.from_pipe(loaded).image_encoder is loaded.image_encoder


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderRAE", "AutoencoderTiny"])
def test_other_autoencoders(tmp_path, kind):
    vae = make_autoencoder(kind).eval()
    channels = {"AutoencoderDC": 4, "AutoencoderRAE": 64, "AutoencoderTiny": 4}[kind]
    if kind != "AutoencoderRAE":
        vae.register_to_config(latents_mean=[0.5] * channels, latents_std=[2.0] * channels)
    pipe = make_pipeline(make_transformer(sample_size=2, in_channels=channels), vae=vae, memory_bank=make_bank())
    pipe.save_pretrained(tmp_path)
    for loaded in (pipe, load(tmp_path)):
        assert loaded.vae_scale_factor == (4 if kind == "AutoencoderRAE" else 2)
        latents = run(quiet(loaded), output_type="latent").images
        with torch.no_grad():
            if kind == "AutoencoderRAE":  # normalises itself, and decodes to [0, 1]
                expected = vae.decode(latents).sample.clamp(0, 1)
            else:
                factor = vae.config.scaling_factor
                expected = (vae.decode(latents * 2.0 / factor + 0.5).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(run(loaded, output_type="pt").images, expected)
    assert GMemPipeline.from_pipe(pipe).vae is vae


def test_image_processor_of_this_package(tmp_path, warnings):
    """Loading a pipeline finds the class by the name that saving recorded."""
    components = make_image_encoder() | {"image_processor": GMemImageProcessor(crop_size=32, size=28)}
    pipe = make_pipeline(**components)
    pipe.save_pretrained(tmp_path)
    assert index_of(tmp_path)["image_processor"] == ["diffusers_gmem", "GMemImageProcessor"]
    for cls in (GMemPipeline, DiffusionPipeline):
        loaded = load(tmp_path, cls)
        assert loaded.image_processor.to_dict() == components["image_processor"].to_dict()
        torch.testing.assert_close(loaded.encode_image(make_picture()), pipe.encode_image(make_picture()))
    assert not warnings.records
