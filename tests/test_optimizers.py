from __future__ import annotations

import io
import math

import pytest
import torch
from allocations import PoisonedMemory
from torch.optim.lr_scheduler import LambdaLR
from trgnet.optimizers import (
    LCAM,
    OPTIMIZERS,
    SCHEDULES,
    SMES,
    GatedSMES,
    build_exponent_schedule,
    build_optimizer,
    build_schedule,
    builders,
    learning_rates,
    load_training_state,
    training_state,
)

GATE = {"average": "window", "gate": "same", "window": 2, "smoothing": 0.5}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in ((3, 5), (7,))
    ]


def step(
    params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, times: int = 3
) -> list[torch.Tensor]:
    for _ in range(times):
        optimizer.zero_grad()
        loss = sum((p.sin() * p).sum() for p in params)
        loss.backward()
        if hasattr(optimizer, "observe"):
            optimizer.observe(loss)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        (
            "adam",
            lambda p, wd: torch.optim.Adam(
                p, lr=0.1, betas=(0.8, 0.95), eps=0.1, weight_decay=wd, fused=True
            ),
        ),
        (
            "adamw",
            lambda p, wd: torch.optim.AdamW(
                p, lr=0.1, betas=(0.8, 0.95), eps=0.1, weight_decay=wd, fused=True
            ),
        ),
        ("sgd", lambda p, wd: torch.optim.SGD(p, lr=0.1, momentum=0.7, weight_decay=wd, fused=True)),
        ("lcam", lambda p, wd: LCAM(p, lr=0.1, momenta=(0.7, 0.8), weight_decay=wd, **GATE)),
        ("smes", lambda p, wd: SMES(p, lr=0.1, betas=(0.8, 0.95), eps=0.1, alpha=0.3, weight_decay=wd)),
        (
            "gated_smes",
            lambda p, wd: GatedSMES(
                p, lr=0.1, momenta=(0.7, 0.8), beta2=0.95, eps=0.1, alpha=(0.2, 0.4), weight_decay=wd, **GATE
            ),
        ),
    ],
)
def test_optimizer_is_as_named_with_every_setting_passed_on(name, theirs, weight_decay):
    ours_params, their_params = parameters(), parameters()
    ours = build_optimizer(
        ours_params, name=name, lr=0.1, weight_decay=weight_decay, betas=(0.8, 0.95), momentum=0.7,
        momenta=(0.7, 0.8), eps=0.1, alpha=0.3, alphas=(0.2, 0.4), **GATE,
    )  # fmt: skip
    for got, expected in zip(
        step(ours_params, ours), step(their_params, theirs(their_params, weight_decay)), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_zero_by_default_and_changes_the_step_when_set(name):
    plain, default, decayed = parameters(), parameters(), parameters()
    step(plain, build_optimizer(plain, name=name, lr=0.1, weight_decay=0.0))
    step(default, build_optimizer(default, name=name, lr=0.1))
    step(decayed, build_optimizer(decayed, name=name, lr=0.1, weight_decay=0.5))
    assert all(torch.equal(a, b) for a, b in zip(plain, default, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, decayed, strict=True))


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown optimizer 'adamm'.*adam, adamw, sgd.*did you mean 'adam"):
        build_optimizer(parameters(), name="adamm", lr=0.1)
    optimizer = build_optimizer(parameters(), name="sgd", lr=0.1)
    with pytest.raises(ValueError, match="unknown schedule 'cosin'.*did you mean 'cosine'"):
        build_schedule(optimizer, name="cosin", steps=3)


def rates(name: str, steps: int, **options) -> list[float]:
    """The learning rate that each of `steps` optimizer steps uses, from a base rate of 2."""
    params = parameters()
    optimizer = build_optimizer(params, name="sgd", lr=2.0)
    schedule = build_schedule(optimizer, name=name, steps=steps, **options)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        step(params, optimizer, times=1)
        schedule.step()
    return used


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.4] * 5),
        ("linear", [0.4, 0.5, 0.6, 0.7, 0.8]),
        ("cosine", [0.4, 0.6 - 0.2 * math.sqrt(0.5), 0.6, 0.6 + 0.2 * math.sqrt(0.5), 0.8]),
        ("cyclic", [0.4, 0.8, 0.4, 0.8, 0.4]),
    ],
)
def test_schedules_of_the_exponent(name: str, expected: list[float]):
    optimizer = build_optimizer(parameters(), name="smes", lr=0.1, alpha=9.0)
    schedule = build_exponent_schedule(optimizer, name=name, alpha=0.4, final=0.8, steps=4, period=2)
    used = []
    for _ in expected:
        used.append(optimizer.param_groups[0]["alpha"])
        assert schedule.exponents() == used[-1:]
        schedule.step()
    assert used == pytest.approx(expected)


def test_exponents_that_cannot_be_scheduled_are_refused():
    smes, lcam = (build_optimizer(parameters(), name=name, lr=0.1) for name in ("smes", "lcam"))
    with pytest.raises(ValueError, match="unknown exponent schedule 'cosin'.*did you mean 'cosine'"):
        build_exponent_schedule(smes, name="cosin", alpha=0.5, steps=3)
    with pytest.raises(ValueError, match="a pair of exponents can only be constant"):
        build_exponent_schedule(smes, name="linear", alpha=(0.5, 0.4), steps=3)
    with pytest.raises(ValueError, match="LCAM has no exponent"):
        build_exponent_schedule(lcam, name="constant", alpha=0.5, steps=3)
    with pytest.raises(ValueError, match=r"Invalid alpha value: \(0.5, 0.4\); a pair is for GatedSMES"):
        SMES(parameters(), alpha=(0.5, 0.4))


