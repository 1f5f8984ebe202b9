"""``python -m trgnet`` is the command ``trgnet``."""

from __future__ import annotations

import os
import sys

from .cli import main

code = main()
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    # The connections between processes have threads that now and then abort an interpreter that is shutting down,
    # which torchrun would take for a failed training.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
