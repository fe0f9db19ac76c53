# SPDX-License-Identifier: Apache-2.0
"""`python -m common.experiment RUN_FOLDER`: look at a run, film its policy, score it again.

It is a program above the rooms of common/: it evaluates, which no module of this room does.
"""

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np

from common import command_line, envs, evaluation, fail, files, one_line
from common.experiment import devices, look, stored

NEW_STARTS = evaluation.EVAL_SEED + 1_000_000  # no evaluation during training reaches these
FRAMES_PER_SECOND = 25


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What Rollouts reads of a Config: one evaluation of some episodes."""

    eval_episodes: int
    eval_every: int = 1
    num_updates: int = 0


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    jax.config.update("jax_platforms", "cpu")  # evaluations act on the CPU
    print(f"run {args.folder}")
    print(look.describe(args.folder))
    if args.plot:
        _draw(args)
    if not (args.evaluate or args.video or args.export):
        return
    module = look.find_module(args.folder, args.file)
    if args.evaluate:
        evaluate(module, args)
    if args.video or args.export:
        policy = stored.load_policy(module, args.folder, args.which, args.seed)
        if args.export:
            with _writing("--export", args.export):
                policy.export(args.export)
            print(f"written: {args.export}")
        if args.video:
            film(policy, args)


def _arguments(argv):
    parser = command_line.Parser("python -m common.experiment", description="Look at a run folder.")
    parser.add_argument("folder", help="run folder, runs/<algorithm>/<data set>/<name>")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the learning curve")
    parser.add_argument("--video", metavar="FILE.gif", help="film one episode of the policy")
    parser.add_argument("--evaluate", metavar="N", type=int, help="score N episodes per seed")
    parser.add_argument(
        "--starts",
        choices=("same", "new"),
        default="same",
        help="start states of the episodes: those of the evaluations during training, or others",
    )
    parser.add_argument(
        "--keep-episodes",
        action="store_true",
        help="with --evaluate: write the score of every episode to episodes.csv in the run folder",
    )
    parser.add_argument("--which", default="last", help="last, best (--keep best) or an update")
    parser.add_argument("--seed", type=int, help="whose policy is filmed and exported")
    parser.add_argument("--export", metavar="FILE.npz", help="write what acting needs for NumPy")
    parser.add_argument("--file", help="the algorithm's file, where it is not found by itself")
    args = parser.parse_args(argv)
    if args.which not in ("last", "best"):
        if not args.which.isdecimal():
            fail(f"--which {args.which}: must be last, best or the number of an update")
        args.which = int(args.which)
    if args.evaluate is not None and args.evaluate < 1:
        fail(f"--evaluate {args.evaluate}: must be at least 1")
    if args.keep_episodes and args.evaluate is None:
        fail("--keep-episodes: needs --evaluate N, the number of episodes per seed")
    return args


def _first_start(args):
    return NEW_STARTS if args.starts == "new" else evaluation.EVAL_SEED


def evaluate(module, args):
    """Score more episodes of all seeds' policies and print them. Returns what Rollouts does."""
    cfg, dataset, state, updates = stored.load_all(module, args.folder, args.which)
    if dataset.make_env is None:
        fail(f"{args.folder}: no env is known to evaluate in")
    memory = stored.initial_memory(module, cfg, dataset, args.evaluate)
    keys = devices.streams(cfg.seeds, 3)[2]
    act = stored.acting(module, cfg, dataset, state)
    with evaluation.Rollouts(
        dataset, act, keys, Evaluation(args.evaluate), memory, _first_start(args)
    ) as rollouts:
        update = max(step or 0 for step in updates)
        found = rollouts.run(module.policy_params(state), update)
    starts = "new start states" if args.starts == "new" else "the start states of training"
    print(f"{args.evaluate} episodes per seed of the {_title(args)} policy, {starts}")
    names = [name for name in ("score", "return", "success", "length") if found[name] is not None]
    for i, seed in enumerate(cfg.seeds):
        numbers = ", ".join(f"{name} {found[name][i]:.2f}" for name in names)
        print(f"  seed {seed} at update {updates[i]}: {numbers}")
    if len(cfg.seeds) > 1:
        mean, std = np.mean(found["score"]), np.std(found["score"])
        print(f"  score {mean:.2f} ± {std:.2f} (mean and std of {len(cfg.seeds)} seeds)")
    if args.keep_episodes:
        path = Path(args.folder, "episodes.csv")
        lines = ["seed,update,which,starts,episode,score\n"]
        for seed, update, scores in zip(cfg.seeds, updates, found["episode_scores"], strict=True):
            policy = f"{seed},{update},{args.which},{args.starts}"
            lines += [f"{policy},{episode},{score:.9g}\n" for episode, score in enumerate(scores)]
        with _writing("--keep-episodes", path):
            files.write(path, "".join(lines))
        print(f"written: {path}")
    return found


def _title(args):
    return args.which if isinstance(args.which, str) else f"update {args.which}"


def film(policy, args):
    """Play one episode and write its pictures as a GIF."""
    dataset = policy.dataset
    if dataset.make_env is None:
        fail(f"{args.folder}: no env is known to film")
    env = dataset.make_env("rgb_array")
    every = max(1, round((env.metadata.get("render_fps") or 50) / FRAMES_PER_SECOND))
    observation = envs.reset(env, _first_start(args))
    frames, reward, total, over, steps = [], 0.0, 0.0, False, 0
    while not over:
        if steps % every == 0:
            frames.append(_frame(env))
        action = policy.act_flat(observation, reward)
        observation, reward, termination, truncation, _ = envs.step(env, action)
        total, steps, over = total + float(reward), steps + 1, termination or truncation
    frames.append(_frame(env))
    envs.close(env)
    with _writing("--video", args.video):
        import imageio

        imageio.mimsave(args.video, frames, duration=1000 / FRAMES_PER_SECOND, loop=0)
    print(f"filmed: {args.video}, {steps} steps with return {total:.2f}")


def _frame(env):
    try:
        frame = env.render()
    except Exception as error:  # of MuJoCo, Pygame and others
        hint = "; without a display: MUJOCO_GL=egl" if "GL" in str(error) else ""
        fail(f"--video: the env cannot draw itself ({one_line(error)}){hint}")
    if not isinstance(frame, np.ndarray):
        fail("--video: the env has no pictures (render_mode rgb_array)")
    return frame


def _draw(args):
    with _writing("--plot", args.plot):
        look.plot(args.folder, args.plot)
    print(f"drawn: {args.plot}")


@contextlib.contextmanager
def _writing(flag, file):
    """Inside, an error of writing that file is one line and exit code 2."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        fail(f"{flag} {file}: cannot be written ({one_line(error)})")


if __name__ == "__main__":
    command_line.run(main)
