# SPDX-License-Identifier: Apache-2.0
"""A look at a data set: a table of facts, and plots."""

import numpy as np

from common.datasets.names import slug
from common.datasets.views import episodes


def describe(dataset) -> str:
    """What a data set holds, in a dozen lines."""
    t, (starts, ends) = dataset.transitions, episodes(dataset)
    lengths, returns = ends - starts, dataset.episode_returns
    score = "success rate" if dataset.score_is_success else "plain return"
    if dataset.ref_min_score is not None:
        score = f"0 at {dataset.ref_min_score:g}, 100 at {dataset.ref_max_score:g}; "
        score += f"the data: {_range(dataset.score(returns))}"
    if dataset.num_actions is None:
        action = f"{t.action.shape[1]} numbers, {_range(t.action)}, |a| = 1 in "
        action += f"{np.mean(np.abs(t.action) >= 1):.1%} of them"
    else:
        counts = np.bincount(t.action, minlength=dataset.num_actions)
        rest = "" if len(counts) <= 20 else " for the first 20"
        action = f"{dataset.num_actions} discrete, counts {counts[:20].tolist()}{rest}"
    std, env = t.observation.std(axis=0), (dataset.record or {}).get("env")
    lines = [
        ("transitions", f"{len(t.reward):,} in {len(ends):,} episodes"),
        ("episode length", _range(lengths)),
        ("return", _range(returns)),
        ("score", score),
        ("reward", f"{_range(t.reward)}, zero in {np.mean(t.reward == 0):.1%}"),
        ("ends", f"{int(t.termination.sum()):,} terminations, {int(t.truncation.sum()):,} cut off"),
        ("action", action),
        ("observation", f"{t.observation.shape[1]} numbers, {_range(t.observation)}"),
        ("constant", f"{int((std == 0).sum())} of them never change"),
        ("evaluated in", f"{env}, {dataset.horizon} steps" if env else "nothing: no env is known"),
    ]
    shown = {"env", "env_facts", "action_box"}
    lines += [(k, str(value)) for k, value in (dataset.record or {}).items() if k not in shown]
    return "\n".join(f"  {name:16} {text}" for name, text in lines)


def _range(values):
    values = np.asarray(values)
    low, mean, high = values.min(), values.mean(dtype=np.float64), values.max()
    return f"{low:.4g} / {mean:.4g} / {high:.4g} (min / mean / max)"


def plot(dataset, file: str) -> None:
    """Plot returns, lengths and, for mazes, the visited places. Needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot, which would change a notebook's pictures

    maze = "maze" in dataset.id and dataset.transitions.observation.shape[1] >= 2
    figure = Figure(figsize=(12 if maze else 8, 3.5))
    axes = figure.subplots(1, 3 if maze else 2)
    starts, ends = episodes(dataset)
    for axis, values, name in zip(
        axes, (dataset.episode_returns, ends - starts), ("return", "length"), strict=False
    ):
        axis.hist(values, bins=50 if np.ptp(values) else [values[0] - 0.5, values[0] + 0.5])
        if not np.ptp(values):  # one bar, named by its value
            axis.set_xticks([values[0]], [f"{values[0]:g}"])
        axis.set_xlabel(f"{name} of an episode")
        axis.set_ylabel("episodes")
        if np.ptp(values):
            axis.ticklabel_format(useOffset=False)
    if maze:
        place = dataset.transitions.observation[:, :2]
        *_, drawn = axes[2].hist2d(*place.T, bins=100, norm="log", cmin=1)
        figure.colorbar(drawn, label="visits (log scale)")
        axes[2].set_xlabel("x")
        axes[2].set_ylabel("y")
        axes[2].set_aspect("equal")
    figure.suptitle(slug(dataset.id))
    figure.tight_layout()
    figure.savefig(file, dpi=150)
