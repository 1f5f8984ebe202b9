"""LCAM: stochastic gradient descent whose momentum the loss chooses."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .moments import GatedOptimizer


class LCAM(GatedOptimizer):
    """Loss-controlled asymmetric momentum: SGD with the first momentum of a pair where the loss is below its average.

        average <- the average of the losses with this one in it
        mu      <- momenta[0] if loss < average, else momenta[1]
        g       <- g + weight_decay * p
        buf     <- mu * buf + (1 - dampening) * g        buf <- g at first
        p       <- p - lr * buf                          p - lr * (g + mu * buf) with nesterov

    As published, a loss decides on the momentum of the **next** step, and :meth:`new_epoch` forgets the average but not the
    momentum; until a loss has decided, the momentum is momenta[1]. Published pairs with lr 0.1, weight decay 5e-4 and
    batches of 128: (0.9, 0.95) for CIFAR-10, (0.93, 0.9) for CIFAR-100.

    Call ``step(loss=loss)`` after each backward pass and :meth:`new_epoch` before each epoch but the first; with
    accumulated gradients call :meth:`observe` for each micro-batch. In data-parallel training the loss is averaged over
    the processes. A loss that is not finite, and a step that a GradScaler skips, leave average and momentum as they are.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        momenta: momentum where the loss is below the average, and otherwise. Not called ``momentum``, which schedulers
            such as OneCycleLR would overwrite; so theirs is an error.
        weight_decay: coefficient of the L2 term, or of the decay.
        dampening: of the momentum.
        nesterov: Nesterov momentum; needs momenta and no dampening.
        decoupled_weight_decay: p <- (1 - lr * weight_decay) * p instead of an L2 term.
        average: ``"epoch"`` (as published: since :meth:`new_epoch`), ``"run"`` (all losses), ``"window"`` (the last
            ``window`` losses) or ``"ema"`` (exponential; the newest loss has the weight ``1 - smoothing``). Trainings of one
            epoch want one of the last two.
        gate: whether a loss decides on the ``"next"`` step, as published, or on the ``"same"``.
        window: losses in the window of ``average="window"``.
        smoothing: of ``average="ema"``.
        process_group: processes over which losses are averaged. None: all of torch.distributed, where it is initialised.
            Every process must then call :meth:`step` with a loss, or none. Copies of the optimizer do not have it.
        maximize: maximise the objective.
        foreach: use PyTorch's list functions. Default: yes, unless ``differentiable``.
        fused: one Triton kernel for all parameters; on a GPU (or under Triton's interpreter), not for float64.
        capturable: make the hyper-parameters tensors on the device (views that stay in force when a CUDA graph is
            replayed: fill them in place), as float32, and allow capture.
        differentiable: let autograd go through the step.
        state_dtype: dtype of the momentum. Default: the parameter's, float32 for half precision.
        rounding: of half-precision results: ``"nearest"``, ``"kahan"`` (the rounding error is kept beside the parameter) or
            ``"stochastic"`` (bfloat16 only).

    Raises:
        ValueError, RuntimeError: as ``torch.optim.SGD`` for hyper-parameters out of range and options that exclude each other.

    State: ``momentum_buffer`` as in torch.optim.SGD, whose checkpoints load, and ``step``.

    Source: arXiv 2309.02130 and its public code.
    """

    first_name = "momentum_buffer"
    form = "sum"
    second = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momenta: tuple[float | Tensor, float | Tensor] = (0.9, 0.95),
        *,
        weight_decay: float | Tensor = 0.0,
        dampening: float | Tensor = 0.0,
        nesterov: bool = False,
        decoupled_weight_decay: bool = False,
        average: str = "epoch",
        gate: str = "next",
        window: int = 100,
        smoothing: float = 0.98,
        process_group: dist.ProcessGroup | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
    ) -> None:
        defaults = {
            "lr": lr, "momenta": momenta, "weight_decay": weight_decay, "dampening": dampening, "nesterov": nesterov,
            "decoupled_weight_decay": decoupled_weight_decay, "average": average, "gate": gate, "window": window,
            "smoothing": smoothing, "maximize": maximize, "foreach": foreach, "fused": fused,
            "capturable": capturable, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(
            params, defaults, process_group=process_group, state_dtype=state_dtype, rounding=rounding
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for momentum in group["momenta"]:
            if not 0.0 <= momentum:
                raise ValueError(f"Invalid momentum value: {momentum}")
        self._check_nesterov(group)
