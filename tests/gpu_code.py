"""What the tests of a GPU's code share: it is generated in processes of its own, each once for all workers."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_model import guard

ROOT = Path(__file__).parent.parent
REASON = guard.reason_against()
marks = [pytest.mark.gpu_codegen, pytest.mark.skipif(bool(REASON), reason=REASON)]


def facts(folder: Path, *command: str) -> list[dict[str, Any]]:
    """The JSON lines that `python -m benchmarks.gpu_model` prints, from `folder` if they are there already."""
    kept = folder / f"gpu-{'-'.join(command)}.jsonl"
    with (folder / f"{kept.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton"), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.gpu_model", *command],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            kept.write_text("\n".join(line for line in done.stdout.splitlines() if line.startswith(("{", "["))))
        return [json.loads(line) for line in kept.read_text().splitlines()]


def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of one run have."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
