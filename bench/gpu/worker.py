"""The process that does the work: reads items from its input, one a line, and writes results to its output.

Whatever else is printed goes to the log, which is shown where an item fails.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from .processes import MARK, Skipped


def main() -> None:
    """Do items until the input ends."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    faulthandler.enable()
    for line in sys.stdin:
        item = json.loads(line)
        # A hang ends with a traceback, even if whoever started this process is gone.
        faulthandler.dump_traceback_later(max(0.1, item["until"] - time.time()), exit=True)
        for message in outcome(item):
            results.write(f"\n{MARK}{json.dumps(finite(message))}\n")
        faulthandler.cancel_dump_traceback_later()


def outcome(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the values of an item as they come, and how it ended."""
    try:
        module, _, function = item["function"].partition(":")
        yield from getattr(import_module(module), function)(**item["arguments"])
    except Skipped as why:
        yield {"status": "skipped", "reason": str(why)}
    except Exception as error:
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " <- ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(frames))
        yield {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:1500]} ({where})"}
    else:
        yield {"status": "done"}


def finite(value: Any) -> Any:
    """The same with None in the place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
