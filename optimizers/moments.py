"""What the optimizers on moments share: groups, state, the three ways to do a step, and the loss gate.

A step is :mod:`trgnet.kernels.moment_update`. Here is what makes it an optimizer of ``torch.optim``: parameter groups,
state by torch's names, checkpoints, hooks, closures, complex and distributed parameters, gradient scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from trgnet.kernels.loss_gate import HIGH_STEPS, LOW_STEPS, PHASE, new_control, reset_average
from trgnet.kernels.moment_update import (
    COUNTS,
    ROUNDINGS,
    Draw,
    Hyper,
    Moments,
    MomentTable,
    Scalars,
    count_step,
    fused_obstacle,
    gate_step,
    log_of,
    step_scalars,
    update_all,
    update_one_by_one,
)

from .participants import Entry, Participants

AVERAGES = ("epoch", "window", "ema", "run")
GATES = ("next", "same")
LOGS = COUNTS[1:]
HALF = (torch.float16, torch.bfloat16)
# Where in a row of hyper-parameters those of a group are, by their names; of a pair both places. An optimizer without a
# gate is always in phase 1.
SLOTS = {
    "lr": 0, "momenta": (3, 4), "betas": (4, 5), "beta2": 5, "eps": 6, "alpha": (7, 8), "dampening": 9,
}  # fmt: skip
HYPER = (*SLOTS, "weight_decay", "decoupled_weight_decay", "maximize", "nesterov")
"""All that a row depends on."""


class MomentOptimizer(torch.optim.Optimizer):
    """Base class. Subclasses say what their groups hold, and ``form``, ``second`` and ``gated``."""

    first_name = "exp_avg"
    second_name = "exp_avg_sq"
    spare_name = "rounding_error"
    group_state = ("loss_gate", "loss_window", "rounding_seed")
    """What a group holds that is state and no setting."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        state_dtype: torch.dtype | None,
        rounding: str,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"Invalid rounding: {rounding!r}, expected one of {', '.join(ROUNDINGS)}")
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise ValueError(f"Invalid state_dtype: {state_dtype}, expected a floating-point dtype")
        self._check_paths(defaults)
        self.process_group = process_group
        self._settings = {"state_dtype": state_dtype, "rounding": rounding}
        if rounding == "stochastic":
            defaults["rounding_seed"] = int(torch.randint(2**31 - 1, ()).item())
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """What is built when it is needed."""
        self._control: Tensor | None = None
        self._history: Tensor | None = None
        self._counts: Tensor | None = None
        self._cohorts: dict[Tensor, Any] = {}
        self._stepping: list[int] = []
        self._participants: Participants | None = None
        self._plain = True
        self._rows: Tensor | None = None
        self._known_rows: list[list[float | None]] = []
        self._settings_in_rows: list[Any] | None = None
        self._live: list[Tensor] = []
        self._table: MomentTable | None = None
        self._captured: list[MomentTable] = []
        self._observed: list[Tensor] = []

    # What subclasses say.

    @property
    def form(self) -> str:
        """One of :data:`trgnet.kernels.moment_update.FORMS`."""
        raise NotImplementedError

    @property
    def second(self) -> bool:
        """Whether there is a second moment."""
        raise NotImplementedError

    @property
    def gated(self) -> bool:
        """Whether the loss chooses momentum and exponent."""
        return "average" in self.defaults

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for hyper-parameters out of range."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not 0.0 <= lr:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 <= group["weight_decay"]:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        if not 0.0 <= group.get("eps", 0.0):
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        for i, beta in enumerate(group.get("betas", ())):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        for alpha in as_pair(group.get("alpha", 0.0)):
            if isinstance(alpha, Tensor) and alpha.numel() != 1:
                raise ValueError("Tensor alpha must be 1-element")
            if not math.isfinite(alpha):
                raise ValueError(f"Invalid alpha value: {alpha}")

    # Options that exclude one another, as in torch.optim.

    @staticmethod
    def _check_paths(defaults: dict[str, Any]) -> None:
        if defaults["fused"] and defaults["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if defaults["fused"] and defaults["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if defaults["foreach"] and defaults["differentiable"]:
            raise RuntimeError("`foreach` does not support `differentiable`")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by GradScaler: the kernel unscales gradients and skips the step itself."""
        return bool(self.defaults["fused"])

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; also raises ValueError for hyper-parameters out of range and for dtypes that the state cannot have."""
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for p in group["params"]:
                self._check_dtypes(p)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        self._counts = self._rows = self._table = None
        self._attach_gate()
        if self.defaults["capturable"]:
            self._make_live()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _check_dtypes(self, p: Tensor) -> None:
        rounding, moment = self._settings["rounding"], self._state_dtype(p)
        if self.defaults["fused"]:
            reason = fused_obstacle([_local(p)])
            if reason:
                raise RuntimeError(
                    f"`fused=True` cannot update a parameter of {p.dtype} on {p.device}: {reason}"
                )
        if rounding == "stochastic" and torch.float16 in (p.dtype, moment):
            raise ValueError("stochastic rounding is for bfloat16; there are float16 parameters or moments")
        if self.second and moment == torch.float16:
            raise ValueError("a second moment in float16 underflows; choose state_dtype=torch.float32")
        if self.second and moment == torch.bfloat16 and rounding != "stochastic":
            raise ValueError(
                "a second moment in bfloat16 never decays when it is rounded to nearest; choose "
                "state_dtype=torch.float32 or rounding='stochastic'"
            )

    def _state_dtype(self, p: Tensor) -> torch.dtype:
        """Of the moments: as asked for, else the parameter's, else float32 for half precision."""
        if self._settings["state_dtype"] is not None and not p.is_complex():
            return self._settings["state_dtype"]
        return torch.float32 if p.dtype in HALF else p.dtype

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        """The hyper-parameters of a group as the step takes them."""
        decay = group["weight_decay"]
        decoupled = group.get("decoupled_weight_decay", False)
        betas = group.get("betas", (0.0, 0.0))
        beta2 = group.get("beta2", betas[1])
        return Hyper(
            lr=group["lr"],
            l2=0.0 if decoupled else decay,
            decay=decay if decoupled else 0.0,
            beta1=as_pair(group.get("momenta", betas[0])),
            beta2=0.0 if beta2 is None else beta2,
            eps=group.get("eps", 0.0),
            alpha=as_pair(group.get("alpha", 0.0)),
            dampening=group.get("dampening", 0.0),
            sign=-1.0 if group["maximize"] else 1.0,
            nesterov=float(group.get("nesterov", False)),
        )

    # The step.

    @torch.compiler.disable
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Tensor | float | None = None,
        clip: Tensor | float | None = None,
    ) -> Any:
        """Do one step.

        Args:
            closure: computes the loss and the gradients again, and returns the loss; used as ``loss`` if none is given.
            loss: the data loss, unscaled and undivided: a 0-dim tensor on the device of the parameters, or a number.
                Without one the last decision stays in force. Ignored by optimizers without a gate.
            clip: coefficient that multiplies every gradient, in the same forms.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: sparse gradients; a capture into a CUDA graph without ``capturable=True``, with a loss that is a
                Python number, or while a parameter has no gradient.
            ValueError: a loss that is not one number or on another device.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
            loss = returned if loss is None else loss
        self._check_capture(loss, clip)
        with torch.no_grad():
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            participants = self._take_part(grads)
            observed = self._take_loss(loss)
            if self.defaults["fused"] and participants.entries:
                self._fused_step(participants, grads, observed, clip)
                return returned
        # Without entries there is nothing to launch; the gate still sees the loss.
        self._refuse_sparse(grads)
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            self._plain_step(participants.entries, observed, clip)
        return returned

    def _check_capture(self, *numbers: Tensor | float | None) -> None:
        if not capturing():
            return
        name = type(self).__name__
        if not self.defaults["capturable"]:
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {name} but capturable is False."
            )
        if any(isinstance(x, (int, float)) for x in numbers):
            raise RuntimeError(
                f"{name}: a Python number would be frozen in the graph; pass a tensor on the device"
            )
        if any(p.grad is None for p in self._params()):
            raise RuntimeError(
                f"{name}: a parameter without a gradient would be left out of the captured graph; "
                "do a backward pass first, or leave the parameter out of the optimizer"
            )

    def _take_part(self, grads: Sequence[Tensor | None]) -> Participants:
        """The parameters that have a gradient, collected anew only if they, their groups or their state changed."""
        known = self._participants
        if (
            self._counts is None
            or known is None
            or not known.are_current(self.param_groups, grads, self.state)
        ):
            self._refuse_sparse(grads)
            params = self._params()
            stepping = [i for i, grad in enumerate(grads) if grad is not None]
            for i in stepping:
                if not self.state[params[i]]:
                    self._init_state(params[i], self.state[params[i]])
            if stepping:
                self._gather_counts(params, stepping)
            self._participants = Participants(self.param_groups, grads, self.state)
            self._table, self._plain = None, all(map(_is_plain, self._participants.params))
        return self._participants

    def _refuse_sparse(self, grads: Sequence[Tensor | None]) -> None:
        if any(grad is not None and grad.is_sparse for grad in grads):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def _init_state(self, p: Tensor, state: dict[str, Any]) -> None:
        names = [self.first_name] + ([self.second_name] if self.second else [])
        for name in names:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format, dtype=self._state_dtype(p))
        if self._settings["rounding"] == "kahan" and p.dtype in HALF:
            state[self.spare_name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        self._counts = None

    @property
    def _has_spare(self) -> bool:
        return self._settings["rounding"] == "kahan"

    @property
    def _counted(self) -> tuple[str, ...]:
        return COUNTS if self.form == "product" else COUNTS[:1]

    def _gather_counts(self, params: list[Tensor], stepping: list[int]) -> None:
        """Keep the counts of all parameters in one tensor, of which those in ``state`` are views."""
        new = self._counts is None
        if new:
            self._counts = torch.zeros(len(params), len(COUNTS), device=_local(params[0]).device)
        replaced = [p for i, p in enumerate(params) if self._adopt_counts(i, self.state.get(p))]
        if not (new or replaced) and stepping == self._stepping:
            return
        if not new:  # somebody else has set them
            self._cohorts.update((p, object()) for p in replaced)
        # Parameters that have always stepped together have their scalars in common; the host knows without asking.
        taking_part, kinds = set(stepping), {}
        self._cohorts = {
            p: kinds.setdefault((self._cohorts.get(p), i in taking_part), len(kinds))
            for i, p in enumerate(params)
        }
        self._stepping = stepping

    def _adopt_counts(self, index: int, state: dict[str, Any] | None) -> bool:
        """Put the counts in ``state`` into their places, if they are elsewhere; returns whether there were any."""
        replaced = False
        for j, name in enumerate(self._counted if state else ()):
            value, address = state.get(name), self._counts.data_ptr() + 4 * (len(COUNTS) * index + j)
            if value is not None and value.data_ptr() == address:
                continue
            place = state[name] = self._counts[index, j]
            if value is not None:
                place.copy_(value)
                replaced = True
        return replaced

    def _moments(self, entries: list[Entry]) -> Moments:
        """The tensors of these entries."""
        params, grads = [e.param for e in entries], [e.param.grad for e in entries]
        first = [e.state[self.first_name] for e in entries]
        second = [e.state[self.second_name] for e in entries] if self.second else []
        spare = [e.state.get(self.spare_name) for e in entries] if self._has_spare else []
        return self._computed(Moments(params, grads, first, second, spare), all(map(_is_plain, params)))

    def _computed(self, moments: Moments, plain: bool) -> Moments:
        """The tensors that are computed with: local parts of distributed ones, complex ones as pairs of real numbers."""
        if all(t is None for t in moments.spare):
            moments = moments._replace(spare=[])
        if plain:
            return moments
        moments = moments._replace(grads=list(map(_matching, moments.grads, moments.params)))
        return Moments(*([_computed(t) for t in tensors] for tensors in moments))

    # In PyTorch: one by one, or lists.

    def _plain_step(self, entries: list[Entry], loss: Tensor | None, clip: Tensor | float | None) -> None:
        gate = self._gate_arguments()
        with torch.no_grad():
            phase, control, history = gate_step(self._control, self._history, loss, *gate)
        numbers = self._in_numbers(entries)
        if numbers:
            phase, clip = float(phase), None if clip is None else float(clip)
        elif isinstance(clip, Tensor):
            clip = clip.reshape(())
        for bucket in self._buckets(entries):
            hyper = self._hyper(self.param_groups[bucket[0].group])
            hyper = Hyper(*map(_number if numbers else _wide, hyper))
            self._update(bucket, hyper, phase, clip, numbers)
        if self._control is not None:
            self._control.copy_(control)
        if self._history is not None:
            self._history.copy_(history)

    def _in_numbers(self, entries: list[Entry]) -> bool:
        """Whether the scalars of the step are Python numbers: on a CPU, where reading them waits for nothing."""
        live = self.defaults["capturable"] or self.defaults["differentiable"]
        return not live and bool(entries) and self._counts.device.type == "cpu"

    def _buckets(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        """Entries that have all scalars in common."""
        kahan = self._settings["rounding"] == "kahan"
        if entries and len(self.param_groups) == 1 and len(set(self._cohorts.values())) == 1 and not kahan:
            yield entries
            return
        buckets: dict[Any, list[Entry]] = {}
        for e in entries:
            key = e.group, self._cohorts[e.param], self.spare_name in e.state
            buckets.setdefault(key, []).append(e)
        yield from buckets.values()

    def _update(
        self, bucket: list[Entry], hyper: Hyper, phase: Any, clip: Tensor | float | None, numbers: bool
    ) -> None:
        indices = [e.index for e in bucket]
        with torch.no_grad():
            counts = self._counts[indices[0]]
            counts = counts.tolist() if numbers else counts.double().unbind()
        s = step_scalars(hyper, self.form, self.second, phase, counts)
        if clip is not None:
            s = s._replace(scale=s.scale * clip)
        draws = [self._draw(i, counts[0]) for i in indices]
        moments = self._moments(bucket)
        if self._uses_lists(bucket):
            update_all(moments, s, draws)
        else:
            self._update_one_by_one(bucket, moments, s, draws)
        with torch.no_grad():
            count_step(self._counts, indices, self.form, s.beta1)

    def _draw(self, index: int, step: Any) -> Draw | None:
        seed = self.defaults.get("rounding_seed")
        return None if seed is None else Draw(self.param_groups[0]["rounding_seed"], step, index)

    def _uses_lists(self, bucket: list[Entry]) -> bool:
        if self.defaults["foreach"] is not None:
            return self.defaults["foreach"]
        return not self.defaults["differentiable"]

    def _update_one_by_one(
        self, bucket: list[Entry], moments: Moments, s: Scalars, draws: list[Draw | None]
    ) -> None:
        differentiable = self.defaults["differentiable"]
        if differentiable:  # what backward needs must not be overwritten
            moments = moments._replace(params=[p.clone() for p in moments.params])
        for entry, new in zip(bucket, update_one_by_one(moments, s, draws)):
            old = self._moments([entry])
            old.params[0].copy_(new.params[0])
            for name, was, tensors in zip(
                (self.first_name, self.second_name, self.spare_name), old[2:], new[2:], strict=True
            ):
                if tensors and differentiable:
                    entry.state[name] = _like(tensors[0], entry.state[name])
                elif tensors:
                    was[0].copy_(tensors[0])

    # In one kernel.

    def _fused_step(
        self,
        participants: Participants,
        grads: Sequence[Tensor | None],
        loss: Tensor | None,
        clip: Tensor | float | None,
    ) -> None:
        average, share, same = self._gate_arguments()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        moments = self._all_moments(participants, grads)
        table = self._table
        recording = capturing()
        # Replays read a captured table, and copy it again from the host's memory: it must stay, and stay as it is.
        fixed = recording or self._is_captured(table)
        if table is None or not table.follow(moments, move_gradients=not fixed):
            moments, table = self._new_table(grads)
        if recording and not self._is_captured(table):
            self._captured.append(table)
        self._refresh_rows(table.device)
        clip = None if clip is None else _scalar_on(clip, table.device, "clip")
        table.launch(
            moments, self._rows, self._counts, self._control, self._history, loss, clip, grad_scale, found_inf,
            form=self.form, average=average, share=share, same=same, rounding=self._settings["rounding"],
            seed=self.param_groups[0].get("rounding_seed", 0),
        )  # fmt: skip
        torch.autograd.graph.increment_version(participants.params)

    def _all_moments(self, participants: Participants, grads: Sequence[Tensor | None]) -> Moments:
        """The tensors of a step."""
        first = participants.tensors(self.first_name)
        second = participants.tensors(self.second_name) if self.second else []
        spare = participants.optional_tensors(self.spare_name) if self._has_spare else []
        moments = Moments(participants.params, participants.gradients(grads), first, second, spare)
        return self._computed(moments, self._plain)

    def _is_captured(self, table: MomentTable | None) -> bool:
        return any(table is captured for captured in self._captured)

    def _new_table(self, grads: Sequence[Tensor | None]) -> tuple[Moments, MomentTable]:
        """The tensors of a step, of which something else than the gradients moved, and the table of their addresses."""
        if self._table is not None:  # state may have moved, too
            self._participants = None
        participants = self._take_part(grads)
        moments = self._all_moments(participants, grads)
        tensors = [t for tensors in moments for t in tensors if t is not None]
        reason = fused_obstacle(tensors) or self._elsewhere(tensors[0].device)
        if reason:
            raise RuntimeError(f"`fused=True` cannot do this step: {reason}")
        entries = participants.entries
        self._table = MomentTable(moments, [e.group for e in entries], [e.index for e in entries])
        return moments, self._table

    def _elsewhere(self, device: torch.device) -> str | None:
        """Why the optimizer's own tensors are not those of parameters on this device; None if they are."""
        for tensor in (self._control, self._counts, self._rows):
            if tensor is not None and tensor.device != device:
                return (
                    f"its parameters are on {device} and its own state is on {tensor.device}; move the model before "
                    "you build the optimizer, and load its state_dict into the new one"
                )
        return None

    def _refresh_rows(self, device: torch.device) -> None:
        """Bring the hyper-parameters on the device up to date: nothing is copied if none has changed."""
        if self._rows is None:
            self._rows, self._known_rows = torch.zeros(len(self.param_groups), 16, device=device), []
            self._settings_in_rows = None
        settings = [group.get(name) for group in self.param_groups for name in HYPER]
        known = self._settings_in_rows
        if known is not None and len(known) == len(settings) and all(map(is_, settings, known)):
            return
        if not self._known_rows:
            self._known_rows = [[None] * 16 for _ in self.param_groups]
        rows = [self._hyper(group).row for group in self.param_groups]
        self._settings_in_rows = settings if self._are_constant(settings, rows) else None
        if not any(isinstance(x, Tensor) for row in rows for x in row):
            if rows != self._known_rows:
                pinned = torch.tensor(rows, pin_memory=device.type == "cuda")
                self._rows.copy_(pinned, non_blocking=True)
                self._known_rows = rows
            return
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if isinstance(value, Tensor):
                    self._known_rows[i][j] = None
                    if value.data_ptr() != self._address_in_rows(i, j):
                        self._rows[i, j].copy_(value.reshape(()))
                elif value != self._known_rows[i][j]:
                    self._rows[i, j].fill_(value)
                    self._known_rows[i][j] = value

    def _are_constant(self, settings: list[Any], rows: list[list[Any]]) -> bool:
        """Whether the rows change only if a setting is replaced by another object: plain numbers, and tensors in their places."""
        return not any(isinstance(x, list) for x in settings) and all(
            x.data_ptr() == self._address_in_rows(i, j)
            if isinstance(x, Tensor)
            else isinstance(x, (int, float))
            for i, row in enumerate(rows)
            for j, x in enumerate(row)
        )

    def _address_in_rows(self, i: int, j: int) -> int:
        return self._rows.data_ptr() + 4 * (16 * i + j)

    def _make_live(self, replace: bool = False) -> None:
        """Put every hyper-parameter into its place on the device and a view of that into its group (``capturable=True``).

        Tensors of the caller stay, unless they are to be replaced; they are copied from at every step.
        """
        device = _local(self.param_groups[0]["params"][0]).device
        if self._rows is None:
            self._rows, self._known_rows = torch.zeros(len(self.param_groups), 16, device=device), []
        ours, self._live = {id(t) for t in self._live}, []

        def live(value: Any, place: Tensor) -> Tensor:
            if isinstance(value, Tensor) and not replace and id(value) not in ours:
                return value
            with torch.no_grad():
                place.copy_(value.reshape(())) if isinstance(value, Tensor) else place.fill_(value)
            self._live.append(place)
            return place

        for row, group in zip(self._rows, self.param_groups):
            for name, slots in self._slots(group).items():
                if isinstance(slots, tuple):
                    group[name] = tuple(live(x, row[slot]) for x, slot in zip(as_pair(group[name]), slots))
                else:
                    group[name] = live(group[name], row[slots])

    def _slots(self, group: dict[str, Any]) -> dict[str, Any]:
        slots = {name: slot for name, slot in SLOTS.items() if group.get(name) is not None}
        slots["weight_decay"] = 2 if group.get("decoupled_weight_decay", False) else 1
        if not self.gated and "alpha" in slots:
            slots["alpha"] = 8
        return slots

    # The gate.

    def _attach_gate(self) -> None:
        """One control block, in every group: so it is saved with them."""
        if not self.gated:
            return
        if self._control is None:
            device = _local(self.param_groups[0]["params"][0]).device
            self._control = new_control(device)
            if self.defaults["average"] == "window":
                self._history = torch.zeros(self.defaults["window"], device=device)
        for group in self.param_groups:
            group["loss_gate"] = self._control
            if self._history is not None:
                group["loss_window"] = self._history

    def _gate_arguments(self) -> tuple[str, float, bool]:
        """(average, share, same) as the kernels name them."""
        if not self.gated:
            return "mean", 0.0, False
        average = self.defaults["average"]
        kind = average if average in ("window", "ema") else "mean"
        return kind, 1 - self.defaults["smoothing"], self.defaults["gate"] == "same"

    def _take_loss(self, loss: Tensor | float | None) -> Tensor | None:
        """The loss of this step: the mean of what was observed, over all processes."""
        if not self.gated:
            return None
        losses = self._observed + ([] if loss is None else [self._checked_loss(loss)])
        self._observed = []
        if not losses:
            return None
        mean = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        return self._over_processes(mean)

    def _checked_loss(self, loss: Tensor | float) -> Tensor:
        if _is_distributed(loss):
            loss = loss.full_tensor()
        return _scalar_on(loss, self._control.device, "loss")

    def _over_processes(self, loss: Tensor) -> Tensor:
        """Replicas that decide each on their own loss would silently diverge."""
        if not dist.is_available() or not dist.is_initialized():
            return loss
        processes = dist.get_world_size(self.process_group)
        if processes <= 1:
            return loss
        total = loss.clone()
        dist.all_reduce(total, group=self.process_group)
        return total / processes

    # Checkpoints.

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by ``load_state_dict``, with loaded state and groups."""
        if "_settings" in state:  # a copy, or out of a pickle
            self._forget()
            self.process_group = None
        super().__setstate__(state)
        for group in self.param_groups:
            if group.get("amsgrad"):
                raise ValueError(f"{type(self).__name__} cannot go on from a checkpoint with amsgrad=True")
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._check_group(group)
            for p in group["params"]:
                if p in self.state:
                    self._adopt(p, group)
        self._counts, self._table, self._observed = None, None, []
        self._cohorts = {
            p: tuple(float(s[name]) for name in self._counted) for p, s in self.state.items() if s
        }
        self._adopt_gate()
        if self.defaults["capturable"]:
            self._make_live(replace=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments keep this optimizer's dtypes (torch casts them to the parameter's), and nothing is shared
        with ``state_dict``. A checkpoint of torch's SGD loads into LCAM, one of Adam or AdamW into SMES."""
        # The last hook: those of the user have seen the tensors by then.
        handle = self.register_load_state_dict_pre_hook(_hide_tensors)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _adopt(self, p: Tensor, group: dict[str, Any]) -> None:
        """Make loaded state of a parameter this optimizer's own."""
        state = {name: x.tensor if isinstance(x, _Hidden) else x for name, x in self.state[p].items()}
        kept: dict[str, Any] = {}
        for name in (self.first_name, self.second_name, self.spare_name):
            if name == self.second_name and not self.second or state.get(name) is None:
                continue
            dtype = p.dtype if name == self.spare_name else self._state_dtype(p)
            kept[name] = _copied(state[name], p, dtype, name)
        if self.first_name not in kept:
            self.state.pop(p)
            return
        if self.second and self.second_name not in kept:
            kept[self.second_name] = torch.zeros_like(p, dtype=self._state_dtype(p))
        if self._settings["rounding"] == "kahan" and p.dtype in HALF and self.spare_name not in kept:
            kept[self.spare_name] = torch.zeros_like(p)
        steps = float(state.get("step", 1.0))  # torch's SGD does not count them
        kept["step"] = torch.tensor(steps)
        if self.form == "product":
            beta1 = float(as_pair(group.get("betas", group["momenta"]))[0])
            so_far = (steps * log_of(beta1), 0.0)
            for name, value in zip(LOGS, so_far):
                kept[name] = torch.tensor(float(state.get(name, value)))
        self.state[p] = kept

    def _adopt_gate(self) -> None:
        saved, window = (self.param_groups[0].get(name) for name in ("loss_gate", "loss_window"))
        self._attach_gate()
        if self._control is None:
            return
        with torch.no_grad():
            if saved is not self._control:
                self._control.copy_(new_control() if saved is None else saved)
            if self._history is not None and window is not self._history:
                if window is not None and len(window) == len(self._history):
                    self._history.copy_(window)
                else:  # another window: its losses are not there
                    reset_average(self._control, self._history)


