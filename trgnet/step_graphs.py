"""The training step as CUDA graphs: started as one, however many kernels it launches.

A graph is a recording of launches with their sizes and addresses. So there is one for every size of batch, the
batches are padded to few sizes (:func:`trgnet.data.collate` with ``buckets``), and a batch is copied to where its
graph reads. The first step of a size is an ordinary one: it makes what is made once, such as the optimizer's state.
The second is recorded and replayed, the later ones are replayed. Every batch is trained on exactly once. Where a step
cannot be recorded, or the memory does not last, the training goes on with ordinary steps.

What the recorded step makes, the gradients included, is in memory that all graphs share. A replay leaves nothing
there that another one needs, but the loss terms, which have to be copied before the next step. The learning rate and
dropout's random numbers are read from the device, so they are others in every replay.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .data import Batch
from .errors import DataWarning, UserError, one_line
from .processes import Processes

if TYPE_CHECKING:  # pydantic, which the benchmarks on a GPU do without
    from .config import TrainConfig

Terms = dict[str, Tensor]
Step = Callable[[Batch], Terms]
Size = tuple[int, ...]
Capture = Callable[[Callable[[], Terms]], Callable[[], Terms]]

MOST_GRAPHS = 48
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
        repair: called after a recording that failed: forgets what Python remembers of tensors of that step.
        capture: makes a recording of what a function launches and returns what replays it.
        memory: of the device.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        repair: Callable[[], None] = lambda: None,
        capture: Capture | None = None,
        memory: CudaMemory | None = None,
    ) -> None:
        self.device = device
        self._step, self._repair = step, repair
        self._capture: Capture | None = capture or CudaCapture(device)
        self._memory = memory or CudaMemory(device)
        self._peaks: dict[Size, int] = {}
        self._told = False
        self._graphs: dict[Size, tuple[Batch, Callable[[], Terms]]] = {}

    def __call__(self, batch: Batch) -> Terms:
        """Train on a batch from page-locked memory; the terms are overwritten by later calls."""
        size = (*batch.x.shape, len(batch.segments))
        if size in self._graphs:
            place, replay = self._graphs[size]
            place.copy_(batch)
            return replay()
        batch = batch.to(self.device, non_blocking=True)
        if self._capture is None:
            return self._step(batch)
        if size not in self._peaks:
            return self._first_step(batch, size)
        if len(self._graphs) == MOST_GRAPHS:
            self._tell()
            return self._step(batch)
        replay = self._recorded(batch, size)
        return self._step(batch) if replay is None else replay()

    def release(self) -> None:
        """Free the graphs and their memory; later steps are ordinary ones."""
        self._graphs.clear()
        self._capture = None

    def _first_step(self, batch: Batch, size: Size) -> Terms:
        """An ordinary step, whose memory is measured."""
        if self._graphs and self._memory.free() < self._expected_peak(size):
            self._give_up("the memory does not last for them and for the steps of sizes that are new")
            return self._step(batch)
        terms, self._peaks[size] = self._memory.measured(lambda: self._step(batch))
        return terms

    def _expected_peak(self, size: Size) -> float:
        """Bytes that a step of another size takes, in proportion to its frames."""
        sequences, _, _, frames, _ = size
        return max(peak / (n * t) for (n, _, _, t, _), peak in self._peaks.items()) * sequences * frames

    def _recorded(self, batch: Batch, size: Size) -> Callable[[], Terms] | None:
        """What replays the step of this size, on this batch first; None where it could not be recorded."""
        if self._memory.free() < self._peaks[size]:
            self._give_up("a graph keeps the memory of its step, and the GPU has not so much left")
            return None
        try:
            replay = self._capture(lambda: self._step(batch))
        except RuntimeError as error:  # CUDA's errors are of this kind too, and so is a lack of memory
            reason = f"a step could not be recorded ({type(error).__name__}: {one_line(error)})"
        else:
            self._graphs[size] = batch, replay
            return replay
        self._give_up(reason)
        self._repair()
        return None

    def _give_up(self, reason: str) -> None:
        self.release()
        gc.collect()
        self._memory.free()
        warnings.warn(
            f"no more CUDA graphs: {reason}; the training goes on with ordinary steps. To start with them, set "
            "train.cuda_graph=false (--no-cuda-graph)",
            DataWarning,
            stacklevel=4,
        )

    def _tell(self) -> None:
        """Warn, once, that some batches have no graph."""
        if not self._told:
            self._told = True
            warnings.warn(
                f"there are more than {MOST_GRAPHS} sizes of batches: those that came later are trained on without a "
                "CUDA graph; a larger train.pad_multiple makes them fewer",
                DataWarning,
                stacklevel=3,
            )


class CudaCapture:
    """Records what functions launch into CUDA graphs that share their memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Terms]) -> Callable[[], Terms]:
        """Record; nothing of it happens before the first replay, which is in the order of the current stream.

        After an error the stream and the random numbers are those of before, and earlier graphs must not be replayed.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins the next batches, may call what a recording one may not.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        cause: BaseException | None = None
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            try:
                with recording:
                    try:
                        outputs = function()
                    except BaseException as error:
                        cause = error
                        raise
            except BaseException as error:
                # Where the end of a recording fails too, torch stays on its stream.
                torch.cuda.set_stream(stream)
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())  # which does not know of the recording
                raise (cause or error) from None

        def replay() -> Terms:
            graph.replay()
            return outputs

        return replay


class CudaMemory:
    """Memory of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        """Return the bytes that are left when PyTorch's cache is emptied; waits for the device."""
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info()[0]

    def measured(self, function: Callable[[], Terms]) -> tuple[Terms, int]:
        """Call a function; returns its result and the bytes that it took at most."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = function()
        return result, torch.cuda.max_memory_allocated(self.device) - before


def uses_graphs(settings: TrainConfig, device: torch.device, processes: Processes) -> bool:
    """Return whether steps are to be recorded; a UserError where that is asked for and cannot be."""
    if settings.cuda_graph is False:
        return False
    reason, alternative = graph_obstacle(settings, device, processes) or (None, "")
    if reason is not None and settings.cuda_graph is True:
        raise UserError(f"{reason}; set train.cuda_graph=auto (leave --cuda-graph away){alternative}")
    return reason is None


def graph_obstacle(
    settings: TrainConfig, device: torch.device, processes: Processes
) -> tuple[str, str] | None:
    """Return why CUDA graphs cannot be used, and what else one can change; None if they can."""
    if device.type != "cuda":
        return f"train.cuda_graph needs a GPU, and this training is on {device}", ""
    if processes.several:
        reason = f"train.cuda_graph is for one process, and here are {processes.count}"
        return reason, ", or train on one GPU"
    if settings.accumulate > 1:
        reason = (
            f"train.cuda_graph records a step of one batch, and train.accumulate is {settings.accumulate}"
        )
        return reason, ", or set train.accumulate=1 and a larger train.batch_size"
    if settings.compile:
        return "train.cuda_graph and train.compile exclude each other", ", or train.compile=false"
    return None
