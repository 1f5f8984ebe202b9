"""LCAM against the published loop, against SGD, and its gate."""

from __future__ import annotations

import math

import pytest
import torch
from optimizer_cases import (
    DEVICE,
    assert_equal,
    assert_near,
    each_path,
    give_gradients,
    losses,
    parameters,
    reloaded,
)
from torch import Tensor
from trgnet.optimizers import LCAM

EPOCH = 6


class PublishedLoop:
    """The published training loop around torch.optim.SGD, in Python's numbers and the dtype of its parameters."""

    def __init__(self, params: list, momenta: tuple[float, float], **options: float) -> None:
        self.sgd = torch.optim.SGD(params, momentum=momenta[1], **options)
        self.momenta, self.epoch_losses = momenta, []

    def step(self, loss: float) -> int:
        """Step, then choose the momentum of the next one; returns the phase of the next one."""
        self.sgd.step()
        self.epoch_losses.append(loss)
        below = loss < sum(self.epoch_losses) / len(self.epoch_losses)
        for group in self.sgd.param_groups:
            group["momentum"] = self.momenta[0] if below else self.momenta[1]
        return 0 if below else 1

    def new_epoch(self) -> None:
        self.epoch_losses = []


@pytest.mark.parametrize("momenta", [(0.9, 0.95), (0.93, 0.9)], ids=["CIFAR-10", "CIFAR-100"])
@each_path()
def test_every_decision_and_step_is_that_of_the_published_loop(path: dict, momenta: tuple[float, float]):
    """Over three epochs in float64 (float32 in the kernel), saved and loaded in the middle of the second one."""
    options = dict(lr=0.1, weight_decay=5e-4)
    dtype = torch.float32 if "fused" in path else torch.float64
    bound = 2e-6 if "fused" in path or "capturable" in path else 1e-13

    def make(params: list) -> LCAM:
        return LCAM(params, momenta=momenta, **options, **path)

    truth, params = parameters(torch.float64), parameters(dtype)
    published, optimizer = PublishedLoop(truth, momenta, **options), make(params)
    phases, steps = [], [0, 0]
    for i, loss in enumerate(losses(3 * EPOCH)):
        if i and i % EPOCH == 0:
            published.new_epoch()
            optimizer.new_epoch()
        give_gradients(truth, i)
        for p, t in zip(params, truth):
            p.grad = t.grad.to(dtype)
        steps[optimizer.phase.item()] += 1
        phases.append(published.step(loss))
        optimizer.step(loss=torch.tensor(loss, device=DEVICE) if i % 2 else loss)
        assert optimizer.phase.item() == phases[-1]
        assert_near(params, truth, bound)
        if i == EPOCH + 2:
            params, optimizer = reloaded(optimizer, make)
    assert phases[0] == phases[EPOCH] == phases[2 * EPOCH] == 1 and 0 in phases
    assert torch.allclose(optimizer.phase_shares.cpu(), torch.tensor(steps) / sum(steps))


@pytest.mark.parametrize("options", [
    dict(),
    dict(weight_decay=0.1, dampening=0.3, maximize=True),
    dict(weight_decay=0.1, nesterov=True),
], ids=str)  # fmt: skip
@each_path("loop", "lists", "fused", "live lists")
def test_a_constant_gate_is_sgd(path: dict, options: dict):
    """Bit for bit in PyTorch; from a checkpoint of SGD, taken after two steps, too."""
    truth, params = parameters(), parameters()
    sgd = torch.optim.SGD(truth, lr=0.1, momentum=0.9, **options)
    optimizer = LCAM(params, lr=0.1, momenta=(0.9, 0.9), **options, **path)
    for i, loss in enumerate(losses(4)):
        give_gradients(truth, i)
        give_gradients(params, i)
        sgd.step()
        optimizer.step(loss=loss)
        if i == 1:
            optimizer = LCAM(params, lr=0.2, momenta=(0.9, 0.9), **path)
            optimizer.load_state_dict(sgd.state_dict())
            assert [g["nesterov"] for g in optimizer.param_groups] == [options.get("nesterov", False)]
        if path in ({"foreach": True}, {"foreach": False}):
            assert_equal([p.detach() for p in params], [p.detach() for p in truth])
        assert_near(params, truth, 1e-6)


