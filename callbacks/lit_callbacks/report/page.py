"""The report as one HTML file that needs nothing else: no server, no network, no library."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.resources import files

from lit_callbacks.health import Diagnosis, loss_key
from lit_callbacks.report.markup import Markup, element, joined, note
from lit_callbacks.report.panels import heat_panels, line_panels, loss_panel, remarks
from lit_callbacks.report.run import Run
from lit_callbacks.report.svg import short
from lit_callbacks.report.tables import checkpoint_table, event_table, sample_table, setting_tables

_SYMBOLS = {"healthy": "✓", "recovered": "↺", "at risk": "!", "no data": "?"}  # the others are a cross


def page(runs: Sequence[Run]) -> str:
    """One page for one run, or for several that are compared.

    Args:
        runs: At least one.

    Cost: a second or two for a run of 100,000 steps, of which the page shows at most 600 places a line, each with its
    lowest and highest value.
    """
    runs = _distinct(runs)
    told = [remarks(run) for run in runs]
    reach = (0, max(1, *(run.last_step for run in runs)))
    title = " and ".join(run.name for run in runs)
    named = len(runs) > 1

    body = [element("h1", title), *(_verdict(run, named) for run in runs), _differences(runs)]
    body += [
        element("h2", "The run over its steps"),
        *_charts(loss_panel(runs, told, reach), *line_panels(runs, reach)),
    ]
    for run in runs:
        body += [element("h2", f"Layers of {run.name}" if named else "Layers"), *_charts(*heat_panels(run, reach))]
    body.append(element("h2", "What happened"))
    body += _each(runs, named, (event_table(i, remarks_of_run) for i, remarks_of_run in enumerate(told)))
    body.append(element("h2", "Skipped samples, and checkpoints"))
    body += _each(runs, named, (joined([sample_table(run), checkpoint_table(run)]) for run in runs))
    body += [element("h2", "Configuration"), setting_tables(runs)]

    own = files("lit_callbacks.report")
    style, script = (Markup((own / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    # The browser is told to load nothing, and to run this one script.
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<link rel="icon" href="data:,">'),  # or browsers ask a server for one
        element("title", title),
        element("style", style),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', *body, element('script', script)), lang='en')}\n"


def _verdict(run: Run, named: bool) -> Markup:
    found = run.diagnosis()
    first, *others = found.sentences
    name = f"{run.name}: " if named else ""
    return element(
        "section",
        element("p", f"{_SYMBOLS.get(found.verdict, '✕')} {name}{first}", kind="first"),
        *(element("p", text) for text in others),
        element("p", run.state, kind="state") if run.state else None,
        element(
            "div", *(element("span", label, element("b", value)) for label, value in _facts(run, found)), kind="facts"
        ),
        *(note(text) for text in run.notes),
        kind=f"verdict {found.verdict.replace(' ', '-')}",
    )


def _facts(run: Run, found: Diagnosis) -> list[tuple[str, str]]:
    wanted = (
        ("Loss at the end", loss_key(run.series) or ""), ("Validation", "val/loss"), ("Validation", "val_loss"),
        ("Tokens a second", "throughput/tokens_per_second"), ("Tokens seen", "throughput/total_tokens"),
    )  # fmt: skip
    facts = [("Last step", f"{run.last_step:,}")]
    if found.culprit:
        facts.append(("Seen first in", f"{found.culprit}, step {found.first_warning_step}"))
    return facts + [(label, short(run.series[key][-1][1])) for label, key in wanted if run.series.get(key)]


def _differences(runs: Sequence[Run]) -> Markup | None:
    """A word of caution where what is compared has different layers."""
    sections = ("grad_norm/", "attention_entropy/")
    if len({frozenset(key for key in run.series if key.startswith(sections)) for run in runs}) < 2:
        return None
    return note(
        "These runs have measured different layers: other models, or other callbacks. Losses compare only on the same "
        "data and tokenizer."
    )


def _charts(*panels: tuple[str, str, str]) -> list[Markup]:
    """Figures, and for those that are empty what would have logged them."""
    return [
        Markup(drawn)
        if drawn
        else element("p", f"{what}: not logged. ", element("code", callback), " logs it.", kind="missing")
        for what, callback, drawn in panels
    ]


def _each(runs: Sequence[Run], named: bool, parts: Iterable[Markup]) -> list[Markup]:
    return [joined([element("h3", run.name) if named else None, part]) for run, part in zip(runs, parts, strict=True)]


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name are called by their folders."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs]
