"""Weights in the published format: reading them into :class:`TRGNet` and writing them back.

The published code's state_dict (github.com/HaoyuJi/TRG-Net) and ours hold the same numbers under other names
and shapes: query and key projections are stacked here, 1x1 kernels carry no trailing axes, and the hop
residual is (S, V, V). The published network also owns ``conv_asb_feature.*`` heads that no output reads; they
are kept aside and written back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import replacing
from .model import TRGNet
from .skeleton import SKELETONS, Skeleton

DATASET_SKELETONS = {
    "PKU-subject": "pku",
    "PKU-view": "pku",
    "LARA": "lara",
    "MCFS-22": "mcfs",
    "MCFS-130": "mcfs",
    "TCG-15": "tcg",
}

# Our name -> published name; the first pattern that matches a part rewrites it, in this order.
_RULES = [
    (re.compile(ours), published)
    for ours, published in (
        (r"^spatial\.hop_residual$", "SP.A_res"),
        (r"^spatial\.(alpha|beta)$", r"SP.\1"),
        (r"^spatial\.multiscale\.", "SP.mlp.layers.0."),
        (r"^spatial\.multiscale_norm\.", "SP.mlp.layers.1."),
        (r"^spatial\.receive\.", "SP.CTRGCN.conv1."),
        (r"^spatial\.send\.", "SP.CTRGCN.conv2."),
        (r"^spatial\.value\.", "SP.CTRGCN.conv3."),
        (r"^spatial\.channel_graph\.", "SP.CTRGCN.conv4."),
        (r"^spatial\.norm\.", "SP.bn."),
        (r"^temporal\.fusion\.", "STI.SFI_layers."),
        (r"^temporal\.seed\.", "STI.conv_t."),
        (r"^temporal\.", "STI."),
        (r"^class_head\.", "conv_cls."),
        (r"^boundary_head\.", "conv_bound."),
        (r"^text_head\.", "conv_feature."),
        (r"^(boundary_stages\.\d+\.layers\.\d+)\.conv_(weight|bias)$", r"\1.conv_dilated.\2"),
        (r"^(boundary_stages\.\d+\.layers\.\d+)\.output\.", r"\1.conv_in."),
        (r"^action_stages\.", "asb."),
        (r"^boundary_stages\.", "brb."),
        (r"\.spatial\.", ".conv_s."),
        (r"\.mix\.", ".conv_fusion."),
        (r"\.expand\.", ".ff.0."),
        (r"\.project\.", ".ff.3."),
        (r"(?<!brb)(\.layers\.\d+)\.conv_(weight|bias)$", r"\1.feed_forward.0.\2"),
        (r"(\.layers\.\d+)\.value\.", r"\1.att_layer.value_projection."),
        (r"(\.layers\.\d+)\.attention\.", r"\1.att_layer.out_projection."),
        (r"(\.layers\.\d+)\.output\.", r"\1.conv_out."),
    )
]
_UNREAD = re.compile(r"^conv_asb_feature\.\d+\.(weight|bias)$")


class PublishedWeightsError(ValueError):
    """A state_dict does not have the published format, or not that of this network."""


def published_names(name: str) -> list[str]:
    """Return the published names of one of our tensors: two, stacked, for queries and keys, else one."""
    stacked = re.fullmatch(r"(.*\.layers\.\d+)\.query_key\.(weight|bias)", name)
    if stacked:
        layer = published_names(f"{stacked[1]}.value.{stacked[2]}")[0]
        return [layer.replace("value_projection", f"{part}_projection") for part in ("query", "key")]
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return [name]


def to_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape tensors that go by our parameter and buffer names (weights, gradients, ...)."""
    result = {}
    for ours, tensor in tensors.items():
        names = published_names(ours)
        for name, part in zip(names, tensor.chunk(len(names), dim=0) if len(names) > 1 else [tensor]):
            result[name] = part.reshape(_published_shape(name, part))
    return result


