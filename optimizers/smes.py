"""SMES: Adam with any exponent of the second moment, and the same with momentum and exponent chosen by the loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .moments import GatedOptimizer, MomentOptimizer, as_pair


class SMES(MomentOptimizer):
    """Second-moment exponential scaling: Adam whose denominator is any power of the second moment.

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * m_hat / (v_hat^alpha + eps)        both moments bias-corrected; eps outside of the power

    alpha = 0.5 is Adam, alpha = 0 bias-corrected momentum; any real alpha is legal, and it may change at every step
    (:class:`~trgnet.optimizers.ExponentSchedule`). v is held at the smallest normal number, so v = 0 gives a finite step.

    **One learning rate does not serve every alpha.** Where eps does not matter, scaling the loss by c scales the update by
    c^(1 - 2 alpha): only Adam does not depend on the scale of the loss.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of both moments. The bias corrections are 1 - beta^t, as in Adam.
        eps: added to the power.
        alpha: exponent, a number or a tensor of one element; each group may have its own.
        weight_decay: coefficient of the L2 term, or of the decay.
        decoupled_weight_decay: p <- (1 - lr * weight_decay) * p instead of an L2 term, as in AdamW.
        maximize, foreach, fused, capturable, differentiable, rounding: as in :class:`~trgnet.optimizers.LCAM`.
        state_dtype: dtype of both moments. Default: the parameter's, float32 for half precision. A second moment in
            bfloat16 would never decay if it were rounded to nearest, and is refused without ``rounding="stochastic"``;
            one in float16 would underflow and is refused.

    Raises:
        ValueError, RuntimeError: as ``torch.optim.Adam`` for hyper-parameters out of range and options that exclude each other.

    State: ``step``, ``exp_avg`` and ``exp_avg_sq`` as in torch.optim.Adam and AdamW, whose checkpoints load.

    Source: arXiv 2405.18498. Nearest before it: Padam, arXiv 1806.06763 (exponents from 0 to 1/2; its public ports have
    eps inside of the power and another bias correction).
    """

    form = "average"
    second = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        alpha: float | Tensor = 0.5,
        *,
        weight_decay: float | Tensor = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "alpha": alpha, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize, "foreach": foreach,
            "fused": fused, "capturable": capturable, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, defaults, state_dtype=state_dtype, rounding=rounding)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if isinstance(group["alpha"], (tuple, list)):
            raise ValueError(f"Invalid alpha value: {group['alpha']}; a pair is for GatedSMES")


class GatedSMES(GatedOptimizer):
    """SMES whose first decay rate and exponent the loss chooses, as in LCAM. Both are special cases of it.

        average <- the average of the losses with this one in it
        phase   <- 0 if loss < average, else 1;   beta1 = momenta[phase],   alpha = alpha[phase]
        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * m_hat / (v_hat^alpha + eps),   m_hat = m / (1 - product of all beta1 so far)

    With equal momenta and exponents it is SMES, with ``form="sum"`` and ``beta2=None`` it is LCAM.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, a number or a tensor of one element.
        momenta: beta1 where the loss is below the average, and otherwise.
        beta2: decay rate of the second moment. None: there is none, and nothing is divided by it.
        eps: added to the power.
        alpha: exponent, one or a pair as ``momenta``.
        form: ``"average"`` as above, or ``"sum"``: m <- beta1 * m + (1 - dampening) * g, not bias-corrected, as in SGD.
        dampening, nesterov: of ``form="sum"``.
        weight_decay: coefficient of the L2 term, or of the decay.
        decoupled_weight_decay: p <- (1 - lr * weight_decay) * p instead of an L2 term.
        average, gate, window, smoothing, process_group: as in :class:`~trgnet.optimizers.LCAM`.
        maximize, foreach, fused, capturable, differentiable, state_dtype, rounding: as in
            :class:`~trgnet.optimizers.SMES`.

    State: that of SMES, and the sum of log beta1 over the steps with its rounding error.

    Source: LCAM, arXiv 2309.02130; SMES, arXiv 2405.18498. Joining them is this package's choice.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momenta: tuple[float | Tensor, float | Tensor] = (0.9, 0.95),
        beta2: float | Tensor | None = 0.999,
        eps: float | Tensor = 1e-8,
        alpha: float | Tensor | tuple[float | Tensor, float | Tensor] = 0.5,
        *,
        form: str = "average",
        dampening: float | Tensor = 0.0,
        nesterov: bool = False,
        weight_decay: float | Tensor = 0.0,
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
        if form not in ("average", "sum"):
            raise ValueError(f"Invalid form: {form!r}, expected average or sum")
        defaults = {
            "lr": lr, "momenta": momenta, "beta2": beta2, "eps": eps, "alpha": as_pair(alpha), "form": form,
            "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "average": average, "gate": gate, "window": window,
            "smoothing": smoothing, "maximize": maximize, "foreach": foreach, "fused": fused,
            "capturable": capturable, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(
            params, defaults, process_group=process_group, state_dtype=state_dtype, rounding=rounding
        )

    @property
    def form(self) -> str:
        return "sum" if self.defaults["form"] == "sum" else "product"

    @property
    def second(self) -> bool:
        return self.defaults["beta2"] is not None

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if (group["beta2"] is None) == self.second:
            raise ValueError(
                "all groups have a second moment, or none: beta2 of this one differs from the default"
            )
        for i, momentum in enumerate(group["momenta"]):
            if not 0.0 <= momentum or (self.form == "product" and not momentum < 1.0):
                raise ValueError(f"Invalid momentum value at index {i}: {momentum}")
        if self.second and not 0.0 <= group["beta2"] < 1.0:
            raise ValueError(f"Invalid beta2 value: {group['beta2']}")
        if self.form == "product" and (group["dampening"] != 0 or group["nesterov"]):
            raise ValueError("dampening and nesterov are of form='sum'")
        self._check_nesterov(group)
