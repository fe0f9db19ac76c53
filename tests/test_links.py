# SPDX-License-Identifier: Apache-2.0
"""Every relative link of the pages leads somewhere, and every file that a page names exists."""

import re
from pathlib import Path

import own_files
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(
    r"(?:\b|(?<=`))(?:algorithms|benchmarks|common|docs|tests)/[a-z0-9_/]+\.(?:py|md|sh)\b"
)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(text):
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


def broken(page):
    """Links and names of files in a page that lead nowhere."""
    text = page.read_text()
    found = []
    for link in LINK.findall(FENCED.sub("", text)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or ROOT not in [target, *target.parents]:
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target.read_text()):
            found.append(f"{link}: no such heading")
    for name in FILE.findall(text):
        if "my_" not in name and not (ROOT / name).exists():
            found.append(f"{name}: no such file")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: here\n[good](#a-heading-here) [one](absent.md) [two](#absent)\n"
        "[three](../..) `docs/absent.md`, [web](https://example.org) and\n```\n[fenced](x)\n```\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [line.split(":")[0] for line in broken(page)] == [
        *("absent.md", "#absent", "../..", "docs/absent.md"),
    ]


def test_what_a_fork_is_told_to_copy_is_there():
    """docs/forking.md, "Check your change": a line of the test, and two lines of tables."""
    tests = ROOT / "tests" / "algorithms"
    page = (ROOT / "docs" / "forking.md").read_text()
    (where, old, new) = re.search(r"sed '/\^(.*)/s/(.*)/(.*)/' tests/alg", page).groups()
    assert (where, old, new) == ("from algorithms import", " iql", " my_iql as iql")
    for name in own_files.NAMES:  # so the command does for every file what it does for iql.py
        lines = (tests / f"test_{name}.py").read_text().splitlines()
        (imports,) = [line for line in lines if line.startswith(where)]
        copied = imports.replace(f" {name}", f" my_{name} as {name}", 1)
        assert re.search(rf" my_{name} as {name}(,|$)", copied), copied
    for file, table in (("probes.py", "SMALL = {"), ("test_probes.py", "FREE = {")):
        assert f"`{table.split()[0]}` of `tests/algorithms/{file}`" in page
        rows = (tests / file).read_text().partition(table)[2].partition("\n}")[0]
        assert re.search(r'^    "iql": ', rows, re.MULTILINE)
