"""The network, its losses and its training reproduce the published code's float64 numbers.

So do the Triton kernels in float32, under the interpreter where there is no GPU.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from published_case import CASES, Case, load_case
from trgnet.kernels import use_backend

from trgnet import TRGNet
from trgnet.data import Batch
from trgnet.published import to_published


@pytest.fixture(params=["reference", "recompute", "auto"])
def every_backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield


def close(got: torch.Tensor, truth: np.ndarray, rtol: float = 1e-8, atol: float = 1e-10) -> None:
    np.testing.assert_allclose(got.detach().numpy(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_evaluation(name: str, every_backend: None):
    case = load_case(name)
    with torch.no_grad():
        logits, boundaries = case.model().eval()(case.batch.x, case.batch.mask, case.joint_graph)
    close(logits, case.truth["eval_cls"])
    close(boundaries, case.truth["eval_bound"])


@pytest.mark.parametrize("name", CASES)
def test_training_outputs_losses_and_every_gradient(name: str, every_backend: None):
    case = load_case(name)
    model = case.model().train()
    output = model(case.batch.x, case.batch.mask, case.joint_graph, case.batch.segments)
    for i, logits in enumerate(output.class_logits):
        close(logits, case.truth[f"train_cls{i}"])
    for i, logits in enumerate(output.boundary_logits):
        close(logits, case.truth[f"train_bound{i}"])
    close(output.segment_features, case.truth["segment_features"])
    assert case.batch.segments.label.tolist() == case.truth["segment_labels"].tolist()

    terms = case.loss()(output, case.batch)
    class_total = terms["cross_entropy"] + terms["smoothness"]
    got = [
        class_total,
        *(terms[key] for key in ("cross_entropy", "boundary", "absolute", "relative", "total")),
    ]
    close(torch.stack(got), case.truth["losses"])

    terms["total"].backward()
    gradients = {key: torch.zeros(shape).double() for key, shape in case.info["state_dict_shapes"].items()}
    gradients |= to_published({key: p.grad for key, p in model.named_parameters()})
    ordered = [gradients[key].flatten() for key in case.info["parameters"]]
    cosines = [torch.cos(torch.arange(len(g), dtype=torch.float64)) for g in ordered]
    close(torch.stack([g.norm() for g in ordered]), case.truth["grad_norms"])
    close(torch.stack([g @ c for g, c in zip(ordered, cosines)]), case.truth["grad_dot"])
    for key in (key for key in case.truth if key.startswith("grad:")):
        close(gradients[key.removeprefix("grad:")], case.truth[key])


def relative_error(got: torch.Tensor, truth: np.ndarray) -> float:
    truth = torch.from_numpy(np.asarray(truth))
    return float((got.detach().cpu() - truth).norm() / truth.norm())


def on_the_kernels(case: Case) -> tuple[TRGNet, Batch, torch.Tensor, str]:
    """The case in float32 on the device that the kernels run on."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = case.batch.to(device)
    batch = replace(batch, x=batch.x.float(), boundaries=batch.boundaries.float())
    return case.model().float().to(device), batch, case.joint_graph.to(device).float(), device


# Minutes under the interpreter, so one case each. A forced backend never falls back.


def test_every_kernel_of_evaluation_in_float32():
    case = load_case("pku")
    model, batch, graph, _ = on_the_kernels(case)
    with use_backend("triton"), torch.no_grad():
        logits, boundaries = model.eval()(batch.x, batch.mask, graph)
    assert relative_error(logits, case.truth["eval_cls"]) < 1e-4
    assert relative_error(boundaries, case.truth["eval_bound"]) < 1e-4


def test_every_kernel_of_training_in_float32():
    case = load_case("lara")
    model, batch, graph, device = on_the_kernels(case)
    loss = case.loss().float().to(device)
    with use_backend("triton"):
        output = model.train()(batch.x, batch.mask, graph, batch.segments)
        terms = loss(output, batch)
        terms["total"].backward()
    outputs = {"segment_features": output.segment_features}
    outputs |= {f"train_cls{i}": stage for i, stage in enumerate(output.class_logits)}
    outputs |= {f"train_bound{i}": stage for i, stage in enumerate(output.boundary_logits)}
    for key, got in outputs.items():
        assert relative_error(got, case.truth[key]) < 1e-4, key
    losses = torch.stack(
        [terms[key].cpu() for key in ("cross_entropy", "boundary", "absolute", "relative", "total")]
    )
    close(losses, case.truth["losses"][1:], rtol=1e-4, atol=1e-5)
    gradients = to_published({key: p.grad for key, p in model.named_parameters()})
    norms = dict(zip(case.info["parameters"], case.truth["grad_norms"], strict=True))
    for key, gradient in gradients.items():
        assert abs(float(gradient.norm()) - norms[key]) < 5e-3 * max(norms.values()), key
    for key in (key for key in case.truth if key.startswith("grad:")):
        assert relative_error(gradients[key.removeprefix("grad:")], case.truth[key]) < 5e-3, key


@pytest.mark.parametrize("name", CASES)
def test_four_adam_steps(name: str):
    case = load_case(name)
    model, loss = case.model().train(), case.loss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    trajectory = []
    for _ in range(4):
        total = loss(model(case.batch.x, case.batch.mask, case.joint_graph, case.batch.segments), case.batch)[
            "total"
        ]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        trajectory.append(total.detach())
    close(torch.stack(trajectory), case.truth["loss_trajectory"], rtol=1e-6)
    with torch.no_grad():
        logits, boundaries = model.eval()(case.batch.x, case.batch.mask, case.joint_graph)
    close(logits, case.truth["eval_cls_after4"], rtol=1e-6, atol=1e-7)
    close(boundaries, case.truth["eval_bound_after4"], rtol=1e-6, atol=1e-7)
