"""The published formulation of TRG-Net: the baseline.

Written from the description of the network (arXiv 2503.15126) and of its formulation: joints innermost,
(N, C, T, V); the hop tensor (N, S*C, T, V) and the frame adjacency (N, T, V, V) as tensors; a transpose
before each temporal layer and each projection; one projection each for queries, keys, values, frame and
channel relations; a D-wide feature per frame; Python loops over frames, segments and pairs of segments
in the losses. Heads that no loss reads are left out, and what all stages share is computed once. How the
distances of segments were computed is not known; here it is the plain formula, over all differences.

Functions and modules serve training only, without padding: there the published network and ours are
equal. Module names are those of published checkpoints, see :mod:`trgnet.published`.

Symbols: N batch, C channels, V joints, T frames, F features, S hops or segments, K classes, D embedding
width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from trgnet.data import Batch
from trgnet.skeleton import hop_matrices

FEATURES, RELATIONS, HOPS, LAYERS, HEADS, GROUP_CHANNELS = 64, 8, 13, 10, 4, 8
ACTION_STAGES, BOUNDARY_STAGES = 1, 2  # refinements after the first prediction
LOSS_WEIGHTS = {"boundary": 0.1, "absolute": 0.8, "relative": 1.0}


class Output(NamedTuple):
    class_logits: list[Tensor]
    """(N, K, T) per stage."""
    boundary_logits: list[Tensor]
    """(N, 1, T) per stage."""
    feature_map: Tensor
    """(N, D, T)."""
    logit_scale: Tensor


# Layers, as functions of their inputs and parameters.


def multiscale_graph_conv(x: Tensor, hops: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, C, T, V), hops (S, V, V), weight (F, S*C) -> (N, F, T, V), over the hop tensor (N, S*C, T, V)."""
    n, c, t, v = x.shape
    gathered = torch.einsum("vu,nctu->nctv", hops.reshape(-1, v), x).view(n, c, t, -1, v)
    hop_tensor = gathered.permute(0, 3, 1, 2, 4).reshape(n, -1, t, v)
    return functional.conv2d(hop_tensor, weight.view(*weight.shape, 1, 1), bias)


def dynamic_graph_conv(x: Tensor, p: Tensor, q: Tensor, graph: Tensor, beta: Tensor) -> Tensor:
    """x (N, F, T, V), p, q (N, T, V), graph (N, F, V, V) -> (N, F, T, V), over the adjacency (N, T, V, V)."""
    frame_graph = beta * torch.tanh(p.unsqueeze(3) - q.unsqueeze(2))
    return torch.einsum("ntuv,nctv->nctu", frame_graph, x) + torch.einsum("ncuv,nctv->nctu", graph, x)


