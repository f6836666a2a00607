"""Some hostile inputs of each kind; `tests/stress/fuzz.py` tries tens of thousands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "stress" / "fuzz.py"
KINDS = "options force_yml pth pickles safetensors states pages lists records images builder benchmark_set"
TRIES = 160


@pytest.mark.skipif(sys.platform != "linux", reason="relies on fork, pidfd_open and /proc")
def test_hostile_input_is_handled_or_refused(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, FUZZ, "--tries", str(TRIES), "--kinds", *KINDS.split(), "-o", tmp_path],
        env={**os.environ, "PYTHONPATH": str(FUZZ.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"| **all** | {TRIES} |" in result.stdout
