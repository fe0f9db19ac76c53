# SPDX-License-Identifier: Apache-2.0
"""Every algorithm file against its authors' or a reference code, from the same parameters.

Both sides take the same batches and random numbers.

The fixtures and how they were made are in tests/fixtures/parity, the comparison is in parity.py.
"""

import importlib

import numpy as np
import own_files
import parity
import pytest
from parity import Case

CQL = {"num_samples": 3, "critic_hidden": (16, 16)}
AWR = {"batch_size": 12, "critic_updates": 3, "actor_updates": 4, "log_every": 8}
RETURNS = {"gradient_steps": 4, "carry": "lambda_returns"}
DT = {
    "batch_size": 10,
    "context": 4,
    "embedding": 16,
    "num_layers": 2,
    "num_heads": 2,
    "episode_length": 12,
    "dropout": None,
}
TT = {
    "batch_size": 6,
    "context": 4,
    "embedding": 16,
    "num_layers": 2,
    "num_heads": 2,
    "dropout": None,
    "num_bins": 10,
    "discount": 0.9,
    "termination_reward": -5.0,
    "actor_learning_rate": 2**-9,
    "warm_up": 4,
    "decay_updates": 12,
    "plan_horizon": 3,
    "plan_context": 3,
    "beam_width": 4,
}
ONLINE_DT = DT | {"eval_context": 4, "temperature_learning_rate": 2**-8, "reward_scale": 2**-7}
QDT = {"context": 4, "episode_length": 12, "dropout": None, "hidden": (4,)}
QC = {"horizon": 3}
SAC = {"hidden": (8, 8, 8)}
MOPO = {"model_hidden": (4,), "model_decays": (0.0, 0.0), "num_models": 2}
MOPO |= {"batch_size": 16, "real_ratio": 0.25, "rollout_batch": 4, "rollout_length": 6}
MOPO |= {"num_elites": 2, "generations": 1}
MOPO |= {"temperature_learning_rate": 1e-4, "actor_learning_rate": 1e-4}
MOPO_FASTER = {"actor_learning_rate": 1e-3, "critic_learning_rate": 3e-3, "discount": 0.9}
MOPO_FASTER |= {"temperature_learning_rate": 5e-3, "target_rate": 0.05}
COMBO = MOPO | {"num_samples": 3}
COMBO_MODEL = COMBO | MOPO_FASTER
COMBO_MODEL |= {"num_samples": 2, "rho": "model", "conservative_weight": 0.5}
MOBILE = MOPO | {"hidden": (8, 8), "num_models": 3, "num_samples": 3}
MOBILE_FIXED = MOBILE | {"num_samples": 2, "penalty_weight": 1.5, "fixed_temperature": 0.2}
MOBILE_FASTER = MOBILE | MOPO_FASTER
MOBILE_FASTER |= {"num_critics": 3, "num_samples": 2, "penalty_weight": 2.5}
MOREL = {"hidden": (8, 8, 8), "num_critics": 3}
BRAC = {"critic_hidden": (16, 16), "clone_updates": 0, "warm_start": 0}
DIFFUSION_DICE = {
    "actor_hidden": (16, 12, 8),
    "guidance_hidden": (16, 16, 16, 16),
    "num_samples": 5,
}
FISHER_BRC = {"behaviour_hidden": (16, 16)}
FBRAC = {
    "generator": "flow",
    "actor_q": "mean",
    "q_agg": "mean",
    "num_samples": 1,
    "max_gradient_norm": None,
    "actor_target_rate": 1.0,
    "actor_target_every": 1,
    "actor_target_start": 1,
}
OPTIDICE = {"absorbing_state": "none"}  # the batches are rows as the update takes them
CHUNKS = {"action_dim": 2, "policy": "sample_chunk"}  # its policy plays what sample_chunk returns
SPOT = {"vae_hidden": (12, 12)}
WSRL = {"hidden": (12, 12), "critic_hidden": (12, 12), "num_critics": 4, "num_samples": 3}
WSRL |= {"updates_per_step": 2, "batch_size": 16}