def batch_norm(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x, residual (N, F, T, V), mask (N, 1, T) -> ReLU(norm(x) + residual), masked."""
    normalised = functional.batch_norm(x, None, None, weight, bias, training=True)
    return functional.relu(normalised + residual) * mask.unsqueeze(3)


def attention_layer(
    x: Tensor,
    mask: Tensor,
    source: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    value: tuple[Tensor, Tensor],
    attention: tuple[Tensor, Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    dilation: int,
    heads: int,
    scale: float,
    attention_dropout: float,
    output_dropout: float,
) -> Tensor:
    """x, source (N, F, T) -> (N, F, T); the projections (weight (F, F), bias (F,)) act on (N, T, F)."""
    o = functional.relu(functional.conv1d(x, conv_weight, conv_bias, padding=dilation, dilation=dilation))
    h = functional.instance_norm(o).transpose(1, 2)
    values = h if source is None else source.transpose(1, 2)
    q, k, v = (
        functional.linear(a, *projection).unflatten(2, (heads, -1))  # (N, T, heads, F/heads)
        for a, projection in ((h, query), (h, key), (values, value))
    )
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    key_value = torch.einsum("nthd,nthm->nhmd", k, v)
    normaliser = 1 / torch.einsum("nthd,nhd->nth", q, k.sum(1) + 1e-6)
    mixed = torch.einsum("nthd,nhmd,nth->nthm", q, key_value, normaliser).flatten(2)
    att = functional.dropout(functional.linear(mixed, *attention), attention_dropout).transpose(1, 2) * mask
    o = functional.conv1d(scale * att + o, output_weight.unsqueeze(2), output_bias)
    return (x + functional.dropout(o, output_dropout)) * mask


def fusion_layer(
    x: Tensor,
    spatial: Tensor,
    mask: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    p: float,
) -> Tensor:
    """x, spatial (N, F, T) -> (N, F, T): the two-layer network on (N, T, F)."""
    hidden = functional.gelu(functional.linear(x.transpose(1, 2), weight1, bias1) + spatial.transpose(1, 2))
    out = functional.linear(functional.dropout(hidden, p), weight2, bias2)
    return (out.transpose(1, 2) + x) * mask


def dilated_residual(
    x: Tensor,
    mask: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    dilation: int,
    p: float,
) -> Tensor:
    """x (N, F, T) -> (N, F, T)."""
    hidden = functional.relu(
        functional.conv1d(x, conv_weight, conv_bias, padding=dilation, dilation=dilation)
    )
    out = functional.conv1d(hidden, output_weight.unsqueeze(2), output_bias)
    return (x + functional.dropout(out, p)) * mask


# Losses.


def class_loss(logits: Tensor, labels: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the batch; smoothness sequence by sequence. logits (N, K, T), similarity (N, T)."""
    cross_entropy = functional.cross_entropy(logits, labels, ignore_index=255)
    smoothness = []
    for sequence, weight in zip(logits, similarity):
        later, earlier = sequence[:, 1:].log_softmax(1), sequence[:, :-1].log_softmax(1)
        smoothness.append(((later - earlier).square().clamp(max=16) * weight[1:]).mean())
    return cross_entropy, torch.stack(smoothness).mean()


def boundary_loss(logits: Tensor, target: Tensor, pos_weight: Tensor) -> Tensor:
    """Sequence by sequence. logits (N, 1, T), target (N, T)."""
    losses = [
        functional.binary_cross_entropy_with_logits(sequence[0], truth, pos_weight=pos_weight)
        for sequence, truth in zip(logits, target)
    ]
    return sum(losses) / len(losses)


def segment_mean(x: Tensor, batch: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """x (N, F, T) -> (S, F), segment by segment."""
    bounds = zip(batch.tolist(), start.tolist(), length.tolist())
    return torch.stack([x[n, :, first : first + frames].mean(1) for n, first, frames in bounds])


def pairwise_distance(f: Tensor) -> Tensor:
    """f (S, D) -> (S, S), over all differences (S, S, D)."""
    return (f.unsqueeze(1) - f.unsqueeze(0)).norm(dim=2)


def loss(
    output: Output, batch: Batch, action_embeddings: Tensor, action_graph: Tensor, pos_weight: Tensor
) -> dict[str, Tensor]:
    """All terms and their weighted sum, by the names of :class:`trgnet.losses.TRGLoss`."""
    step = batch.x[..., 1:] - batch.x[..., :-1]
    similarity = functional.pad(torch.exp(-step.flatten(1, 2).norm(dim=1) / 2), (1, 0))
    stages = [class_loss(logits, batch.labels, similarity) for logits in output.class_logits]
    boundary = [boundary_loss(logits, batch.boundaries, pos_weight) for logits in output.boundary_logits]
    batch_index, start, length, labels = _segments(batch.labels)
    features = segment_mean(output.feature_map, batch_index, start, length)
    terms = {
        "cross_entropy": sum(ce for ce, _ in stages) / len(stages),
        "smoothness": sum(smooth for _, smooth in stages) / len(stages),
        "boundary": sum(boundary) / len(boundary),
        "absolute": _absolute_loss(features, labels, action_embeddings, output.logit_scale),
        "relative": _relative_loss(features, labels, action_graph),
    }
    weighted = sum(weight * terms[name] for name, weight in LOSS_WEIGHTS.items())
    return {"total": terms["cross_entropy"] + terms["smoothness"] + weighted} | terms


def _segments(labels: Tensor) -> Tensor:
    """Runs of one label in (N, T) labels, found frame by frame: batch, start, length, label (4, S), on the host."""
    runs: list[list[int]] = []
    for n, sequence in enumerate(labels):
        previous = None
        for t, frame in enumerate(sequence):
            label = frame.item()
            if label != previous:
                runs.append([n, t, 0, label])
            runs[-1][2] += 1
            previous = label
    return torch.tensor(runs).T


def _absolute_loss(f: Tensor, labels: Tensor, embeddings: Tensor, logit_scale: Tensor) -> Tensor:
    labels = labels.to(f.device)
    text = functional.normalize(embeddings[labels], dim=1)
    logits = logit_scale * functional.normalize(f, dim=1) @ text.T
    target = torch.softmax(10 * (labels.unsqueeze(1) == labels).to(f.dtype), dim=1)
    return (_divergence(logits, target) + _divergence(logits.T, target)) / 2


def _relative_loss(f: Tensor, labels: Tensor, action_graph: Tensor) -> Tensor:
    distance = pairwise_distance(f)
    graph = 1 - (distance - distance.min()) / (distance.max() - distance.min())
    target = torch.zeros_like(graph)
    for i, row in enumerate(labels):
        for j, column in enumerate(labels):
            target[i, j] = action_graph[row, column]
    return _divergence(graph, torch.softmax(10 * target, dim=1))


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    return functional.kl_div(logits.log_softmax(1), target, reduction="batchmean")


# The network.


class PublishedNet(nn.Module):
    """The published configuration for C channels, K classes and a skeleton; the arguments of TRGNet."""

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        adjacency: np.ndarray,
        embedding_dim: int = 768,
        *,
        channel_dropout: float = 0.3,
        fusion_dropout: float = 0.3,
        attention_dropout: float = 0.05,
        output_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        layer_dropout = (attention_dropout, output_dropout)
        self.SP = Spatial(in_channels, adjacency)
        self.STI = Temporal(len(adjacency), channel_dropout, fusion_dropout, layer_dropout)
        self.conv_cls = nn.Conv1d(FEATURES, n_classes, 1)
        self.conv_bound = nn.Conv1d(FEATURES, 1, 1)
        self.conv_feature = nn.Conv1d(FEATURES, embedding_dim, 1)
        self.asb = nn.ModuleList(ActionStage(n_classes, layer_dropout) for _ in range(ACTION_STAGES))
        self.brb = nn.ModuleList(BoundaryStage(output_dropout) for _ in range(BOUNDARY_STAGES))
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))

    def forward(self, x: Tensor, mask: Tensor, joint_graph: Tensor) -> Output:
        """x (N, C, V, T), mask (N, 1, T) all true, joint_graph (V, V)."""
        real = mask.to(x.dtype)
        feature = self.STI(self.SP(x.transpose(2, 3).contiguous(), real, joint_graph), real)
        classes, boundaries = [self.conv_cls(feature)], [self.conv_bound(feature)]
        feature_map = self.conv_feature(feature)
        for i, stage in enumerate(self.asb):
            logits, feature = stage(classes[-1].softmax(1) * real, feature * real, real, math.exp(-3 * i))
            classes.append(logits)
        for stage in self.brb:
            boundaries.append(stage(torch.sigmoid(boundaries[-1]), real))
        return Output(classes, boundaries, feature_map, self.logit_scale)


