# SPDX-License-Identifier: Apache-2.0
"""Views of a data set for methods that need more than transitions, and a look at it. NumPy only.

    python -m common.datasets ID [--plot FILE.png]

Rows of a file without next observations end one row early at a truncation, so a return-to-go or a
chunk there lacks that row's reward.
"""

import argparse
import dataclasses
import sys

import numpy as np

from common import datasets, fail


def episodes(dataset) -> tuple[np.ndarray, np.ndarray]:
    """First row of each episode and the row after its last one, [episodes] each."""
    ends = dataset.episode_ends
    return np.append(0, ends[:-1]).astype(np.int64), ends


def returns_to_go(dataset, discount: float = 1.0) -> np.ndarray:
    """Discounted sum of the rewards from each row to its episode's end or first termination, [N].

    Computed in float64, given as float32.
    """
    starts, ends = episodes(dataset)
    reward = dataset.transitions.reward.astype(np.float64)
    go_on = discount * (1.0 - dataset.transitions.termination)
    total, lengths = reward, ends - starts
    order = np.argsort(-lengths, kind="stable")  # longest first: those left are a prefix
    last = ends[order] - 1
    count = np.searchsorted(-lengths[order], -np.arange(1, lengths.max() + 1), side="right")
    for back in range(1, lengths.max()):
        row = last[: count[back]] - back
        total[row] += go_on[row] * total[row + 1]
    return total.astype(np.float32)


def return_range(dataset) -> tuple[float, float]:
    """Lowest and highest return of an episode, undiscounted."""
    return float(dataset.episode_returns.min()), float(dataset.episode_returns.max())


def return_span(dataset) -> float:
    """Highest minus lowest return of an episode; exit code 2 where there is no difference."""
    low, high = return_range(dataset)
    if low == high:
        fail(f"{dataset.id}: every episode returns {low:g}: no return_scale can be reached")
    return high - low


def chunks(dataset, steps: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Indices [R, steps] of the rows that follow each of `rows` (all), and their validity.

    Past the end of the episode, or of what follows a termination, the last valid row is repeated
    and the mask is 0.
    """
    transitions = dataset.transitions
    stop = np.asarray(dataset.episode_ends)
    cuts = np.union1d(stop, np.flatnonzero(transitions.termination) + 1)
    rows = np.arange(len(transitions.reward)) if rows is None else np.asarray(rows)
    last = cuts[np.searchsorted(cuts, rows, side="right")] - 1
    index = rows[:, None] + np.arange(steps)
    valid = (index <= last[:, None]).astype(np.float32)
    return np.minimum(index, last[:, None]), valid


def filter_by_return(dataset, fraction: float, fraction_of: str = "episodes"):
    """The data set with its best episodes by return, one at least, in their old order.

    Of equal returns the shorter episode is the better one.

    Args:
        dataset: what `datasets.load` returns.
        fraction: share that is kept.
        fraction_of: "episodes", or "transitions" for the best episodes that hold no more of them.

    Raises:
        ValueError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction above 0 and up to 1 is wanted, not {fraction}")
    starts, ends = episodes(dataset)
    order = np.lexsort((ends - starts, -dataset.episode_returns))
    sizes = np.ones_like(ends) if fraction_of == "episodes" else (ends - starts)[order]
    count = np.searchsorted(np.cumsum(sizes), fraction * sizes.sum() + 1e-9, side="right")
    best = np.sort(order[: max(1, count)])
    keep = np.zeros(ends[-1], bool)
    for start, end in zip(starts[best], ends[best], strict=True):
        keep[start:end] = True
    return dataclasses.replace(
        dataset,
        transitions=datasets.Transitions(*(column[keep] for column in dataset.transitions)),
        episode_ends=np.cumsum((ends - starts)[best]),
        episode_returns=dataset.episode_returns[best],
    )


# --- A look at the data ---------------------------------------------------------------------------
def describe(dataset) -> str:
    """What a data set holds, a dozen lines."""
    t, (starts, ends) = dataset.transitions, episodes(dataset)
    lengths, returns = ends - starts, dataset.episode_returns
    pair = dataset.ref_min_score, dataset.ref_max_score
    score = "success rate" if dataset.score_is_success else "plain return"
    if pair[0] is not None:
        score = f"0 at {pair[0]:g}, 100 at {pair[1]:g}; the data: {_range(dataset.score(returns))}"
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
    shown = {"env", "action_box"}
    lines += [(k, str(value)) for k, value in (dataset.record or {}).items() if k not in shown]
    return "\n".join(f"  {name:16} {text}" for name, text in lines)


def _range(values):
    values = np.asarray(values)
    low, mean, high = values.min(), values.mean(dtype=np.float64), values.max()
    return f"{low:.4g} / {mean:.4g} / {high:.4g} (min / mean / max)"


def plot(dataset, file: str) -> None:
    """Returns, lengths and, for mazes, where the walker was. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    maze = "maze" in dataset.id
    figure, axes = pyplot.subplots(1, 3 if maze else 2, figsize=(12 if maze else 8, 3.5))
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
    figure.suptitle(datasets.slug(dataset.id))
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """The command line of `python -m common.datasets`."""
    parser = argparse.ArgumentParser("python -m common.datasets", description="A look at data.")
    parser.add_argument("id", help="data set id or path, see common/datasets.py")
    parser.add_argument("--plot", metavar="FILE.png", help="draw returns, lengths, coverage")
    parser.add_argument("--env", help="Gymnasium id to evaluate in instead of the recorded one")
    parser.add_argument("--env-steps", type=int, help="step limit of that env")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    dataset = datasets.load(args.id, args.env, args.env_steps, actions="any")
    print(describe(dataset))
    if args.plot:
        try:
            plot(dataset, args.plot)
        except (OSError, ValueError, ImportError) as error:
            fail(f"--plot {args.plot}: cannot be drawn ({' '.join(str(error).split())})")
        print(f"drawn: {args.plot}")
