import math

import pytest
import torch
from diffusers.training_utils import EMAModel
from reference_cases import assert_matches, case_state_dict, case_tensors, reference_cases

from diffusers_gmem.conversion import convert_transformer
from diffusers_gmem.schedulers.probability_paths import ProbabilityPath
from diffusers_gmem.training import flow_matching_loss, sample_timesteps


PREDICTIONS = {"velocity": "flow_prediction", "noise": "epsilon", "score": "score"}


def each_case(kind):
    return pytest.mark.parametrize("case", reference_cases(kind), ids=lambda case: case["id"])


def reference_transformer(case):
    weights = next(other for other in reference_cases("model_forward") if other["file"] == case["weights_from"])
    transformer = convert_transformer(case_state_dict(case), weights["options"]["num_heads"])
    # The vectors were made without dropout; in train mode a mask of ones would rescale
    transformer.register_to_config(memory_dropout=0.0)
    return transformer.train()


@each_case("training_losses")
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
        cosine_weight=1.0 if case["options"]["use_cosine_loss"] else 0.0,
        alignment_weight=case["options"]["proj_loss_weight"],
        path_type=case["options"]["path"].lower(),
        prediction_type=PREDICTIONS[case["options"]["prediction"]],
        loss_weighting=case["options"]["loss_weight"],
    )

    assert_matches(case, "xt", seen["hidden_states"], tensors["xt"])
    assert_matches(case, "loss", terms[case["options"]["prediction"]], tensors["loss"])
    assert ("cosine" in terms) == case["has_cos_loss"]
    if case["has_cos_loss"]:
        assert_matches(case, "cos_loss", terms["cosine"], tensors["cos_loss"])
    assert_matches(case, "proj_loss", terms["alignment"].reshape(1), tensors["proj_loss"])
    assert_matches(case, "total", terms["loss"].reshape(1), tensors["total"])


@each_case("training_losses_model")
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


@each_case("training_steps")
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


@pytest.mark.parametrize("path_type", ["linear", "gvp", "vp"])
@pytest.mark.parametrize(
    "prediction_type, term, loss_weighting",
    [
        ("flow_prediction", "velocity", None),
        ("epsilon", "noise", None),
        ("epsilon", "noise", "velocity"),
        ("epsilon", "noise", "likelihood"),
        ("score", "score", None),
        ("score", "score", "velocity"),
        ("score", "score", "likelihood"),
    ],
)
def test_a_perfect_model_has_no_loss_and_a_worse_one_its_weighted_square(
    path_type, prediction_type, term, loss_weighting
):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    path = ProbabilityPath.at(path_type, t[:, None, None, None], 1 - t[:, None, None, None])
    target = {
        "flow_prediction": path.velocity(latents, noise),
        "epsilon": noise,
        "score": -noise / path.sigma,
    }[prediction_type]

    def terms(offset):
        def transformer(**inputs):
            torch.testing.assert_close(inputs["hidden_states"], path.mix(latents, noise))
            return (target + offset,)

        return flow_matching_loss(
            transformer,
            latents,
            torch.zeros(3, 2),
            noise,
            t,
            path_type=path_type,
            prediction_type=prediction_type,
            loss_weighting=loss_weighting,
        )

    assert set(terms(0.0)) == {"loss", term} | ({"cosine"} if term == "velocity" else set())
    assert terms(0.0)["loss"] < 1e-6

    # A wrong score is a wrong velocity by lambda times as much
    expected = torch.full((3,), 0.01, dtype=torch.float64)
    score_scale = path.sigma.flatten() if term == "score" else 1.0
    if loss_weighting is None:
        expected = expected * score_scale**2
    else:
        in_score = score_scale / path.sigma.flatten() * 0.1
        power = {"velocity": 2, "likelihood": 1}[loss_weighting]
        expected = path.drift_variance.flatten() ** power * in_score**2
    torch.testing.assert_close(terms(0.1)[term].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "argument, value, accepted",
    [
        ("path_type", "VP", "linear.*gvp.*vp"),
        ("prediction_type", "noise", "flow_prediction.*epsilon.*score"),
        ("loss_weighting", "velocity", "None"),
    ],
)
def test_wrong_options_are_refused(argument, value, accepted):
    latents = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=f"`{argument}` must be one of .*{accepted}.*got {value!r}"):
        flow_matching_loss(None, latents, torch.randn(2, 5), latents, torch.rand(2), **{argument: value})
    with pytest.raises(ValueError, match="`loss_weighting` must be one of .*velocity.*likelihood.*got 'sigma'"):
        flow_matching_loss(
            None,
            latents,
            torch.randn(2, 5),
            latents,
            torch.rand(2),
            prediction_type="epsilon",
            loss_weighting="sigma",
        )


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


@each_case("timestep_sampling")
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


@pytest.mark.parametrize("path_type", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction_type", ["flow_prediction", "epsilon", "score"])
def test_timesteps_keep_away_from_the_singular_ends(path_type, prediction_type):
    start, end = 0.0, 1.0
    if path_type == "vp":
        end = 0.9
    elif prediction_type != "flow_prediction":
        start, end = 0.1, 0.9
    options = {"path_type": path_type, "prediction_type": prediction_type, "eps": 0.1}
    times = sample_timesteps(1000, torch.Generator().manual_seed(0), std=2.0, **options)
    plain = sample_timesteps(1000, torch.Generator().manual_seed(0), std=2.0)
    torch.testing.assert_close(times, start + (end - start) * plain)
    assert times.min() >= start and times.max() <= end
    with pytest.raises(ValueError, match="`eps` must lie between 0 and 0.5.*got 0.5"):
        sample_timesteps(3, **{**options, "eps": 0.5})
