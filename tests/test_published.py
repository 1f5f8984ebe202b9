"""Weights in the published format, in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published_case import load_case

from trgnet import TRGNet, load_published, save_published
from trgnet.published import PublishedWeightsError, to_published
from trgnet.skeleton import PKU, SKELETONS


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    state = {
        name: tensor if tensor.dtype == torch.int64 else tensor.float()
        for name, tensor in load_case("pku").state.items()
    }
    torch.save(state, tmp_path / "published.pt")
    return tmp_path / "published.pt"


def test_round_trip_is_exact_and_complete(checkpoint: Path, tmp_path: Path):
    model = load_published(checkpoint, dataset="PKU-subject")
    assert not model.training
    save_published(model, tmp_path / "again.pt")
    before, after = (torch.load(path, weights_only=True) for path in (checkpoint, tmp_path / "again.pt"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    assert not list(tmp_path.glob(".partial*"))


def test_wrapped_and_prefixed_states_are_accepted(checkpoint: Path, tmp_path: Path):
    state = torch.load(checkpoint, weights_only=True)
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "wrapped.pt"
    )
    one, two = load_published(checkpoint, PKU), load_published(tmp_path / "wrapped.pt", "PKU-view")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_faults_are_reported_by_name(checkpoint: Path, tmp_path: Path):
    state = torch.load(checkpoint, weights_only=True)
    del state["STI.layers.3.att_layer.key_projection.weight"]
    state["STI.extra"] = torch.zeros(3)
    state["conv_bound.weight"] = torch.zeros(1, 64)
    torch.save(state, tmp_path / "faulty.pt")
    with pytest.raises(PublishedWeightsError) as caught:
        load_published(tmp_path / "faulty.pt", "PKU-subject")
    report = str(caught.value)
    assert "missing: STI.layers.3.att_layer.key_projection.weight (64, 64)" in report
    assert "unexpected: STI.extra (3,)" in report
    assert "conv_bound.weight: got shape (1, 64), expected (1, 64, 1)" in report


def test_wrong_skeleton_dataset_and_file(checkpoint: Path, tmp_path: Path):
    with pytest.raises(PublishedWeightsError, match="25 joints, but the skeleton 'lara' has 19"):
        load_published(checkpoint, "LARA")
    with pytest.raises(ValueError, match="'NTU', expected one of PKU-subject"):
        load_published(checkpoint, "NTU")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(PublishedWeightsError, match="it has no tensor 'SP.A_res'"):
        load_published(tmp_path / "other.pt", "PKU-subject")


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"SP.A_res": 1.0}, {"state_dict": 3}])
def test_files_that_hold_no_state_dict(content: object, tmp_path: Path):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(PublishedWeightsError, match=r"odd\.pt holds no state_dict: expected tensors by name"):
        load_published(tmp_path / "odd.pt", "PKU-subject")


def test_files_that_torch_did_not_write(tmp_path: Path):
    for content in (b"", b"hello, world\n", b"PK\x03\x04 nothing"):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(PublishedWeightsError, match=r"text\.pt cannot be read as weights"):
            load_published(tmp_path / "text.pt", "PKU-subject")
    with pytest.raises(FileNotFoundError):
        load_published(tmp_path / "none.pt", "PKU-subject")


def test_size_of_the_published_configuration(tmp_path: Path):
    model = TRGNet(12, 52, SKELETONS["pku"].adjacency())
    save_published(model, tmp_path / "new.pt")
    state = torch.load(tmp_path / "new.pt", weights_only=True)
    parameters = [
        tensor
        for name, tensor in state.items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    assert (len(parameters), sum(p.numel() for p in parameters)) == (436, 1_415_115)
    assert load_published(tmp_path / "new.pt", "PKU-subject").n_joints == 25


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 3, "refine_layers": 2},
        {"action_stages": 3, "boundary_stages": 1},
        {"features": 32, "relations": 4, "hops": 5},
    ],
    ids=str,
)
def test_other_configurations_keep_their_sizes(sizes: dict[str, int], tmp_path: Path):
    model = TRGNet(3, 4, SKELETONS["lara"].adjacency(), 16, **sizes)
    save_published(model, tmp_path / "other.pt")
    again = load_published(tmp_path / "other.pt", "LARA")
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
    assert len(to_published(model.state_dict())) == len(set(to_published(model.state_dict())))
