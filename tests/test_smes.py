"""SMES against Adam and its formula; the gated optimizer, which contains SMES and LCAM; schedules of the exponent."""

from __future__ import annotations

import io
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
    tensors,
)
from torch import Tensor
from trgnet.optimizers import LCAM, SMES, ExponentSchedule, GatedSMES


@pytest.mark.parametrize("options", [
    dict(),
    dict(betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, maximize=True),
    dict(weight_decay=0.1, decoupled_weight_decay=True),
], ids=str)  # fmt: skip
@each_path()
def test_one_half_is_adam(path: dict, options: dict):
    """In float64 (float32 in the kernel), from a checkpoint of theirs in the middle; one parameter without gradients for a
    while has corrections of its own."""
    dtype = torch.float32 if "fused" in path else torch.float64
    bound = 4e-6 if "fused" in path or "capturable" in path else 1e-12
    truth, params = parameters(torch.float64), parameters(dtype)
    adam = torch.optim.Adam(truth, lr=0.1, **options)
    optimizer = SMES(params, lr=0.1, **options, **path)
    for i in range(6):
        give_gradients(truth, i)
        if i in (1, 4):
            truth[1].grad = None
        for p, t in zip(params, truth):
            p.grad = None if t.grad is None else t.grad.to(dtype)
        adam.step()
        optimizer.step(loss=1.0)
        assert_near(params, truth, bound)
        for p, t in zip(params, truth):
            for name in ("step", "exp_avg", "exp_avg_sq"):
                assert_near([optimizer.state[p][name]], [adam.state[t][name].double()], 4 * bound)
        if i == 2:
            optimizer = SMES(params, lr=0.5, **path)
            optimizer.load_state_dict(adam.state_dict())


@pytest.mark.parametrize("options", [dict(), dict(weight_decay=0.1)], ids=str)
def test_one_half_is_adam_bit_for_bit_in_pytorch(options: dict):
    for foreach in (False, True):
        truth, params = parameters(), parameters()
        adam = torch.optim.Adam(truth, lr=0.1, **options, foreach=foreach)
        optimizer = SMES(params, lr=0.1, **options, foreach=foreach)
        for i in range(4):
            give_gradients(truth, i)
            give_gradients(params, i)
            adam.step()
            optimizer.step()
        assert_near(params, [t.detach() for t in truth], 3e-7)
        for p, t in zip(params, truth):
            assert_equal([optimizer.state[p]["exp_avg_sq"]], [adam.state[t]["exp_avg_sq"]])


def formula(p: Tensor, grads: list[Tensor], betas: list[float], alphas: list[float]) -> Tensor:
    """The gated update in float64: lr 0.1, beta2 0.98, eps 1e-3."""
    m, v, product, p = torch.zeros_like(p), torch.zeros_like(p), 1.0, p.clone()
    for t, (g, beta1, alpha) in enumerate(zip(grads, betas, alphas), start=1):
        product *= beta1
        m = beta1 * m + (1 - beta1) * g
        v = 0.98 * v + 0.02 * g**2
        p -= 0.1 * m / (1 - product) / ((v / (1 - 0.98**t)) ** alpha + 1e-3)
    return p


ALPHAS = [-0.5, 0.0, 0.3, 0.5, 1.0]


