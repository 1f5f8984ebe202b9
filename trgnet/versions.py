"""What a result was computed with: versions of the software, and the commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from . import __version__


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that decide its numbers."""
    installed = {"torch": torch.__version__}  # unlike the metadata, it says for which CUDA it was built
    for name in ("triton", "numpy"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return {"trgnet": __version__, "python": platform.python_version(), **installed}


def checkout_commit() -> str | None:
    """The commit of the checkout that this package runs from; None when it is installed elsewhere."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet: the run is as good without
        return None
