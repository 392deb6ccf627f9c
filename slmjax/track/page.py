"""What the HTML pages have in common: one file, no network, no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from slmjax.track.report_style import STYLE


def page(title: str, about: str, body: str, footer: str, *, state: str = "") -> str:
    """A document.

    Args:
        about, body: HTML, of the line below the title and of what follows.
        footer: text, after which the time is added.
        state: shown beside the title, such as "complete".
    """
    badge = f'<span class="state {escape(state)}">{escape(state)}</span>' if state else ""
    made = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")[:-6]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1>{badge}<p>{about}</p></header>"
        f"{body}<footer>{escape(footer)} made {made} UTC</footer></main></body></html>\n"
    )


def table(title: str, rows: Iterable[tuple[str, ...]], head: Sequence[str] = ()) -> str:
    """A section with a table; nothing if no row says more than its name.

    Args:
        head: names of the columns; without them each row is a name and its values.
    """
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows if any(row[1:]))
    if not body:
        return ""
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    kind = "columns" if head else "fields"
    return f'<section class="{kind}"><h2>{escape(title)}</h2><table>{top}{body}</table></section>'


def cards(of: Iterable[tuple[str, str, str]]) -> str:
    """Figures at the top of a page: (name, figure, note)."""
    inside = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><small>{escape(c)}</small></div>" for a, b, c in of)
    return f'<dl class="cards">{"".join(inside)}</dl>'
