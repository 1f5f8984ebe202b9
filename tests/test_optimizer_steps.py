"""What fused steps keep from one to the next, and what makes them look again."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optimizer_cases import DEVICE, assert_equal, give_gradients, losses, needs_triton, parameters
from torch import Tensor, nn
from trgnet.kernels.launch import Target, record_launches
from trgnet.kernels.moment_update import Hyper, Moments, MomentTable
from trgnet.optimizers import LCAM, SMES, GatedSMES, moments

from bench import optimizer_host

pytestmark = needs_triton
MAKE: dict[str, Callable] = {
    "lcam": lambda params, **options: LCAM(
        params, **{"lr": 0.1, "weight_decay": 0.01, "fused": True, **options}
    ),
    "smes": lambda params, **options: SMES(
        params, **{"alpha": 0.3, "betas": [0.8, 0.9], "fused": True, **options}
    ),
    "gated": lambda params, **options: GatedSMES(params, **{"alpha": (0.3, 0.5), "fused": True, **options}),
}
each_class = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def all_params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def first_of(optimizer: torch.optim.Optimizer) -> tuple[nn.Parameter, dict]:
    p = optimizer.param_groups[0]["params"][0]
    return p, optimizer.state[p]


def move_parameter(optimizer: torch.optim.Optimizer) -> None:
    p, _ = first_of(optimizer)
    p.data = p.data.clone()


def transpose_parameter(optimizer: torch.optim.Optimizer) -> None:
    p, _ = first_of(optimizer)
    p.data = p.data.T.contiguous().T


def narrow_parameter(optimizer: torch.optim.Optimizer) -> None:
    p, _ = first_of(optimizer)
    p.grad = None
    p.data = p.data.half()


def replace_parameter(optimizer: torch.optim.Optimizer) -> None:
    p, _ = first_of(optimizer)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(2 * p.detach())


def alias_parameter(optimizer: torch.optim.Optimizer) -> None:
    """Another parameter in the same memory: it has no state yet."""
    p, _ = first_of(optimizer)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(p.detach())


def move_moment(optimizer: torch.optim.Optimizer) -> None:
    _, state = first_of(optimizer)
    state[optimizer.first_name].data = 2 * state[optimizer.first_name].data


def replace_moment(optimizer: torch.optim.Optimizer) -> None:
    _, state = first_of(optimizer)
    state[optimizer.first_name] = 2 * state[optimizer.first_name]


def replace_step(optimizer: torch.optim.Optimizer) -> None:
    _, state = first_of(optimizer)
    state["step"] = torch.tensor(7.0)


def drop_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.pop(first_of(optimizer)[0])


def clear_state(optimizer: torch.optim.Optimizer) -> None:
    first_of(optimizer)[1].clear()


def shrink_parameter(optimizer: torch.optim.Optimizer) -> None:
    """To a part of its own memory, and its moments with it."""
    p, state = first_of(optimizer)
    p.grad = None
    for t in (p, *(t for t in state.values() if t.dim())):
        t.data = t.data[:2]


def replace_state(optimizer: torch.optim.Optimizer) -> None:
    p, state = first_of(optimizer)
    optimizer.state[p] = {name: 2 * t for name, t in state.items()}


def load_state(optimizer: torch.optim.Optimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for t in state["state"][0].values():
        t.mul_(2)
    optimizer.load_state_dict(state)


def change_setting(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[1]["lr"] = 0.3


def change_setting_in_a_list(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if isinstance(group.get("betas"), list):
            group["betas"][0] = 0.1


def change_setting_on_the_device(optimizer: torch.optim.Optimizer) -> None:
    rate = optimizer.param_groups[0]["lr"]
    if isinstance(rate, Tensor):
        rate.fill_(0.3)


def move_between_groups(optimizer: torch.optim.Optimizer) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())


def add_group(optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, device=DEVICE))], "lr": 0.2})


EVENTS = {
    event.__name__: event
    for event in (
        move_parameter, transpose_parameter, narrow_parameter, replace_parameter, alias_parameter, move_moment,
        replace_moment, replace_step, drop_state, clear_state, shrink_parameter, replace_state, load_state, change_setting, change_setting_in_a_list,
        change_setting_on_the_device, move_between_groups, add_group,
    )
}  # fmt: skip


def gradients(optimizer: torch.optim.Optimizer, seed: int) -> None:
    for i, p in enumerate(all_params(optimizer)):
        generator = torch.Generator().manual_seed(100 * seed + i)
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for p in all_params(optimizer) for t in (p.detach(), *optimizer.state[p].values())]


def two_groups(make: Callable, **options: object) -> torch.optim.Optimizer:
    params = parameters(shapes=((3, 5), (7,), (2, 3)))
    return make([{"params": params[:2]}, {"params": params[2:], "lr": 0.2}], **options)


@pytest.mark.parametrize("name, capturable", [("smes", False), ("gated", True)], ids=["numbers", "live"])
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_a_step_after_a_change_is_that_of_an_optimizer_that_keeps_nothing(
    name: str, event: Callable, capturable: bool
):
    """A copy of an optimizer collects everything anew."""
    optimizer = two_groups(MAKE[name], capturable=capturable)
    for i in range(2):
        gradients(optimizer, i)
        optimizer.step(loss=losses(2)[i])
    event(optimizer)
    other = copy.deepcopy(optimizer)
    for i in range(2):
        for each in (optimizer, other):
            gradients(each, i + 2)
            each.step(loss=0.5 + i)
        assert_equal(tensors_of(optimizer), tensors_of(other))


@each_class
def test_every_setting_of_a_group_may_change_between_two_steps(make: Callable):
    optimizer = make([nn.Parameter(torch.ones(3, device=DEVICE))], weight_decay=0.5)
    changes = [("lr", 0.2), ("momenta", (0.5, 0.6)), ("betas", (0.7, 0.8)), ("beta2", 0.9), ("eps", 1e-3), ("alpha", 0.7),
               ("weight_decay", 0.1), ("decoupled_weight_decay", True), ("maximize", True)]  # fmt: skip
    if isinstance(optimizer, LCAM):
        changes += [("nesterov", True), ("nesterov", False), ("dampening", 0.25)]
    for name, value in [change for change in changes if change[0] in optimizer.param_groups[0]]:
        gradients(optimizer, 0)
        optimizer.step(loss=1.0)
        optimizer.param_groups[0][name] = value
        assert_steps_like_a_copy(optimizer, 1.0)


def plain(p: Tensor, g: Tensor) -> Tensor:
    return g


def transposed(p: Tensor, g: Tensor) -> Tensor:
    return g.T.contiguous().T if g.dim() == 2 else g


def unaligned(p: Tensor, g: Tensor) -> Tensor:
    buffer = torch.empty(g.numel() + 1, device=g.device)
    return buffer[1:].view(g.shape).copy_(g)


def absent(p: Tensor, g: Tensor) -> Tensor | None:
    return None if p.dim() == 1 else g


@pytest.mark.parametrize("name", ["lcam", "gated"])
@pytest.mark.parametrize("form", [plain, transposed, unaligned, absent])
def test_gradients_may_have_another_form_in_every_step(name: str, form: Callable):
    """There and back, new and in place, beside a copy of the optimizer, which collects everything anew."""
    params = parameters(shapes=((3, 5), (7,), (2, 3)))
    optimizer = MAKE[name](params)
    kept = []
    for i, make_gradient in enumerate((plain, plain, form, form, plain)):
        give_gradients(params, i)
        for p in params:
            p.grad = make_gradient(p, p.grad)
        kept.append([p.grad for p in params])  # so that the next ones are elsewhere
        assert_steps_like_a_copy(optimizer, losses(5)[i])
    for p in params:
        p.grad.mul_(2)
    assert_steps_like_a_copy(optimizer, 0.1)


def assert_steps_like_a_copy(optimizer: torch.optim.Optimizer, loss: float) -> None:
    other = copy.deepcopy(optimizer)
    for p, q in zip(all_params(optimizer), all_params(other)):
        q.grad = None if p.grad is None else p.grad.clone(memory_format=torch.contiguous_format)
    optimizer.step(loss=loss)
    other.step(loss=loss)
    assert_equal(tensors_of(optimizer), tensors_of(other))


@each_class
def test_sparse_gradients_are_refused_in_the_middle_of_a_training(make: Callable):
    p = nn.Parameter(torch.ones(4, 2, device=DEVICE))
    optimizer = make([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = torch.ones(4, 2, device=DEVICE).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@each_class
def test_parameters_and_state_on_two_devices_are_refused(make: Callable):
    optimizer = make([nn.Parameter(torch.ones(3, device="meta"))], capturable=True)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(3, device=DEVICE))]
    gradients(optimizer, 0)
    with pytest.raises(RuntimeError, match="its own state is on meta; move the model before you build"):
        optimizer.step()


@each_class
def test_a_table_that_a_graph_reads_stays_as_it_is(make: Callable, monkeypatch: pytest.MonkeyPatch):
    """Also one that was made before the capture: gradients of later steps go into another."""
    params = parameters()
    optimizer = make(params, capturable=True)
    loss = torch.ones((), device=DEVICE)
    give_gradients(params, 0)
    optimizer.step(loss=loss)
    captured = optimizer._table
    with monkeypatch.context() as patch:
        patch.setattr(moments, "capturing", lambda: True)
        optimizer.step(loss=loss)
    assert optimizer._captured == [captured]
    before, kept = captured.parts[0].table.clone(), [p.grad for p in params]
    give_gradients(params, 1)
    optimizer.step(loss=loss)
    assert optimizer._table is not captured and len(kept) == len(params)
    assert torch.equal(captured.parts[0].table, before)


def test_a_table_takes_up_new_addresses_of_gradients_and_of_nothing_else():
    def moved(t: Tensor) -> Tensor:
        return t.clone(memory_format=torch.preserve_format)

    tensors = [torch.randn(6, 8, device=DEVICE) for _ in range(4)]
    p, g, m, v = tensors
    table = MomentTable(Moments([p], [g], [m], [v]), [0], [0])
    new = moved(g)
    assert table.follow(Moments([p], [g], [m], [v]), move_gradients=False)
    assert not table.follow(Moments([p], [new], [m], [v]), move_gradients=False)
    assert table.follow(Moments([p], [new], [m], [v]), move_gradients=True)
    assert table.parts[0].table[1] == new.data_ptr()
    assert table.follow(Moments([p], [new], [m], [v]), move_gradients=False)
    others = [[moved(p), new, m, v], [p, new, moved(m), v], [p, new, m, moved(v)], [p, new.half(), m, v],
              [p, new.T.contiguous().T, m, v], [p, unaligned(p, g), m, v]]  # fmt: skip
    for other in others:
        assert not table.follow(Moments(*([t] for t in other)), move_gradients=True)
    assert table.parts[0].table[1] == new.data_ptr()


def test_host_times_are_measured_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture):
    optimizer_host.main(["--rounds", "2", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert "Host time of a step without a GPU: 394 tensors" in capsys.readouterr().out
    names = [name for family in optimizer_host.FAMILIES.values() for name in family]
    assert [row["optimizer"] for row in rows if row["gradients"] == "new"] == names
    assert all(
        row["microseconds"] > 0 and (row["ratio"] == 1) == row["optimizer"].startswith("torch")
        for row in rows
    )


def test_a_gradient_that_moves_beside_one_of_another_layout():
    """The table keeps the address of the copy that stands for the second one."""
    rows = torch.tensor([Hyper(lr=0.1).row], device=DEVICE)
    results = []
    for move in (False, True):
        params = [torch.ones(4, 6, device=DEVICE) for _ in range(2)]
        first = [torch.zeros(4, 6, device=DEVICE) for _ in params]
        values = torch.arange(24.0, device=DEVICE).view(4, 6)
        grads = [values.clone(), values.T.contiguous().T]
        table, counts = (
            MomentTable(Moments(params, grads, first), [0, 0], [0, 1]),
            torch.zeros(2, 3, device=DEVICE),
        )
        if move:
            grads = [g.clone(memory_format=torch.preserve_format) for g in grads]
            assert table.follow(Moments(params, grads, first), move_gradients=True)
        table.launch(Moments(params, grads, first), rows, counts, form="sum")
        results.append(params)
    assert_equal(*results)
    assert torch.equal(results[0][0], results[0][1]) and not torch.equal(
        results[0][0], torch.ones_like(values)
    )


def calls(function: Callable[[], object]) -> int:
    """Functions of Python, and of C that Python calls by itself."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@each_class
@pytest.mark.parametrize("capturable", [False, True], ids=["numbers", "live"])
@pytest.mark.parametrize("move", [False, True], ids=["kept", "new"])
def test_a_step_calls_nothing_for_single_tensors(make: Callable, capturable: bool, move: bool):
    """Neither where gradients stay in their memory nor where they are made anew: counted for 10 tensors and for 200.

    The bound includes the description of a recorded launch, which an ordinary step does not make."""

    def step_calls(count: int) -> int:
        params = [nn.Parameter(torch.empty(7, device="meta")) for _ in range(count)]
        optimizer = make(params, capturable=capturable)
        loss = torch.empty((), device="meta")

        def step() -> None:
            optimizer.step(loss=loss)

        with record_launches(Target("cuda", 90)):
            for _ in range(2):
                for p in params:
                    p.grad = torch.empty_like(p)
                step()
            if move:  # on meta every address is 0
                optimizer._table._addresses[1] = [16] * count
            return calls(step)

    assert step_calls(10) == step_calls(200) < 500