@each_path()
def test_any_exponent_changing_at_every_step(path: dict):
    """Each group its own, the second a tensor; saved and loaded in the middle, which changes no bit."""
    dtype = torch.float32 if "fused" in path else torch.float64
    bound = 1e-5 if "fused" in path or "capturable" in path else 1e-12

    def make(params: list) -> SMES:
        groups = [
            {"params": params[:2]},
            {"params": params[2:], "alpha": torch.tensor(0.75)},
        ]
        return SMES(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-3, **path)

    def set_alpha(optimizer: SMES, alpha: float) -> None:
        if isinstance(optimizer.param_groups[0]["alpha"], Tensor):
            optimizer.param_groups[0]["alpha"].fill_(alpha)
        else:
            optimizer.param_groups[0]["alpha"] = alpha

    params = parameters(dtype)
    start = [p.detach().double().clone() for p in params]
    optimizer = make(params)
    copies: list[list[Tensor]] = []
    for i, alpha in enumerate(ALPHAS):
        if i == 3:
            params_2, optimizer_2 = reloaded(optimizer, make)
            copies = [params_2]
        for own, opt in [(params, optimizer)] + ([(params_2, optimizer_2)] if copies else []):
            give_gradients(own, i)
            set_alpha(opt, alpha)
            opt.step()
    assert_equal([p.detach() for p in params_2], [p.detach() for p in params])
    grads = [tensors(i + 1, dtype) for i in range(len(ALPHAS))]
    for j, (p, p0) in enumerate(zip(params, start)):
        alphas = ALPHAS if j < 2 else [0.75] * len(ALPHAS)
        expected = formula(p0, [g[j].double() for g in grads], [0.9] * len(ALPHAS), alphas)
        assert_near([p], [expected], bound)


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.25, 0.5, 1.0])
@each_path("loop", "lists", "fused")
def test_scaling_the_loss_scales_the_update(path: dict, alpha: float):
    """By c^(1 - 2 alpha), where eps does not matter."""
    start = [p.detach().clone() for p in parameters()]
    moved = []
    for c in (1.0, 4.0):
        params = parameters()
        optimizer = SMES(params, lr=0.01, eps=0.0, alpha=alpha, **path)
        for i in range(2):
            give_gradients(params, i, scale=c)
            optimizer.step()
        moved.append([p.detach() - p0 for p, p0 in zip(params, start)])
    for one, four in zip(*moved):
        torch.testing.assert_close(four, one * 4.0 ** (1 - 2 * alpha), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 0.5, 1.0])
@each_path("loop", "lists", "fused")
def test_zero_gradients_give_finite_steps(path: dict, alpha: float, dtype: torch.dtype):
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype, device=DEVICE))
    optimizer = SMES([p], lr=0.1, alpha=alpha, **path)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (p == 1).all()
    p.grad = torch.full_like(p, 1e-4)
    optimizer.step()
    assert p.isfinite().all()


@each_path()
def test_gated_update_follows_its_formula(path: dict):
    """beta1 and exponent by phase, divided by 1 minus the product of all beta1; saved and loaded in the middle."""
    dtype = torch.float32 if "fused" in path else torch.float64
    bound = 5e-6 if "fused" in path or "capturable" in path else 1e-12
    momenta, alpha = (0.8, 0.95), (0.3, 0.6)

    def make(params: list) -> GatedSMES:
        return GatedSMES(params, 0.1, momenta, 0.98, 1e-3, alpha, average="run", **path)

    params = parameters(dtype)
    start, optimizer = [p.detach().double().clone() for p in params], make(params)
    used = []
    for i, loss in enumerate(losses(8)):
        used.append(optimizer.phase.item())
        give_gradients(params, i)
        optimizer.step(loss=loss)
        if i == 3:
            params, optimizer = reloaded(optimizer, make)
    assert set(used) == {0, 1}
    grads = [tensors(i + 1, dtype) for i in range(8)]
    for j, (p, p0) in enumerate(zip(params, start)):
        by_phase = [[pair[phase] for phase in used] for pair in (momenta, alpha)]
        assert_near([p], [formula(p0, [g[j].double() for g in grads], *by_phase)], bound)


