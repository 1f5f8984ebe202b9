"""TRG-Net: text-derived relational graph-enhanced network for skeleton-based action segmentation.

Symbols: N batch, C input channels, V joints, T frames, F features, K classes, D embedding width, S segments.
Time is the innermost axis everywhere, so that every 1x1 convolution is one matrix product over V*T columns and
the temporal half reads the spatial half's output without a transpose.

Source: H. Ji et al., arXiv 2503.15126. Padded frames never influence a result: every reduction over time is
over real frames only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trgnet.kernels import (
    attention_layer,
    channel_mask,
    check_mask,
    check_shapes,
    dilated_residual,
    dynamic_graph_conv,
    fusion_layer,
    masked_batch_norm,
    multiscale_graph_conv,
    operator,
    pointwise_conv,
    segment_mean,
    synchronised_statistics,
)

from .data.batch import Segments
from .skeleton import hop_matrices


class Output(NamedTuple):
    """What the network returns in training mode."""

    class_logits: tuple[Tensor, ...]
    """(N, K, T) per class stage, the refined ones last."""
    boundary_logits: tuple[Tensor, ...]
    """(N, 1, T) per boundary stage, the refined ones last."""
    segment_features: Tensor | None
    """(S, D): mean text-space feature of each segment, where segments were given."""
    logit_scale: Tensor
    """(1,): scale of the contrastive logits."""


class Pointwise(nn.Module):
    """1x1 convolution over the last axis, weight (O, F), initialised as torch initialises a convolution."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight, self.bias = _conv_parameters(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, F, T) -> (N, O, T)."""
        return pointwise_conv(x, self.weight, self.bias)


