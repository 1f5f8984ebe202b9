"""Training the same configuration from several seeds: what differs between the runs is chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console

from .config import Config, load_config, with_overrides
from .errors import UserError
from .evaluation import Scores, score_table
from .files import write_json
from .trainer import Result, train


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the seeds (0 for a single seed)."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.deviation:.1f}"


def train_seeds(
    config: Config | str | Path,
    seeds: Sequence[int],
    *,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, dict[str, Spread]]]:
    """Train one network per seed and report the scores' mean and spread.

    Args:
        config: a configuration, or the name or file of one; its own seed does not matter.
        seeds: the values of train.seed, all different.
        out: folder of the run folders ``seed0``, ``seed1``, ... and of ``seeds.json``; by default
            ``runs/DATASET-DATE-TIME``.
        console: as for :func:`trgnet.trainer.train`.

    Returns:
        part of the data ("test") -> which weights ("last_epoch", "mean_of_final_epochs", ...) -> score -> spread.

    Raises:
        UserError: no seed, or one twice; and whatever :func:`trgnet.trainer.train` raises.
    """
    config = config if isinstance(config, Config) else load_config(config)
    console = console or Console()
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different numbers, at least one; got {list(seeds)}")
    out = Path(out if out is not None else f"runs/{config.data.name}-{datetime.now():%Y%m%d-%H%M%S}")
    results = [
        train(with_overrides(config, [f"train.seed={seed}"]), out=out / f"seed{seed}", console=console)
        for seed in seeds
    ]
    spreads = _spreads(results)
    for part, columns in spreads.items():
        headings = {name.replace("_", " "): scores for name, scores in columns.items()}
        listed = ", ".join(map(str, seeds))
        console.print(
            score_table(f"{part}: mean ± standard deviation over the seeds {listed}", headings, str)
        )
    write_json(out / "seeds.json", {"seeds": list(seeds), **_plain(spreads)})
    console.print(str(out / "seeds.json"), highlight=False, soft_wrap=True)
    return spreads


def _spreads(results: Sequence[Result]) -> dict[str, dict[str, dict[str, Spread]]]:
    first = results[0].scores
    return {
        part: {
            column: {name: _spread([r.scores[part][column] for r in results], name) for name in scores}
            for column, scores in columns.items()
        }
        for part, columns in first.items()
    }


def _spread(runs: Sequence[Scores], name: str) -> Spread:
    values = [scores[name] for scores in runs]
    return Spread(fmean(values), stdev(values) if len(values) > 1 else 0.0)


def _plain(spreads: Mapping[str, Mapping[str, Mapping[str, Spread]]]) -> dict[str, object]:
    return {
        part: {
            column: {name: {"mean": s.mean, "deviation": s.deviation} for name, s in scores.items()}
            for column, scores in columns.items()
        }
        for part, columns in spreads.items()
    }
