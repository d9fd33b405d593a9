"""Places on a page of the documentation that a benchmark fills in: between <!-- MARK --> and <!-- /MARK -->."""

from __future__ import annotations

from collections.abc import Sequence


def filled(text: str, mark: str, lines: Sequence[str]) -> str:
    """The page with ``lines`` in the place that is marked for them.

    >>> filled("a <!-- x -->old<!-- /x --> b", "x", ["new"])
    'a <!-- x -->\\nnew\\n<!-- /x --> b'
    """
    before, _, rest = text.partition(f"<!-- {mark} -->")
    return "\n".join([f"{before}<!-- {mark} -->", *lines, f"<!-- /{mark} -->"]) + rest.partition(f"<!-- /{mark} -->")[2]
