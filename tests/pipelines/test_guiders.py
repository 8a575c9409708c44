# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LayerSkipConfig,
    LTX2Guidance,
    PerturbedAttentionGuidance,
    PyramidAttentionBroadcastConfig,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
    TaylorSeerCacheConfig,
)
from tiny_pipeline import (
    MEMORY_DIM,
    batch_sizes,
    make_pipeline,
    make_transformer,
    quiet,
    record_evaluations,
    run,
    seed,
)

from diffusers_gmem import GMemFlowMatchScheduler, GMemPipeline


MEMORY = torch.randn(2, MEMORY_DIM, generator=seed(1))


@pytest.fixture
def pipe():
    return make_pipeline(make_transformer(in_channels=3))


def generate(pipe, **arguments):
    arguments = {"memory": MEMORY, "output_type": "latent", "num_inference_steps": 6, **arguments}
    return run(pipe, **arguments).images


def auto_guidance(**arguments):
    return AutoGuidance(3.0, auto_guidance_config=LayerSkipConfig([1], dropout=1.0), **arguments)


def skip_layer_guidance(**arguments):
    arguments = {"guidance_scale": 3.0, "skip_layer_guidance_stop": 1.0, **arguments}
    return SkipLayerGuidance(skip_layer_config=LayerSkipConfig([1]), **arguments)


