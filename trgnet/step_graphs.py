"""The training step as CUDA graphs: started as one, however many kernels it launches.

A graph is a recording of launches with their sizes and addresses. So there is one for every size of batch, the
batches are padded to few sizes (:func:`trgnet.data.collate` with ``buckets``), and a batch is copied to where its
graph reads. The first step of a size is an ordinary one: it makes what is made once, such as the optimizer's state.
The second is recorded and replayed, the later ones are replayed. Every batch is trained on exactly once.

What the recorded step makes, the gradients included, is in memory that all graphs share. A replay leaves nothing
there that another one needs, but the loss terms, which have to be copied before the next step. The learning rate and
dropout's random numbers are read from the device, so they are others in every replay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .data import Batch
from .errors import DataWarning, UserError
from .processes import Processes

if TYPE_CHECKING:
    from .config import TrainConfig

Terms = dict[str, Tensor]
Step = Callable[[Batch], Terms]
Capture = Callable[[Callable[[], Terms]], Callable[[], Terms]]

MOST_GRAPHS = 32
"""Sizes that are recorded; batches of others are trained on without a graph.

Each keeps a copy of its batch. None is given up for another: with more sizes than this a step would be recorded
again and again.
"""


class StepGraphs:
    """Trains on batches of few sizes, with one CUDA graph for each.

    Args:
        step: a whole training step on a batch that is on the device. Returns the terms of the loss without their
            history. Does nothing that waits for the device, and changes nothing but tensors.
        device: a GPU.
        capture: makes a recording of what a function launches and returns what replays it.
    """

    def __init__(self, step: Step, device: torch.device, capture: Capture | None = None) -> None:
        self.device = device
        self._step, self._capture = step, capture or CudaCapture(device)
        self._seen: set[tuple[int, ...]] = set()
        self._told = False
        self._graphs: dict[tuple[int, ...], tuple[Batch, Callable[[], Terms]]] = {}

    def __call__(self, batch: Batch) -> Terms:
        """Train on a batch from page-locked memory; the terms are overwritten by later calls."""
        size = (*batch.x.shape, len(batch.segments))
        if size in self._graphs:
            place, replay = self._graphs[size]
            place.copy_(batch)
            return replay()
        batch = batch.to(self.device, non_blocking=True)
        if size not in self._seen:
            self._seen.add(size)
            return self._step(batch)
        if len(self._graphs) == MOST_GRAPHS:
            self._tell()
            return self._step(batch)
        replay = self._capture(lambda: self._step(batch))
        self._graphs[size] = batch, replay
        return replay()

    def _tell(self) -> None:
        """Warn, once, that some batches have no graph."""
        if not self._told:
            self._told = True
            warnings.warn(
                f"there are more than {MOST_GRAPHS} sizes of batches: those that came later are trained on without a "
                "CUDA graph; train.length_sorted=true or a larger train.pad_multiple makes them fewer",
                DataWarning,
                stacklevel=3,
            )


class CudaCapture:
    """Records what functions launch into CUDA graphs that share their memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Terms]) -> Callable[[], Terms]:
        """Record; nothing of it happens before the first replay, which is in the order of the current stream."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins the next batches, may call what a recording one may not.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(self.device), recording:
            outputs = function()

        def replay() -> Terms:
            graph.replay()
            return outputs

        return replay


def check_graphs(settings: TrainConfig, device: torch.device, processes: Processes) -> None:
    """Raise a UserError where the settings ask for CUDA graphs and something does not go with them."""
    if not settings.cuda_graph:
        return
    remedy = "set train.cuda_graph=false (leave --cuda-graph away)"
    if device.type != "cuda":
        raise UserError(f"train.cuda_graph needs a GPU, and this training is on {device}; {remedy}")
    if processes.several:
        raise UserError(
            f"train.cuda_graph is for one process, and here are {processes.count}; {remedy}, or train on one GPU"
        )
    if settings.accumulate > 1:
        raise UserError(
            f"train.cuda_graph records a step of one batch, and train.accumulate is {settings.accumulate}; "
            f"{remedy}, or set train.accumulate=1 and a larger train.batch_size"
        )
    if settings.compile:
        raise UserError(
            f"train.cuda_graph and train.compile exclude each other; {remedy}, or train.compile=false"
        )
