"""The network of each provider with its batch: training step, forward pass, and inference of a whole recording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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
from .agreement import Results
from .device import DEVICE
from .operators import Size
from .providers import BACKENDS, compiled, precision_of

FRAMES_PER_SEGMENT = 150  # as in 30 fps recordings of daily actions
NO_DROPOUT = {f"{name}_dropout": 0.0 for name in ("channel", "fusion", "attention", "output")}
POS_WEIGHT = float(FRAMES_PER_SEGMENT)
SKELETON_OF = {len(SKELETONS[name].joints): name for name in ("pku", "lara", "mocap6")}


class Network:
    """A network with its loss and optimizer on one batch; all providers start from the same weights.

    Args:
        provider: one of :data:`bench.providers.PROVIDERS`.
        size: N, C, V, T, K and the embedding width; V is that of a skeleton in SKELETON_OF.
        precision: as for :func:`bench.providers.precision_of`, or "float64".
        dropout: whether the layers drop anything.
        capturable: whether the optimizer can be recorded into a CUDA graph.
        training: whether it is to be trained; otherwise there are no dropout, gradients and optimizer.
    """

    def __init__(
        self,
        provider: str,
        size: Size,
        precision: str = "float32",
        *,
        dropout: bool = True,
        training: bool = True,
        capturable: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.provider, self.precision, self.training = provider, precision, training
        self.classes = size.k
        dtype = torch.float64 if precision == "float64" else torch.float32
        adjacency = SKELETONS[SKELETON_OF[size.v]].adjacency()
        options = {} if dropout and training else NO_DROPOUT
        model = _with_relations(TRGNet(size.c, size.k, adjacency, size.d, **options))
        self.network = model
        if provider == "published":
            self.network = published.PublishedNet(size.c, size.k, adjacency, size.d, **options)
            self.network.load_state_dict(to_published(model.state_dict()))
        self.network = self.network.to(DEVICE, dtype).train(training)
        self.model = compiled(self.network) if provider == "compiled" else self.network
        batch, prior = _batch(size), _prior(size)
        floats = {"x": batch.x.to(dtype), "boundaries": batch.boundaries.to(dtype)}
        self.batch = replace(batch, **floats).to(DEVICE)
        self.joint_graph = prior.joint_graph().to(DEVICE, dtype)
        self.criterion = TRGLoss(prior, pos_weight=POS_WEIGHT).to(DEVICE, dtype)
        if training:
            fused = provider != "published"  # as trgnet's trainer
            parameters = self.network.parameters()
            self.optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=fused, capturable=capturable)

    @property
    def shape(self) -> dict[str, int]:
        """The sizes of the batch by their symbols, and its segments."""
        n, c, v, t = self.batch.x.shape
        return {"n": n, "c": c, "v": v, "t": t, "k": self.classes, "segments": len(self.batch.segments)}

    def step(self) -> dict[str, Tensor]:
        """Do the whole training step and return the terms of the loss."""
        self.optimizer.zero_grad()
        terms = self.backward()
        self.optimizer.step()
        return terms

    def backward(self) -> dict[str, Tensor]:
        """Accumulate the gradients and return the terms of the loss."""
        with self._running():
            terms = self._loss()
        terms["total"].backward()
        return {name: term.detach() for name, term in terms.items()}

    def forward(self) -> list[Tensor]:
        """Class and boundary logits of all stages, in training mode."""
        with self._running():
            output = self._output()
        return [*output.class_logits, *output.boundary_logits]

    def forward_backward(self) -> None:
        """The forward pass, and gradients of the sum of all logits."""
        logits = self.forward()
        torch.autograd.backward(logits, [torch.ones_like(x) for x in logits])

    def infer(self) -> tuple[Tensor, Tensor]:
        """Class logits (N, K, T) and boundary logits (N, 1, T) of the last stage, in evaluation mode."""
        with torch.no_grad(), self._running():
            if self.provider != "published":
                return self.model(self.batch.x, self.batch.mask, self.joint_graph)
            output = self._output()
            return output.class_logits[-1], output.boundary_logits[-1]

    def training_results(self) -> Results:
        """Terms of the loss, and gradients of the parameters by their published names."""
        torch.manual_seed(1)  # dropout
        terms = self.backward()
        own = {name: p.grad for name, p in self.network.named_parameters()}
        return terms, own if self.provider == "published" else to_published(own)

    def inferred_results(self) -> Results:
        """The logits by name; no gradients."""
        return dict(zip(("classes", "boundaries"), self.infer())), {}

    @contextmanager
    def _running(self) -> Iterator[None]:
        backend = BACKENDS.get(self.provider, self.provider)
        with use_backend(backend), precision_of(self.precision):
            yield

    def _output(self) -> published.Output:
        batch = self.batch
        inputs = batch.x, batch.mask, self.joint_graph
        return self.model(*inputs) if self.provider == "published" else self.model(*inputs, batch.segments)

    def _loss(self) -> dict[str, Tensor]:
        criterion, output = self.criterion, self._output()
        if self.provider != "published":
            return criterion(output, self.batch)
        text = criterion.action_embeddings, criterion.action_graph
        return published.loss(output, self.batch, *text, criterion.pos_weight)


def _with_relations(model: TRGNet) -> TRGNet:
    """Away from the initial state, in which the dynamic graph has weight 0 and hides errors."""
    with torch.no_grad():
        model.spatial.alpha.fill_(0.5)
        model.spatial.beta.fill_(0.5)
        model.spatial.hop_residual.uniform_(-0.01, 0.01)
    return model


def _batch(size: Size) -> Batch:
    """N unpadded recordings of T frames; segments last FRAMES_PER_SEGMENT frames on average."""
    rng = np.random.default_rng(0)
    shape = size.c, size.v, size.t
    recordings = [
        Recording(f"r{i}", 0.1 * rng.standard_normal(shape, np.float32), random_labels(rng, size.t, size.k))
        for i in range(size.n)
    ]
    return collate(recordings, pad_multiple=1)


def random_labels(rng: np.random.Generator, frames: int, classes: int) -> np.ndarray:
    """Labels of that many frames, whose segments last FRAMES_PER_SEGMENT frames on average."""
    cuts = np.sort(rng.choice(np.arange(1, frames), frames // FRAMES_PER_SEGMENT, replace=False))
    steps = rng.integers(1, classes, len(cuts) + 1)  # never 0: neighbours differ
    return (np.cumsum(steps) % classes).repeat(np.diff(cuts, prepend=0, append=frames))


def _prior(size: Size) -> TextPrior:
    rng = np.random.default_rng(1)
    return TextPrior(*(rng.standard_normal((rows, size.d), np.float32) for rows in (size.v, size.k)))
