"""What a checkpoint is known by among processes: equal where states may be shared, and different where they may not.

The headers of safetensors files (names, dtypes, shapes) are equal for any two trainings of one architecture. What tells
these apart is a hash of the content, which our own writers put into the metadata, or a revision that somebody named.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

CONTENT_KEY = "content_sha256"
"""In the metadata of a safetensors file, and of an index for all its files together."""

Header = Mapping[str, object]

_HUB_COMMIT = re.compile(r"[0-9a-f]{40}")


def combined_content(contents: Mapping[str, str]) -> str:
    """One hash for all files of an index. contents: file name -> hash of the file's content."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def revision_of(path: Path) -> str | None:
    """The commit, where a directory is a snapshot in the Hugging Face cache (``.../snapshots/COMMIT``)."""
    path = path.resolve()
    return path.name if path.parent.name == "snapshots" and _HUB_COMMIT.fullmatch(path.name) else None


def identify(
    config: str, index: Header | None, headers: Mapping[str, Header | None], revision: str | None, extra: str
) -> tuple[str, str | None]:
    """The identity, and why two different checkpoints may have the same; None if they cannot.

    index: the index file, None of a checkpoint of a single file. headers: of each file by its name; None: it cannot be read.
    extra: what else states depend on.
    """
    digest = hashlib.sha256(config.encode())
    digest.update(_canonical(index))
    unsure = None
    if revision is not None:
        digest.update(_canonical({"revision": revision}))
    elif index is not None and _content(index, "metadata") is not None:
        pass  # it speaks for all files
    else:
        digest.update(_canonical(headers))
        if missing := [name for name, header in headers.items() if header is None]:
            unsure = f"lacks {missing[0]}, whose header is a part of what it is known by,"
        elif not all(header is not None and _content(header, "__metadata__") for header in headers.values()):
            unsure = "holds no hash of its content,"
    digest.update(extra.encode())
    return digest.hexdigest()[:16], unsure


def _content(header: Header, metadata_key: str) -> str | None:
    metadata = header.get(metadata_key)
    content = metadata.get(CONTENT_KEY) if isinstance(metadata, Mapping) else None
    return content if isinstance(content, str) and content else None


def _canonical(value: object) -> bytes:
    """As JSON whose keys are in order: writers order them as they like."""
    return json.dumps(value, sort_keys=True).encode()
