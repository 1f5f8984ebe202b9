"""Skeletons: joint names and bones of the supported data sets, and the multi-scale graph built of them.

A skeleton is a tree. Its bones are (child, parent) pairs of 0-based joint indices, so every joint but the
root is the child of exactly one bone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Bone = tuple[int, int]


@dataclass(frozen=True)
class Skeleton:
    """A tree of named joints.

    Args:
        name: short name, such as "pku".
        joints: V distinct joint names, in the order of the data's joint axis.
        edges: the V - 1 bones, (child, parent), 0-based.
        root: the joint without a parent.

    Raises:
        ValueError: the joints are not distinct, an index is out of range, or the bones are not a tree
            under `root`.
    """

    name: str
    joints: tuple[str, ...]
    edges: tuple[Bone, ...]
    root: int

    def __post_init__(self) -> None:
        if not self.joints:
            raise ValueError(f"skeleton {self.name!r} has no joints; give at least one")
        if len(set(self.joints)) != len(self.joints):
            twice = sorted({joint for joint in self.joints if self.joints.count(joint) > 1})
            raise ValueError(
                f"skeleton {self.name!r}: joint names must be distinct, got {twice} twice or more"
            )
        joints = range(len(self.joints))
        if self.root not in joints:
            raise ValueError(
                f"skeleton {self.name!r}: root must be a joint 0..{len(self) - 1}, got {self.root}"
            )
        for child, parent in self.edges:
            if child not in joints or parent not in joints:
                raise ValueError(
                    f"skeleton {self.name!r}: bone ({child}, {parent}) leaves the joints 0..{len(self) - 1}"
                )
        self._check_tree()

    def _check_tree(self) -> None:
        children = [child for child, _ in self.edges]
        expected = [joint for joint in range(len(self)) if joint != self.root]
        if sorted(children) != expected:
            raise ValueError(
                f"skeleton {self.name!r} is not a tree: every joint but the root {self.root} must be the "
                f"child of exactly one bone, got the children {sorted(children)}"
            )
        parent_of = dict(self.edges)
        for joint in expected:
            ancestor, steps = joint, 0
            while ancestor != self.root:
                ancestor, steps = parent_of[ancestor], steps + 1
                if steps > len(self):
                    raise ValueError(
                        f"skeleton {self.name!r} is not connected: the parents of joint {joint} "
                        f"({self.joints[joint]!r}) form a cycle and never reach the root {self.root}"
                    )

    def __len__(self) -> int:
        return len(self.joints)

    def adjacency(self) -> np.ndarray:
        """The symmetric 0/1 adjacency without self loops, float32 (V, V)."""
        matrix = np.zeros((len(self), len(self)), dtype=np.float32)
        for child, parent in self.edges:
            matrix[child, parent] = matrix[parent, child] = 1
        return matrix


def hop_matrices(adjacency: np.ndarray, hops: int = 13) -> np.ndarray:
    """The disentangled multi-scale graph of TRG-Net (arXiv 2503.15126).

    Matrix k joins every joint to itself and to the joints exactly k bones away:
    A_0 = I and A_k = min((A + I)^k, 1) - min((A + I)^(k-1), 1) + I, each normalised to D^-1/2 A_k D^-1/2
    with D the row sums. All arithmetic is float32, as it was for the published weights.

    Args:
        adjacency: (V, V), symmetric, 0/1, zero diagonal.
        hops: number of matrices, at least 1.

    Returns:
        float32 (hops, V, V).

    Raises:
        ValueError: `adjacency` is not as above, or `hops` < 1.
    """
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"adjacency must be a square matrix (V, V), got shape {adjacency.shape}")
    binary, symmetric = np.isin(adjacency, (0, 1)).all(), (adjacency == adjacency.T).all()
    if not (binary and symmetric) or adjacency.diagonal().any():
        raise ValueError(
            "adjacency must be symmetric with entries 0 and 1 and a zero diagonal; see Skeleton.adjacency"
        )
    if hops < 1:
        raise ValueError(f"hops must be at least 1, got {hops}")
    identity = np.eye(len(adjacency), dtype=np.float32)
    step = adjacency.astype(np.float32) + identity
    matrices, within = [identity], identity
    for _ in range(1, hops):
        # Clipping at every step reaches the same joints as clipping the power, and cannot overflow.
        wider = np.minimum(within @ step, 1)
        matrices.append(wider - within + identity)
        within = wider
    return np.stack([_normalise(matrix) for matrix in matrices])


def _normalise(matrix: np.ndarray) -> np.ndarray:
    scale = np.power(matrix.sum(axis=1), np.float32(-0.5))
    return scale[:, None] * matrix * scale[None, :]


def _from_one(edges: Sequence[Bone]) -> tuple[Bone, ...]:
    return tuple((child - 1, parent - 1) for child, parent in edges)


# Microsoft Kinect v2, in the order of its JointType enumeration.
PKU = Skeleton(
    name="pku",
    joints=(
        "spine_base", "spine_mid", "neck", "head",
        "left_shoulder", "left_elbow", "left_wrist", "left_hand",
        "right_shoulder", "right_elbow", "right_wrist", "right_hand",
        "left_hip", "left_knee", "left_ankle", "left_foot",
        "right_hip", "right_knee", "right_ankle", "right_foot",
        "spine_shoulder", "left_hand_tip", "left_thumb", "right_hand_tip", "right_thumb",
    ),
    edges=(
        (12, 0), (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18), (1, 0), (20, 1),
        (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (21, 7), (22, 6), (8, 20), (9, 8), (10, 9),
        (11, 10), (24, 10), (23, 11),
    ),
    root=0,
)  # fmt: skip

# OpenPose BODY_25, in the order of its output; the published bones count from one.
MCFS = Skeleton(
    name="mcfs",
    joints=(
        "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow",
        "left_wrist", "mid_hip", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee",
        "left_ankle", "right_eye", "left_eye", "right_ear", "left_ear", "left_big_toe", "left_small_toe",
        "left_heel", "right_big_toe", "right_small_toe", "right_heel",
    ),
    edges=_from_one((
        (2, 9), (1, 2), (16, 1), (18, 16), (17, 1), (19, 17), (6, 2), (7, 6), (8, 7), (3, 2), (4, 3), (5, 4),
        (10, 9), (11, 10), (12, 11), (25, 12), (23, 12), (24, 23), (13, 9), (14, 13), (15, 14), (22, 15),
        (20, 15), (21, 20),
    )),
    root=8,
)  # fmt: skip

LARA_SHOULDER: Bone = (12, 10)


def lara(disputed_edge: Bone = LARA_SHOULDER) -> Skeleton:
    """The 19-joint skeleton of LARa.

    The published code hangs the left shoulder (12) on the head (10); later work of the same authors hangs it
    on the left collar (11), as anatomy does.

    Args:
        disputed_edge: (12, 10), the published bone, or (12, 11).

    Raises:
        ValueError: another bone.
    """
    if disputed_edge not in (LARA_SHOULDER, (12, 11)):
        raise ValueError(f"disputed_edge must be (12, 10) or (12, 11), got {disputed_edge}")
    return Skeleton(
        name="lara",
        joints=(
            "root", "left_hip", "left_knee", "left_ankle", "left_foot",
            "right_hip", "right_knee", "right_ankle", "right_foot", "spine", "head",
            "left_collar", "left_shoulder", "left_elbow", "left_wrist",
            "right_collar", "right_shoulder", "right_elbow", "right_wrist",
        ),
        edges=(
            (1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (6, 5), (7, 6), (8, 7), (9, 0), (10, 9), (11, 9),
            disputed_edge, (13, 12), (14, 13), (15, 9), (16, 15), (17, 16), (18, 17),
        ),
        root=0,
    )  # fmt: skip


# The data names no joints. These names follow from the published text embeddings of the joints, whose rows equal
# rows of PKU's joints, and from the bones; the graph does not depend on them. They are likely, not certain:
# the embeddings cannot tell where on the trunk and the neck a joint lies.
TCG = Skeleton(
    name="tcg",
    joints=(
        "chest", "head", "hips", "right_shoulder", "right_foot", "right_elbow", "right_hand", "right_knee",
        "right_hip", "neck", "left_shoulder", "left_foot", "left_elbow", "left_hand", "left_knee", "left_hip",
        "spine",
    ),
    edges=(
        (16, 2), (0, 16), (9, 0), (1, 9), (3, 9), (5, 3), (6, 5), (10, 9), (12, 10), (13, 12), (8, 2), (7, 8),
        (4, 7), (15, 2), (14, 15), (11, 14),
    ),
    root=2,
)  # fmt: skip

# The joints of the CMU skeleton that mocap6 keeps, each under its nearest kept ancestor.
MOCAP6 = Skeleton(
    name="mocap6",
    joints=(
        "root", "lowerback", "upperneck", "rhumerus", "rradius", "lhumerus", "lradius", "rtibia", "rfoot",
        "ltibia", "lfoot",
    ),
    edges=((1, 0), (2, 1), (3, 1), (4, 3), (5, 1), (6, 5), (7, 0), (8, 7), (9, 0), (10, 9)),
    root=0,
)  # fmt: skip

SKELETONS: dict[str, Skeleton] = {skeleton.name: skeleton for skeleton in (PKU, MCFS, lara(), TCG, MOCAP6)}
