"""HTML elements, which escape all text inside them, and the style and script of a document.

A document needs no network: style and script are inside, and its security policy allows that one script alone.
"""

import base64
import dataclasses
import hashlib
import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that already is HTML."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the number to sort by. A `share` of its width, from 0 to 1, is shaded."""

    shown: object
    number: float | None = None
    share: float | None = None


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """An element. Text inside is escaped, `Markup` is not; an attribute of None is left out."""
    given = (
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{''.join(given)}>{joined(inside)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """Concatenates elements and texts."""
    return Markup("".join(x if isinstance(x, Markup) else html.escape(str(x)) for x in parts))


def table(head: Sequence[str], rows: Sequence[Sequence[Cell | object]], words: int = 1, **attributes: object) -> Markup:
    """A table in a box that scrolls if the table is wide. The first `words` columns are text."""
    side = lambda i: None if i < words else "n"
    titles = tag("tr", *(tag("th", title, scope="col", class_=side(i)) for i, title in enumerate(head)))
    body = [tag("tr", *(_cell(cell, side(i)) for i, cell in enumerate(row))) for row in rows]
    made = tag("table", tag("thead", titles), tag("tbody", *body), **attributes)
    return tag("div", made, class_="scroll long" if len(rows) > 24 else "scroll", tabindex=0)


def _cell(cell, side):
    if not isinstance(cell, Cell):
        return tag("td", cell, class_=side)
    style = None if cell.share is None else f"--share:{100 * cell.share:.3g}%"
    number = None if cell.number is None else f"{cell.number:.9g}"
    return tag("td", cell.shown, class_=side, style=style, data_n=number)


def section(title: str, *inside: object, **attributes: object) -> Markup:
    """A section with a heading."""
    return tag("section", tag("h2", title), *inside, **attributes)


def breakable(name: str) -> Markup:
    """The path of a parameter, with line breaks allowed after each slash."""
    parts = name.split("/")
    broken = joined(joined([part, Markup("/<wbr>")]) for part in parts[:-1])
    return tag("span", broken, parts[-1], class_="path")


def folded(title: str, *inside: object) -> Markup:
    """An element that is hidden until it is opened."""
    return tag("details", tag("summary", title), *inside)


def document(title: str, *inside: object) -> str:
    """A complete document."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = (
        Markup(f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    body = tag("body", tag("main", *inside), tag("script", Markup(SCRIPT)))
    return "<!doctype html>\n" + tag("html", tag("head", *head), body, lang="en") + "\n"


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #59636e; --rule: #d8dee4; --card: #f5f7f9;
  --blue: #0072b2; --orange: #d55e00; --green: #00835f; --gray: #818b96; --shade: #0072b22e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e7eaee; --soft: #a0a9b4; --rule: #30363d; --card: #1c2127;
    --blue: #56b4e9; --orange: #f0883e; --green: #2fc69a; --gray: #8b95a1; --shade: #56b4e938; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; line-height: 1.3; margin: 40px 0 4px; }
h2 + .scroll { margin-top: 10px; }
.pictures + .scroll { margin-top: 16px; }
p { margin: 4px 0 12px; max-width: 100ch; }
.lead, figcaption, footer, summary, .cards span { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin: 20px 0 0; }
.cards div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 16px; }
.cards b { display: block; font-size: 26px; line-height: 1.3; font-weight: 600; }
.cards span { display: block; font-size: 13.5px; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 20px 28px; }
.small { grid-template-columns: repeat(auto-fill, minmax(min(45%, 220px), 1fr)); gap: 16px 20px; }
figure { margin: 12px 0 0; break-inside: avoid; min-width: 0; }
figcaption { font-size: 13.5px; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 9px; vertical-align: top; border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; background: var(--card); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.n { text-align: right; }
td.n { white-space: nowrap; }
td[style] { background: linear-gradient(to left, var(--shade) var(--share), transparent var(--share)); }
td > .path { display: block; min-width: min(220px, 34vw); max-width: 400px; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 16px 0 8px; }
footer { margin-top: 40px; border-top: 1px solid var(--rule); padding-top: 12px; font-size: 13.5px; }
@media screen { .long { max-height: 75vh; overflow: auto; } .long th { position: sticky; top: 0; } }
@media print {
  body { font-size: 10pt; } main { max-width: none; padding: 0; }
  .cards { grid-template-columns: repeat(4, 1fr); } .pictures { grid-template-columns: 1fr 1fr; }
  .small { grid-template-columns: repeat(4, 1fr); } .cards b { font-size: 16pt; } svg { max-height: 80mm; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: 2px 4px; }
  thead { display: table-header-group; } tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sorted"))
  [...table.tHead.rows[0].cells].forEach((head, column, all) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1, key = row => row.cells[column];
      const order = (a, b) => a.dataset.n && b.dataset.n ? a.dataset.n - b.dataset.n
        : a.textContent.localeCompare(b.textContent, "en", { numeric: true });
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => sign * order(key(a), key(b))));
      for (const other of all) other.removeAttribute("aria-sort");
      head.ariaSort = sign > 0 ? "ascending" : "descending";
    };
  });
"""
