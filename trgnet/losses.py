"""The training objective of TRG-Net (arXiv 2503.15126).

    total = mean over class stages (cross_entropy + smoothness) + w_b * mean over boundary stages boundary
          + w_a * absolute + w_r * relative

``absolute`` pulls the feature of each segment to the text embedding of its action and away from the others
(contrastive, both directions); ``relative`` makes the distances between segment features follow the
text-derived action graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from trgnet.kernels import boundary_loss, class_loss, frame_similarity, widened

from .data.batch import Batch
from .data.labels import IGNORE
from .model import Output
from .text import TextPrior, relation_graph

SHARPNESS = 10.0  # of the target distributions: softmax(10 * similarity)


class TRGLoss(nn.Module):
    """Weighted sum of the frame, boundary and text losses.

    Args:
        text: TextPrior. Embeddings of joints and actions.
        pos_weight: float. Weight of the boundary frames: 1 / (share of boundary frames in the training set).
        class_weights: Tensor (K,), optional. Of the cross-entropy.
        boundary, absolute, relative: float, default 0.1, 0.8, 1.0. Weights of the terms.

    Raises:
        ValueError: a weight is negative or ``pos_weight`` is not positive.
    """

    def __init__(
        self,
        text: TextPrior,
        *,
        pos_weight: float,
        class_weights: Tensor | None = None,
        boundary: float = 0.1,
        absolute: float = 0.8,
        relative: float = 1.0,
    ) -> None:
        super().__init__()
        self.weights = {"boundary": boundary, "absolute": absolute, "relative": relative}
        for name, value in (*self.weights.items(), ("pos_weight", pos_weight)):
            if value < 0 or (name == "pos_weight" and value == 0):
                raise ValueError(f"{name} is {value}, expected a positive weight")
        self.register_buffer("pos_weight", torch.tensor(float(pos_weight)))
        self.register_buffer("class_weights", class_weights)
        self.register_buffer("action_embeddings", torch.from_numpy(text.actions))
        self.register_buffer("action_graph", text.action_graph())

    def forward(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Return every term, unweighted, and their weighted sum ``total``, as 0-dim tensors."""
        similarity = frame_similarity(batch.x, batch.mask)
        stages = [
            class_loss(logits, batch.labels, similarity, batch.mask, self.class_weights)
            for logits in output.class_logits
        ]
        boundaries = [
            boundary_loss(logits, batch.boundaries, batch.mask, self.pos_weight)
            for logits in output.boundary_logits
        ]
        terms = {
            "cross_entropy": torch.stack([ce for ce, _ in stages]).mean(),
            "smoothness": torch.stack([smooth for _, smooth in stages]).mean(),
            "boundary": torch.stack(boundaries).mean(),
        }
        terms |= self._text_terms(output, batch)
        weighted = [self.weights[name] * terms[name] for name in self.weights if name in terms]
        return {"total": terms["cross_entropy"] + terms["smoothness"] + sum(weighted)} | terms

    def _text_terms(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        if output.segment_features is None:
            raise ValueError(
                "the network's output has no segment features: call model(x, mask, graph, segments)"
            )
        f, labels = widened(output.segment_features), batch.segments.label
        return {
            "absolute": absolute_loss(f, labels, self.action_embeddings, output.logit_scale),
            "relative": relative_loss(f, labels, self.action_graph),
        }


def absolute_loss(f: Tensor, labels: Tensor, embeddings: Tensor, logit_scale: Tensor) -> Tensor:
    """Contrastive loss between segments and the text of their actions, averaged over both directions.

    Args:
        f: Tensor (S, D). Segment features.
        labels: int64 Tensor (S,). `IGNORE` marks padding, which changes neither the loss nor a gradient.
        embeddings: Tensor (K, D). Text embedding per class.
        logit_scale: Tensor (1,). Used as it is, not exponentiated.

    Segments of one class share their target mass: target = softmax(10 * [same label]). Without segments the
    loss is 0.
    """
    real = labels != IGNORE
    text = functional.normalize(embeddings.to(f.dtype), dim=1)[torch.where(real, labels, 0)]
    logits = logit_scale * functional.normalize(f, dim=1) @ text.T
    same = (labels.unsqueeze(1) == labels.unsqueeze(0)).to(f.dtype)
    return (_divergence(logits, same, real) + _divergence(logits.T, same, real)) / 2


def relative_loss(f: Tensor, labels: Tensor, action_graph: Tensor) -> Tensor:
    """Divergence between the segments' graph of feature distances and the text-derived action graph.

    Args:
        f: Tensor (S, D). Segment features.
        labels: int64 Tensor (S,). `IGNORE` marks padding, which changes neither the loss nor a gradient; it
            comes behind the segments.
        action_graph: Tensor (K, K). Text-derived relations of the classes.

    The segments' graph is :func:`trgnet.text.relation_graph` of their features. Where all distances are equal
    (one segment, say) it says nothing and the loss is 0, as it is without segments.
    """
    if len(labels) == 0:
        return f.sum()  # 0, with a gradient
    real = labels != IGNORE
    # Padding at the place of the first segment adds no distance that was not there: the extremes stay.
    graph = relation_graph(torch.where(real.unsqueeze(1), f, f[:1]))
    known = torch.where(real, labels, 0)
    target = action_graph.to(f.dtype)[known.unsqueeze(1), known.unsqueeze(0)]
    # The least entry is 0, or 1 where all distances are equal.
    return torch.where(graph.min() < 1, _divergence(graph, target, real), 0)


def _divergence(logits: Tensor, similarity: Tensor, real: Tensor) -> Tensor:
    """KL(softmax(10 * similarity) || softmax(logits)): sum over columns, mean over rows; `real` (S,) of both."""
    # Where nothing is real, every column is let in: what is then left out is finite.
    outside = ~real & real.any()
    given, target = (
        torch.log_softmax(scores.masked_fill(outside, -torch.inf), dim=1).masked_fill(outside, 0)
        for scores in (logits, SHARPNESS * similarity)
    )
    rows = functional.kl_div(given, target, reduction="none", log_target=True).sum(1)
    return torch.where(real, rows, 0).sum() / real.sum().clamp(min=1)