class MaskedBatchNorm(nn.Module):
    """Batch norm over joints and real frames, then residual, ReLU and mask; running averages as in torch.

    `process_group` may be set to processes whose batches are parts of one: their statistics are then common.
    """

    def __init__(self, features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.process_group: ProcessGroup | None = None
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        residual: Tensor | None = None,
        *,
        statistics: Sequence[Tensor] | None = None,
        frame_sum: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(N, F, V, T) -> the same, zero on padded frames, and its sum over time (N, F, V) where wanted.

        `statistics` are those that the operator that made x returned.
        """
        known = {"statistics": statistics}
        if not self.training:
            known = {"running": (self.running_mean, self.running_var)}
        elif self.process_group is not None:
            *running, count = synchronised_statistics(x, mask, self.process_group)
            known = {"running": running}
        out, total, mean, var = masked_batch_norm(
            x, mask, self.weight, self.bias, residual=residual, frame_sum=frame_sum, **known
        )
        if self.training:
            self._track(mean, var, mask.sum() * x.shape[2] if self.process_group is None else count)
        return out, total

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1


class SpatialModule(nn.Module):
    """Spatial half of DSFM: multi-scale graph convolution, then dynamic graph convolution on the text graph."""

    def __init__(
        self, in_channels: int, adjacency: np.ndarray, features: int, relations: int, hops: int
    ) -> None:
        super().__init__()
        joints = len(adjacency)
        self.register_buffer("hops", torch.from_numpy(hop_matrices(adjacency, hops)), persistent=False)
        self.hop_residual = nn.Parameter(torch.empty(hops, joints, joints).uniform_(-1e-6, 1e-6))
        self.multiscale = Pointwise(hops * in_channels, features)
        self.multiscale_norm = MaskedBatchNorm(features)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.beta = nn.Parameter(torch.zeros(1))
        self.receive = _kaiming(Pointwise(features, relations))
        self.send = _kaiming(Pointwise(features, relations))
        self.value = _kaiming(Pointwise(features, features))
        self.channel_graph = _kaiming(Pointwise(relations, features))
        self.norm = MaskedBatchNorm(features)

    def forward(self, x: Tensor, mask: Tensor, joint_graph: Tensor) -> Tensor:
        """x (N, C, V, T), mask (N, 1, T), joint_graph (V, V) -> (N, F, V, T), zero on padded frames."""
        # The operators return the batch's statistics, where they have them for nothing, to the norms of training.
        counted = mask if self.training and self.norm.process_group is None else None
        y, *statistics = multiscale_graph_conv(
            x, self.hops + self.hop_residual, self.multiscale.weight, self.multiscale.bias, mask=counted
        )
        y, total = self.multiscale_norm(y, mask, statistics=statistics, frame_sum=True)
        value, bias = self._value_and_frame_relations(y)
        z, *statistics = dynamic_graph_conv(
            value, self._graph(total, mask, joint_graph), self.beta, bias=bias, mask=counted
        )
        return self.norm(z, mask, residual=y, statistics=statistics)[0]

    def _value_and_frame_relations(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Value and the two frame-level relations in one product, (N, F + 2, V, T), and the bias that it lacks, if any.

        The frame level uses the mean over the relation channels, and the mean of 1x1 convolutions is one row.
        """
        layers = [self.value, self.receive, self.send]
        weight = torch.cat([layers[0].weight, *(layer.weight.mean(0, True) for layer in layers[1:])])
        bias = torch.cat([layers[0].bias, *(layer.bias.mean(0, True) for layer in layers[1:])])
        # The product's kernels add the bias for nothing; torch would write it everywhere first.
        rows = y.flatten(2)
        own = (
            not torch.compiler.is_compiling()
            and operator("pointwise_conv").choose((rows, weight, bias), None) == "triton"
        )
        value = pointwise_conv(rows, weight, bias if own else None).unflatten(2, y.shape[2:])
        return value, None if own else bias

    def _graph(self, total: Tensor, mask: Tensor, joint_graph: Tensor) -> Tensor:
        """Channel-level graph (N, F, V, V) plus twice the joint graph: both levels start from it.

        total (N, F, V): sum over time.
        """
        mean = (total / mask.sum(2, keepdim=True).clamp(min=1)).to(self.receive.weight.dtype)
        p, q = self.receive(mean), self.send(mean)
        relation = torch.tanh(p.unsqueeze(3) - q.unsqueeze(2))
        return (
            self.alpha * self.channel_graph(relation.flatten(2)).unflatten(2, relation.shape[2:])
            + 2 * joint_graph
        )


class FusionLayer(nn.Module):
    """Parameters that fuse one spatial group into the temporal features, see :meth:`TemporalModule._folded`."""

    def __init__(self, group_width: int, features: int) -> None:
        super().__init__()
        self.spatial = Pointwise(group_width, features)
        self.mix = Pointwise(2 * features, features)
        self.expand = Pointwise(features, features)
        self.project = Pointwise(features, features)


class AttentionLayer(nn.Module):
    """Temporal attention layer; see :func:`trgnet.kernels.attention_layer`."""

    def __init__(
        self, features: int, dilation: int, heads: int, attention_dropout: float, output_dropout: float
    ) -> None:
        super().__init__()
        self.options = {
            "dilation": dilation,
            "heads": heads,
            "attention_dropout": attention_dropout,
            "output_dropout": output_dropout,
        }
        self.conv_weight, self.conv_bias = _conv_parameters(features, features, 3)
        self.query_key = Pointwise(features, 2 * features)
        self.value = Pointwise(features, features)
        self.attention = Pointwise(features, features)
        self.output = Pointwise(features, features)

    def forward(
        self, x: Tensor, mask: Tensor, source: Tensor | None, scale: float, seeds: Tensor | None
    ) -> Tensor:
        """x, source (N, F, T), mask (N, 1, T), seeds (2,) -> (N, F, T)."""
        return attention_layer(
            x,
            mask,
            source,
            conv_weight=self.conv_weight,
            conv_bias=self.conv_bias,
            query_key_weight=self.query_key.weight,
            query_key_bias=self.query_key.bias,
            value_weight=self.value.weight,
            value_bias=self.value.bias,
            attention_weight=self.attention.weight,
            attention_bias=self.attention.bias,
            output_weight=self.output.weight,
            output_bias=self.output.bias,
            scale=scale,
            seeds=seeds,
            **self.options,
        )


class TemporalModule(nn.Module):
    """Temporal half of DSFM: attention layers of growing dilation, each but the first fused with a spatial group."""

    def __init__(
        self,
        joints: int,
        features: int,
        layers: int,
        heads: int,
        channel_dropout: float,
        fusion_dropout: float,
        attention_dropout: float,
        output_dropout: float,
        group_channels: int = 8,
    ) -> None:
        super().__init__()
        self.group_channels = group_channels
        self.channel_dropout, self.fusion_dropout = channel_dropout, fusion_dropout
        self.conv_in = Pointwise(features, layers * group_channels)
        self.seed = Pointwise(joints * group_channels, features)
        self.fusion = nn.ModuleList(FusionLayer(joints * group_channels, features) for _ in range(layers - 1))
        self.layers = nn.ModuleList(
            AttentionLayer(features, 2**i, heads, attention_dropout, output_dropout) for i in range(layers)
        )
        self.conv_out = Pointwise(features, features)

    def forward(self, x: Tensor, mask: Tensor, seeds: Iterator[Tensor | None]) -> Tensor:
        """x (N, F, V, T), mask (N, 1, T) -> (N, F, T), zero on padded frames."""
        groups = self._groups(x, _single(next(seeds)))
        temporal, spatial, bias = self._folded()
        projected, shift = self._project(groups, spatial)
        weights, biases = temporal.unbind(0), (bias + shift[:-1]).unbind(0)
        s = (projected[-1] + (self.seed.bias + shift[-1]).to(x.dtype).unsqueeze(1)) * mask.to(x.dtype)
        for i, layer in enumerate(self.layers):
            if i > 0:
                project = self.fusion[i - 1].project
                s = fusion_layer(
                    s,
                    projected[i - 1],
                    mask,
                    weight1=weights[i - 1],
                    bias1=biases[i - 1],
                    weight2=project.weight,
                    bias2=project.bias,
                    p=self.fusion_dropout,
                    seed=_single(next(seeds)),
                )
            s = layer(s, mask, None, 1.0, next(seeds))
        return self.conv_out(s) * mask.to(s.dtype)

    def _groups(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """The spatial groups without the bias of `conv_in`: (N, F, V, T) -> (N, layers, 8, V, T).

        Channel dropout takes whole planes of x, so the weight drops them: no dropped copy of x is made.
        """
        weight = self.conv_in.weight
        kept = channel_mask(*x.shape[:2], self.channel_dropout, seed, weight.dtype)
        if kept is not None:
            weight = weight * kept.unsqueeze(1)
        channels = pointwise_conv(x.flatten(2), weight)
        return rearrange(channels, "n (g c) (v t) -> n g c v t", c=self.group_channels, v=x.shape[2])

    def _folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply out the linear maps of every fusion layer before its GELU: weights of the inputs, bias.

        expand(mix([s; spatial(g)])) = A s + B g + b with A (L, F, F), B (L, F, group width), b (L, F) for L fusion layers:
        small products, each in one launch for all layers.
        """
        if not self.fusion:
            weight, bias = (parameter.new_empty(0, *parameter.shape) for parameter in self.seed.parameters())
            return weight, weight, bias
        expand, expand_bias = _stacked([layer.expand for layer in self.fusion])
        mix, mix_bias = _stacked([layer.mix for layer in self.fusion])
        spatial, spatial_bias = _stacked([layer.spatial for layer in self.fusion])
        mix_temporal, mix_spatial = mix.chunk(2, dim=2)
        to_hidden = torch.bmm(expand, mix_spatial)
        bias = torch.baddbmm(expand_bias, expand, mix_bias)
        bias = torch.baddbmm(bias, to_hidden, spatial_bias).squeeze(2)
        return torch.bmm(expand, mix_temporal), torch.bmm(to_hidden, spatial), bias

    def _project(self, groups: Tensor, spatial: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Project every spatial group and the seed, in one product: (N, layers, 8, V, T) -> layers x (N, F, T).

        The groups lie channel-major; the weights are joint-major, so the weights are re-ordered. Also returned is what
        the bias of `conv_in` adds to every frame behind the projections, (layers, F), for the biases that follow them:
        added here it would cost a pass over the groups.
        """
        weights = rearrange(
            torch.cat([spatial, self.seed.weight.unsqueeze(0)]), "g f (v c) -> g f c v", c=self.group_channels
        )
        shift = (weights.sum(3) * rearrange(self.conv_in.bias, "(g c) -> g 1 c", g=len(weights))).sum(2)
        projected = pointwise_conv(groups.flatten(2, 3).flatten(0, 1), weights.flatten(2))
        return projected.unflatten(0, groups.shape[:2]).unbind(1), shift


class ActionStage(nn.Module):
    """Refines class logits with decoder attention layers that read the previous stage's features."""

    def __init__(
        self,
        n_classes: int,
        features: int,
        layers: int,
        heads: int,
        attention_dropout: float,
        output_dropout: float,
    ) -> None:
        super().__init__()
        self.conv_in = Pointwise(n_classes, features)
        self.layers = nn.ModuleList(
            AttentionLayer(features, 2**i, heads, attention_dropout, output_dropout) for i in range(layers)
        )
        self.conv_out = Pointwise(features, n_classes)

    def forward(
        self, logits: Tensor, feature: Tensor, mask: Tensor, scale: float, seeds: Iterator[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """logits (N, K, T), feature (N, F, T) -> refined logits (N, K, T), new feature (N, F, T)."""
        real = mask.to(feature.dtype)
        s = self.conv_in(torch.softmax(logits, dim=1).to(feature.dtype) * real) * real
        for layer in self.layers:
            s = layer(s, mask, feature, scale, next(seeds))
        return self.conv_out(s), s


class BoundaryStage(nn.Module):
    """Refines boundary logits with dilated residual layers."""

    def __init__(self, features: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv_in = Pointwise(1, features)
        self.layers = nn.ModuleList(DilatedResidual(features) for _ in range(layers))
        self.conv_out = Pointwise(features, 1)

    def forward(self, logits: Tensor, mask: Tensor, seeds: Iterator[Tensor | None]) -> Tensor:
        """(N, 1, T) -> (N, 1, T), zero on padded frames."""
        real = mask.to(logits.dtype)
        s = self.conv_in(torch.sigmoid(logits)) * real
        for i, layer in enumerate(self.layers):
            s = dilated_residual(
                s,
                mask,
                conv_weight=layer.conv_weight,
                conv_bias=layer.conv_bias,
                output_weight=layer.output.weight,
                output_bias=layer.output.bias,
                dilation=2**i,
                p=self.dropout,
                seed=_single(next(seeds)),
            )
        return self.conv_out(s) * real


class DilatedResidual(nn.Module):
    """Parameters of one dilated residual layer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv_weight, self.conv_bias = _conv_parameters(features, features, 3)
        self.output = Pointwise(features, features)


class TRGNet(nn.Module):
    """The segmentation network.

    Args:
        in_channels: int. C, channels per joint.
        n_classes: int. K.
        adjacency: numpy array (V, V). Symmetric 0/1 adjacency of the skeleton, without self loops.
        embedding_dim: int, default 768. D, width of the text embeddings.
        features, relations, hops: int, default 64, 8, 13. Width F, relation channels of the dynamic graph, scales
            of the multi-scale graph.
        layers, refine_layers: int, default 10, 10. Attention layers of the encoder; layers of every refinement
            stage.
        action_stages, boundary_stages: int, default 2, 3. Number of class and boundary predictions, the first one
            included.
        heads: int, default 4. Attention heads; divides ``features``.
        channel_dropout, fusion_dropout, attention_dropout, output_dropout: float, default 0.3, 0.3, 0.05, 0.5.

    Defaults are the published configuration (arXiv 2503.15126). Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        adjacency: np.ndarray,
        embedding_dim: int = 768,
        *,
        features: int = 64,
        relations: int = 8,
        hops: int = 13,
        layers: int = 10,
        refine_layers: int = 10,
        action_stages: int = 2,
        boundary_stages: int = 3,
        heads: int = 4,
        channel_dropout: float = 0.3,
        fusion_dropout: float = 0.3,
        attention_dropout: float = 0.05,
        output_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if features % heads:
            raise ValueError(f"features is {features}, expected a multiple of heads = {heads}")
        counts = {
            "in_channels": in_channels,
            "n_classes": n_classes,
            "layers": layers,
            "refine_layers": refine_layers,
            "action_stages": action_stages,
            "boundary_stages": boundary_stages,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.in_channels, self.n_joints = in_channels, len(adjacency)
        self.spatial = SpatialModule(in_channels, adjacency, features, relations, hops)
        self.temporal = TemporalModule(
            len(adjacency),
            features,
            layers,
            heads,
            channel_dropout,
            fusion_dropout,
            attention_dropout,
            output_dropout,
        )
        self.class_head = Pointwise(features, n_classes)
        self.boundary_head = Pointwise(features, 1)
        self.text_head = Pointwise(features, embedding_dim)
        self.action_stages = nn.ModuleList(
            ActionStage(n_classes, features, refine_layers, heads, attention_dropout, output_dropout)
            for _ in range(action_stages - 1)
        )
        self.boundary_stages = nn.ModuleList(
            BoundaryStage(features, refine_layers, output_dropout) for _ in range(boundary_stages - 1)
        )
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        # Weights of a published checkpoint that no output reads, kept to be written back.
        self.unread_weights: dict[str, Tensor] = {}
        # A pair of dropout seeds for channel dropout and for every fusion, attention and refinement layer.
        self._n_seeds = 2 * layers + (action_stages + boundary_stages - 2) * refine_layers

    def forward(
        self, x: Tensor, mask: Tensor, joint_graph: Tensor, segments: Segments | None = None
    ) -> Output | tuple[Tensor, Tensor]:
        """Classify every frame of a batch of sequences.

        Args:
            x: Tensor (N, C, V, T). Joint channels. What padded frames hold does not matter.
            mask: bool Tensor (N, 1, T). True on real frames, which come first in every sequence.
            joint_graph: Tensor (V, V). Text-derived relations of the joints.
            segments: Segments, optional. Ground-truth segments of the batch, for the text losses (training mode).

        Returns:
            Output in training mode; (class logits (N, K, T), boundary logits (N, 1, T)) of the last stage in
            evaluation mode.

        Raises:
            ValueError: an input whose shape does not fit the network or the other inputs.
            TypeError: the mask is not bool.
        """
        self._check_inputs(x, mask, joint_graph)
        x = x.masked_fill(~mask.unsqueeze(1), 0.0)
        seeds = self._seeds(x.device)
        feature = self.temporal(self.spatial(x, mask, joint_graph), mask, seeds)
        class_logits = self._class_stages(feature, mask, seeds)
        boundary_logits = self._boundary_stages(feature, mask, seeds)
        if not self.training:
            return class_logits[-1], boundary_logits[-1]
        return Output(
            class_logits, boundary_logits, self._segment_features(feature, segments), self.logit_scale
        )

    def _check_inputs(self, x: Tensor, mask: Tensor, joint_graph: Tensor) -> None:
        if x.dim() != 4 or x.shape[1:3] != (self.in_channels, self.n_joints):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (N, C, V, T) with C = {self.in_channels} channels and "
                f"V = {self.n_joints} joints"
            )
        check_shapes("TRGNet", x=(x, "N C V T"), mask=(mask, "N 1 T"), joint_graph=(joint_graph, "V V"))
        check_mask("TRGNet", mask)

    def _seeds(self, device: torch.device) -> Iterator[Tensor | None]:
        """Dropout seeds of one forward pass from torch's generator, two per layer; None in evaluation."""
        if not self.training:
            return iter([None] * self._n_seeds)
        drawn = torch.randint(-(2**63), 2**63 - 1, (self._n_seeds, 2), device=device)
        return iter(drawn.unbind(0))

    def _class_stages(
        self, feature: Tensor, mask: Tensor, seeds: Iterator[Tensor | None]
    ) -> tuple[Tensor, ...]:
        stages = [self.class_head(feature)]
        for i, stage in enumerate(self.action_stages):
            logits, feature = stage(stages[-1], feature, mask, math.exp(-3 * i), seeds)
            stages.append(logits)
        return tuple(stages)

    def _boundary_stages(
        self, feature: Tensor, mask: Tensor, seeds: Iterator[Tensor | None]
    ) -> tuple[Tensor, ...]:
        stages = [self.boundary_head(feature)]
        for stage in self.boundary_stages:
            stages.append(stage(stages[-1], mask, seeds))
        return tuple(stages)

    def _segment_features(self, feature: Tensor, segments: Segments | None) -> Tensor | None:
        """Text-space feature per segment: the 1x1 head commutes with the mean, so it sees S rows only."""
        if segments is None:
            return None
        mean = segment_mean(feature, segments.batch, segments.start, segments.length)
        return nn.functional.linear(mean, self.text_head.weight, self.text_head.bias)


def _conv_parameters(out_features: int, in_features: int, *kernel: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a convolution with torch's default initialisation: U(-b, b), b = 1 / sqrt(fan in)."""
    bound = 1 / math.sqrt(in_features * math.prod(kernel))
    weight = torch.empty(out_features, in_features, *kernel).uniform_(-bound, bound)
    return nn.Parameter(weight), nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))


def _stacked(layers: Sequence[Pointwise]) -> tuple[Tensor, Tensor]:
    """Weights (L, O, F) and biases (L, O, 1) of L layers."""
    weight, bias = (
        torch.stack(parameters) for parameters in zip(*((layer.weight, layer.bias) for layer in layers))
    )
    return weight, bias.unsqueeze(2)


def _kaiming(layer: Pointwise) -> Pointwise:
    """Kaiming-normal weight (fan out), zero bias: the published initialisation of the graph's convolutions."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    nn.init.zeros_(layer.bias)
    return layer


def _single(pair: Tensor | None) -> Tensor | None:
    """The seed of a layer that has one dropout."""
    return None if pair is None else pair[0]
