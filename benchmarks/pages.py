# SPDX-License-Identifier: Apache-2.0
"""Turn a list of blocks into Markdown, or into one self-contained HTML file."""

import html
import re
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Text:
    markdown: str


@dataclass
class Table:
    head: list
    rows: list
    caption: str = ""


@dataclass
class Figure:
    file: str  # name of the PNG beside the Markdown page
    alt: str
    svg: str = ""


@dataclass
class Folded:
    title: str
    blocks: list = field(default_factory=list)


# --- Markdown -----------------------------------------------------------------------------------
def markdown(blocks):
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Any):
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Text):
        return block.markdown.strip()
    if isinstance(block, Figure):
        return f"![{block.alt}]({block.file})"
    if isinstance(block, Folded):
        inner = markdown(block.blocks).strip()
        title = html.escape(block.title)
        return f"<details>\n<summary>{title}</summary>\n\n{inner}\n\n</details>"
    lines = [f"{block.caption}\n"] if block.caption else []
    lines += ["| " + " | ".join(block.head) + " |", "|" + " --- |" * len(block.head)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in block.rows]
    return "\n".join(lines)


# --- HTML ---------------------------------------------------------------------------------------
CSS = """
:root { color-scheme: light dark; --ink: #1b1c1d; --paper: #fff; --line: #d4d7da; --soft: #f3f4f6;
  --link: #005a9c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --paper: #15171a; --line: #3a3f45;
  --soft: #22262b; --link: #7cbcf0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1400px; margin: 0 auto; padding: 1.5rem; }
h1, h2, h3 { line-height: 1.2; margin: 1.8em 0 .6em; } h1 { margin-top: 0; }
a { color: var(--link); } code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { background: var(--soft); padding: .7em 1em; overflow-x: auto; border-radius: 4px; }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4em; }
th, td { padding: .3em .55em; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
.word { text-align: left; }
th { background: var(--soft); vertical-align: bottom; white-space: normal; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th button::after { content: " \\2195"; opacity: .35; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1.2em 0; } figure svg { width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
summary { cursor: pointer; } sub { opacity: .6; }
"""

JS = """
const number = s => { const m = s.replace(/,/g, "").match(/^-?\\d+(\\.\\d+)?/);
  return m ? parseFloat(m[0]) : NaN; };
document.querySelectorAll("table").forEach(table => {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(x => x.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const text = row => row.cells[i].textContent.trim();
    const rows = [...body.rows];
    const plain = rows.every(row => !text(row) || !isNaN(number(text(row))));
    rows.sort((a, b) => {
      const [x, y] = [text(a), text(b)];
      if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);  // empty cells stay below
      const order = plain ? number(x) - number(y) : x.localeCompare(y, undefined, {numeric: true});
      return down ? -order : order;
    });
    body.append(...rows);
  }));
});
"""


def page(title, blocks):
    """A complete HTML file with style, script and figures."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"{body}\n<script>{JS}</script>\n</body>\n</html>\n"
    )


def _html(block: Any):
    if isinstance(block, Heading):
        return f"<h{block.level}>{inline(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return text(block.markdown)
    if isinstance(block, Figure):
        return f'<figure role="img" aria-label="{html.escape(block.alt)}">{block.svg}</figure>'
    if isinstance(block, Folded):
        inner = "\n".join(map(_html, block.blocks))
        return f"<details>\n<summary>{html.escape(block.title)}</summary>\n{inner}\n</details>"
    return table(block.head, block.rows, block.caption)


def table(head, rows, caption=""):
    words = [any(str(x)[:1].isalpha() for x in column) for column in zip(*rows, strict=True)]
    side = [' class="word"' if word else "" for word in [*words, *[True] * len(head)][: len(head)]]
    heads = "".join(
        f'<th scope="col"{kind}><button type="button">{inline(x)}</button></th>'
        for x, kind in zip(head, side, strict=True)
    )
    cells = [
        "".join(f"<td{kind}>{inline(str(x))}</td>" for x, kind in zip(row, side, strict=True))
        for row in rows
    ]
    top = f"<caption>{inline(caption)}</caption>" if caption else ""
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return (
        f'<div class="wide"><table>{top}<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def text(source):
    """Convert the Markdown of notes: headings, paragraphs, lists, tables and code."""
    out = []
    for part in re.split(r"(^```.*?^```$)", source, flags=re.M | re.S):
        if part.startswith("```"):
            code = "\n".join(part.splitlines()[1:-1])
            out.append(f"<pre><code>{html.escape(code)}</code></pre>")
            continue
        for block in re.split(r"\n\s*\n", part.strip()):
            lines = block.strip().splitlines()
            if not lines:
                continue
            if match := re.match(r"(#+) (.*)", lines[0]):
                out.append(f"<h{len(match[1])}>{inline(match[2])}</h{len(match[1])}>")
                lines = lines[1:]
            if lines and lines[0].startswith("|"):
                cells = [[x.strip() for x in line.strip("| ").split("|")] for line in lines]
                out.append(table(cells[0], cells[2:]))
            elif lines and lines[0].startswith("- "):
                items = re.split(r"(?:^|\n)- ", "\n".join(lines))[1:]
                out.append("<ul>" + "".join(f"<li>{inline(x)}</li>" for x in items) + "</ul>")
            elif lines:
                out.append(f"<p>{inline(chr(10).join(lines))}</p>")
    return "\n".join(out)


def inline(source):
    """Escaped text with `code`, [links](address), **bold** and <br><sub>small type</sub>."""
    parts = re.split(r"(`[^`]+`)", source)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"<code>{html.escape(part[1:-1])}</code>"
            continue
        part = html.escape(part, quote=False)
        part = re.sub(r"\[([^\]]+)\]\(([^)\s\"]+)\)", r'<a href="\2">\1</a>', part)
        part = re.sub(r"&lt;br&gt;&lt;sub&gt;(.+?)&lt;/sub&gt;", r"<br><sub>\1</sub>", part)
        parts[i] = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", part)
    return "".join(parts)
