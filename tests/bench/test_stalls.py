"""`bench stalls` with a small storm: what hostile clients get, and that streams beside them neither fail nor change."""

from __future__ import annotations

from pathlib import Path

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.bench.stalls import StallsConfig, measure


async def test_streams_outlast_hostile_clients(tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    write_tiny_checkpoint(path, vocab_size=VOCAB_SIZE, block_size=4, max_position_embeddings=4096)
    write_byte_tokenizer(path)
    lines: list[str] = []
    result = await measure(StallsConfig(path, seconds=3.0), lines.append)
    assert result.calm.failures == result.stormy.failures == []
    assert len(result.calm.gaps_s) > 100
    assert len(result.stormy.gaps_s) > 100
    assert not [kind for kind in result.hostile if kind.startswith("error")]
    assert result.hostile["bad path"]
    assert not {answer.rpartition(": ")[2] for answer in result.hostile} & {"200", "500", "UNKNOWN", "INTERNAL", "OK"}
    assert not any("Traceback" in line for line in lines)
    assert len(lines) < 200
