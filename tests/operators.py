"""Arguments for every operator, and the same functions written straight from the formulas, for the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional
from trgnet.kernels.examples import Size, example, lengths_mask  # noqa: F401  lengths_mask for the tests

# With dropout the formulas differ: the position of the probabilities in the arguments, to switch it off.
DROPOUT = {"attention_layer": (-1, -2), "fusion_layer": (-1,), "dilated_residual": (-1,)}


def arguments(name: str, n: int = 2, t: int = 9, v: int = 5, f: int = 8, *, seed: int = 0) -> tuple:
    """Float64 arguments of one operator as its ``Operator`` takes them; floating tensors require gradients."""
    segments = n + 3 if name == "pairwise_distance" else 2 * n
    size = Size(n=n, c=3, v=v, f=f, t=t, hops=3, k=4, segments=segments, d=f)
    return example(name, size, seed=seed, scaled=False)


def without_dropout(name: str, args: tuple) -> tuple:
    """The arguments with every probability of dropout 0."""
    changed = list(args)
    for position in DROPOUT.get(name, ()):
        changed[position] = 0.0
    return tuple(changed)


def as_tuple(outputs: object) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def real_rows(x, mask):
    """(real frames x joints, F)."""
    return x.movedim(1, -1)[mask.expand(-1, x.shape[2], -1)]


def statistics(x, mask):
    rows = real_rows(x.detach(), mask)
    return rows.mean(0), rows.var(0, unbiased=False)


def converted(args: tuple, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """The arguments as leaves of their own on ``device``, floating point in ``dtype``."""
    return tuple(
        a.detach().to(device, dtype if a.is_floating_point() else a.dtype).requires_grad_(a.requires_grad)
        if isinstance(a, Tensor)
        else a
        for a in args
    )


def gradients(
    outputs: tuple[Tensor, ...], args: tuple, *, allow_unused: bool = True, retain_graph: bool = False
) -> list[Tensor]:
    """Gradients of a fixed random projection of the outputs; of what no output depends on zeros, or an error."""
    generator = torch.Generator().manual_seed(1)
    projected = [o for o in outputs if o.requires_grad]
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in projected]
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return list(
        torch.autograd.grad(
            projected,
            wanted,
            weights,
            retain_graph=retain_graph,
            allow_unused=allow_unused,
            materialize_grads=allow_unused,
        )
    )


def multiscale_graph_conv(x, hops, weight, bias, mask):
    h = torch.einsum("kvu,ncut->nkcvt", hops, x).flatten(1, 2)
    y = torch.einsum("oi,nivt->novt", weight, h) + bias.view(-1, 1, 1)
    return y, *statistics(y, mask)


def dynamic_graph_conv(x, graph, beta, bias, mask):
    *value, p, q = (x + bias.view(-1, 1, 1)).unbind(1)
    frame = beta * torch.tanh(p.unsqueeze(2) - q.unsqueeze(1))  # (N, U, V, T)
    z = torch.einsum("ncuvt,ncvt->ncut", frame.unsqueeze(1) + graph.unsqueeze(-1), torch.stack(value, 1))
    return z, *statistics(z, mask)


def masked_batch_norm(x, mask, weight, bias, residual, mean, var, of_batch, frame_sum, eps):
    if mean is None:
        rows = real_rows(x, mask)
        mean, var = rows.mean(0), rows.var(0, unbiased=False)
    y = (x - mean.view(-1, 1, 1)) / torch.sqrt(var + eps).view(-1, 1, 1) * weight.view(-1, 1, 1) + bias.view(
        -1, 1, 1
    )
    y = y if residual is None else y + residual
    y = torch.relu(y) * mask.unsqueeze(1)
    return y, y.sum(3), mean.detach(), var.detach()


def attention_layer(
    x,
    mask,
    source,
    conv_weight,
    conv_bias,
    wqk,
    bqk,
    wv,
    bv,
    wa,
    ba,
    wc,
    bc,
    seeds,
    dilation,
    heads,
    scale,
    attention_dropout,
    output_dropout,
):
    """Sequence by sequence, head by head, on real frames only; dropout off."""
    out = torch.zeros_like(x)
    f = x.shape[1]
    for i, length in enumerate(mask.sum((1, 2)).tolist()):
        s = x[i, :, :length]
        padded = functional.pad(s, (dilation, dilation))
        o = torch.relu(
            sum(conv_weight[:, :, j] @ padded[:, j * dilation : j * dilation + length] for j in range(3))
            + conv_bias[:, None]
        )
        h = (o - o.mean(1, keepdim=True)) / torch.sqrt(o.var(1, keepdim=True, unbiased=False) + 1e-5)
        query, key = (torch.sigmoid(wqk @ h + bqk[:, None])[:f], torch.sigmoid(wqk @ h + bqk[:, None])[f:])
        value = wv @ (h if source is None else source[i, :, :length]) + bv[:, None]
        parts = []
        for part in torch.arange(f).chunk(heads):
            similarity = query[part].T @ key[part]  # (T, T), the quadratic form of linear attention
            normaliser = (query[part] * (key[part].sum(1, keepdim=True) + 1e-6)).sum(0)
            parts.append(value[part] @ similarity.T / normaliser)
        o = scale * (wa @ torch.cat(parts) + ba[:, None]) + o
        out[i, :, :length] = s + wc @ o + bc[:, None]
    return out


def fusion_layer(x, spatial, mask, w1, b1, w2, b2, seed, p):
    z = torch.einsum("of,nft->not", w1, x) + spatial + b1[:, None]
    gelu = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return (torch.einsum("of,nft->not", w2, gelu) + b2[:, None] + x) * mask


def dilated_residual(x, mask, conv_weight, conv_bias, weight, bias, seed, dilation, p):
    padded = functional.pad(x, (dilation, dilation))
    conv = sum(
        torch.einsum(
            "of,nft->not", conv_weight[:, :, j], padded[..., j * dilation : j * dilation + x.shape[2]]
        )
        for j in range(3)
    )
    return (
        x + torch.einsum("of,nft->not", weight, torch.relu(conv + conv_bias[:, None])) + bias[:, None]
    ) * mask


def class_loss(logits, labels, similarity, mask, class_weights):
    weighted, weight, smooth = 0.0, 0.0, []
    for i, length in enumerate(mask.sum((1, 2)).tolist()):
        z = logits[i, :, :length]
        for t in range(length):
            label = int(labels[i, t])
            if label != 255:
                weighted = weighted - class_weights[label] * torch.log_softmax(z[:, t], 0)[label]
                weight = weight + class_weights[label]
        later, earlier = torch.log_softmax(z[:, 1:], 1), torch.log_softmax(z[:, :-1], 1)
        loss = (later - earlier).square().clamp(max=16) * similarity[i, 1:length]
        smooth.append(loss.mean() if length > 1 else logits.sum() * 0)
    return weighted / weight, torch.stack(smooth).mean()


def boundary_loss(logits, target, mask, pos_weight):
    losses = []
    for i, length in enumerate(mask.sum((1, 2)).tolist()):
        p, y = torch.sigmoid(logits[i, 0, :length]), target[i, :length]
        losses.append(-(pos_weight * y * p.log() + (1 - y) * (1 - p).log()).mean())
    return torch.stack(losses).mean()


def pointwise_conv(x, weight, bias):
    return torch.stack([weight[b % len(weight)] @ x[b] + bias.view(-1, 1) for b in range(len(x))])


def segment_mean(x, batch, start, length):
    return torch.stack([x[b, :, s : s + n].mean(1) for b, s, n in zip(batch, start, length)])


def pairwise_distance(f):
    difference = f.unsqueeze(0) - f.unsqueeze(1)
    # The square root has no gradient at 0; off the diagonal it is never reached here.
    off = ~torch.eye(len(f), dtype=torch.bool)
    return torch.zeros(len(f), len(f), dtype=f.dtype).masked_scatter(off, difference[off].norm(dim=1))
