"""Settings that cannot work are one line, before anything is started."""

from __future__ import annotations

import pytest

from twotower.cli.main import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate a --target nonsense", "target: must be HOST:PORT, not 'nonsense'"),
        ("generate a --target h:99999", "target: must be HOST:PORT, not 'h:99999'"),
        ("generate a --target :50051", "target: must be HOST:PORT, not ':50051'"),
        ("generate a --local --threads 0", "threads: must be at least 1, not 0"),
        ("conformance . --target x", "target: must be HOST:PORT, not 'x'"),
        ("conformance . --concurrency 0", "concurrency: must be at least 1, not 0"),
        ("up --denoisers 0", "denoisers: must be at least 1, not 0"),
        ("up --grpc-port 7000 --http-port 7000", "http_port: 7000 is the gRPC port; the two need one each"),
        ("up --drain -1", "drain: must be a finite number of seconds, not -1.0"),
        ("gateway --max-in-flight 0", "max_in_flight: must be at least 1, not 0"),
        ("gateway --drain nan", "drain: must be a finite number of seconds, not nan"),
        ("context --prefill-chunk 0", "prefill_chunk: must be at least 1, not 0"),
        ("denoiser --slots 0", "slots: must be at least 1, not 0"),
    ],
)
def test_one_line_that_names_the_setting(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"error: {said}\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("twotower ")