def test_decoupled_weight_decay_shrinks_the_parameter():
    params = parameters(torch.float64)
    before = [p.detach().clone() for p in params]
    optimizer = LCAM(params, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=1.0)
    assert_near(params, [0.95 * p for p in before], 1e-15)


def expected_phases(values: list[float], average: str) -> list[int]:
    """The decision after each loss, in Python's numbers."""
    phases, seen, ema = [], [], None
    for x in values:
        seen.append(x)
        ema = x if ema is None else 0.75 * ema + 0.25 * x
        mean = {"run": seen, "window": seen[-4:], "epoch": seen}.get(average)
        phases.append(0 if x < (ema if mean is None else sum(mean) / len(mean)) else 1)
    return phases


@pytest.mark.parametrize("gate", ["next", "same"])
@pytest.mark.parametrize("average", ["epoch", "window", "ema", "run"])
@each_path("lists", "fused")
def test_averages_and_gates(path: dict, average: str, gate: str):
    """The momentum that a step uses: where the gradient is 0, it is what the buffer is multiplied by."""
    p = torch.nn.Parameter(torch.zeros((), device=DEVICE))
    optimizer = LCAM(
        [p], lr=0.1, momenta=(0.25, 0.5), average=average, gate=gate, window=4, smoothing=0.75, **path
    )
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = torch.zeros_like(p)
    values = losses(14)
    phases, before = expected_phases(values, average), 1.0
    for i, (loss, phase) in enumerate(zip(values, phases)):
        if i == 7:
            optimizer.new_epoch()
            if average == "epoch":
                phases[7:] = expected_phases(values[7:], "epoch")
                phase = phases[7]
        optimizer.step(loss=loss)
        now = optimizer.state[p]["momentum_buffer"].item()
        used = phase if gate == "same" else ([1, *phases][i])
        assert now / before == (0.25, 0.5)[used]
        before = now
        assert optimizer.phase.item() == phase


@each_path("loop", "lists", "fused")
def test_observed_micro_batches_are_averaged(path: dict):
    one, two = (LCAM(parameters(), lr=0.1, **path) for _ in range(2))
    for i in range(4):
        values = losses(3, seed=i)
        for optimizer in (one, two):
            give_gradients(optimizer.param_groups[0]["params"], i)
        one.observe(values[0])
        one.observe(torch.tensor(values[1], device=DEVICE))
        one.step(loss=values[2])
        two.step(loss=torch.tensor(values, device=DEVICE).mean())
        assert_equal([one._control], [two._control])
    assert one._control[2] == 4


@each_path("loop", "lists", "fused")
def test_losses_that_are_not_finite_or_not_there_change_no_decision(path: dict):
    params = parameters()
    optimizer = LCAM(params, lr=0.1, **path)
    for i, loss in enumerate([1.0, 0.5]):
        give_gradients(params, i)
        optimizer.step(loss=loss)
    control = optimizer._control[:4].clone()
    assert control[3] == 0
    for i, loss in enumerate([math.nan, math.inf, torch.tensor(-math.inf, device=DEVICE), None]):
        give_gradients(params, i)
        optimizer.step(loss=loss)
        assert_equal([optimizer._control[:4]], [control])
        assert all(p.isfinite().all() for p in params)
    optimizer.observe(math.nan)
    optimizer.step(loss=0.1)
    assert_equal([optimizer._control[:4]], [control])


def test_observed_losses_end_with_an_epoch_and_bad_ones_are_refused():
    optimizer = LCAM(parameters(), lr=0.1)
    optimizer.observe(5.0)
    optimizer.new_epoch()
    give_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert optimizer._control[2] == 0
    with pytest.raises(ValueError, match=r"loss must be one number, got a tensor of shape \(2,\)"):
        optimizer.step(loss=torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match="loss is on meta, expected a tensor on"):
        optimizer.observe(torch.ones((), device="meta"))


