"""Properties of the network and its losses that hold for any data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from allocations import LargestTensor, LargeTensors
from operators import lengths_mask
from published_case import NO_DROPOUT
from torch import Tensor
from trgnet.kernels import BackendError, use_backend
from trgnet.kernels.dynamic_graph_conv import BLOCK_ELEMENTS

from trgnet import TRGLoss, TRGNet
from trgnet.data import Dataset, Segments, collate, synthetic_dataset
from trgnet.losses import absolute_loss, relative_loss
from trgnet.model import MaskedBatchNorm, TemporalModule

SMALL = {"features": 16, "layers": 4, "refine_layers": 3}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    data = synthetic_dataset(
        recordings=4, frames=61, joints=7, channels=4, classes=5, seed=3, embedding_dim=12
    )
    # Sequences of different lengths, down to a few frames.
    short = tuple(
        replace(r, features=np.ascontiguousarray(r.features[..., :n]), labels=r.labels[:n])
        for r, n in zip(data.recordings, (61, 40, 17, 5), strict=True)
    )
    return replace(data, recordings=short)


def build(dataset: Dataset, dtype: torch.dtype = torch.float64, **options: object) -> TRGNet:
    torch.manual_seed(0)
    model = TRGNet(
        4, len(dataset.classes), dataset.skeleton.adjacency(), dataset.text.dim, **(SMALL | options)
    )
    with torch.no_grad():  # the initial zeros would switch the text graph's adaptation off
        model.spatial.alpha.fill_(0.5)
        model.spatial.beta.fill_(0.5)
    return model.to(dtype)


def batch_of(dataset: Dataset, names: tuple[int, ...] = (0, 1, 2, 3), garbage: float = 0.0, **options: int):
    batch = collate([dataset.recordings[i] for i in names], **options)
    batch.x, batch.boundaries = batch.x.double(), batch.boundaries.double()
    batch.x = torch.where(batch.mask.unsqueeze(1), batch.x, garbage)
    return batch


def step(model: TRGNet, dataset: Dataset, batch) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Outputs on real frames, loss terms and gradients of one training step from fixed seeds."""
    loss = TRGLoss(dataset.text, pos_weight=9.0).double()
    torch.manual_seed(11)
    model.zero_grad()
    output = model.train()(batch.x, batch.mask, dataset.text.joint_graph().double(), batch.segments)
    terms = loss(output, batch)
    terms["total"].backward()
    real = batch.mask.squeeze(1)
    outputs = [o.transpose(1, 2)[real] for o in (*output.class_logits, *output.boundary_logits)]
    features = output.segment_features[batch.segments.length > 0]
    return [*outputs, features], terms, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dropout", [False, True])
def test_padding_changes_nothing_in_training(dataset: Dataset, dropout: bool):
    options = {} if dropout else NO_DROPOUT
    tight = step(build(dataset, **options), dataset, batch_of(dataset, pad_multiple=1))
    for batch in (
        batch_of(dataset, pad_multiple=64),
        batch_of(dataset, pad_multiple=1, pad_to=203, garbage=1e3),
        batch_of(dataset, pad_multiple=16, garbage=float("nan")),
        batch_of(dataset, buckets=True),
        batch_of(dataset, pad_to=300, buckets=True, garbage=-7.0),
    ):
        padded = step(build(dataset, **options), dataset, batch)
        for ours, truth in zip(padded[0] + padded[2], tight[0] + tight[2], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)
        for name, value in tight[1].items():
            torch.testing.assert_close(padded[1][name], value, rtol=1e-10, atol=1e-12)


def test_running_statistics_ignore_padding(dataset: Dataset):
    models = [build(dataset, **NO_DROPOUT) for _ in range(2)]
    for model, pad in zip(models, (1, 64)):
        step(model, dataset, batch_of(dataset, pad_multiple=pad))
    for (name, one), two in zip(models[0].named_buffers(), models[1].buffers()):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12, msg=name)
    assert models[0].spatial.norm.num_batches_tracked == 1


def test_batch_norm_tracks_what_torch_tracks():
    x = torch.randn(3, 6, 5, 8, dtype=torch.float64)
    ours, truth = MaskedBatchNorm(6).double(), torch.nn.BatchNorm2d(6).double()
    for _ in range(3):
        out, _ = ours(x, torch.ones(3, 1, 8, dtype=torch.bool))
        torch.testing.assert_close(out, torch.relu(truth(x)))
        x = 2 * x + 1
    for name, value in truth.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_a_sequence_does_not_depend_on_its_batch_in_evaluation(dataset: Dataset):
    model = build(dataset).eval()
    graph = dataset.text.joint_graph().double()
    with torch.no_grad():
        together = model(*(lambda b: (b.x, b.mask))(batch_of(dataset, garbage=float("inf"))), graph)
        for i in range(4):
            batch = batch_of(dataset, (i,), pad_multiple=1)
            for alone, joint in zip(model(batch.x, batch.mask, graph), together):
                torch.testing.assert_close(joint[i, :, : batch.lengths[0]], alone[0], rtol=1e-10, atol=1e-11)