CASES = [
    Case("td3_bc", "mujoco", {}, gradient_steps=2),
    Case(
        "td3_bc",
        "antmaze",
        {"reward_shift": -1.0, "alpha": 0.7, "target_noise": 0.4, "target_noise_clip": 0.3},
        gradient_steps=2,
    ),
    Case("rebrac", "mujoco", {"actor_penalty": 0.7, "critic_penalty": 0.3}, gradient_steps=2),
    Case(
        "rebrac",
        "antmaze",
        {
            "actor_penalty": 0.003,
            "critic_penalty": 0.05,
            "discount": 0.999,
            "target_noise": 0.5,
            "target_noise_clip": 0.3,
            "reward_scale": 100.0,
        },
        gradient_steps=2,
    ),
    Case("iql", "mujoco", {"num_updates": 10}),
    Case(
        "iql",
        "kitchen",
        {"expectile": 0.9, "inverse_temperature": 10.0, "dropout": 0.1, "num_updates": 10},
    ),
    Case("fql", "mean", {}),
    Case("fql", "min", {"alpha": 3.0, "q_agg": "min", "normalize_q": True, "discount": 0.995}),
    Case("gfp", "cube", {"eta": 0.5, "target_agg": "mean"}),
    Case(
        "gfp",
        "antmaze",
        {
            "alpha": 0.3,
            "eta": 0.1,
            "q_agg": "min",
            "discount": 0.995,
            "guidance_agg": "max",
            "flow_steps": 4,
        },
    ),
    Case(
        "gfp",
        "fql",
        {
            "alpha": 3.0,
            "eta": None,
            "normalize_q": False,
            "discount": 0.9,
            "target_agg": "flow",
            "flow_steps": 3,
        },
    ),
    Case("diffusion_dice", "mujoco", DIFFUSION_DICE | {"num_choosers": 4, "noisy_copies": 3}),
    Case(
        "diffusion_dice",
        "antmaze",
        DIFFUSION_DICE
        | {
            "alpha": 0.1,
            "discount": 0.95,
            "guidance_scale": 1.0,
            "noisy_copies": 2,
            "generator_steps": 6,
            "selection": "softmax",
            "num_choosers": None,
        },
    ),
    Case(
        "diffusion_dice",
        "clone",
        DIFFUSION_DICE | {"num_choosers": None, "generator_steps": 5, "guidance_scale": 1.0},
        update="clone_update",
    ),
    Case(
        "diffusion_ql",
        "mujoco",
        {"max_gradient_norm": 2.5, "actor_target_start": 2, "actor_target_every": 2},
    ),
    Case(
        "diffusion_ql",
        "antmaze",
        {
            "discount": 0.95,
            "eta": 3.5,
            "generator_steps": 3,
            "actor_learning_rate": 1e-3,
            "max_gradient_norm": None,
            "target_samples": 10,
            "actor_target_start": 1,
            "actor_target_every": 3,
        },
    ),
    Case("diffusion_ql", "fbrac", FBRAC | {"alpha": 30.0, "discount": 0.97, "flow_steps": 4}),
    Case("cql", "mujoco", CQL),
    Case(
        "cql",
        "antmaze",
        CQL
        | {"target_action_gap": 0.8, "alpha": 5.0, "max_target_backup": True, "clip_diff_min": 4.0},
    ),
    Case("cql", "unweighted", CQL | {"importance_sampling": False, "alpha": 2.0, "discount": 0.9}),
    Case("cal_ql", "adroit", CQL | {"alpha": 1.0}),
    Case(
        "cal_ql",
        "antmaze",
        CQL | {"target_action_gap": 0.8, "alpha": 5.0, "max_target_backup": True},
    ),
    Case(
        "cal_ql",
        "kitchen",
        CQL | {"importance_sampling": False, "alpha": 2.0, "discount": 0.9},
    ),
    Case("wsrl", "antmaze", WSRL | {"target_action_gap": 0.8, "std_per_state": False}),
    Case(
        "wsrl",
        "kitchen",
        WSRL
        | {"importance_sampling": False, "max_target_backup": False, "alpha": 2.0, "discount": 0.9},
    ),
    Case("wsrl", "mujoco", WSRL | {"calibrate": False}),
    Case(
        "wsrl",
        "online_antmaze",
        WSRL | {"std_per_state": False},
        gradient_steps=2,
        update="online_update",
    ),
    Case(
        "wsrl",
        "online",
        WSRL
        | {
            "max_target_backup": False,
            "discount": 0.95,
            "target_rate": 0.05,
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 3e-3,
        },
        gradient_steps=2,
        update="online_update",
    ),
    Case("awac", "mujoco", {}),
    Case("awac", "sharp", {"inverse_temperature": 20.0, "discount": 0.95}),
    Case("bc", "mujoco", {}),
    Case("awr", "mujoco", AWR | {"discount": 0.97, "inverse_temperature": 1 / 0.7}, **RETURNS),
    Case(
        "awr",
        "sharp",
        AWR
        | {
            "discount": 0.9,
            "td_lambda": 0.8,
            "inverse_temperature": 4.0,
            "fixed_std": 0.6,
            "actor_learning_rate": 1e-4,
        },
        **RETURNS,
    ),
    Case("bcq", "mujoco", {"vae_hidden": (16, 16)}),
    Case(
        "bcq",
        "wide",
        {
            "vae_hidden": (16, 16),
            "reward_shift": -1.0,
            "perturbation": 0.6,
            "lam": 0.6,
            "discount": 0.95,
        },
    ),
    Case("xql", "mujoco", {"num_updates": 10}),
    Case(
        "xql",
        "antmaze",
        {
            "beta": 0.6,
            "max_clip": 2.0,
            "value_updates": 3,
            "random_actions": 2,
            "inverse_temperature": 10.0,
            "dropout": 0.1,
            "cosine": False,
        },
    ),
    Case(
        "xql",
        "noise",
        {"beta": 0.8, "action_noise": 0.4, "inverse_temperature": 1.0, "num_updates": 10},
    ),
    Case("ivr", "sql", {"sql_alpha": 0.3, "num_updates": 10}),
    Case(
        "ivr",
        "eql",
        {
            "variant": "eql",
            "eql_alpha": 0.4,
            "dropout": 0.1,
            "discount": 0.95,
            "num_updates": 10,
        },
    ),
    Case(
        "ivr",
        "clipped",
        {
            "variant": "eql",
            "eql_alpha": 0.1,
            "dropout": 0.1,
            "discount": 0.95,
            "num_updates": 10,
        },
    ),
    Case("odice", "mujoco", {"value_hidden": (16, 16)}),
    Case(
        "odice",
        "antmaze",
        {
            "value_hidden": (16, 16),
            "num_values": 1,
            "layer_norm": False,
            "lam": 0.8,
            "eta": 0.5,
            "discount": 0.95,
            "weight_decay": 0.1,
        },
    ),
    Case("odice", "true", {"value_hidden": (16, 16), "gradient": "true", "lam": 0.5}),
    Case("odice", "semi", {"value_hidden": (16, 16), "gradient": "semi"}),
    Case("atac", "game", {"warm_start": 0, "weight_norm": 3.0}),
    Case(
        "atac",
        "bounded",
        {
            "warm_start": 0,
            "beta": 0.25,
            "lowest_target": -0.4,
            "highest_target": 1.5,
            "discount": 0.95,
        },
    ),
    Case("atac", "warm", {}),
    Case("qc", "best_of_n", QC | {"num_samples": 4, "q_agg": "min", "discount": 0.9}, **CHUNKS),
    Case("qc", "distill", QC | {"actor": "distill", "alpha": 3.0, "discount": 0.95}, **CHUNKS),
    Case("idql", "mujoco", {"actor_hidden": (16, 16), "num_samples": 6, "num_updates": 10}),
    Case(
        "idql",
        "ifql",
        {
            "generator": "flow",
            "generator_steps": 4,
            "num_samples": 6,
            "actor_hidden": (16, 16),
            "layer_norm": "hidden",
            "expectile": 0.9,
            "discount": 0.97,
            "actor_target_rate": 1.0,
            "weight_decay": 0.0,
            "cosine": False,
            "dropout": None,
        },
    ),
    Case("sac", "twin", {}),
    Case(
        "sac",
        "several",
        {
            "num_critics": 4,
            "discount": 0.9,
            "target_rate": 0.05,
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 3e-3,
            "temperature_learning_rate": 5e-3,
        },
    ),
    Case("rlpd", "locomotion", {"num_critics": 4, "updates_per_step": 3}, gradient_steps=3),
    Case(
        "rlpd",
        "antmaze",
        {
            "num_critics": 3,
            "num_target_critics": 1,
            "updates_per_step": 2,
            "backup_entropy": False,
            "reward_shift": -1.0,
            "discount": 0.95,
            "target_rate": 0.05,
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 3e-3,
            "temperature_learning_rate": 5e-3,
        },
        gradient_steps=2,
    ),
    Case(
        "spot",
        "antmaze",
        SPOT | {"density_weight": 0.25, "reward_shift": -1.0},
        gradient_steps=2,
    ),
    Case("spot", "clone", SPOT, update="clone_update"),
    Case(
        "spot",
        "online",
        SPOT
        | {
            "num_samples": 3,
            "num_updates": 0,
            "density_weight": 1.0,
            "penalty_floor": 0.5,
            "penalty_decay_updates": 16,
            "online_discount": 0.9,
            "kl_weight": 0.8,
            "target_rate": 0.05,
            "target_noise": 0.4,
            "target_noise_clip": 0.3,
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 2e-3,
        },
        gradient_steps=2,
        update="online_update",
    ),
    Case("dt", "mujoco", DT | {"warm_up": 4}),
    Case(
        "dt",
        "free",
        DT
        | {
            "embedding": 8,
            "num_layers": 1,
            "num_heads": 1,
            "weight_decay": 0.1,
            "max_gradient_norm": 50.0,
            "warm_up": 2,
        },
    ),
    Case("trajectory_transformer", "mujoco", TT),
    Case(
        "trajectory_transformer",
        "topk",
        TT
        | {
            "batch_size": 5,
            "context": 3,
            "embedding": 8,
            "num_layers": 1,
            "num_heads": 1,
            "num_bins": 8,
            "discount": 0.97,
            "termination_reward": None,
            "action_weight": 2.0,
            "reward_weight": 3.0,
            "value_weight": 0.5,
            "weight_decay": 0.3,
            "max_gradient_norm": 50.0,
            "actor_learning_rate": 2**-8,
            "warm_up": 2,
            "decay_updates": 4,
            "plan_horizon": 2,
            "plan_context": 2,
            "beam_width": 3,
            "num_expand": 3,
            "observation_top_k": 2,
            "action_top_k": 4,
            "action_cdf": None,
        },
    ),
    Case("qdt", "mujoco", DT | QDT | {"warm_up": 4, "reward_scale": 2**-7}),
    Case(
        "qdt",
        "free",
        DT
        | QDT
        | {
            "embedding": 8,
            "num_layers": 1,
            "num_heads": 1,
            "weight_decay": 0.1,
            "max_gradient_norm": 50.0,
            "warm_up": 2,
            "reward_scale": 2**-6,
        },
    ),
    Case(
        "qdt",
        "critic",
        QDT
        | {
            "embedding": 8,
            "num_layers": 1,
            "reward_scale": 2**-7,
            "hidden": (16, 16),
            "alpha": 10.0,
            "num_samples": 3,
            "pi_learning_rate": 3e-5,
        },
        update="value_update",
    ),
    Case("online_dt", "plain", ONLINE_DT | {"warm_up": 4, "actor_learning_rate": 2**-8}),
    Case(
        "online_dt",
        "ordered",
        ONLINE_DT
        | {
            "embedding": 8,
            "num_layers": 1,
            "num_heads": 1,
            "timestep_embedding": True,
            "weight_decay": 0.1,
            "warm_up": 2,
            "actor_learning_rate": 2**-7,
            "initial_temperature": 1.0,
            "temperature_learning_rate": 2**-5,
        },
    ),
    Case("cql_discrete", "cartpole", {"target_every": 3}, create={"num_actions": 4}),
    Case(
        "cql_discrete",
        "strong",
        {"alpha": 4.0, "target_every": 5, "discount": 0.9},
        create={"num_actions": 4},
    ),
    Case("sac_n", "ten", SAC),
    Case(
        "sac_n",
        "two",
        SAC
        | {
            "num_critics": 2,
            "discount": 0.95,
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "temperature_learning_rate": 1e-3,
        },
    ),
    Case("edac", "mujoco", SAC | {"num_critics": 5}),
    Case("edac", "adroit", SAC | {"num_critics": 8, "eta": 200.0, "discount": 0.95}),
    Case("lb_sac", "plain", SAC),
    Case("lb_sac", "layer_norm", SAC | {"num_critics": 5, "layer_norm": True, "discount": 0.95}),
    Case("brac", "value", BRAC | {"warm_start": 2}),
    Case(
        "brac",
        "policy",
        BRAC
        | {
            "variant": "p",
            "divergence": "mmd",
            "alpha": 3.0,
            "alpha_training": "linear",
            "target_divergence": 0.05,
            "kernel_width": 2.0,
            "discount": 0.95,
            "num_eval_samples": 6,
        },
    ),
    Case("brac", "both", BRAC | {"divergence": "mmd", "alpha": 0.7}),
    Case("brac", "clone", BRAC, update="clone_update"),
    Case(
        "brac",
        "bear",
        BRAC
        | {
            "variant": "p",
            "divergence": "mmd",
            "alpha": 1.0,
            "alpha_training": "log",
            "target_divergence": 0.05,
            "warm_start": 2,
            "kernel_width": 8.0,
            "mmd_root": True,
            "mmd_before_tanh": True,
            "lam": 0.75,
            "num_target_samples": 10,
            "num_eval_samples": 6,
        },
    ),
    Case("fisher_brc", "mujoco", FISHER_BRC),
    Case(
        "fisher_brc",
        "strong",
        FISHER_BRC | {"gradient_penalty": 3.0, "survival_bonus": 0.0, "discount": 0.9},
    ),
    Case("fisher_brc", "clone", FISHER_BRC, update="clone_update"),
    Case("optidice", "iproj", OPTIDICE | {"alpha": 0.7, "components": 3, "warm_start": 0}),
    Case(
        "optidice",
        "kl",
        OPTIDICE
        | {
            "f": "kl",
            "residual_fit": "mse",
            "alpha": 1.5,
            "discount": 0.95,
            "components": 2,
            "warm_start": 2,
        },
    ),
    Case(
        "optidice",
        "wbc",
        OPTIDICE | {"f": "chi2", "extraction": "wbc", "alpha": 0.5, "warm_start": 0},
    ),
    Case("algaedice", "code", {}, gradient_steps=2),
    Case(
        "algaedice",
        "residual",
        {"online_share": 0.6, "exponent": 2.0, "alpha": 0.5, "discount": 0.9, "target_rate": 0.1},
        gradient_steps=2,
    ),
    Case("mopo", "mujoco", MOPO, update="policy_update"),
    Case("mopo", "faster", MOPO | MOPO_FASTER, update="policy_update"),
    Case("combo", "mixed", COMBO, update="policy_update"),
    Case("combo", "model", COMBO_MODEL, update="policy_update"),
    Case("mobile", "mujoco", MOBILE, update="policy_update"),
    Case("mobile", "faster", MOBILE_FASTER, update="policy_update"),
    Case("mobile", "fixed", MOBILE_FIXED, update="policy_update"),
    Case("morel", "mujoco", MOPO | MOREL | {"num_critics": 4}, update="policy_update"),
    Case("morel", "faster", MOPO | MOREL | MOPO_FASTER, update="policy_update"),
]