def from_published(state: Mapping[str, Tensor], model: TRGNet) -> dict[str, Tensor]:
    """Return the published ``state`` under our names and shapes, as ``model.state_dict()`` has them.

    Raises:
        PublishedWeightsError: lists every missing, unexpected and misshapen tensor.
    """
    expected = to_published(model.state_dict())
    faults = [f"missing: {name} {tuple(expected[name].shape)}" for name in expected if name not in state]
    faults += [
        f"unexpected: {name} {tuple(state[name].shape)}"
        for name in state
        if name not in expected and not _UNREAD.match(name)
    ]
    faults += [
        f"{name}: got shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        raise PublishedWeightsError("not a state_dict of this network:\n  " + "\n  ".join(faults))
    return {
        ours: torch.cat([state[name] for name in published_names(ours)]).reshape(tensor.shape)
        if tensor.dim()
        else state[published_names(ours)[0]].reshape(())
        for ours, tensor in model.state_dict().items()
    }


def load_published(path: str | os.PathLike[str], dataset: str | Skeleton) -> TRGNet:
    """Read a published checkpoint into a network, in evaluation mode on the CPU.

    Args:
        path: path. File written by ``torch.save(model.state_dict(), path)`` in the published code; a ``module.``
            prefix and an enclosing ``{"state_dict": ...}`` are accepted. Loaded with ``weights_only=True``.
        dataset: str or Skeleton. PKU-subject, PKU-view, LARA, MCFS-22, MCFS-130, TCG-15, or the skeleton itself:
            the hop matrices follow from it and are not in the file.

    Sizes and numbers of layers are read off the tensors.

    Raises:
        PublishedWeightsError: the file holds no weights, or some are missing, unexpected or of another shape.
        ValueError: an unknown dataset.
        OSError: the file cannot be opened.
    """
    skeleton = dataset if isinstance(dataset, Skeleton) else _skeleton(dataset)
    state = _read_state(path)
    model = _network_of(state, skeleton)
    model.load_state_dict(from_published(state, model))
    model.unread_weights = {name: tensor for name, tensor in state.items() if _UNREAD.match(name)}
    return model.eval()


def save_published(model: TRGNet, path: str | os.PathLike[str]) -> None:
    """Write the network's weights in the published format, readable by the published code.

    The heads that no output reads are written as they were loaded, or as zeros.
    """
    state = to_published(model.state_dict())
    for i in range(len(model.action_stages)):
        for name in ("weight", "bias"):
            zeros = torch.zeros_like(state[f"conv_feature.{name}"])
            state.setdefault(
                f"conv_asb_feature.{i}.{name}",
                model.unread_weights.get(f"conv_asb_feature.{i}.{name}", zeros),
            )
    with replacing(Path(path)) as temporary:
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, temporary)


def _read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler meets in a file that is none of torch's
        raise PublishedWeightsError(
            f"{os.fspath(path)} cannot be read as weights that torch.save wrote: {error}"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise PublishedWeightsError(
            f"{os.fspath(path)} holds no state_dict: expected tensors by name, got {type(state).__name__}; "
            "write it with torch.save(model.state_dict(), path)"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _skeleton(dataset: str) -> Skeleton:
    if dataset not in DATASET_SKELETONS:
        raise ValueError(
            f"dataset is {dataset!r}, expected one of {', '.join(DATASET_SKELETONS)} or a Skeleton"
        )
    return SKELETONS[DATASET_SKELETONS[dataset]]


def _network_of(state: Mapping[str, Tensor], skeleton: Skeleton) -> TRGNet:
    """Build the network whose sizes the published tensors have."""
    try:
        hops = state["SP.A_res"].shape[0] // state["SP.A_res"].shape[1]
        features, inputs = state["SP.mlp.layers.0.weight"].shape[:2]
        classes, embedding_dim = state["conv_cls.weight"].shape[0], state["conv_feature.weight"].shape[0]
        relations = state["SP.CTRGCN.conv1.weight"].shape[0]
    except KeyError as error:
        raise PublishedWeightsError(f"not a published TRG-Net state_dict: it has no tensor {error}") from None
    if state["SP.A_res"].shape[1] != len(skeleton):
        raise PublishedWeightsError(
            f"the file is for {state['SP.A_res'].shape[1]} joints, but the skeleton "
            f"{skeleton.name!r} has {len(skeleton)}; choose the dataset it was trained on"
        )
    return TRGNet(
        inputs // hops,
        classes,
        skeleton.adjacency(),
        embedding_dim,
        features=features,
        relations=relations,
        hops=hops,
        layers=_count(state, r"STI\.layers\.(\d+)\."),
        refine_layers=_count(state, r"(?:asb|brb)\.\d+\.layers\.(\d+)\.") or 10,
        action_stages=1 + _count(state, r"asb\.(\d+)\."),
        boundary_stages=1 + _count(state, r"brb\.(\d+)\."),
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest index that the pattern's group takes among the names."""
    found = (re.match(pattern, name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _published_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    if name == "SP.A_res":
        return (tensor.shape[0] * tensor.shape[1], tensor.shape[2])
    if tensor.dim() != 2 or "_projection." in name or ".ff." in name:
        return tuple(tensor.shape)
    two_axes = name.startswith("SP.") or name == "STI.conv_in.weight"
    return (*tensor.shape, 1, 1) if two_axes else (*tensor.shape, 1)
