"""Every launch of both towers' steps compiles for an H200 at the published model's shapes; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_launch_compiles_for_an_h200() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.compiled_launches"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    tensor_cores = json.loads(result.stdout)
    scan = {"_mix_kernel", "_block_scan_kernel", "_apply_kernel", "_norm_kernel"}
    experts = {"_logits_kernel", "_choose_kernel", "_plan_kernel", "_project_kernel", "_sum_kernel"}
    unmask = {"_scan_kernel", "_commit_kernel"}
    prefill = {"_prompt_mix_kernel", "_prompt_scan_kernel", "_prompt_attention_kernel"}
    assert tensor_cores.keys() == {*scan, *experts, *unmask, *prefill, "_attention_kernel", "_combine_kernel"}
    assert tensor_cores["_project_kernel"]
    assert tensor_cores["_attention_kernel"]
    assert tensor_cores["_prompt_attention_kernel"]
