# SPDX-License-Identifier: Apache-2.0
"""Make a data set of some size: `python -m common.recipes ID [--episodes N | --official]`."""

import difflib
from pathlib import Path

from common import command_line, fail, folders, machine, recipes


def main(argv: list[str] | None = None) -> None:
    ids = [*recipes.IDS, *(f"local/ogbench/{name}" for name in recipes.OGBENCH_RECIPES)]
    parser = command_line.Parser("python -m common.recipes", description="Make a data set.")
    parser.add_argument("id", help="one of " + ", ".join(ids))
    parser.add_argument("--episodes", type=int, help="number of episodes for training")
    official = "OGBench's number of episodes, on all cores (local/ogbench/ only)"
    parser.add_argument("--official", action="store_true", help=official)
    parser.add_argument("--workers", type=int, help="number of processes (local/ogbench/ only)")
    args = parser.parse_args(argv)
    if args.id not in ids:
        near = " or ".join(difflib.get_close_matches(args.id, ids)) or "one that --help lists"
        fail(f"no recipe makes {args.id}; did you mean {near}?")
    for name in ("episodes", "workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            fail(f"--{name} {value}: must be at least 1")
    stored_by_minari = args.id in recipes.IDS
    if args.official:
        if stored_by_minari:
            fail(f"--official: there are no official episodes of {args.id}; leave --official out")
        if args.episodes:
            fail(f"--official and --episodes {args.episodes}: give one of the two")
        args.episodes = recipes.OGBENCH_RECIPES[Path(args.id).name].official
        args.workers = args.workers or machine.cores()
    if stored_by_minari and (folders.minari(args.id) / "data").exists():
        if args.episodes:
            fail(f"{args.id} is made already; delete {folders.minari(args.id)} first")
        return
    folder = folders.minari() if stored_by_minari else folders.ogbench("local")
    try:
        if stored_by_minari:
            recipes.make(args.id, args.episodes)
        else:
            recipes.make_ogbench(Path(args.id).name, folder, args.episodes, args.workers)
    except OSError as error:
        fail(f"{args.id}: cannot be made in {folder} ({error})")


if __name__ == "__main__":
    command_line.run(main)