@pytest.mark.parametrize("arguments, message", [
    (dict(lr=-1.0), "Invalid learning rate: -1.0"),
    (dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
    (dict(momenta=(0.9, -0.1)), "Invalid momentum value: -0.1"),
    (dict(momenta=(0.9,)), "Invalid momenta: expected two"),
    (dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (dict(nesterov=True, momenta=(0.0, 0.9)), "Nesterov momentum requires a momentum and zero dampening"),
    (dict(nesterov=True, dampening=0.1), "Nesterov momentum requires a momentum and zero dampening"),
    (dict(average="median"), "Invalid average: 'median', expected one of epoch, window, ema, run"),
    (dict(gate="now"), "Invalid gate: 'now', expected one of next, same"),
    (dict(window=0), "Invalid window: 0"),
    (dict(smoothing=1.0), "Invalid smoothing value: 1.0"),
    (dict(rounding="up"), "Invalid rounding: 'up', expected one of nearest, kahan, stochastic"),
    (dict(state_dtype=torch.int32), "Invalid state_dtype: torch.int32, expected a floating-point dtype"),
], ids=str)  # fmt: skip
def test_bad_arguments_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LCAM(parameters(), **{"lr": 0.1, **arguments})
    if not {"average", "gate", "window", "smoothing", "rounding", "state_dtype"} & arguments.keys():
        optimizer = LCAM(parameters(), lr=0.1)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [torch.zeros(2, device=DEVICE)], **arguments})
        assert len(optimizer.param_groups) == 1


def test_a_window_of_another_size_starts_anew():
    first = LCAM(parameters(), lr=0.1, average="window", window=3)
    for i, loss in enumerate(losses(5)):
        give_gradients(first.param_groups[0]["params"], i)
        first.step(loss=loss)
    _, same = reloaded(first, lambda p: LCAM(p, lr=0.1, average="window", window=3))
    _, other = reloaded(first, lambda p: LCAM(p, lr=0.1, average="window", window=5))
    assert_equal([same._control, same._history], [first._control, first._history])
    assert other._control[:3].tolist() == [0.0, 0.0, 0.0] and len(other._history) == 5
    assert other.phase == first.phase


def _steps(path: dict) -> int:
    """Few under the interpreter."""
    return 10 if "fused" in path and DEVICE == "cpu" else 300


def small_steps(rounding: str, dtype: torch.dtype, path: dict) -> Tensor:
    """A parameter of 1 after steps of 2^-12, each less than half a unit of its last place."""
    p = torch.nn.Parameter(torch.ones(500, dtype=dtype, device=DEVICE))
    optimizer = LCAM([p], lr=2**-12, momenta=(0.0, 0.0), rounding=rounding, **path)
    p.grad = torch.ones_like(p)
    for _ in range(_steps(path)):
        optimizer.step()
    return p.detach().float()


@each_path("loop", "lists", "fused")
def test_rounding_of_half_precision(path: dict):
    steps = _steps(path)
    exact = 1 - steps * 2**-12
    assert (small_steps("nearest", torch.bfloat16, path) == 1).all()
    kahan = small_steps("kahan", torch.bfloat16, path)
    assert (kahan - exact).abs().max() <= 2**-8
    if steps == 300:
        assert (kahan < 0.95).all()
    stochastic = small_steps("stochastic", torch.bfloat16, path)
    assert stochastic.mean().item() == pytest.approx(exact, abs=3e-3 if steps == 300 else 1.5e-3)
    assert len(stochastic.unique()) > 1


@each_path("loop", "lists", "fused")
def test_gradients_stay_as_they_are(path: dict):
    params = parameters()
    give_gradients(params, 0)
    grads = [p.grad.clone() for p in params]
    LCAM(params, lr=0.1, weight_decay=0.1, maximize=True, **path).step(loss=1.0, clip=0.5)
    assert_equal([p.grad for p in params], grads)
