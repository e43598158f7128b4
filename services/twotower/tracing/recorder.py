"""Records a process's spans as JSON lines, in a file for each process, so that none waits for another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NoOpTracer, Span, Tracer

from twotower.errors import ConfigError

LANE = "lane"
"""Attribute of a span: the part of the process that did the work. `engine`, the default, is its one computing thread;
`wire` are transfers, of which those of several sessions may overlap."""

NO_TRACER: Tracer = NoOpTracer()
"""A tracer that records nothing."""


class FileExporter(SpanExporter):
    """Appends spans to a file, one JSON object a line."""

    def __init__(self, path: Path, service: str) -> None:
        """Raises OSError if the file cannot be written."""
        self._service = service
        self._file = path.open("w", encoding="utf-8")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write a batch; called on the exporter's own thread."""
        for span in spans:
            attributes = dict(span.attributes or {})
            line = {
                "service": self._service,
                "lane": attributes.pop(LANE, "engine"),
                "name": span.name,
                "start_ns": span.start_time,
                "end_ns": span.end_time,
                "attributes": attributes,
            }
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file."""
        self._file.close()


def transfer(tracer: Tracer, name: str, session_id: str) -> Span:
    """A span of the wire that begins now; use it as a context manager, or call `.end()`. It has no parent or child, since
    overlapping tasks begin and end such spans in any order."""
    return tracer.start_span(name, Context(), attributes={LANE: "wire", "session": session_id})


@contextmanager
def recording(directory: Path | None, service: str) -> Iterator[Tracer]:
    """A tracer that records to `directory`/`service`.jsonl until the context ends; with None, it records nothing.

    Raises ConfigError if the directory cannot be written to.
    """
    if directory is None:
        yield NO_TRACER
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        exporter = FileExporter(directory / f"{service}.jsonl", service)
    except OSError as error:
        raise ConfigError(f"trace: {directory} cannot be written to: {error.strerror}") from None
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield provider.get_tracer("twotower")
    finally:
        provider.shutdown()