@each_path("loop", "lists", "fused")
def test_gated_optimizer_contains_the_others(path: dict):
    """SMES with equal momenta and exponents, LCAM in the form of SGD without a second moment."""
    pairs = [
        (lambda p: GatedSMES(p, 0.1, (0.9, 0.9), alpha=0.3, weight_decay=0.1, **path),
         lambda p: SMES(p, 0.1, (0.9, 0.999), alpha=0.3, weight_decay=0.1, **path), 2e-6),
        (lambda p: GatedSMES(p, 0.1, (0.8, 0.9), None, form="sum", dampening=0.1, **path),
         lambda p: LCAM(p, 0.1, (0.8, 0.9), dampening=0.1, **path), 0),
    ]  # fmt: skip
    for make, make_special, bound in pairs:
        params, special = parameters(), parameters()
        optimizers = make(params), make_special(special)
        for i, loss in enumerate(losses(5)):
            for own, optimizer in zip((params, special), optimizers):
                give_gradients(own, i)
                optimizer.step(loss=loss)
        if bound:
            assert_near(params, [p.detach() for p in special], bound)
        else:
            assert_equal([p.detach() for p in params], [p.detach() for p in special])


def test_an_adam_checkpoint_loads_into_the_gated_optimizer():
    truth, params = parameters(torch.float64), parameters(torch.float64)
    adam = torch.optim.Adam(truth, lr=0.1, betas=(0.8, 0.99))
    for i in range(3):
        give_gradients(truth, i)
        adam.step()
    optimizer = GatedSMES(params, momenta=(0.8, 0.8), beta2=0.99)
    optimizer.load_state_dict(adam.state_dict())
    with torch.no_grad():
        for p, t in zip(params, truth):
            p.copy_(t)
    for i in range(3, 6):
        give_gradients(truth, i)
        give_gradients(params, i)
        adam.step()
        optimizer.step(loss=1.0)
    assert_near(params, [t.detach() for t in truth], 1e-7)
    amsgrad = torch.optim.Adam(truth, amsgrad=True)
    with pytest.raises(ValueError, match="GatedSMES cannot go on from a checkpoint with amsgrad=True"):
        optimizer.load_state_dict(amsgrad.state_dict())


def test_long_runs_of_the_product_stay_exact():
    """The sum of logarithms after 5000 steps, with a switching beta1, to float64's accuracy."""
    p = torch.nn.Parameter(torch.zeros((), device=DEVICE))
    optimizer = GatedSMES([p], momenta=(0.99, 0.999), average="run", foreach=True)
    p.grad = torch.ones_like(p)
    exact = 0.0
    for i in range(2000):
        exact += math.log((0.99, 0.999)[optimizer.phase.item()])
        optimizer.step(loss=float(i % 3))
    state = optimizer.state[p]
    assert state["log_beta1"].item() + state["log_beta1_rest"].item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("arguments, message", [
    (dict(eps=-1.0), "Invalid epsilon value: -1.0"),
    (dict(betas=(1.0, 0.999)), "Invalid beta parameter at index 0: 1.0"),
    (dict(betas=(0.9, -0.1)), "Invalid beta parameter at index 1: -0.1"),
    (dict(weight_decay=-1.0), "Invalid weight_decay value: -1.0"),
    (dict(alpha=math.nan), "Invalid alpha value: nan"),
    (dict(alpha=torch.ones(2)), "Tensor alpha must be 1-element"),
], ids=str)  # fmt: skip
def test_bad_arguments_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SMES(parameters(), **arguments)


@pytest.mark.parametrize("arguments, message", [
    (dict(momenta=(0.9, 1.0)), "Invalid momentum value at index 1: 1.0"),
    (dict(momenta=(0.9, 0.9, 0.9)), "Invalid momenta: expected two"),
    (dict(beta2=1.0), "Invalid beta2 value: 1.0"),
    (dict(form="median"), "Invalid form: 'median', expected average or sum"),
    (dict(nesterov=True), "dampening and nesterov are of form='sum'"),
    (dict(form="sum", nesterov=True, dampening=0.1), "Nesterov momentum requires a momentum and zero dampening"),
], ids=str)  # fmt: skip
def test_bad_arguments_of_the_gated_optimizer_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GatedSMES(parameters(), **arguments)


