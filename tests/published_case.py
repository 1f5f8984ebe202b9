"""The reference cases of tests/golden: inputs from a recipe, results from the published code in float64.

Nothing is padded and every dropout is 0. ``NAME.json`` holds the sizes and the published state_dict's names and
shapes, ``NAME.npz`` the results.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trgnet import TRGLoss, TRGNet
from trgnet.data import Batch, Recording, collate
from trgnet.published import DATASET_SKELETONS, from_published
from trgnet.skeleton import SKELETONS
from trgnet.text import TextPrior, relation_graph

GOLDEN = Path(__file__).parent / "golden"
CASES = ("pku", "lara")
NO_DROPOUT = {f"{name}_dropout": 0.0 for name in ("channel", "fusion", "attention", "output")}


@dataclass
class Case:
    info: dict
    truth: dict[str, np.ndarray]
    state: dict[str, Tensor]
    batch: Batch
    joint_graph: Tensor
    action_embeddings: Tensor

    def model(self) -> TRGNet:
        """The network with the case's weights, in float64."""
        skeleton = SKELETONS[DATASET_SKELETONS[self.info["dataset"]]]
        model = TRGNet(
            self.info["C"],
            self.info["n_classes"],
            skeleton.adjacency(),
            self.info["embedding_dim"],
            **NO_DROPOUT,
        ).double()
        model.load_state_dict(from_published(self.state, model))
        return model

    def loss(self) -> TRGLoss:
        prior = TextPrior(np.zeros((self.info["V"], 768), np.float32), self.action_embeddings.float().numpy())
        loss = TRGLoss(prior, pos_weight=self.info["pos_weight"]).double()
        # The embeddings of the case are float64; those of a prior are float32.
        loss.action_embeddings = self.action_embeddings
        loss.action_graph = relation_graph(self.action_embeddings)
        return loss


@lru_cache
def load_case(name: str) -> Case:
    info = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        truth = dict(file)
    rng = np.random.Generator(np.random.PCG64(info["seed"]))
    state = {
        key: _weight(key, rng.standard_normal(shape))
        for key, shape in sorted(info["state_dict_shapes"].items())
    }
    rng = np.random.Generator(np.random.PCG64(info["seed"] + 1))
    n, c, v, t = (info[axis] for axis in "NCVT")
    x = 0.1 * rng.standard_normal((n, c, v, t))
    labels = [_labels(rng, t, info["n_classes"]) for _ in range(n)]
    batch = collate(
        [Recording(f"r{i}", x[i].astype(np.float32), labels[i]) for i in range(n)], pad_multiple=1
    )
    batch = replace(batch, x=torch.from_numpy(x))
    joints, actions = (torch.from_numpy(rng.standard_normal((m, 768))) for m in (v, info["n_classes"]))
    return Case(info, truth, state, batch, relation_graph(joints), actions)


def _weight(name: str, a: np.ndarray) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(a.shape, dtype=torch.int64)
    if name.endswith("running_var"):
        a = 1 + 0.5 * abs(a)
    elif name.endswith("running_mean"):
        a = 0.1 * a
    elif a.ndim >= 2:
        a = a / math.sqrt(math.prod(a.shape[1:])) * (0.01 if name == "SP.A_res" else 1)
    elif name == "logit_scale":
        a = math.log(1 / 0.07) + 0.01 * a
    elif name in ("SP.alpha", "SP.beta"):
        a = 0.5 + 0.1 * a
    else:
        a = 1 + 0.1 * a if name.endswith(".weight") else 0.1 * a
    return torch.from_numpy(a)


def _labels(rng: np.random.Generator, frames: int, classes: int) -> np.ndarray:
    labels, position, previous = np.zeros(frames, np.int64), 0, None
    while position < frames:
        length, label = int(rng.integers(4, 17)), int(rng.integers(0, classes))
        while label == previous:
            label = int(rng.integers(0, classes))
        labels[position : position + length] = label
        position, previous = position + length, label
    return labels
