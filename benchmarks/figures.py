# SPDX-License-Identifier: Apache-2.0
"""Figures of a report: PNG for a Markdown page, inline SVG with the page's colours for HTML."""

import collections
import contextlib
import io
import re

import numpy as np

import intervals

# Okabe and Ito's colours that are readable on white and on near-black. Line styles tell more apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")
INK = "#1b1c1d"  # becomes the text colour of an HTML page
BAND_SEEDS = 3  # with fewer, every seed is drawn as a line
LEVELS = 81  # points of a performance profile
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **{"axes.grid": True, "grid.alpha": 0.18, "legend.frameon": False, "font.size": 9},
    **{"axes.titlesize": 9.5, "svg.fonttype": "none", "svg.hashsalt": "report"},
}


@contextlib.contextmanager
def panels(count, columns=3, size=(4.0, 2.9)):
    """Figure and flat axes; `count` of them are visible."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, count)
    rows = -(-count // columns)
    with matplotlib.rc_context(STYLE):
        shape = {"figsize": (size[0] * columns, size[1] * rows + 0.5), "layout": "constrained"}
        figure, axes = plt.subplots(rows, columns, squeeze=False, **shape)
        for axis in axes.flat[count:]:
            axis.set_visible(False)
        yield figure, axes.flat[:count]
        plt.close(figure)


def look(labels, label):
    """Colour, style and marker of a method, the same in every panel of a report."""
    i = labels.index(label)
    style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % 4]}
    return style | {"marker": MARKERS[i % len(MARKERS)], "markersize": 4}


def legend(figure, axes):
    """One legend for all panels, below them."""
    handles = {}
    for axis in axes:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    handles |= {key: handles.pop(key) for key in ("data mean", "data max") if key in handles}
    width = 0.6 + 0.075 * max(map(len, handles), default=0)  # inches of the longest label
    columns = max(1, int(figure.get_figwidth() // width))
    lines = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0, lines - 2))  # two lines fit already
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


@contextlib.contextmanager
def curves(rows, labels):
    """A panel per data set: mean over seeds with a 95 % interval, or every seed; data levels.

    Where all rows of a panel have an online phase, updates are counted from the switch on.
    """
    names = list(dict.fromkeys((row.family, row.dataset) for row in rows))
    with panels(len(names)) as (figure, axes):
        for axis, (family, name) in zip(axes, names, strict=True):
            group = [row for row in rows if (row.family, row.dataset) == (family, name)]
            switches = {row.switch for row in group}
            online = None not in switches
            for row in group:
                _curve(axis, row, look(labels, row.label), row.switch if online else 0)
            for key, style in (("mean", "--"), ("max", ":")):
                if not np.isnan(level := group[0].level(key)):
                    axis.axhline(level, color="0.5", linestyle=style, linewidth=1.2)
                    axis.plot([], [], color="0.5", linestyle=style, label=f"data {key}")
            unit = {"normalised": "score", "success": "success, %", "return": "return"}
            axis.set(title=_broken(name), xlabel="updates", ylabel=unit[group[0].scale])
            if online:
                axis.set_xlabel("updates since the switch to the env")
            for switch in {0} if online else switches - {None}:
                axis.axvline(switch, color=INK, linewidth=1.2)
            axis.xaxis.set_major_formatter(_thousands)
            axis.xaxis.set_major_locator(_ticks())
        legend(figure, axes)
        yield figure


def _curve(axis, row, style, switch):
    points = collections.defaultdict(list)  # a seed that diverged has fewer of them
    for curve in row.curves.values():
        for update, score in curve.T:
            points[update - switch].append(score)
    updates = sorted(points)
    if not updates:
        return
    mean = [np.mean(points[update]) for update in updates]
    every = max(1, len(updates) // 8)
    axis.plot(updates, mean, linewidth=1.8, label=row.label, markevery=every, **style)
    full = [update for update in updates if len(points[update]) == len(row.curves)]
    if len(row.curves) >= BAND_SEEDS and full:
        scores = np.array([points[update] for update in full]).T  # [S, T]
        low, high = intervals.interval(lambda x: x.mean(axis=-2), scores, draws=2000)
        axis.fill_between(full, low, high, color=style["color"], alpha=0.2, linewidth=0)
    elif len(row.curves) > 1:
        for updates, scores in row.curves.values():
            axis.plot(updates - switch, scores, color=style["color"], alpha=0.35, linewidth=0.8)


@contextlib.contextmanager
def aggregates(family, summary, labels, unit):
    """IQM with intervals, performance profiles and probability of improvement of one family."""
    names = list(summary.scores)
    with panels(3, size=(4.4, max(2.9, 0.32 * len(names) + 1.2))) as (figure, axes):
        for i, name in enumerate(names):
            style = look(labels, name)
            low, high = summary.iqm[name][1:]
            if not np.isnan(low):
                axes[0].barh(i, high - low, left=low, color=style["color"], alpha=0.35, height=0.6)
            axes[0].plot(summary.iqm[name][0], i, **style)
        axes[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axes[0].set(title=f"{family}: IQM and 95 % interval", xlabel=unit)
        for name in names:
            style = look(labels, name)
            share, low, high = summary.profile[name]
            axes[1].plot(summary.levels, share, label=name, markevery=10, linewidth=1.6, **style)
            axes[1].fill_between(
                summary.levels, low, high, color=style["color"], alpha=0.15, linewidth=0
            )
        axes[1].set(title="Performance profile", xlabel=f"{unit} above", ylim=(0, 1.02))
        axes[1].set_ylabel("share of seeds and data sets")
        _improvement(axes[2], names, summary.improvement)
        legend(figure, axes[1:2])
        yield figure


def _improvement(axis, names, table):
    values = np.array([[table[x, y][0] if x != y else np.nan for y in names] for x in names])
    axis.imshow(values, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if i != j:
            ink = "#ffffff" if abs(value - 0.5) > 0.3 else "#101010"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink)
    numbered = [f"{name}  {i}" for i, name in enumerate(names, 1)]
    axis.set(yticks=range(len(names)), yticklabels=numbered, xticks=range(len(names)))
    axis.set_xticklabels(range(1, len(names) + 1))
    axis.set_title("P(row beats column)")
    axis.grid(False)


@contextlib.contextmanager
def pulls(found):
    """A panel per data set: the score after k episodes of a bandit, with its interval.

    Args:
        found: data set -> method -> ([pulls] mean, [pulls] half of the interval).
    """
    labels = sorted({method for methods in found.values() for method in methods})
    with panels(len(found)) as (figure, axes):
        for axis, (name, methods) in zip(axes, found.items(), strict=True):
            for method, (mean, half) in methods.items():
                style, k = look(labels, method) | {"marker": ""}, np.arange(1, len(mean) + 1)
                axis.plot(k, mean, label=method, linewidth=1.8, **style)
                axis.fill_between(k, mean - half, mean + half, color=style["color"], alpha=0.2)
            axis.set(title=_broken(name), xlabel="episodes played", ylabel="score", xscale="log")
        legend(figure, axes)
        yield figure


@contextlib.contextmanager
def means(suites):
    """A panel per suite: the mean over its data sets, an interval, a dot per data set.

    Args:
        suites: suite -> method -> [mean, low, high, [scores of the data sets]]; low and high are
            None for a single seed.
    """
    most = max(map(len, suites.values()))
    with panels(len(suites), size=(4.0, max(2.2, 0.24 * most + 0.8))) as (figure, axes):
        for axis, (suite, methods) in zip(axes, suites.items(), strict=True):
            for i, (mean, low, high, each) in enumerate(methods.values()):
                axis.plot(each, [i] * len(each), ".", color="0.6", markersize=5)
                if low is not None:
                    axis.plot([low, high], [i, i], color=COLOURS[0], linewidth=3, alpha=0.45)
                axis.plot(mean, i, "o", color=COLOURS[0], markersize=6)
            axis.set(yticks=range(len(methods)), yticklabels=methods, title=suite)
            axis.set(ylim=(len(methods) - 0.5, -0.5), xlabel="normalised score")
        yield figure


def png(figure, path, description=None):
    """Write the figure; the description goes into the file's text."""
    metadata = {"Software": None, "Description": description}
    figure.savefig(path, dpi=110, facecolor="white", metadata=metadata)


def svg(figure):
    """The figure as text for an HTML page, in the page's text colour, without a background."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    return text.replace(INK, "currentColor")


def _broken(name):
    """A long name over two lines."""
    if len(name) < 38:
        return name
    middle = min(
        (i for i, x in enumerate(name) if x in " -/"), key=lambda i: abs(i - len(name) / 2)
    )
    return f"{name[: middle + 1]}\n{name[middle + 1 :]}"


def _thousands(x, _):
    return f"{x / 1e6:g}M" if abs(x) >= 1e6 else f"{x / 1e3:g}k" if abs(x) >= 1e3 else f"{x:g}"


def _ticks():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, steps=[1, 2, 5, 10])
