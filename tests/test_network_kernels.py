"""The whole network and its losses with every Triton kernel forced, dropout on, against plain PyTorch.

Both backends draw the same dropout from the same seeds, so they are the same function. On a machine without a GPU the
kernels run under Triton's interpreter, which conftest.py switches on.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from trgnet.kernels import use_backend

from trgnet import TRGLoss, TRGNet
from trgnet.data import Batch, Recording, collate
from trgnet.skeleton import SKELETONS
from trgnet.text import TextPrior

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS, CLASSES, WIDTH = 3, 4, 8
SKELETON = SKELETONS["tcg"].adjacency()
RNG = np.random.default_rng(3)
PRIOR = TextPrior(
    RNG.standard_normal((len(SKELETON), WIDTH), np.float32), RNG.standard_normal((CLASSES, WIDTH), np.float32)
)


def padded_batch() -> Batch:
    """Two recordings of different lengths, in three and two segments, the second with frames of no class."""
    rng = np.random.default_rng(0)
    labels = [np.repeat([0, 3, 1], (9, 12, 10)), np.repeat([2, 255, 0], (8, 5, 7))]
    recordings = [
        Recording(
            f"r{i}",
            0.3 * rng.standard_normal((CHANNELS, len(SKELETON), len(of)), np.float32),
            of.astype(np.int64),
        )
        for i, of in enumerate(labels)
    ]
    return collate(recordings).to(DEVICE)


def results(backend: str, autocast: torch.dtype | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Logits of every stage, terms of the loss, gradients of every parameter."""
    torch.manual_seed(seed)
    model = TRGNet(CHANNELS, CLASSES, SKELETON, WIDTH, features=16, layers=2, refine_layers=2, hops=3)
    with torch.no_grad():
        for parameter in (model.spatial.alpha, model.spatial.beta):
            parameter.fill_(0.5)
    model, loss, batch = model.to(DEVICE).train(), TRGLoss(PRIOR, pos_weight=10.0).to(DEVICE), padded_batch()
    torch.manual_seed(1)
    with use_backend(backend):
        with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
            output = model(batch.x, batch.mask, PRIOR.joint_graph().to(DEVICE), batch.segments)
        terms = loss(output, batch)
        terms["total"].backward()
    found = {f"class {i}": a for i, a in enumerate(output.class_logits)}
    found |= {f"boundary {i}": a for i, a in enumerate(output.boundary_logits)}
    found |= {f"loss {name}": term for name, term in terms.items()}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {name: a.detach() for name, a in found.items()}


def test_float32_with_dropout():
    expected, got = results("reference"), results("triton")
    largest = max(a.norm() for name, a in expected.items() if name.startswith("gradient"))
    for name, truth in expected.items():
        # Gradients that are zero but for rounding, of biases before a norm, are compared with the others.
        scale = largest / 100 if name.startswith("gradient") else truth.norm()
        assert (got[name] - truth).norm() <= 1e-4 * max(scale, truth.norm()), name


@pytest.mark.parametrize(
    "dtype", [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else []), ids=str
)  # no bfloat16 products in the interpreter
def test_autocast_with_dropout(dtype: torch.dtype):
    """As close to float32 as plain PyTorch under autocast is, in the same dtypes."""
    # A ReLU of a number near 0 may round to the other side, which changes whole gradients; a fault does not depend on the seed.
    wrong = [names_too_far(dtype, seed) for seed in range(3)]
    assert not set.intersection(*wrong), wrong


def names_too_far(dtype: torch.dtype, seed: int) -> set[str]:
    """Results of the kernels that are farther from float32 than plain PyTorch's are."""
    found = set()
    exact, plain = results("reference", seed=seed), results("reference", dtype, seed)
    got = results("triton", dtype, seed)
    largest = max(a.norm() for name, a in exact.items() if name.startswith("gradient"))
    for name, truth in exact.items():
        assert got[name].dtype == plain[name].dtype and got[name].isfinite().all(), name
        scale = largest / 10 if name.startswith("gradient") else truth.norm()
        floor = 0.01 * max(scale, truth.norm())
        if (got[name] - truth).norm() > 2 * (plain[name] - truth).norm() + floor:
            found.add(name)
    return found