# Relative to the largest number of an array. Adam divides by the size of a gradient, so parameters
# drift apart faster than losses. The results of IDQL's wide layers are rounded to 5e-10.
LIMITS = {
    np.dtype("float64"): {"loss": 1e-10, "gradient": 1e-10, "policy": 1e-10, "parameters": 1e-9},
    np.dtype("float32"): {"loss": 1e-5, "gradient": 1e-4, "policy": 1e-3, "parameters": 1e-3},
}
# dt.py, qdt.py and trajectory_transformer.py compute the learning rate in float32. With one in
# float64, dt.py's differences are 7e-12.
DT_LIMITS = {"loss": 1e-8, "gradient": 1e-10, "policy": 1e-8, "parameters": 1e-9}
TT_LIMITS = DT_LIMITS | {"loss": 1e-7, "parameters": 1e-7, "policy": 1e-7}


def limits_of(case):
    if case.algorithm in ("dt", "qdt"):
        return DT_LIMITS
    if case.algorithm == "trajectory_transformer":
        return TT_LIMITS
    return LIMITS[parity.precision(parity.fixture(case.algorithm)[case.name])]


def exceeded(case, found):
    """Names of what differs by more than its limit. A NaN differs."""
    limits = limits_of(case)
    return [
        what for what, far in parity.summary(found).items() if not far <= limits[what.split()[0]]
    ]


