"""What a training step starts on a GPU: nobody adds a launch unnoticed."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from torch import Tensor
from trgnet.kernels import operator

from bench import launches
from bench.compiled import triton_operators
from bench.launches import (
    PHASES,
    Counts,
    DeviceCalls,
    Step,
    column,
    counting,
    network_operators,
    operator_counts,
    step_counts,
)
from bench.operators import Size, make_case

pytest.importorskip("triton")

# Triton kernels and calls of ATen, forward and backward.
OPERATORS = {
    "attention_layer": ((4, 1), (5, 3)),
    "boundary_loss": ((2, 0), (1, 0)),
    "class_loss": ((3, 0), (1, 0)),
    "dilated_residual": ((2, 0), (3, 1)),
    "dynamic_graph_conv": ((2, 2), (3, 7)),
    "fusion_layer": ((1, 0), (1, 1)),
    "masked_batch_norm": ((3, 1), (2, 5)),
    "multiscale_graph_conv": ((3, 3), (3, 12)),
    "pairwise_distance": ((1, 0), (1, 0)),
    "pointwise_conv": ((2, 0), (3, 1)),
    "segment_mean": ((1, 0), (1, 0)),
}
SMALL = Size(n=2, t=96, segments=4)
MOST_OF_A_STEP = {"forward": 318, "losses": 130, "backward": 533, "optimizer": 2}


def numbers(counts: Counts) -> tuple[int, int]:
    return counts.kernels.total(), counts.calls.total()


@pytest.fixture(scope="module")
def triton_step() -> dict[str, Counts]:
    with column("triton"):
        return step_counts(SMALL)


@pytest.mark.parametrize("name", OPERATORS)
def test_launches_of_an_operator(name: str):
    with column("triton"):
        assert tuple(map(numbers, operator_counts(name))) == OPERATORS[name]


def test_every_operator_with_kernels_is_counted():
    assert sorted(OPERATORS) == network_operators()
    assert set(triton_operators()) - set(network_operators()) == {"moment_update"}


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]):
    with mock.patch.object(launches, "STEP_SIZE", SMALL):
        launches.main([])
    printed = capsys.readouterr().out
    assert "attention_layer forward" in printed and "step" in printed


def test_attention_layer_by_hand():
    with column("triton"):
        forward, backward = operator_counts("attention_layer")
    assert forward.kernels == dict.fromkeys(
        ("attention_pack", "attention_conv", "attention_key_value", "attention_output"), 1
    )
    assert forward.calls == {"sum": 1}  # of the parts of keys and values
    assert backward.kernels == dict.fromkeys(
        (
            "attention_output_backward",
            "attention_key_value_backward",
            "dilated_conv_backward",
            "dilated_conv_weights",
            "attention_weights_backward",
        ),
        1,
    )
    assert backward.calls == {"sum": 3}  # of the parts of the sums, the norm and the weights


def test_nothing_is_filled_for_outputs_without_a_gradient():
    """Autograd would write zeros as large as what a forward pass keeps for its backward pass."""
    for name in OPERATORS:
        with column("triton"):
            assert "zeros" not in operator_counts(name)[1].calls, name


def test_launches_of_a_step(triton_step: dict[str, Counts]):
    assert tuple(triton_step) == PHASES
    for phase, counts in triton_step.items():
        assert counts.total <= MOST_OF_A_STEP[phase], (phase, counts)
    layers = sum((counts.kernels for counts in triton_step.values()), Counter())
    assert {name: layers[name] for name in ("attention_conv", "fusion_layer_forward", "class_loss_sums")} == {
        "attention_conv": 20, "fusion_layer_forward": 9, "class_loss_sums": 2,
    }  # fmt: skip


def test_a_step_starts_far_less_than_plain_torch(triton_step: dict[str, Counts]):
    with column("plain"):
        plain = step_counts(SMALL)
    assert not any(counts.kernels for counts in plain.values())
    assert sum(c.calls["native_dropout"] for c in plain.values()) == 1 + 9 + 2 * 20 + 20
    ours, theirs = (sum(c.total for c in counts.values()) for counts in (triton_step, plain))
    assert 3 * ours < theirs


def test_counts_depend_on_neither_batch_nor_length(triton_step: dict[str, Counts]):
    with column("triton"):
        assert step_counts(Size(n=3, t=1000, segments=30)) == triton_step


X = torch.ones(4, 6, device="meta")
CALLS = {
    "elementwise": (lambda: torch.relu(X + 1), 2),
    "in place": (lambda: X.clone().mul_(2), 2),
    "views": (lambda: X.T.unsqueeze(0).expand(3, -1, -1).chunk(2, 1)[0].flatten(1)[:, :1], 1),
    "allocations": (lambda: (torch.empty_like(X), X.new_empty(3)), 0),
    "filled": (lambda: torch.zeros(3, device="meta"), 1),
    "contiguous already": (lambda: X.contiguous().to(torch.float32), 0),
    "on the host": (lambda: torch.ones(3) + 1, 0),
    "dropout": (lambda: torch.native_dropout(X, 0.5, True), 1),
    "convolution": (lambda: torch.conv1d(X, X[None, :, :4]), 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_reach_the_device(name: str):
    work, expected = CALLS[name]
    with DeviceCalls() as mode:
        work()
    assert mode.calls.total() == expected, mode.calls


@pytest.mark.parametrize("name", ["attention_layer", "multiscale_graph_conv"])
def test_calls_within_an_operator_are_counted(name: str):
    """As many as when its launchers are called without torch.library, which hides what they do from others."""
    args = [
        a.detach().to("meta") if isinstance(a, Tensor) else a for a in make_case(name, SMALL).network_args
    ]
    with counting() as direct:
        operator(name).triton_passes(args, torch.empty_like)
    with column("triton"):
        assert sum(operator_counts(name, SMALL), Counts()) == direct


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["triton", "plain"])
def test_counts_are_those_of_the_profiler(name: str):
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with column(name):
        counted = sum(step_counts(SMALL).values(), Counts())
        step = Step(SMALL, torch.device("cuda"))
        for _ in range(2):  # compiles kernels, makes the optimizer's state
            step.run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            step.run()
            torch.cuda.synchronize()
    started = Counter(
        event.name.strip("_").removesuffix("_kernel")
        for event in prof.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    assert {name: started[name] for name in counted.kernels} == counted.kernels
    assert started.total() >= counted.total
