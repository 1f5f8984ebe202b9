"""Skeletons are the published trees; hop matrices are the published multi-scale graph."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from trgnet.skeleton import SKELETONS, Skeleton, hop_matrices, lara


def bones(skeleton: Skeleton) -> set[tuple[str, str]]:
    return {(skeleton.joints[child], skeleton.joints[parent]) for child, parent in skeleton.edges}


def distances(adjacency: np.ndarray) -> np.ndarray:
    """Number of bones between two joints, by breadth-first search."""
    table = np.full(adjacency.shape, -1)
    for source in range(len(adjacency)):
        table[source, source] = 0
        queue = deque([source])
        while queue:
            joint = queue.popleft()
            for other in np.flatnonzero(adjacency[joint]):
                if table[source, other] < 0:
                    table[source, other] = table[source, joint] + 1
                    queue.append(other)
    return table


@pytest.mark.parametrize(
    ("name", "joints", "root"),
    [("pku", 25, 0), ("mcfs", 25, 8), ("lara", 19, 0), ("tcg", 17, 2), ("mocap6", 11, 0)],
)
def test_adjacency_of_every_skeleton_is_a_tree(name: str, joints: int, root: int) -> None:
    skeleton = SKELETONS[name]
    adjacency = skeleton.adjacency()
    assert skeleton.name == name and len(skeleton) == joints and skeleton.root == root
    assert adjacency.dtype == np.float32 and adjacency.shape == (joints, joints)
    assert (adjacency == adjacency.T).all() and not adjacency.diagonal().any()
    assert adjacency.sum() == 2 * (joints - 1)
    assert distances(adjacency).min() == 0  # -1 would be a joint that no path reaches


def test_left_and_right_mirror_each_other() -> None:
    for name in ("pku", "mcfs"):
        named = bones(SKELETONS[name])
        swap = {"left": "right", "right": "left"}
        mirrored = {
            tuple("_".join(swap.get(w, w) for w in joint.split("_")) for joint in bone) for bone in named
        }
        assert mirrored == named


def test_mocap6_hangs_limbs_on_the_spine() -> None:
    assert bones(SKELETONS["mocap6"]) == {
        ("lowerback", "root"),
        ("upperneck", "lowerback"),
        ("rhumerus", "lowerback"),
        ("rradius", "rhumerus"),
        ("lhumerus", "lowerback"),
        ("lradius", "lhumerus"),
        ("rtibia", "root"),
        ("rfoot", "rtibia"),
        ("ltibia", "root"),
        ("lfoot", "ltibia"),
    }


def test_lara_has_one_disputed_bone() -> None:
    assert lara() == SKELETONS["lara"]
    assert set(lara().edges) ^ set(lara((12, 11)).edges) == {(12, 10), (12, 11)}
    with pytest.raises(ValueError, match=r"\(12, 10\) or \(12, 11\), got \(12, 9\)"):
        lara((12, 9))


@pytest.mark.parametrize(
    ("joints", "edges", "root", "message"),
    [
        ((), (), 0, "no joints"),
        (("a", "a"), ((1, 0),), 0, r"distinct, got \['a'\]"),
        (("a", "b"), ((1, 0),), 2, "root must be a joint 0..1, got 2"),
        (("a", "b"), ((2, 0),), 0, r"bone \(2, 0\) leaves the joints 0..1"),
        (("a", "b", "c"), ((1, 0),), 0, r"not a tree.*children \[1\]"),
        (("a", "b", "c"), ((1, 0), (1, 2)), 0, r"not a tree.*children \[1, 1\]"),
        (("a", "b", "c"), ((1, 2), (2, 1)), 0, "not connected: the parents of joint 1 .* cycle"),
    ],
)
def test_a_skeleton_that_is_no_tree_is_refused(
    joints: tuple[str, ...], edges: tuple[tuple[int, int], ...], root: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Skeleton("bad", joints, edges, root)


@pytest.mark.parametrize("name", sorted(SKELETONS))
def test_hop_matrices_join_joints_exactly_k_bones_apart(name: str) -> None:
    adjacency = SKELETONS[name].adjacency()
    apart = distances(adjacency)
    graph = hop_matrices(adjacency)
    assert graph.dtype == np.float32 and graph.shape == (13, *adjacency.shape)
    for hop, matrix in enumerate(graph):
        expected = ((apart == hop) | (apart == 0)).astype(np.float64)
        scale = expected.sum(axis=1) ** -0.5
        np.testing.assert_allclose(matrix, scale[:, None] * expected * scale, rtol=1e-6)


def test_hop_matrices_follow_the_published_formula() -> None:
    adjacency = SKELETONS["pku"].adjacency()
    with_self = adjacency.astype(np.float64) + np.eye(25)

    def reach(power: int) -> np.ndarray:
        return np.minimum(np.linalg.matrix_power(with_self, power), 1)

    graph = hop_matrices(adjacency, hops=7)
    for hop in range(1, 7):
        raw = reach(hop) - reach(hop - 1) + np.eye(25)
        root = np.diag(raw.sum(axis=1) ** -0.5)
        np.testing.assert_allclose(graph[hop], root @ raw @ root, rtol=1e-6)


def test_hop_matrices_beyond_the_tree_are_the_identity() -> None:
    chain = Skeleton("chain", ("a", "b", "c"), ((1, 0), (2, 1)), 0)
    graph = hop_matrices(chain.adjacency(), hops=300)
    assert (graph[3:] == np.eye(3)).all() and not (graph[2] == np.eye(3)).all()


def test_hop_matrices_refuse_what_is_no_adjacency() -> None:
    with pytest.raises(ValueError, match=r"square matrix \(V, V\), got shape \(2, 3\)"):
        hop_matrices(np.zeros((2, 3), np.float32))
    for bad in (np.eye(2), np.array([[0, 1], [0, 0]]), np.array([[0, 0.5], [0.5, 0]])):
        with pytest.raises(ValueError, match="symmetric with entries 0 and 1 and a zero diagonal"):
            hop_matrices(bad)
    with pytest.raises(ValueError, match="hops must be at least 1, got 0"):
        hop_matrices(np.zeros((2, 2)), hops=0)
