"""The example of the optimizers runs as it is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "digits.py"


def test_digits(tmp_path: Path):
    pytest.importorskip("sklearn", reason="pip install 'trgnet[example]'")
    picture = tmp_path / "curves.png"
    command = [sys.executable, str(EXAMPLE), "--epochs", "2", "--seeds", "2", "--out", str(picture)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = dict(line.rsplit("   ", 1) for line in run.stdout.splitlines()[1:-1])
    names = {row[:20].strip(): float(result.split(" ±")[0]) for row, result in rows.items()}
    assert len(names) == 8 and names["Adam"] == names["SMES, alpha 0.5"]
    assert all(accuracy > 80 for accuracy in names.values()), names
    assert picture.read_bytes().startswith(b"\x89PNG")