def test_backends_agree_on_a_training_step(dataset: Dataset):
    batch = batch_of(dataset)
    with use_backend("reference"):
        expected = step(build(dataset), dataset, batch)
    for backend in ("recompute", "auto"):
        with use_backend(backend):
            got = step(build(dataset), dataset, batch)
        for ours, truth in zip(got[0] + got[2], expected[0] + expected[2], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    with use_backend("triton"), pytest.raises(BackendError, match="multiscale_graph_conv"):
        step(build(dataset), dataset, batch)


def test_every_parameter_is_trained(dataset: Dataset):
    model = build(dataset)
    gradients = step(model, dataset, batch_of(dataset))[2]
    assert all(g.abs().sum() > 0 for g in gradients)


def test_bitwise_repeatable(dataset: Dataset):
    one, two = (step(build(dataset, torch.float64), dataset, batch_of(dataset)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[0] + one[2], two[0] + two[2]))


def test_one_frame_and_one_segment(dataset: Dataset):
    one = replace(
        dataset.recordings[0],
        features=dataset.recordings[0].features[..., :1].copy(),
        labels=dataset.recordings[0].labels[:1],
    )
    batch = collate([one], pad_multiple=4)
    batch.x, batch.boundaries = batch.x.double(), batch.boundaries.double()
    outputs, terms, gradients = step(build(dataset, **NO_DROPOUT), dataset, batch)
    assert terms["smoothness"] == 0 and terms["relative"] == 0 and terms["absolute"] == 0
    assert all(torch.isfinite(x).all() for x in (*outputs, *terms.values(), *gradients))


def test_no_segments_at_all(dataset: Dataset):
    batch = batch_of(dataset)
    batch.labels = torch.full_like(batch.labels, 255)
    batch.segments = Segments(*torch.zeros(4, 0, dtype=torch.int64))
    _, terms, gradients = step(build(dataset, **NO_DROPOUT), dataset, batch)
    assert terms["cross_entropy"] == terms["absolute"] == terms["relative"] == 0
    assert all(torch.isfinite(g).all() for g in gradients)


def test_text_losses_against_their_definition():
    torch.manual_seed(0)
    f, embeddings = torch.randn(6, 9).double(), torch.randn(3, 9).double()
    labels, scale = torch.tensor([0, 2, 2, 1, 0, 2]), torch.tensor([2.5]).double()
    graph = torch.rand(3, 3).double()

    def divergence(similarity: Tensor, logits: Tensor) -> Tensor:
        target, model = torch.softmax(10 * similarity, 1), torch.softmax(logits, 1)
        return (target * (target / model).log()).sum(1).mean()

    e = embeddings[labels]
    logits = scale * (f / f.norm(dim=1, keepdim=True)) @ (e / e.norm(dim=1, keepdim=True)).T
    same = (labels[:, None] == labels[None]).double()
    torch.testing.assert_close(
        absolute_loss(f, labels, embeddings, scale),
        (divergence(same, logits) + divergence(same, logits.T)) / 2,
    )
    d = (f[:, None] - f[None]).norm(dim=2)
    torch.testing.assert_close(
        relative_loss(f, labels, graph),
        divergence(graph[labels][:, labels], 1 - (d - d.min()) / (d.max() - d.min())),
    )
    equal = torch.ones(4, 9, dtype=torch.float64, requires_grad=True)
    loss = relative_loss(equal, labels[:4], graph)
    loss.backward()
    assert loss == 0 and torch.isfinite(equal.grad).all()


@pytest.mark.parametrize("count", [0, 1, 2, 6])
@pytest.mark.parametrize("padding", [1, 3, 40])
def test_padded_segments_change_neither_text_losses_nor_gradients(count: int, padding: int):
    torch.manual_seed(count)
    embeddings, graph = torch.randn(3, 9).double(), torch.rand(3, 3).double()
    f, labels = torch.randn(count, 9).double(), torch.tensor([0, 2, 2, 1, 0, 2])[:count]
    garbage = 1e3 * torch.randn(padding, 9).double()
    garbage[0] = 0.0
    results = []
    for rows, classes in (
        (f, labels),
        (torch.cat([f, garbage]), torch.cat([labels, torch.full((padding,), 255)])),
    ):
        rows, scale = rows.requires_grad_(), torch.tensor([2.5], dtype=torch.float64, requires_grad=True)
        absolute, relative = (
            absolute_loss(rows, classes, embeddings, scale),
            relative_loss(rows, classes, graph),
        )
        (2 * absolute + relative).backward()
        assert not rows.grad[count:].any()
        results.append((absolute, relative, rows.grad[:count], scale.grad))
    for got, truth in zip(*results):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-14)
    assert (results[1][0] == 0) == (count < 2) and (results[1][1] == 0) == (count < 2)
    assert all(torch.isfinite(value).all() for value in results[1])


