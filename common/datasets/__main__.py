# SPDX-License-Identifier: Apache-2.0
"""`python -m common.datasets ID [--plot FILE.png] [--mirror URL]`: what a data set holds."""

import sys

from common import command_line, fail
from common.datasets import loading, look, mirrors


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser(
        "python -m common.datasets", description="Show what a data set holds."
    )
    parser.add_argument("id", help="data set id or path; docs/data.md lists the forms")
    parser.add_argument("--plot", metavar="FILE.png", help="plot returns, lengths and coverage")
    parser.add_argument("--env", help="Gymnasium id to evaluate in instead of the recorded one")
    parser.add_argument("--env-steps", type=int, help="step limit of that env")
    parser.add_argument(
        "--mirror",
        metavar="URL",
        help="folder on a server to download D4RL's and OGBench's files from (default: "
        f"{mirrors.D4RL} and {mirrors.OGBENCH})",
    )
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.mirror:
        mirrors.use(args.mirror)
    dataset = loading.load(args.id, args.env, args.env_steps, actions="any")
    print(look.describe(dataset))
    if args.plot:
        try:
            look.plot(dataset, args.plot)
        except (OSError, ValueError, ImportError) as error:
            fail(f"--plot {args.plot}: cannot be drawn ({' '.join(str(error).split())})")
        print(f"drawn: {args.plot}")


if __name__ == "__main__":
    command_line.run(main)
