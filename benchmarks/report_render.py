"""The page's markup from its template; needs jinja2 and matplotlib."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from benchmarks import report_changes as rc
from benchmarks import report_environment as rv
from benchmarks import report_numbers as rn
from benchmarks.report_sections import TITLES, identifier, sections
from benchmarks.report_summary import summary
from benchmarks.rows import Results, Row

PARTS = Path(__file__).with_name("report_page")
STATES = {"holds": "as it must be", "fails": "not as it must be", "open": "undecided"}
MOST = 10  # models that the head names


def page(results: Results, previous: Results | None = None) -> str:
    """The whole page."""
    changes = rc.compare(results, previous) if previous else None
    return template().render(
        results=results,
        summary=summary(results.rows),
        states=STATES,
        measured=measured(results.rows),
        started=moment(results.started),
        duration=rn.duration(results.seconds),
        machine=rv.machine(results.environment),
        environments=rv.versions(results.environments, results.environment),
        sections=sections(results),
        changes=changes,
        changed=rc.table(changes.rows) if changes else None,
        **_own_files(),
    )


def template() -> Template:
    """The page's template; every text that is put into it is escaped."""
    loader = FileSystemLoader(PARTS)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(identifier=identifier, moment=moment)
    return made.get_template("template.html")


def moment(text: str) -> str:
    """A date and time for people; what is none stays as it is.

    >>> moment("2026-11-22T10:00:00+00:00"), moment("yesterday")
    ('2026-11-22 10:00 UTC', 'yesterday')
    """
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{found.astimezone(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"


def _own_files() -> dict[str, str]:
    """Style and script as they are; the page's policy allows this script alone, whatever else may stand in it."""
    style, script = ((PARTS / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": Markup(style), "script": Markup(script), "script_hash": digest}


def measured(rows: Sequence[Row]) -> str:
    """What was measured, in a sentence or two."""
    names = list(dict.fromkeys(row.benchmark for row in rows))
    models = list(dict.fromkeys(row.model for row in rows if row.model))
    of_models = f" on {', '.join(models[:MOST])}{' and others' if len(models) > MOST else ''}" if models else ""
    known = ", ".join(TITLES.get(name, name).lower() for name in names)
    absent = ", ".join(title.lower() for name, title in TITLES.items() if name not in names)
    plural = "" if len(rows) == 1 else "s"
    return f"{len(rows)} figure{plural} of {known}{of_models}." + (f" Not in this run: {absent}." if absent else "")
