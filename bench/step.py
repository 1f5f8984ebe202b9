"""One training step of each provider: forward, loss, backward, Adam.

python -m bench.step PROVIDER       prints the peak memory of one step in a fresh process, in bytes (Linux)
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from trgnet.kernels import use_backend

from trgnet import TRGLoss, TRGNet
from trgnet.data import Batch, Recording, collate
from trgnet.published import to_published
from trgnet.skeleton import SKELETONS
from trgnet.text import TextPrior

from . import published

PROVIDERS = ("published", "reference", "recompute")
N, C, V, T, K, D = 2, 12, 25, 1000, 52, 768
FRAMES_PER_SEGMENT = 150  # as in 30 fps recordings of daily actions
NO_DROPOUT = {f"{name}_dropout": 0.0 for name in ("channel", "fusion", "attention", "output")}
POS_WEIGHT = float(FRAMES_PER_SEGMENT)


class TrainingStep:
    """A network with its loss and optimizer on one batch; all providers start from the same weights."""

    def __init__(self, provider: str, *, dropout: bool = True, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        adjacency, options = SKELETONS["pku"].adjacency(), {} if dropout else NO_DROPOUT
        model = _with_relations(TRGNet(C, K, adjacency, D, **options)).to(dtype)
        self.batch, prior = _batch(), _prior()
        self.batch.x, self.batch.boundaries = self.batch.x.to(dtype), self.batch.boundaries.to(dtype)
        self.joint_graph = prior.joint_graph().to(dtype)
        self.criterion = TRGLoss(prior, pos_weight=POS_WEIGHT).to(dtype)
        self.provider, self.model = provider, model.train()
        if provider == "published":
            self.model = published.PublishedNet(C, K, adjacency, D, **options).to(dtype).train()
            self.model.load_state_dict(to_published(model.state_dict()))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def backward(self) -> dict[str, Tensor]:
        """Accumulate the gradients and return the terms of the loss."""
        with use_backend("auto" if self.provider == "published" else self.provider):
            terms = self._loss()
            terms["total"].backward()
        return {name: term.detach() for name, term in terms.items()}

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the parameters by their published names."""
        own = {name: p.grad for name, p in self.model.named_parameters()}
        return own if self.provider == "published" else to_published(own)

    def _loss(self) -> dict[str, Tensor]:
        batch, criterion = self.batch, self.criterion
        if self.provider != "published":
            return criterion(self.model(batch.x, batch.mask, self.joint_graph, batch.segments), batch)
        return published.loss(
            self.model(batch.x, batch.mask, self.joint_graph),
            batch,
            criterion.action_embeddings,
            criterion.action_graph,
            criterion.pos_weight,
        )


def peak_memory(provider: str) -> int:
    """Bytes by which one step in a fresh process raises its memory at most above what the imports took."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.step", provider],
        cwd=Path(__file__).parents[1],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(run.stdout)


def _with_relations(model: TRGNet) -> TRGNet:
    """Away from the initial state, in which the dynamic graph has weight 0 and hides errors."""
    with torch.no_grad():
        model.spatial.alpha.fill_(0.5)
        model.spatial.beta.fill_(0.5)
        model.spatial.hop_residual.uniform_(-0.01, 0.01)
    return model


def _batch() -> Batch:
    """N unpadded recordings of T frames; segments last FRAMES_PER_SEGMENT frames on average."""
    rng = np.random.default_rng(0)
    return collate(
        [
            Recording(f"r{i}", 0.1 * rng.standard_normal((C, V, T), np.float32), _labels(rng))
            for i in range(N)
        ],
        pad_multiple=1,
    )


def _labels(rng: np.random.Generator) -> np.ndarray:
    cuts = np.sort(rng.choice(np.arange(1, T), T // FRAMES_PER_SEGMENT, replace=False))
    steps = rng.integers(1, K, len(cuts) + 1)  # never 0: neighbours differ
    return (np.cumsum(steps) % K).repeat(np.diff(cuts, prepend=0, append=T))


def _prior() -> TextPrior:
    rng = np.random.default_rng(1)
    return TextPrior(rng.standard_normal((V, D), np.float32), rng.standard_normal((K, D), np.float32))


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes. (The peak of getrusage starts at that of the parent process.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    imported = _resident("VmRSS")
    TrainingStep(sys.argv[1])()
    print(_resident("VmHWM") - imported)