class GatedOptimizer(MomentOptimizer):
    """Base class of those whose loss decides on the momentum."""

    def __init__(self, params: Any, defaults: dict[str, Any], **settings: Any) -> None:
        average, gate = defaults["average"], defaults["gate"]
        if average not in AVERAGES:
            raise ValueError(f"Invalid average: {average!r}, expected one of {', '.join(AVERAGES)}")
        if gate not in GATES:
            raise ValueError(f"Invalid gate: {gate!r}, expected one of {', '.join(GATES)}")
        if defaults["window"] < 1:
            raise ValueError(f"Invalid window: {defaults['window']}")
        if not 0.0 <= defaults["smoothing"] < 1.0:
            raise ValueError(f"Invalid smoothing value: {defaults['smoothing']}")
        super().__init__(params, defaults, **settings)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if len(group["momenta"]) != 2:
            raise ValueError(f"Invalid momenta: expected two, got {group['momenta']}")

    @staticmethod
    def _check_nesterov(group: dict[str, Any]) -> None:
        if group["nesterov"] and (min(map(float, group["momenta"])) <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def observe(self, loss: Tensor | float) -> None:
        """Take the loss of a micro-batch: the next step's is the mean of those observed and the one given to it, if any.

        A loss that is not finite makes the mean so, and the step then leaves average and decision as they are. What is
        observed is not part of a checkpoint, as accumulated gradients are not.
        """
        self._observed.append(self._checked_loss(loss).clone())

    def new_epoch(self) -> None:
        """Start an epoch: with ``average="epoch"`` the average is forgotten; the chosen momentum never is."""
        self._observed = []
        if self.defaults["average"] == "epoch":
            reset_average(self._control)

    @property
    def phase(self) -> Tensor:
        """The phase in force, a 0-dim tensor on the device: 0 (loss below average) or 1. With ``gate="next"`` it is that
        of the next step, with ``gate="same"`` that of the last one. Reading it does not wait for the device."""
        return self._control[PHASE].to(torch.int64)

    @property
    def phase_shares(self) -> Tensor:
        """Shares of the steps so far that were in phase 0 and 1, a tensor (2,) on the device; zeros before the first."""
        steps = self.phase_steps
        return steps / steps.sum().clamp(min=1)

    @property
    def phase_steps(self) -> Tensor:
        """The steps so far in phase 0 and 1, a tensor (2,) on the device. Later steps do not change it."""
        return self._control[LOW_STEPS : HIGH_STEPS + 1].clone()


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def as_pair(value: Any) -> tuple[Any, Any]:
    """A pair as it is, one value for both phases."""
    return value if isinstance(value, (tuple, list)) else (value, value)


def _number(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, tuple) else float(value)


def _wide(value: Any) -> Any:
    """Tensors in float64, 0-dim; numbers as they are."""
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    return value.reshape(()).double() if isinstance(value, Tensor) else value


def _scalar_on(value: Tensor | float, device: torch.device, name: str) -> Tensor:
    """A number as a float32 tensor () on the device, without waiting for it."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), device=device)
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected a tensor on {device} or a number")
    if value.dim() == 0 and value.dtype == torch.float32 and not value.requires_grad:
        return value
    return value.detach().reshape(()).float()


PLAIN = (Tensor, torch.nn.Parameter)


def _is_plain(t: Tensor) -> bool:
    return type(t) in PLAIN and not t.is_complex()


def _is_distributed(t: Any) -> bool:
    return type(t) not in PLAIN and hasattr(t, "to_local")


def _local(t: Tensor) -> Tensor:
    """This process's part of a distributed tensor."""
    return t if type(t) in PLAIN or not _is_distributed(t) else t.to_local()


def _matching(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient, distributed as its parameter is."""
    if type(p) in PLAIN:
        return grad
    if _is_distributed(p) and _is_distributed(grad) and grad.placements != p.placements:
        return grad.redistribute(placements=p.placements)
    return grad


def _computed(t: Tensor | None) -> Tensor | None:
    """What is computed with: the local part of a distributed tensor, complex numbers as pairs of real ones."""
    if t is None:
        return None
    t = _local(t)
    return torch.view_as_real(t) if t.is_complex() else t


def _like(t: Tensor, old: Tensor) -> Tensor:
    return torch.view_as_complex(t) if old.is_complex() else t


def _copied(t: Tensor, p: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A copy of loaded state on the device and in the layout of its parameter."""
    if t.shape != p.shape:
        raise ValueError(f"loaded {name} has the shape {tuple(t.shape)}, its parameter {tuple(p.shape)}")
    copy = torch.empty_like(p, dtype=dtype)
    with torch.no_grad():
        return copy.copy_(t)


class _Hidden:
    """A tensor that torch's ``load_state_dict`` leaves as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _hide_tensors(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        key: {name: _Hidden(x) if isinstance(x, Tensor) else x for name, x in values.items()}
        if isinstance(values, dict)
        else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
