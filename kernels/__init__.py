"""Operators of skeleton-based temporal action segmentation, each with a reference, its cost and its backends."""

from __future__ import annotations

from .attention_layer import attention_layer
from .backend import BACKENDS, BackendError, BackendWarning, current_backend, use_backend
from .dilated_residual import dilated_residual
from .dropout import channel_mask, dropout
from .dynamic_graph_conv import dynamic_graph_conv
from .frame_loss import IGNORE, boundary_loss, class_loss, frame_similarity
from .fusion_layer import fusion_layer
from .masked_batch_norm import masked_batch_norm, synchronised_statistics
from .moment_update import moment_update
from .multiscale_graph_conv import multiscale_graph_conv
from .operator import Cost, Operator, check_mask, check_shapes, operator, operator_table
from .pointwise import pointwise_conv
from .precision import wide_dtype, widened
from .segment import pairwise_distance, segment_mean
from .verification import verify_once

__all__ = [
    "BACKENDS",
    "IGNORE",
    "BackendError",
    "BackendWarning",
    "Cost",
    "Operator",
    "attention_layer",
    "boundary_loss",
    "channel_mask",
    "check_mask",
    "check_shapes",
    "class_loss",
    "current_backend",
    "dilated_residual",
    "dropout",
    "dynamic_graph_conv",
    "frame_similarity",
    "fusion_layer",
    "masked_batch_norm",
    "moment_update",
    "multiscale_graph_conv",
    "operator",
    "operator_table",
    "pairwise_distance",
    "pointwise_conv",
    "segment_mean",
    "synchronised_statistics",
    "use_backend",
    "verify_once",
    "wide_dtype",
    "widened",
]
