import math

import pytest
import torch
from diffusers.training_utils import EMAModel
from reference_cases import assert_matches, case_state_dict, case_tensors, reference_cases

from diffusers_gmem.conversion import convert_transformer
from diffusers_gmem.training import flow_matching_loss, sample_timesteps


def velocity_cases(kind):
    return [
        pytest.param(case, id=case["id"])
        for case in reference_cases(kind)
        if case["options"]["path"] == "Linear" and case["options"]["prediction"] == "velocity"
    ]


def reference_transformer(case):
    weights = next(other for other in reference_cases("model_forward") if other["file"] == case["weights_from"])
    transformer = convert_transformer(case_state_dict(case), weights["options"]["num_heads"])
    # The vectors were made without dropout; in train mode a mask of ones would rescale
    transformer.register_to_config(memory_dropout=0.0)
    return transformer.train()


@pytest.mark.parametrize("case", velocity_cases("training_losses"))
def test_terms_match_the_reference_on_given_outputs(case):
    tensors = case_tensors(case)
    seen = {}

    def transformer(**inputs):
        seen.update(inputs)
        return tensors["pred"], tensors["z_tilde"]

    terms = flow_matching_loss(
        transformer,
        tensors["x1"],
        torch.zeros(4, 2),
        tensors["x0"],
        tensors["t"],
        alignment_features=tensors["z"],
        cosine_weight=1.0 if case["has_cos_loss"] else 0.0,
        alignment_weight=case["options"]["proj_loss_weight"],
    )

    assert_matches(case, "xt", seen["hidden_states"], tensors["xt"])
    assert_matches(case, "loss", terms["velocity"], tensors["loss"])
    if case["has_cos_loss"]:
        assert_matches(case, "cos_loss", terms["cosine"], tensors["cos_loss"])
    assert_matches(case, "proj_loss", terms["alignment"].reshape(1), tensors["proj_loss"])
    assert_matches(case, "total", terms["loss"].reshape(1), tensors["total"])


@pytest.mark.parametrize("case", velocity_cases("training_losses_model"))
def test_terms_and_gradient_match_the_reference_with_its_model(case):
    tensors = case_tensors(case)
    transformer = reference_transformer(case)
    terms = flow_matching_loss(
        transformer,
        tensors["x1"],
        tensors["c_raw"],
        tensors["x0"],
        tensors["t"],
        alignment_features=tensors["z"],
        alignment_weight=case["options"]["proj_loss_weight"],
    )
    terms["loss"].backward()
    grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in transformer.parameters()])

    assert_matches(case, "loss", terms["velocity"], tensors["loss"])
    assert_matches(case, "cos_loss", terms["cosine"], tensors["cos_loss"])
    assert_matches(case, "proj_loss", terms["alignment"].reshape(1), tensors["proj_loss"])
    assert_matches(case, "total", terms["loss"].reshape(1), tensors["total"])
    assert_matches(case, "grad_norm", grad_norm.reshape(1), tensors["grad_norm"])


@pytest.mark.parametrize("case", velocity_cases("training_steps"))
def test_optimizer_steps_and_moving_average_match_the_reference(case):
    tensors, options = case_tensors(case), case["options"]
    transformer = reference_transformer(case)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=options["lr"], betas=options["betas"], weight_decay=options["weight_decay"]
    )
    # As the training script makes it with --ema_warmup none
    ema = EMAModel(
        transformer.parameters(), decay=options["ema_decay"], min_decay=options["ema_decay"], update_after_step=-1
    )
    for step in range(options["steps"]):
        terms = flow_matching_loss(
            transformer,
            tensors["x1"][step],
            tensors["c"][step],
            tensors["x0"][step],
            tensors["t"][step],
            alignment_features=tensors["z"][step],
            alignment_weight=options["proj_loss_weight"],
        )
        terms["loss"].backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), options["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        ema.step(transformer.parameters())
        for name, value in {"total": terms["loss"], "grad_norm": grad_norm}.items():
            assert_matches(case, name, value.reshape(1), tensors[name][step : step + 1])

    names = {
        "x_embedder.proj.weight": "x_embedder.weight",
        "blocks.3.attn.proj.weight": "transformer_blocks.3.attn.to_out.0.weight",
        "final_layer.linear.weight": "proj_out.weight",
    }
    parameters = dict(transformer.named_parameters())
    averages = dict(zip(parameters, ema.shadow_params, strict=True))
    stored = [name.removeprefix("param/") for name in tensors if name.startswith("param/")]
    assert stored
    for name in stored:
        assert_matches(case, f"param/{name}", parameters[names[name]], tensors[f"param/{name}"])
        assert_matches(case, f"ema/{name}", averages[names[name]], tensors[f"ema/{name}"])


def test_terms_are_left_out_where_not_asked_for():
    calls = []

    def transformer(**inputs):
        calls.append(inputs["return_alignment"])
        return (inputs["hidden_states"],)

    terms = flow_matching_loss(
        transformer,
        torch.randn(2, 3, 4, 4),
        torch.randn(2, 5),
        torch.randn(2, 3, 4, 4),
        torch.rand(2),
        cosine_weight=0,
    )
    assert set(terms) == {"loss", "velocity"}
    assert calls == [False]


def test_features_of_another_grid_are_refused():
    def transformer(**inputs):
        return inputs["hidden_states"], torch.randn(2, 16, 8)

    with pytest.raises(ValueError, match=r"\(2, 16, 8\).*\(2, 1, 8\)"):
        flow_matching_loss(
            transformer,
            torch.randn(2, 3, 4, 4),
            torch.randn(2, 5),
            torch.randn(2, 3, 4, 4),
            torch.rand(2),
            alignment_features=torch.randn(2, 1, 8),
        )


@pytest.mark.parametrize("case", reference_cases("timestep_sampling"), ids=lambda case: case["id"])
def test_timesteps_are_logit_normal(case):
    tensors = case_tensors(case)
    for name, expected in tensors.items():
        if not name.startswith("q_mu"):
            continue
        mean, std = (float(value) for value in name.removeprefix("q_mu").split("_sigma"))
        n = 200_000
        times = sample_timesteps(n, torch.Generator().manual_seed(0), mean, std)
        for probability, quantile in zip(tensors["p"], expected, strict=True):
            below = (times <= quantile).double().mean().item()
            # Five standard deviations of a binomial proportion
            assert abs(below - probability) < 5 * math.sqrt(probability * (1 - probability) / n)
