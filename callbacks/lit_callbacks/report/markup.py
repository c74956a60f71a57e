"""HTML from text: whatever is not markup already is escaped."""

from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """Text that is HTML. All other text comes from files and may hold anything."""

    __slots__ = ()


def element(tag: str, *content: str | None, **attributes: object) -> Markup:
    """An element with its content.

    Args:
        tag: Its name.
        content: Text, which is escaped, and markup, which is not; None is left out.
        attributes: ``kind`` stands for ``class``, ``_`` for ``-``; what is None or empty is left out.

    Example:
        >>> element("p", "a < b", element("b", "c"), kind="note", data_step=3)
        '<p class="note" data-step="3">a &lt; b<b>c</b></p>'
    """
    named = {"class" if key == "kind" else key.replace("_", "-"): value for key, value in attributes.items()}
    written = "".join(f' {key}="{escape(str(value))}"' for key, value in named.items() if value not in (None, ""))
    return Markup(f"<{tag}{written}>{joined(content)}</{tag}>")


def joined(content: Iterable[str | None]) -> Markup:
    """One after the other; what is not markup is escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in content if part is not None))


def table(heads: Sequence[str], rows: Iterable[Markup]) -> Markup:
    """A table of rows."""
    return element(
        "table", element("thead", element("tr", *(element("th", head) for head in heads))), element("tbody", *rows)
    )


def note(text: str) -> Markup:
    """Something said by the way."""
    return element("p", text, kind="note")