def test_memory_of_a_step_is_bounded_by_the_feature_map(dataset: Dataset):
    """No (N, 13C, V, T), no (N, T, V, V) and no (N, D, T) tensor exists at any time, forward or backward."""
    n, c, v, t, f, d = 1, 6, 30, 8192, 8, 768
    adjacency = np.zeros((v, v), np.float32)
    adjacency[np.arange(1, v), np.arange(v - 1)] = adjacency[np.arange(v - 1), np.arange(1, v)] = 1
    model = TRGNet(c, 3, adjacency, d, features=f, layers=1, refine_layers=1)
    x, mask = torch.randn(n, c, v, t), torch.ones(n, 1, t, dtype=torch.bool)
    segments = Segments(*torch.tensor([[0, 0], [0, 100], [100, t - 100], [0, 1]]))
    with LargestTensor() as largest:
        output = model(x, mask, torch.rand(v, v), segments)
        sum(
            o.sum() for o in (*output.class_logits, *output.boundary_logits, output.segment_features)
        ).backward()
    feature_map = n * (f + 2) * v * t  # x3 with its two relation rows
    assert (
        largest.elements
        <= max(feature_map, BLOCK_ELEMENTS)
        < min(n * 13 * c * v * t, n * t * v * v, n * d * t)
    )


def test_temporal_module_makes_no_copy_of_what_it_reads():
    """Of the size of its input: the groups' channels, and in backward their gradient and that of the input."""
    n, f, v, t, layers = 2, 16, 9, 30, 2
    module = TemporalModule(v, f, layers, 4, 0.3, 0.3, 0.05, 0.5)
    x = torch.randn(n, f, v, t, requires_grad=True)
    seeds = torch.arange(4 * layers).view(-1, 2)
    with LargeTensors(n * layers * module.group_channels * v * t) as large:
        out = module(x, torch.ones(n, 1, t, dtype=torch.bool), iter(seeds))
        assert len(large.storages) == 1
        torch.autograd.grad(out.sum(), [x, *module.parameters()])
    assert len(large.storages) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_long_sequences(dataset: Dataset, dtype: torch.dtype):
    model = build(dataset, torch.float32, layers=3, refine_layers=2).eval()
    x, mask = torch.randn(1, 4, 7, 20_000), torch.ones(1, 1, 20_000, dtype=torch.bool)
    with torch.no_grad():
        expected = model(x, mask, dataset.text.joint_graph())[0]
        with torch.autocast("cpu", dtype=dtype):
            got = model(x, mask, dataset.text.joint_graph())[0]
    assert (got - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize("backend", ["reference", "recompute", "auto"])
def test_compiles_to_one_graph_for_any_length(dataset: Dataset, backend: str):
    """The first length compiles, the second makes the length dynamic, no further one compiles."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = build(
        dataset, **NO_DROPOUT, layers=1, refine_layers=1, action_stages=1, boundary_stages=1
    ).train()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graph = dataset.text.joint_graph().double()
    with use_backend(backend):
        for t in (20, 31, 48, 17):
            x, mask = torch.randn(2, 4, 7, t).double(), lengths_mask(2, t)
            got, expected = (f(x, mask, graph).class_logits[-1] for f in (compiled, model))
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
            got.sum().backward()
    assert counter.frame_count <= 2


def test_wrong_inputs_are_explained(dataset: Dataset):
    model = build(dataset)
    with pytest.raises(
        ValueError, match=r"x has shape \(1, 4, 6, 8\), expected .* C = 4 channels and V = 7 joints"
    ):
        model(
            torch.zeros(1, 4, 6, 8).double(),
            torch.ones(1, 1, 8, dtype=torch.bool),
            torch.zeros(7, 7).double(),
        )
    x, mask, graph = (
        torch.zeros(2, 4, 7, 8).double(),
        torch.ones(2, 1, 8, dtype=torch.bool),
        torch.zeros(7, 7).double(),
    )
    for wrong in (graph[0], graph[:1], torch.zeros(()), torch.zeros(12, 12)):
        with pytest.raises(
            ValueError, match=r"TRGNet: joint_graph has shape .* expected \(V, V\) = \(7, 7\)"
        ):
            model(x, mask, wrong)
    for wrong in (mask[:, 0], mask[..., :5], mask[:1]):
        with pytest.raises(ValueError, match=r"TRGNet: mask has shape .* expected \(N, 1, T\) = \(2, 1, 8\)"):
            model(x, wrong, graph)
    with pytest.raises(TypeError, match="TRGNet: mask has dtype torch.float32"):
        model(x, mask.float(), graph)
    with pytest.raises(ValueError, match="features is 18, expected a multiple of heads = 4"):
        build(dataset, features=18)
    with pytest.raises(ValueError, match="refine_layers is 0, expected at least 1"):
        build(dataset, refine_layers=0)
    with pytest.raises(ValueError, match="absolute is -1, expected"):
        TRGLoss(dataset.text, pos_weight=2.0, absolute=-1)
    batch = batch_of(dataset)
    output = model.train()(batch.x, batch.mask, dataset.text.joint_graph().double())
    with pytest.raises(ValueError, match="no segment features: call"):
        TRGLoss(dataset.text, pos_weight=2.0).double()(output, batch)