class Spatial(nn.Module):
    def __init__(self, in_channels: int, adjacency: np.ndarray) -> None:
        super().__init__()
        v = len(adjacency)
        self.register_buffer("hops", torch.from_numpy(hop_matrices(adjacency, HOPS)), persistent=False)
        self.A_res = nn.Parameter(torch.empty(HOPS * v, v).uniform_(-1e-6, 1e-6))
        self.mlp = nn.Module()
        self.mlp.layers = nn.ModuleList(
            [nn.Conv2d(HOPS * in_channels, FEATURES, 1), nn.BatchNorm2d(FEATURES)]
        )
        self.CTRGCN = DynamicGraph()
        self.alpha, self.beta = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.bn = nn.BatchNorm2d(FEATURES)

    def forward(self, x: Tensor, real: Tensor, joint_graph: Tensor) -> Tensor:
        conv, norm = self.mlp.layers
        hops = self.hops + self.A_res.view_as(self.hops)
        y = functional.relu(norm(multiscale_graph_conv(x, hops, conv.weight.flatten(1), conv.bias)))
        z = self.CTRGCN(y, joint_graph, self.alpha, self.beta)
        return functional.relu(self.bn(z) + y) * real.unsqueeze(3)


class DynamicGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(FEATURES, RELATIONS, 1), nn.Conv2d(FEATURES, RELATIONS, 1)
        self.conv3, self.conv4 = nn.Conv2d(FEATURES, FEATURES, 1), nn.Conv2d(RELATIONS, FEATURES, 1)

    def forward(self, y: Tensor, joint_graph: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        x1, x2, x3 = self.conv1(y), self.conv2(y), self.conv3(y)
        relation = torch.tanh(x1.mean(2).unsqueeze(3) - x2.mean(2).unsqueeze(2))
        # The joint graph enters on the frame level and on the channel level.
        graph = alpha * self.conv4(relation) + 2 * joint_graph
        return dynamic_graph_conv(x3, x1.mean(1), x2.mean(1), graph, beta)


class Temporal(nn.Module):
    def __init__(
        self, joints: int, channel_dropout: float, fusion_dropout: float, layer_dropout: tuple[float, float]
    ) -> None:
        super().__init__()
        width = joints * GROUP_CHANNELS
        self.dropout = nn.Dropout2d(channel_dropout)
        self.conv_in = nn.Conv2d(FEATURES, LAYERS * GROUP_CHANNELS, 1)
        self.conv_t = nn.Conv1d(width, FEATURES, 1)
        self.SFI_layers = nn.ModuleList(Fusion(width, fusion_dropout) for _ in range(LAYERS - 1))
        self.layers = nn.ModuleList(Attention(2**i, layer_dropout) for i in range(LAYERS))
        self.conv_out = nn.Conv1d(FEATURES, FEATURES, 1)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        groups = [
            group.permute(0, 3, 1, 2).flatten(1, 2)  # (N, 8, T, V) -> (N, V*8, T)
            for group in self.conv_in(self.dropout(x)).split(GROUP_CHANNELS, dim=1)
        ]
        s = self.conv_t(groups[-1]) * real
        for i, layer in enumerate(self.layers):
            if i > 0:
                s = self.SFI_layers[i - 1](groups[i - 1], s, real)
            s = layer(s, None, 1.0, real)
        return self.conv_out(s) * real


class Fusion(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.conv_s = nn.Conv1d(width, FEATURES, 1)
        self.conv_fusion = nn.Conv1d(2 * FEATURES, FEATURES, 1)
        self.ff = nn.Sequential(
            nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.Dropout(dropout), nn.Linear(FEATURES, FEATURES)
        )

    def forward(self, group: Tensor, s: Tensor, real: Tensor) -> Tensor:
        fused = self.conv_fusion(torch.cat([s, self.conv_s(group)], dim=1))
        return (self.ff(fused.transpose(1, 2)).transpose(1, 2) + s) * real


class Attention(nn.Module):
    def __init__(self, dilation: int, dropout: tuple[float, float]) -> None:
        super().__init__()
        self.dilation, self.dropout = dilation, dropout
        self.feed_forward = nn.ModuleList([nn.Conv1d(FEATURES, FEATURES, 3)])
        self.att_layer = nn.ModuleDict(
            {f"{part}_projection": nn.Linear(FEATURES, FEATURES) for part in ("query", "key", "value", "out")}
        )
        self.conv_out = nn.Conv1d(FEATURES, FEATURES, 1)

    def forward(self, x: Tensor, source: Tensor | None, scale: float, real: Tensor) -> Tensor:
        conv, out = self.feed_forward[0], self.conv_out
        projections = [(layer.weight, layer.bias) for layer in self.att_layer.values()]
        return attention_layer(
            x,
            real,
            source,
            conv.weight,
            conv.bias,
            *projections,
            out.weight.squeeze(2),
            out.bias,
            self.dilation,
            HEADS,
            scale,
            *self.dropout,
        )


class ActionStage(nn.Module):
    def __init__(self, n_classes: int, dropout: tuple[float, float]) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(n_classes, FEATURES, 1)
        self.layers = nn.ModuleList(Attention(2**i, dropout) for i in range(LAYERS))
        self.conv_out = nn.Conv1d(FEATURES, n_classes, 1)

    def forward(
        self, probability: Tensor, source: Tensor, real: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        s = self.conv_in(probability) * real
        for layer in self.layers:
            s = layer(s, source, scale, real)
        return self.conv_out(s), s


class BoundaryStage(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(1, FEATURES, 1)
        self.layers = nn.ModuleList(DilatedResidual(2**i, dropout) for i in range(LAYERS))
        self.conv_out = nn.Conv1d(FEATURES, 1, 1)

    def forward(self, probability: Tensor, real: Tensor) -> Tensor:
        s = self.conv_in(probability) * real
        for layer in self.layers:
            s = layer(s, real)
        return self.conv_out(s) * real


class DilatedResidual(nn.Module):
    def __init__(self, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilation, self.dropout = dilation, dropout
        self.conv_dilated = nn.Conv1d(FEATURES, FEATURES, 3)
        self.conv_in = nn.Conv1d(FEATURES, FEATURES, 1)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        conv, out = self.conv_dilated, self.conv_in
        return dilated_residual(
            x, real, conv.weight, conv.bias, out.weight.squeeze(2), out.bias, self.dilation, self.dropout
        )
