"""Which pages there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from twotower.reference.errors import errors_page
from twotower.reference.metrics import metrics_page

PAGES: Mapping[str, Callable[[], str]] = {"errors.md": errors_page, "metrics.md": metrics_page}
"""The pages of `docs/` that follow from the code, by file name, and what writes each as Markdown."""
