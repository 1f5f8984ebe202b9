"""What a drop-in optimizer owes its users: the contract of torch.optim, for each class and each way to do a step."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optimizer_cases import (
    DEVICE,
    assert_equal,
    assert_near,
    each_path,
    give_gradients,
    losses,
    needs_triton,
    parameters,
    reloaded,
    tensors,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from trgnet.kernels.launch import Target, record_launches
from trgnet.kernels.moment_update import MomentTable
from trgnet.optimizers import (
    LCAM,
    SMES,
    GatedSMES,
    build_schedule,
    load_training_state,
    moments,
    training_state,
)

MAKE: dict[str, Callable] = {
    "lcam": lambda params, **options: LCAM(params, **{"lr": 0.1, "weight_decay": 0.01, **options}),
    "smes": lambda params, **options: SMES(
        params, **{"lr": 0.1, "alpha": 0.3, "weight_decay": 0.01, **options}
    ),
    "gated": lambda params, **options: GatedSMES(params, **{"lr": 0.1, "alpha": (0.3, 0.5), **options}),
}
each_class = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def train(optimizer: torch.optim.Optimizer, params: list, steps: range) -> None:
    for i in steps:
        give_gradients(params, i)
        optimizer.step(loss=losses(steps.stop)[i])


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        t
        for group in optimizer.param_groups
        for p in group["params"]
        for t in (p.detach(), *(optimizer.state[p][name] for name in sorted(optimizer.state[p])))
    ] + [group["loss_gate"] for group in optimizer.param_groups if "loss_gate" in group]


@each_class
@each_path()
def test_saved_training_continues_bit_for_bit(path: dict, make: Callable):
    """Through torch.save and weights_only=True, through deepcopy and through pickle; what was saved is not touched."""
    params = parameters()
    optimizer = make(params, **path)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    loaded = [nn.Parameter(p.detach().clone()) for p in params]
    others = [(loaded, make(loaded, **path)), reloaded(optimizer, lambda p: make(p, **path))]
    others[0][1].load_state_dict(saved)
    others += [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    for own, other in others:
        assert_equal(state_tensors(other), state_tensors(optimizer))
        train(other, own, range(2, 4))
    tensors_of = [[t for s in state["state"].values() for t in s.values()] for state in (saved, kept)]
    assert_equal(*tensors_of)
    train(optimizer, params, range(2, 4))
    for _, other in others:
        assert_equal(state_tensors(other), state_tensors(optimizer))


@each_class
@each_path("loop", "lists", "fused", "live fused")
def test_merging_and_permuting_groups_changes_no_bit(path: dict, make: Callable):
    order = [3, 0, 4, 2, 1]
    one, many = parameters(), parameters()
    optimizer = make(one, **path)
    split = make([{"params": [many[i]]} for i in order[:3]], **path)
    split.add_param_group({"params": [many[i] for i in order[3:]]})
    for i, loss in enumerate(losses(4)):
        give_gradients(one, i)
        give_gradients(many, i)
        optimizer.step(loss=loss)
        split.step(loss=loss)
        assert_equal([p.detach() for p in many], [p.detach() for p in one])


@each_path("loop", "lists", "fused", "live lists")
def test_groups_keep_their_own_settings_in_one_step(path: dict):
    """Of every kind, in one step (one launch), like an optimizer for each group; one group joins later."""
    settings = [
        dict(lr=0.1, weight_decay=0.1, momenta=(0.8, 0.9)),
        dict(lr=0.01, weight_decay=0.2, decoupled_weight_decay=True, maximize=True),
        dict(lr=0.05, nesterov=True),
        dict(lr=0.2, dampening=0.5),
    ]
    together, apart = parameters(), parameters()
    optimizer = LCAM([{"params": [p], **s} for p, s in zip(together, settings[:3])], **path)
    single = [LCAM([p], **s, **path) for p, s in zip(apart, settings)]
    for i, loss in enumerate(losses(4)):
        if i == 2:
            optimizer.add_param_group({"params": [together[3], together[4]], **settings[3]})
            single[3] = LCAM([apart[3], apart[4]], **settings[3], **path)
            single[3].load_state_dict({"state": {}, "param_groups": [single[3].state_dict()["param_groups"][0]
                                       | {"loss_gate": single[0]._control.clone()}]})  # fmt: skip
        give_gradients(together, i)
        give_gradients(apart, i)
        optimizer.step(loss=loss)
        for s in single[: 3 if i < 2 else 4]:
            s.step(loss=loss)
        assert_equal([p.detach() for p in together], [p.detach() for p in apart])


@each_class
@each_path("loop", "lists", "fused")
def test_parameters_without_gradient_stay_and_keep_their_own_count(path: dict, make: Callable):
    params, alone = parameters(), parameters()
    optimizer, single = make(params, **path), make(alone[:1], **path)
    present = [True, False, False, True, True, False, True]
    for i, here in enumerate(present):
        give_gradients(params, i)
        alone[0].grad = params[0].grad if here else None
        params[0].grad = alone[0].grad
        before = [p.detach().clone() for p in params]
        optimizer.step(loss=1.0)
        single.step(loss=1.0)
        assert torch.equal(params[0], before[0]) != here
        assert not torch.equal(params[1], before[1])
    assert_equal([params[0].detach()], [alone[0].detach()])
    steps = [optimizer.state[p]["step"].item() for p in params]
    assert steps == [sum(present)] + [len(present)] * 4
    for p in params:
        p.grad = None
    optimizer.step(loss=1.0)
    assert [optimizer.state[p]["step"].item() for p in params] == steps


@each_class
@each_path("loop", "lists", "fused")
def test_closure_and_hooks(path: dict, make: Callable):
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer, seen = make([p], **path), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["extra"]))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first == 3 and (p != 1).all() and seen == ["before", "after"]
    second = optimizer.step(closure)
    if "average" in optimizer.defaults:
        assert optimizer._control[0].item() == pytest.approx((first.item() + second.item()) / 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[-1] == 1


@each_class
@each_path("loop", "lists", "fused")
def test_complex_parameters_are_pairs_of_real_ones(path: dict, make: Callable):
    dtype = torch.complex64
    params = parameters(dtype)
    real = [nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
    optimizers = make(params, **path), make(real, **path)
    for i, loss in enumerate(losses(3)):
        give_gradients(params, i)
        for p, r in zip(params, real):
            r.grad = torch.view_as_real(p.grad)
        for optimizer in optimizers:
            optimizer.step(loss=loss)
    assert_equal([torch.view_as_real(p.detach()) for p in params], [r.detach() for r in real])
    name = "momentum_buffer" if "momentum_buffer" in optimizers[0].state[params[0]] else "exp_avg"
    assert optimizers[0].state[params[0]][name].dtype == dtype


@each_class
def test_misuse_raises(make: Callable, monkeypatch: pytest.MonkeyPatch):
    p = nn.Parameter(torch.ones(4, 2, device=DEVICE))
    p.grad = torch.ones(4, 2, device=DEVICE).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        make([p]).step()
    for options, message in (
        (dict(fused=True, foreach=True), "`fused` and `foreach` cannot be `True` together."),
        (dict(fused=True, differentiable=True), "`fused` does not support `differentiable`"),
        (dict(foreach=True, differentiable=True), "`foreach` does not support `differentiable`"),
    ):
        with pytest.raises(RuntimeError, match=message):
            make([p], **options)
    with pytest.raises(RuntimeError, match="`fused=True` cannot update a parameter of torch.float64"):
        make([nn.Parameter(torch.ones(2, dtype=torch.float64, device=DEVICE))], fused=True)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        make([])
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        make([1])
    optimizer = make([p])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    wrong = make([nn.Parameter(torch.ones(2, 2, device=DEVICE))])
    wrong.param_groups[0]["params"][0].grad = torch.ones(2, 2, device=DEVICE)
    wrong.step()
    with pytest.raises(ValueError, match=r"loaded \w+ has the shape \(2, 2\), its parameter \(4, 2\)"):
        optimizer.load_state_dict(wrong.state_dict())


@each_class
def test_captures_that_would_go_wrong_are_refused(make: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(moments, "capturing", lambda: True)
    params = parameters()
    give_gradients(params, 0)
    with pytest.raises(RuntimeError, match="Attempting CUDA graph capture of step.* but capturable is False"):
        make(params).step()
    optimizer = make(params, capturable=True)
    with pytest.raises(RuntimeError, match="a Python number would be frozen in the graph"):
        optimizer.step(loss=1.0)
    with pytest.raises(RuntimeError, match="a Python number would be frozen in the graph"):
        optimizer.step(clip=0.5)
    optimizer.step(loss=torch.ones((), device=DEVICE))
    params[1].grad = None
    with pytest.raises(RuntimeError, match="a parameter without a gradient would be left out"):
        optimizer.step()


@each_class
@each_path("live fused")
def test_tables_of_captured_steps_stay(path: dict, make: Callable, monkeypatch: pytest.MonkeyPatch):
    """Replays read them, also when a later capture has others."""
    params = parameters()
    optimizer = make(params, **path)
    give_gradients(params, 0)
    optimizer.step()
    assert optimizer._captured == []
    monkeypatch.setattr(moments, "capturing", lambda: True)
    tables, kept = [], []
    for seed in range(2):
        kept += [p.grad for p in params]  # so that the next ones are elsewhere
        give_gradients(params, seed)
        optimizer.step()
        tables.append(optimizer._table)
    assert tables[0] is not tables[1] and optimizer._captured == tables


@each_class
@each_path("loop", "lists", "fused", "live fused")
def test_learning_rate_schedules(path: dict, make: Callable):
    """Also of a tensor learning rate, which is filled in place."""
    scheduled, by_hand, tensor = parameters(), parameters(), parameters()
    optimizers = make(scheduled, **path), make(by_hand, **path)
    rate = torch.tensor(0.1, device=DEVICE)
    with_tensor = make(tensor, **{**path, "lr": rate})
    schedules = [StepLR(o, step_size=2, gamma=0.5) for o in (optimizers[0], with_tensor)]
    for i in range(3):
        lr = torch.tensor(0.1 * 0.5 ** (i // 2))
        for group in optimizers[1].param_groups:
            group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else group.update(lr=lr.item())
        for optimizer, params in zip((*optimizers, with_tensor), (scheduled, by_hand, tensor)):
            give_gradients(params, i)
            optimizer.step(loss=1.0)
        for schedule in schedules:
            schedule.step()
        for params in (scheduled, tensor):
            assert_near(params, [p.detach().double() for p in by_hand], 3e-7)
    assert rate.item() == pytest.approx(0.05) and with_tensor.param_groups[0]["lr"] is rate


def test_one_cycle_is_an_error_or_what_it_is_for_adam():
    for make in (MAKE["lcam"], MAKE["gated"]):
        with pytest.raises(
            ValueError, match="optimizer must support momentum or beta1 with `cycle_momentum`"
        ):
            OneCycleLR(make(parameters()), max_lr=0.1, total_steps=5)
        OneCycleLR(make(parameters()), max_lr=0.1, total_steps=5, cycle_momentum=False)
    params, truth = parameters(torch.float64), parameters(torch.float64)
    optimizers = SMES(params), torch.optim.Adam(truth)
    schedules = [OneCycleLR(o, max_lr=0.1, total_steps=5) for o in optimizers]
    for i in range(5):
        for own, optimizer, schedule in zip((params, truth), optimizers, schedules):
            give_gradients(own, i)
            optimizer.step()
            schedule.step() if i < 4 else None
    assert_near(params, [t.detach() for t in truth], 1e-12)


@each_class
@each_path("loop", "lists", "fused", "live fused")
def test_gradient_scaler_with_infinities(path: dict, make: Callable):
    """A skipped step changes nothing: neither parameters nor state nor the gate."""
    params, plain = parameters(), parameters()
    optimizer, without = make(params, **path), make(plain, **path)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    for i, loss in enumerate(losses(6)):
        give_gradients(params, i, scale=scaler.get_scale())
        scaler.scale(torch.ones((), device=DEVICE))  # makes its tensors
        if i in (0, 3):
            params[0].grad[0, 0] = math.inf
        else:
            give_gradients(plain, i)
            without.step(loss=loss)
        scaler.step(optimizer, loss=loss)
        scaler.update()
        if i:
            assert_equal(state_tensors(optimizer), state_tensors(without))
    assert scaler.get_scale() == 256.0


@each_class
def test_state_of_a_training_continues_with_other_settings(make: Callable):
    """``load_training_state`` keeps the settings of the new optimizer, and the gate and the seed of the saved one."""
    params = parameters(torch.bfloat16)
    optimizer = make(params, rounding="stochastic", state_dtype=torch.bfloat16)
    schedule = build_schedule(optimizer, name="constant", steps=5)
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(training_state(schedule), file)
    file.seek(0)
    other = make(
        parameters(torch.bfloat16), rounding="stochastic", state_dtype=torch.bfloat16, weight_decay=0.5
    )
    load_training_state(build_schedule(other, name="constant", steps=5), torch.load(file, weights_only=True))
    assert other.param_groups[0]["weight_decay"] == 0.5
    for name in ("loss_gate", "rounding_seed"):
        saved, loaded = (torch.as_tensor(o.param_groups[0].get(name, 0)) for o in (optimizer, other))
        assert torch.equal(saved, loaded)
    if "average" in other.defaults:
        assert other._control is other.param_groups[0]["loss_gate"] and other._control[2] == 3


@each_class
@each_path("loop", "lists", "fused", "live lists")
def test_clipping_coefficient_multiplies_every_gradient(path: dict, make: Callable):
    params, clipped = parameters(), parameters()
    optimizers = make(params, **path), make(clipped, **path)
    for i, clip in enumerate((0.5, torch.tensor(0.25, device=DEVICE))):
        give_gradients(params, i, scale=float(clip))
        give_gradients(clipped, i)
        optimizers[0].step(loss=1.0)
        optimizers[1].step(loss=1.0, clip=clip)
    assert_equal([p.detach() for p in clipped], [p.detach() for p in params])


@each_class
@each_path("loop", "lists")
def test_scalars_on_the_device_and_numbers_agree(path: dict, make: Callable, monkeypatch: pytest.MonkeyPatch):
    """Elsewhere than on a CPU the scalars are tensors, although the hyper-parameters are numbers."""
    params, numbers = parameters(torch.float64), parameters(torch.float64)
    optimizers = make(params, **path), make(numbers, **path)
    monkeypatch.setattr(optimizers[0], "_in_numbers", lambda entries: False)
    for i, loss in enumerate(losses(4)):
        for own, optimizer in zip((params, numbers), optimizers):
            give_gradients(own, i)
            optimizer.step(loss=loss, clip=0.5)
        assert_near(params, [p.detach() for p in numbers], 1e-13)


@each_class
def test_state_has_torchs_names_and_keeps_its_dtype(make: Callable):
    """float32 moments of half-precision parameters survive loading, which torch would have cast."""
    params = parameters(torch.bfloat16)
    optimizer = make(params, rounding="kahan")
    train(optimizer, params, range(2))
    state = optimizer.state[params[0]]
    names = {"lcam": {"momentum_buffer"}}.get(
        next(k for k, v in MAKE.items() if v is make), {"exp_avg", "exp_avg_sq"}
    )
    assert {"step", "rounding_error", *names} <= set(state)
    assert all(isinstance(key, Tensor) for key in optimizer.state)
    _, other = reloaded(optimizer, lambda p: make(p, rounding="kahan"))
    loaded = other.state_dict()["state"][0]
    for name, t in state.items():
        assert loaded[name].dtype == (torch.bfloat16 if name == "rounding_error" else torch.float32)
        assert torch.equal(loaded[name], t)


@each_path("loop", "lists", "fused")
def test_half_precision_is_as_close_as_one_rounding(path: dict):
    """To float64 on the rounded gradients, after each of four steps: half a unit of the last place for each step."""
    for dtype in (torch.float16, torch.bfloat16):
        params = parameters(dtype)
        optimizer = SMES(params, lr=0.01, alpha=0.4, **path)
        truth = [nn.Parameter(p.detach().double()) for p in params]
        exact = SMES(truth, lr=0.01, alpha=0.4, foreach=False)
        for i in range(4):
            give_gradients(params, i)
            for t, p in zip(truth, params):
                t.grad = p.grad.double()
            optimizer.step()
            exact.step()
            for p, t in zip(params, truth):
                error = (p.detach().double() - t).abs()
                assert (error <= (i + 1) * torch.finfo(dtype).eps * t.abs() + 1e-5).all()


@each_class
def test_differentiable_step(make: Callable):
    """Gradients of two steps with respect to the parameter, the gradients and the hyper-parameters."""
    start, grads = tensors(0, torch.float64, ((4,),))[0], tensors(1, torch.float64, ((2, 4),))[0]
    rate, decay = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (0.1, 0.2))

    def steps(start: Tensor, grads: Tensor, rate: Tensor, decay: Tensor) -> Tensor:
        p = start.clone()
        optimizer = make([p], differentiable=True)
        optimizer.param_groups[0].update(lr=rate, weight_decay=decay)
        for g in grads:
            p.grad = g
            optimizer.step(loss=1.0)
        return p

    leaves = [t.requires_grad_() for t in (start, grads, rate, decay)]
    assert torch.autograd.gradcheck(steps, leaves)


@needs_triton
@each_class
def test_one_launch_for_everything_and_a_table_made_once(make: Callable, monkeypatch: pytest.MonkeyPatch):
    made, launched = [], []
    real_launch = MomentTable.launch

    class Counted(MomentTable):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            made.append(self)

        def launch(self, *args: object, **kwargs: object) -> None:
            launched.append(len(self.parts))
            real_launch(self, *args, **kwargs)

    monkeypatch.setattr(moments, "MomentTable", Counted)
    params = parameters()
    optimizer = make([{"params": [p]} for p in params], fused=True)
    give_gradients(params, 0)
    for i in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (i + 1)
        optimizer.step(loss=1.0)
    assert len(made) == 1 and launched == [1, 1, 1]
    rows = optimizer._rows.data_ptr()
    kept = weakref.ref(params[0].grad)
    params[0].grad = params[0].grad.clone()  # moves, and is followed
    assert kept() is None, "the table keeps a gradient alive"
    optimizer.step(loss=1.0)
    assert len(made) == 1
    params[0].data = params[0].data.clone()
    optimizer.step(loss=1.0)
    optimizer.step(loss=1.0)
    assert len(made) == 2 and optimizer._rows.data_ptr() == rows
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=DEVICE))
    half.grad = torch.ones_like(half)
    optimizer.add_param_group({"params": [half]})
    optimizer.step(loss=1.0)
    assert len(made) == 3 and launched[-1] == 2


@needs_triton
@each_class
def test_replaying_the_launch_equals_steps_with_every_hyperparameter_changed(make: Callable):
    """What a CUDA graph replays is the launch: everything else that a step reads is on the device."""
    params, eager = parameters(), parameters()
    optimizer, other = make(params, fused=True, capturable=True), make(eager, fused=True, capturable=True)
    loss = torch.ones((), device=DEVICE)
    recorded: list = []
    for own, opt in ((params, optimizer), (eager, other)):
        give_gradients(own, 0)
        opt.step(loss=loss)
    table = optimizer._table
    table_launch = table.launch
    table.launch = lambda *args, **kwargs: recorded.append((args, kwargs))
    optimizer.step(loss=loss)
    ((args, kwargs),) = recorded
    changes = {"lr": 0.03, "weight_decay": 0.2, "momenta": (0.5, 0.6), "betas": (0.7, 0.8), "beta2": 0.9, "eps": 1e-3,
               "alpha": 0.7, "dampening": 0.25}  # fmt: skip
    for i in range(3):
        for opt in (optimizer, other):
            for name in changes.keys() & opt.param_groups[0].keys():
                if name == "dampening" and not isinstance(opt, LCAM):
                    continue
                places, new = opt.param_groups[0][name], changes[name]
                places = places if isinstance(places, tuple) else (places,)
                for place, x in zip(places, new if isinstance(new, tuple) else (new,) * 2):
                    place.fill_(x * (1 - 0.1 * i))
        loss.fill_(losses(3)[i])
        for p, q, g in zip(params, eager, tensors(i + 3)):
            p.grad.copy_(g)
            q.grad.copy_(g)
        table_launch(*args, **kwargs)
        other.step(loss=loss)
        assert_equal(state_tensors(optimizer), state_tensors(other))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@each_class
@each_path("live lists", "live fused")
def test_graph_replay_equals_eager_steps(path: dict, make: Callable):
    """With learning rate and weight decay changed between replays, and no step that waits for the device."""
    params, eager = parameters(), parameters()
    optimizer, other = make(params, **path), make(eager, **path)
    loss = torch.ones((), device=DEVICE)
    for own, opt in ((params, optimizer), (eager, other)):
        give_gradients(own, 0)
        opt.step(loss=loss)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step(loss=loss)
        for i in range(3):
            for group in (*optimizer.param_groups, *other.param_groups):
                group["lr"].fill_(0.1 / (i + 1))
                group["weight_decay"].fill_(0.01 * i)
            loss.fill_(1.0 - 0.1 * i)
            graph.replay()
            other.step(loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(state_tensors(optimizer), state_tensors(other))


@each_class
@each_path("live loop", "live lists", "live fused")
def test_nothing_waits_for_the_device(path: dict, make: Callable):
    """Tensors on meta have no values to read: a step that asked for one would fail. One launch for 436 tensors."""
    count = 436 if "fused" in path else 20
    params = [nn.Parameter(torch.empty(7, i % 5 + 1, device="meta")) for i in range(count)]
    optimizer = make([{"params": params[:8]}, {"params": params[8:]}], **path)
    loss, clip = torch.empty((), device="meta"), torch.empty((), device="meta")
    for p in params:
        p.grad = torch.empty_like(p)
    with record_launches(Target("cuda", 90)) as launches:
        for _ in range(2):
            optimizer.step(loss=loss, clip=clip)
            if "average" in optimizer.defaults:
                optimizer.observe(loss)
                optimizer.new_epoch()
                assert optimizer.phase.device == optimizer.phase_shares.device == loss.device
    assert len(launches) == (2 if "fused" in path else 0)


@each_class
@each_path("loop", "fused")
def test_compiled_training_step(path: dict, make: Callable):
    """torch.compile of forward, backward and step gives the parameters of the step without it."""

    def run(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE)
        optimizer = make(model.parameters(), **path)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
            return loss

        step = torch.compile(step, backend="eager") if compiled else step
        for i in range(3):
            step(torch.full((2, 4), float(i + 1), device=DEVICE))
        return [p.detach() for p in model.parameters()]

    assert_equal(run(True), run(False))


@each_class
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_round_trip(tmp_path: Path, make: Callable, flatten: bool):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def trainer() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to(DEVICE)
        return model, make(model.parameters())

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = trainer()
    train(optimizer, list(model.parameters()), range(3))
    checkpoint.save(
        get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=tmp_path, no_dist=True
    )
    other_model, other = trainer()
    other_model.load_state_dict(model.state_dict())
    state = get_optimizer_state_dict(other_model, other, options=options)
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other_model, other, state, options=options)
    for m, o in ((model, optimizer), (other_model, other)):
        train(o, list(m.parameters()), range(3, 5))
    assert_equal(state_tensors(other), state_tensors(optimizer))


PROCESSES = Path(__file__).parent / "optimizer_processes.py"


def test_two_processes(tmp_path: Path):
    """Replicas with different local losses stay equal bit for bit; distributed parameters are updated like whole ones; fully
    sharded training goes on from a distributed checkpoint."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(PROCESSES),
    ]
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count("passed") == 2
