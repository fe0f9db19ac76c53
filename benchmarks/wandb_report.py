# SPDX-License-Identifier: Apache-2.0
"""Write the report as a page on wandb: the table, and curves by data set and method.

    pip install wandb-workspaces
    python benchmarks/wandb_report.py ENTITY/PROJECT --folders runs

The table is that of report.py, from the folders or else from the project. Every data set gets a
panel of finished runs, filtered by their config and grouped by algorithm and by the config values
that distinguish methods, so that no curve averages two methods. The page is saved as a draft.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

import readers
import report
from common import command_line, fail, one_line
from common.experiment import wrong_words
from pages import markdown


@dataclass
class Arguments:
    """Where to read, and the title of the page."""

    project: tyro.conf.Positional[str]  # "entity/project" on wandb
    folders: tuple[Path, ...] = ()  # run folders of the table (default: the project's runs)
    title: str = "Results"  # heading of the page


def build(rows, notes, entity, project, title):
    """Build the report object, which needs neither an account nor a network."""
    import wandb_workspaces.reports.v2 as wr

    blocks = [wr.TableOfContents(), wr.P(report.explained(rows).strip())]
    blocks += [wr.MarkdownBlock("\n".join(f"- {note}" for note in notes))] if notes else []
    for family, group in report.by_family(rows).items():
        blocks += [wr.H1(family), wr.MarkdownBlock(markdown([report.table(group)]))]
        for name in dict.fromkeys(row.config["dataset"] for row in group):
            same = [row for row in group if row.config["dataset"] == name]
            blocks += [wr.H2(readers.datasets.slug(name))]
            blocks += [_grid(wr, entity, project, name, same)]
    return wr.Report(entity=entity, project=project, title=title, blocks=blocks, width="fluid")


def _grid(wr, entity, project, name, rows):
    keys = [word.split("=")[0] for row in rows for word in row.variant.split() if "=" in word]
    code = ["code.algorithm"] * ("code" in keys)
    code += ["code.common"] * ("common" in keys)
    keys = [key for key in dict.fromkeys(keys) if any(key in row.config for row in rows)] + code
    algorithms = ", ".join(f"'{x}'" for x in dict.fromkeys(row.algorithm for row in rows))
    runs = wr.Runset(
        entity=entity,
        project=project,
        name=name,
        filters=f"Config('dataset') = '{name}' and Config('algorithm') in [{algorithms}] "
        "and Metric('State') = 'finished'",
        groupby=[f"config.{key}" for key in ("algorithm", *keys)],
    )
    shown = ["score", "return", "success"] if rows[0].scale != "return" else ["return", "length"]
    panels = [
        wr.LinePlot(
            title=metric,
            x="Step",
            y=[metric],
            title_x="updates",
            smoothing_type="none",
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            layout=wr.Layout(x=8 * i, y=0, w=8, h=8),
        )
        for i, metric in enumerate(shown)
    ]
    return wr.PanelGrid(runsets=[runs], panels=panels)


def main(arguments):
    entity, slash, project = arguments.project.partition("/")
    if not (entity and slash and project):
        fail(f"{arguments.project}: entity/project is wanted")
    if arguments.folders:
        rows, notes = readers.find(arguments.folders)
    else:
        rows, notes = readers.from_wandb(arguments.project)
    try:
        page = build(rows, notes, entity, project, arguments.title)
        page.save(draft=True)
    except Exception as error:  # the package missing, no key, no network, no such project
        fail(f"wandb report for {arguments.project}: {one_line(error)}")
    print(f"draft: {page.url}")


def start():
    description = __doc__.split("\n\n")[0]
    main(wrong_words.parse(Arguments, sys.argv[1:], "wandb_report.py", description=description))


if __name__ == "__main__":
    command_line.run(start)
