"""SGD, LCAM, Adam, SMES and the gated optimizer on a small task: the digits of scikit-learn.

    pip install 'trgnet[example]'
    python docs/digits.py                        # about two minutes on one core; draws digits.png
    python docs/digits.py --epochs 10 --seeds 2  # less

A network of two linear layers learns 1,797 images of 8 x 8 pixels. The learning rate of each optimizer is the one of a
grid with which the network of seed 100 is best on a fifth of the training images; then it is trained with other seeds and
tested on images that nothing was chosen with. It shows how the optimizers are used, and says nothing about other tasks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trgnet.optimizers import LCAM, SMES, GatedSMES

Make = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
Data = tuple[Tensor, Tensor]

OPTIMIZERS: dict[str, Make] = {
    "SGD, momentum 0.9": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
    "LCAM (0.9, 0.95)": lambda params, lr: LCAM(params, lr, (0.9, 0.95)),
    "SMES, alpha 0": lambda params, lr: SMES(params, lr, alpha=0.0),
    "SMES, alpha 0.25": lambda params, lr: SMES(params, lr, alpha=0.25),
    "Adam": lambda params, lr: torch.optim.Adam(params, lr),
    "SMES, alpha 0.5": lambda params, lr: SMES(params, lr, alpha=0.5),
    "SMES, alpha 0.75": lambda params, lr: SMES(params, lr, alpha=0.75),
    "gated SMES": lambda params, lr: GatedSMES(params, lr, (0.9, 0.95), alpha=(0.4, 0.5)),
}
RATES = [x * 10.0**k for k in range(-6, 1) for x in (1, 3)]
TESTED, VALIDATED, BATCH = 360, 287, 64


def digits() -> tuple[Data, Data, Data]:
    """Images (N, 64) with values from 0 to 1 and their digits (N,): for training, validation and test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    sizes = [len(labels) - TESTED - VALIDATED, VALIDATED, TESTED]
    return tuple(zip(images.split(sizes), labels.split(sizes)))


def train(make: Make, lr: float, data: Data, test: Data, seed: int, epochs: int) -> tuple[float, list[float]]:
    """Accuracy on ``test`` at the end, and the mean training loss of each epoch."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = make(network.parameters(), lr)
    images, labels = data
    curve = []
    for epoch in range(epochs):
        if epoch and hasattr(optimizer, "new_epoch"):
            optimizer.new_epoch()
        losses = []
        for batch in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(network(images[batch]), labels[batch])
            loss.backward()
            # Optimizers of torch take no loss.
            optimizer.step(loss=loss) if isinstance(optimizer, (LCAM, SMES, GatedSMES)) else optimizer.step()
            losses.append(loss.detach())
        curve.append(torch.stack(losses).mean().item())
    with torch.no_grad():
        accuracy = (network(test[0]).argmax(1) == test[1]).float().mean().item()
    return accuracy, curve


def best_rate(make: Make, data: Data, validation: Data, epochs: int) -> float:
    """The learning rate with the best accuracy on the validation images; of equals the one with the lower loss."""

    def rank(lr: float) -> tuple[float, float]:
        accuracy, curve = train(make, lr, data, validation, seed=100, epochs=epochs)
        return accuracy, -curve[-1]

    return max(RATES, key=rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=30, help="default: 30")
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="default: digits.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    training, validation, test = digits()
    everything = tuple(map(torch.cat, zip(training, validation)))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    print(f"{'optimizer':<20} {'learning rate':>13}   test accuracy [%], {options.seeds} seeds")
    for name, make in OPTIMIZERS.items():
        lr = best_rate(make, training, validation, options.epochs)
        runs = [train(make, lr, everything, test, seed, options.epochs) for seed in range(options.seeds)]
        accuracies = [100 * accuracy for accuracy, _ in runs]
        spread = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
        print(f"{name:<20} {lr:>13.0e}   {statistics.mean(accuracies):.1f} ± {spread:.1f}", flush=True)
        curves = torch.tensor([curve for _, curve in runs])
        epochs = range(1, options.epochs + 1)
        (line,) = axes.plot(epochs, curves.mean(0), label=f"{name}, lr {lr:.0e}")
        axes.fill_between(epochs, curves.amin(0), curves.amax(0), alpha=0.15, color=line.get_color())
    axes.set(xlabel="epoch", ylabel="training loss (mean, least and most of the seeds)", yscale="log")
    axes.legend(fontsize=7)
    figure.savefig(options.out, dpi=120)
    print(f"training losses: {options.out}")


if __name__ == "__main__":
    main()