def test_constant():
    assert rates("constant", 4) == [2.0] * 4


def test_linear_goes_to_its_final_share():
    assert rates("linear", 4, final=0.2) == pytest.approx([2.0, 1.6, 1.2, 0.8])


def test_cosine_is_half_way_at_half_time():
    assert rates("cosine", 4, final=0.5) == pytest.approx(
        [2.0, 1.5 + 0.5 * math.cos(math.pi / 4), 1.5, 1.5 - 0.5 * math.cos(math.pi / 4)]
    )


def test_step_drops_every_step_size():
    assert rates("step", 5, step_size=2, step_factor=0.1) == pytest.approx([2.0, 2.0, 0.2, 0.2, 0.02])


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_rises_in_equal_steps_and_joins_the_schedule(name):
    used = rates(name, 6, warmup_steps=3, step_size=10)
    assert used[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_saved_schedule_continues_exactly(name):
    options = dict(steps=8, warmup_steps=2, final=0.1, step_size=3, step_factor=0.5)
    expected = rates(name, **options)

    params = parameters()
    optimizer = build_optimizer(params, name="sgd", lr=2.0)
    schedule = build_schedule(optimizer, name=name, **options)
    for _ in range(4):
        step(params, optimizer, times=1)
        schedule.step()
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, saved)

    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    optimizer = build_optimizer(params, name="sgd", lr=2.0)
    schedule = build_schedule(optimizer, name=name, **options)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    continued = []
    for _ in range(4):
        continued.append(optimizer.param_groups[0]["lr"])
        step(params, optimizer, times=1)
        schedule.step()
    assert continued == expected[4:]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_continues_on_another_kind_of_device(name: str, monkeypatch: pytest.MonkeyPatch):
    """CPU, GPU, CPU: what is kept where differs, learning rates are numbers in the state, results are equal."""

    def build(on_gpu: bool) -> tuple[list, torch.optim.Optimizer, LambdaLR]:
        monkeypatch.setattr(builders, "_on_gpu", lambda params: on_gpu)
        params = [torch.nn.Parameter(p.detach().float()) for p in parameters()]
        optimizer = build_optimizer(params, name=name, lr=0.1, capturable=True)
        return params, optimizer, build_schedule(optimizer, name="linear", steps=9, final=0.1)

    def steps(params: list, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> list[float]:
        used = []
        for _ in range(3):
            used.append(float(optimizer.param_groups[0]["lr"]))
            step(params, optimizer, times=1)
            schedule.step()
        return used

    alone = build(on_gpu=False)
    expected = [rate for _ in range(3) for rate in steps(*alone)]
    used, state, weights = [], None, None
    for on_gpu in (False, True, False):
        params, optimizer, schedule = build(on_gpu)
        if state is not None:
            with torch.no_grad():
                for param, weight in zip(params, weights, strict=True):
                    param.copy_(weight)
            load_training_state(schedule, state)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == on_gpu
        assert bool(optimizer.param_groups[0]["fused"]) == (on_gpu or name in ("adam", "adamw", "sgd"))
        used += steps(params, optimizer, schedule)
        saved = io.BytesIO()
        torch.save(training_state(schedule), saved)
        saved.seek(0)
        state, weights = torch.load(saved, weights_only=True), [p.detach() for p in params]
        assert type(state["optimizer"]["param_groups"][0]["lr"]) is float
        assert state["schedule"]["_last_lr"] == learning_rates(schedule)
    assert used == pytest.approx(expected, rel=1e-6)
    for got, truth in zip(weights, alone[0], strict=True):
        torch.testing.assert_close(got, truth.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_step_that_is_skipped_on_the_device_leaves_no_trace(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(builders, "_on_gpu", lambda params: True)
    results = []
    for overflows in (False, True):
        params = [torch.nn.Parameter(p.detach().float()) for p in parameters()]
        with PoisonedMemory():
            optimizer = build_optimizer(params, name=name, lr=0.1, weight_decay=0.1)
            if overflows:
                before = [p.detach().clone() for p in params]
                optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
                assert all(map(torch.equal, step(params, optimizer, times=1), before))
                del optimizer.grad_scale, optimizer.found_inf
            results.append(step(params, optimizer))
    for skipped, plain in zip(*results, strict=True):
        assert torch.equal(skipped, plain)


def test_a_state_takes_the_settings_of_the_optimizer_it_is_given_to():
    params = parameters()
    schedule = build_schedule(build_optimizer(params, name="sgd", lr=0.1), name="linear", steps=4)
    step(params, schedule.optimizer, times=1)
    schedule.step()
    state = training_state(schedule)
    other = build_schedule(build_optimizer(params, name="sgd", lr=0.4, momentum=0.5), name="linear", steps=4)
    load_training_state(other, state)
    (group,) = other.optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (pytest.approx(0.3), 0.5) and learning_rates(other) == [
        group["lr"]
    ]
    with pytest.raises(ValueError):
        load_training_state(
            build_schedule(build_optimizer(params[:1], name="sgd", lr=1.0), name="constant", steps=1), state
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(steps=3, warmup_steps=4), r"warmup_steps must be between 0 and steps \(3\), got 4"),
        (dict(steps=3, step_size=0), "step_size must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    optimizer = build_optimizer(parameters(), name="sgd", lr=0.1)
    with pytest.raises(ValueError, match=message):
        build_schedule(optimizer, name="constant", **options)
