"""Training the same configuration from several seeds: what differs between the runs is chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console

from .config import Config, load_config, with_overrides
from .errors import UserError
from .evaluation import Scores, print_table, score_table
from .files import write_json
from .runs import Run, default_folder
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
        UserError: no seed, one twice, one below 0, or one whose folder is in use, all before the first
            training; and whatever :func:`trgnet.trainer.train` raises.
    """
    config = config if isinstance(config, Config) else load_config(config)
    console = console or Console()
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be different numbers, at least one; got {list(seeds)}")
    out = default_folder(config) if out is None else Path(out)
    configs = {out / f"seed{seed}": with_overrides(config, [f"train.seed={seed}"]) for seed in seeds}
    for folder in configs:
        Run(folder).check_unused()
    results = [train(one, out=folder, console=console) for folder, one in configs.items()]
    spreads = _spreads(results)
    for part, columns in spreads.items():
        headings = {name.replace("_", " "): scores for name, scores in columns.items()}
        listed = ", ".join(map(str, seeds))
        title = f"{part}: mean ± standard deviation over the seeds {listed}"
        print_table(console, score_table(title, headings, str))
    write_json(out / "seeds.json", {"seeds": list(seeds), **_plain(spreads)})
    console.out(out / "seeds.json", highlight=False)
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
