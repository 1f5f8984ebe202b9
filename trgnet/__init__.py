"""TRG-Net: human action segmentation of skeleton sequences with text-derived relational graphs.

The names below are loaded when they are first used, so that ``import trgnet`` and ``trgnet --help`` are fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .config import Config, load_config
    from .data import load_dataset
    from .losses import TRGLoss
    from .model import TRGNet
    from .predictor import load
    from .published import load_published, save_published
    from .trainer import train

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "TRGLoss": "losses",
    "TRGNet": "model",
    "load": "predictor",
    "load_config": "config",
    "load_dataset": "data",
    "load_published": "published",
    "save_published": "published",
    "train": "trainer",
}

__all__ = ["__version__", *_HOME]

# In a checkout `kernels` and `optimizers` lie beside this folder instead of in it: look there too, so that
# `python -m trgnet` started in a checkout works whatever kind of installation there is.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