def test_every_file_and_every_case_of_a_fixture_is_compared():
    assert {case.algorithm for case in CASES} == set(own_files.NAMES)
    for algorithm in own_files.NAMES:
        names = [case.name for case in CASES if case.algorithm == algorithm]
        assert sorted(names) == sorted(parity.fixture(algorithm)), algorithm


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.algorithm}-{case.name}")
def test_the_update_rule_is_that_of_the_reference(case):
    module = importlib.import_module(f"algorithms.{case.algorithm}")
    found = parity.compare(module, case)
    expected = {"loss", "gradient", "parameters after 1", "parameters after N", "policy"}
    assert set(found) == expected
    assert not exceeded(case, found), parity.describe(found)


def test_a_fixture_that_lacks_a_part_of_the_state_is_refused():
    (case,) = [case for case in CASES if case.algorithm == "bc"]
    ours = dict.fromkeys(["actor/params/x", "actor/mu/x", "actor/target_params/x"])
    parity.check_complete(case, True, ours, ours)
    for name in ours:
        stored = ours.keys() - {name}
        with pytest.raises(AssertionError, match=f"not in the fixture: .*{name}"):
            parity.check_complete(case, True, ours, stored)
    later = ours.keys() - {"actor/mu/x"}  # which is stored after the first update only
    parity.check_complete(case, False, ours, later)
