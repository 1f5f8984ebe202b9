"""The network, its losses and its training reproduce the published code's float64 numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published_case import CASES, load_case
from trgnet.kernels import use_backend

from trgnet.published import to_published


@pytest.fixture(params=["reference", "recompute"])
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