def perturbed_attention_guidance():
    config = LayerSkipConfig([1], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    return PerturbedAttentionGuidance(
        3.0, perturbed_guidance_config=config, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )


@pytest.mark.parametrize("scale", [0.0, 2.5])
@pytest.mark.parametrize("negative", [None, MEMORY[1]], ids=["null memory", "negative memory"])
def test_classifier_free_guidance_is_guidance_scale(pipe, scale, negative):
    expected = generate(pipe, guidance_scale=scale, negative_memory=negative)
    evaluations = record_evaluations(pipe)
    images = generate(pipe, guider=ClassifierFreeGuidance(scale), negative_memory=negative)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert batch_sizes(evaluations) == [2] * 2 * 11  # each prediction is a batch of its own
    assert not torch.allclose(images, generate(pipe), atol=1e-2)


@pytest.mark.parametrize(
    "scheduler", [GMemFlowMatchScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["sde", "euler"]
)
def test_start_and_stop_are_fractions_of_the_evaluations(pipe, scheduler):
    pipe.scheduler = scheduler
    evaluations = record_evaluations(pipe)
    generate(pipe, guider=ClassifierFreeGuidance(2.0, start=0.3, stop=0.7), num_inference_steps=10)
    times = [evaluation["timestep"][0].item() for evaluation in evaluations]
    n = pipe.num_timesteps
    guided = [int(0.3 * n) <= i < int(0.7 * n) for i in range(n)]
    expected = [1 - scheduler.sigmas[i].item() for i in range(n) for _ in range(2 if guided[i] else 1)]
    np.testing.assert_allclose(times, expected, atol=1e-6)


def test_disabled_guider(pipe):
    guider = ClassifierFreeGuidance(3.0)
    guider.disable()
    evaluations = record_evaluations(pipe)
    images = generate(pipe, guider=guider)
    assert len(evaluations) == 11
    assert torch.equal(images, generate(pipe))


@pytest.mark.parametrize(
    "guider",
    [
        ClassifierFreeZeroStarGuidance(3.0),
        TangentialClassifierFreeGuidance(3.0),
        AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5, eta=0.5),
        AdaptiveProjectedMixGuidance(3.0),
        auto_guidance(),
        skip_layer_guidance(),
        perturbed_attention_guidance(),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_guiders_change_the_images_and_nothing_else(pipe, guider):
    plain, guided = generate(pipe), generate(pipe, guidance_scale=3.0)
    images = generate(pipe, guider=guider)
    assert images.isfinite().all()
    for other in (plain, guided):
        assert (images - other).abs().max() > 1e-3
    assert torch.equal(generate(pipe, guider=guider), images)  # a guider's state begins anew with each call
    assert torch.equal(generate(pipe), plain)


class Recorder(ClassifierFreeGuidance):
    def forward(self, pred_cond, pred_uncond=None):
        self.predictions.append((self._step, self._num_inference_steps, pred_cond, pred_uncond))
        return super().forward(pred_cond, pred_uncond)


def test_guiders_see_noise_minus_data(pipe):
    guider = Recorder(3.0)
    guider.predictions = []
    evaluations = record_evaluations(pipe)
    outputs = []
    pipe.transformer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    generate(pipe, guider=guider)
    assert [(step, count) for step, count, _, _ in guider.predictions] == [(i, 11) for i in range(11)]
    for i, (_, _, conditional, unconditional) in enumerate(guider.predictions):
        assert torch.equal(conditional, -outputs[2 * i]) and torch.equal(unconditional, -outputs[2 * i + 1])
        assert torch.equal(evaluations[2 * i]["memory"], MEMORY)
        assert torch.equal(evaluations[2 * i + 1]["memory"], torch.zeros_like(MEMORY))


def test_auto_guidance_is_guidance_by_a_model_with_fewer_blocks(pipe):
    outputs = []
    hook = pipe.transformer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    evaluations = record_evaluations(pipe)
    generate(pipe, guider=auto_guidance(), negative_memory=MEMORY)
    hook.remove()
    assert len(outputs) == 22
    evaluation = evaluations[9]  # the weak model's
    del pipe.transformer.transformer_blocks[1]
    with torch.no_grad():
        weak = pipe.transformer(**evaluation)[0]
    torch.testing.assert_close(outputs[9], weak)
    assert not torch.allclose(outputs[8], weak, atol=1e-3)


def test_layers_are_whole_again_after_an_error(pipe):
    plain = generate(pipe)

    def fail(module, inputs, output):
        raise KeyboardInterrupt

    def fail_at_the_weak_model(module, args, kwargs):
        calls.append(1)
        if len(calls) == 2:
            hooks.append(pipe.transformer.proj_out.register_forward_hook(fail))

    calls, hooks = [], []
    hooks.append(pipe.transformer.register_forward_pre_hook(fail_at_the_weak_model, with_kwargs=True))
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, guider=auto_guidance())
    for hook in hooks:
        hook.remove()
    assert torch.equal(generate(pipe), plain)
    assert generate(pipe, guider=auto_guidance()).isfinite().all()


@pytest.mark.parametrize("cls", [GMemPipeline, DiffusionPipeline])
@pytest.mark.parametrize("make_guider", [lambda: ClassifierFreeGuidance(3.0, start=0.25), auto_guidance])
def test_guider_is_a_component(tmp_path, cls, make_guider):
    pipe = make_pipeline(make_transformer(in_channels=3), guider=make_guider())
    images = generate(pipe)
    without = make_pipeline(make_transformer(in_channels=3))
    assert torch.equal(generate(without, guider=make_guider()), images)
    # the argument goes before the component
    other = ClassifierFreeGuidance(1.5)
    assert torch.equal(generate(pipe, guider=other), generate(without, guider=other))

    pipe.save_pretrained(tmp_path)
    loaded = quiet(cls.from_pretrained(tmp_path))
    assert type(loaded.guider) is type(pipe.guider)
    torch.testing.assert_close(generate(loaded), images)
    loaded.guider = None
    torch.testing.assert_close(generate(loaded), generate(without))


@pytest.mark.parametrize(
    ("guider", "arguments", "pattern"),
    [
        ("cfg", {}, "`guider` must be one of diffusers' guiders, got 'cfg'"),
        (ClassifierFreeGuidance, {}, "`guider` must be one of diffusers' guiders"),
        (ClassifierFreeGuidance(), {"guidance_scale": 2.0}, "do not go with a guider: .* Got guidance_scale=2.0, .* and ClassifierFreeGuidance"),
        (ClassifierFreeGuidance(), {"guidance_interval": (0.5, 1.0)}, r"do not go with a guider: .*guidance_interval=\(0.5, 1.0\)"),
        (SmoothedEnergyGuidance(seg_guidance_config={"indices": [1]}), {}, r"SmoothedEnergyGuidance needs \['pred_cond_seg'\]"),
        (LTX2Guidance(), {}, r"LTX2Guidance needs \['pred_cond_modality', 'pred_cond_stg'\]"),
        (skip_layer_guidance(guidance_scale=1.0), {}, "SkipLayerGuidance skips no layers where classifier-free guidance is off"),
        (skip_layer_guidance(stop=0.5), {}, "SkipLayerGuidance skips no layers where classifier-free guidance is off"),
    ],
)  # fmt: skip
def test_wrong_guider(pipe, guider, arguments, pattern):
    with pytest.raises(ValueError, match=pattern):
        generate(pipe, guider=guider, **arguments)


def test_guider_and_adaptive_solver(pipe):
    pipe.scheduler = GMemFlowMatchScheduler(stochastic=False, solver="dopri5")
    with pytest.raises(ValueError, match="ClassifierFreeGuidance counts steps, and the solver 'dopri5' does not"):
        generate(pipe, guider=ClassifierFreeGuidance())
    # a scheduler of diffusers made from it remembers the solver, and has a number of steps
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generate(pipe, guider=ClassifierFreeGuidance())


def test_guider_and_caches(pipe):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="one prediction of ClassifierFreeGuidance the attention of another"):
        generate(pipe, guider=ClassifierFreeGuidance())
    pipe.transformer.disable_cache()

    exact = generate(pipe, guider=ClassifierFreeGuidance(2.0))
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2))
    cached = generate(pipe, guider=ClassifierFreeGuidance(2.0))
    assert not torch.equal(cached, exact)
    torch.testing.assert_close(cached, exact, rtol=0, atol=0.5)
    assert torch.equal(generate(pipe, guider=ClassifierFreeGuidance(2.0)), cached)