def test_second_moments_that_would_stand_still_are_refused():
    half = parameters(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 never decays when it is rounded to nearest"):
        SMES(half, state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float16 underflows"):
        SMES(half, state_dtype=torch.float16)
    with pytest.raises(ValueError, match="stochastic rounding is for bfloat16"):
        SMES(parameters(torch.float16), rounding="stochastic")
    optimizer = SMES(half, state_dtype=torch.bfloat16, rounding="stochastic")
    give_gradients(half, 0)
    optimizer.step()
    assert optimizer.state[half[0]]["exp_avg_sq"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="all groups have a second moment, or none"):
        GatedSMES([{"params": parameters(), "beta2": None}])


def exponents(make, steps: int, optimizer: torch.optim.Optimizer | None = None) -> list:
    """The exponent that each of `steps` steps uses."""
    optimizer = optimizer or SMES(parameters())
    schedule, used = make(optimizer), []
    for _ in range(steps):
        used.append(schedule.get_last_alpha()[0])
        optimizer.step()
        schedule.step()
    return used


def test_schedules_of_the_exponent():
    assert exponents(lambda o: ExponentSchedule.constant(o, 0.3), 3) == [0.3] * 3
    assert exponents(lambda o: ExponentSchedule.linear(o, 0.0, 1.0, 4), 6) == [0, 0.25, 0.5, 0.75, 1, 1]
    assert exponents(lambda o: ExponentSchedule.cosine(o, 1.0, 0.0, 4), 6) == pytest.approx(
        [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0, 0]
    )
    assert exponents(lambda o: ExponentSchedule.cyclic(o, 0.2, 0.6, 4), 6) == pytest.approx(
        [0.2, 0.4, 0.6, 0.4, 0.2, 0.4]
    )
    assert exponents(lambda o: ExponentSchedule(o, lambda i: i / 8), 3) == [0, 0.125, 0.25]
    gated = GatedSMES(parameters(), alpha=(0.1, 0.2))
    assert exponents(lambda o: ExponentSchedule(o, lambda i: (i, 2 * i)), 2, gated) == [(0, 0), (1, 2)]
    assert exponents(lambda o: ExponentSchedule.constant(o, 0.4), 1, gated) == [(0.4, 0.4)]


def test_schedules_fill_tensors_and_take_a_function_per_group():
    params = parameters()
    optimizer = SMES([{"params": params[:1]}, {"params": params[1:]}], capturable=True)
    places = [group["alpha"] for group in optimizer.param_groups]
    schedule = ExponentSchedule(optimizer, [lambda i: 0.25 * i, lambda i: 0.5 * i])
    schedule.step()
    assert [p.item() for p in places] == [0.25, 0.5]
    assert all(p is g["alpha"] for p, g in zip(places, optimizer.param_groups))


def test_a_saved_schedule_continues_exactly():
    expected = exponents(lambda o: ExponentSchedule.cyclic(o, 0.2, 0.6, 5), 8)
    optimizer = SMES(parameters())
    schedule = ExponentSchedule.cyclic(optimizer, 0.2, 0.6, 5)
    for _ in range(3):
        schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    other = SMES(parameters())
    resumed = ExponentSchedule.cyclic(other, 0.0, 1.0, 2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["alpha"] == expected[3]
    assert exponents(lambda o: resumed, 5, other) == expected[3:]


def test_schedules_refuse_what_has_no_exponent():
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        ExponentSchedule.constant(1, 0.5)
    with pytest.raises(ValueError, match="LCAM has no exponent: its groups lack alpha"):
        ExponentSchedule.constant(LCAM(parameters()), 0.5)
    with pytest.raises(ValueError, match="Expected 1 functions, but got 2"):
        ExponentSchedule(SMES(parameters()), [abs, abs])
    for make in (ExponentSchedule.linear, ExponentSchedule.cosine):
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            make(SMES(parameters()), 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="period must be at least 1, got 0"):
        ExponentSchedule.cyclic(SMES(parameters()), 0.0, 1.0, 0)
