"""The frame of a page: one HTML file that asks for nothing, with one small script that its own policy allows by digest.

Every page of craft-fast may use it: ``document`` around ``section``s. What ``script.js`` adds to a page it finds by
class names, so a page without such parts is left as it is; without the script everything is there to read.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources

from craft_fast.report.text import esc

PAGE_BYTES = 4_900_000
"""What a page may take: under 5 MB, which mail and chat programs still pass on."""


@cache
def asset(name: str) -> str:
    """Text of a file of this package, ``style.css`` or ``script.js``."""
    return resources.files("craft_fast.report").joinpath(name).read_text(encoding="utf-8")


def policy(script: str = "") -> str:
    """The page's Content-Security-Policy.

    No address is ever asked for, no script runs but the one with this digest, and where the browser knows trusted
    types, no text can become markup: a prompt that got past escaping would still be inert.

    Args:
        script: the text between the script's tags; empty: none runs.
    """
    rules = [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        rules += [f"script-src 'sha256-{digest}'", "require-trusted-types-for 'script'", "trusted-types 'none'"]
    return "; ".join(rules)


def document(
    title: str,
    parts: Sequence[str],
    *,
    header: str = "",
    styles: Sequence[str] = ("style.css",),
    script: bool = True,
    meta: str = "",
) -> str:
    """A whole page.

    Args:
        title: plain text.
        parts: HTML of the sections; empty ones are left out.
        header: HTML before ``main``, such as a ``<header>``.
        styles: files of this package, in order.
        script: whether ``script.js`` goes in.
        meta: more HTML for the head.
    """
    code = asset("script.js") if script else ""
    style = "".join(map(asset, styles))
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(code)}">{meta}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{esc(title)}</title><style>{style}</style></head>\n<body>{header}<main>\n{body}\n</main>"
        + (f"<script>{code}</script>" if code else "")
        + "</body></html>\n"
    )


def section(name: str, title: str, lead: str, body: str) -> str:
    """A part of the page with its heading.

    Args:
        name: id, plain word.
        title: plain text.
        lead: HTML of the first sentences.
        body: HTML.
    """
    heading = f"<h2 id={name}-title>{esc(title)}</h2>"
    opening = f"<section id={name} aria-labelledby={name}-title>{heading}"
    return f"{opening}<p class=lead>{lead}</p>{body}</section>" if lead else f"{opening}{body}</section>"


def links(sections: Sequence[tuple[str, str]]) -> str:
    """The page's contents as a line of links.

    Args:
        sections: id and plain text of each.
    """
    items = "".join(f'<a href="#{name}">{esc(text)}</a>' for name, text in sections)
    return f'<nav aria-label="Contents">{items}</nav>'
