"""``python -m trgnet`` is the same as the command ``trgnet``."""

import sys

from .cli import main

sys.exit(main())
