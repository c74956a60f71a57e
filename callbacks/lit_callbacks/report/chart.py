"""A figure: caption, legend, drawing, and the numbers behind it for whoever points at them."""

import json

from lit_callbacks.report.markup import Markup, element, joined
from lit_callbacks.report.svg import WIDTH


def figure(
    title: str,
    kind: str,
    keys: list[Markup],
    drawing: list[Markup],
    height: float,
    ends: tuple[float, float, int, int],
    data: object,
) -> Markup:
    """One figure of the page.

    Args:
        title: Its caption.
        kind: ``lines`` or ``heat``.
        keys: The legend.
        drawing: What is in the SVG.
        height: Of the SVG, where ``WIDTH`` is its width.
        ends: Places of the first and last step, and those steps.
        data: What ``page.js`` shows under the pointer.
    """
    left, right, first, last = ends
    svg = element(
        "svg", *drawing, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=title,
        data_left=left, data_right=right, data_first=first, data_last=last,
    )  # fmt: skip
    return element(
        "figure",
        element("figcaption", title),
        element("div", *keys, kind="keys"),
        svg,
        element("script", Markup(in_script(data)), type="application/json"),
        Markup('<div class="tip" hidden></div>'),
        kind=f"chart {kind}",
    )


def key(sample: Markup, name: str, width: int, height: int, box: str | None = None) -> Markup:
    """One entry of a legend."""
    svg = element("svg", sample, width=width, height=height, viewBox=box, aria_hidden="true")
    return element("span", svg, joined([name]), kind="key")


def in_script(data: object) -> str:
    r"""JSON that can stand inside a script element: nothing in it can end that.

    Example:
        >>> print(in_script(["</script>"]))
        ["\u003c/script>"]
    """
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
