"""Program for two processes, started by test_optimizer_contract.py: the optimizers in data- and tensor-parallel training."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from trgnet.optimizers import LCAM, SMES, GatedSMES

MAKE = (
    lambda params, **options: LCAM(params, lr=0.1, **options),
    lambda params, **options: GatedSMES(params, lr=0.1, **options),
)


def gathered(t: Tensor) -> list[Tensor]:
    everywhere = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, t.contiguous())
    return everywhere


def replicas_stay_equal(rank: int) -> None:
    """Gradients averaged as DDP does, losses that alone would choose differently on the two processes."""
    for make in MAKE:
        p, alone = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
        optimizer = make([p])
        single = make([alone], process_group=dist.new_group([rank], use_local_synchronization=True))
        chosen = []
        for i in range(8):
            local = 1.0 + 0.5 * (-1) ** (i + rank) + 0.1 * (-1) ** (i // 2) * (rank + 1)
            p.grad = torch.sin(torch.arange(5.0) + i)
            alone.grad = p.grad.clone()
            if i % 3 == 2:
                optimizer.observe(local)
                optimizer.step()
            else:
                optimizer.step(loss=local)
            single.step(loss=local)
            chosen.append(optimizer.phase.item())
            for t in (p.detach(), optimizer.param_groups[0]["loss_gate"]):
                first, second = gathered(t)
                assert torch.equal(first, second)
        assert set(chosen) == {0, 1}
        first, second = gathered(alone.detach())
        assert not torch.equal(first, second)  # so it would be without the mean over processes


def sharded_parameters_follow_whole_ones(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    values, gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(6, 4)
    for make in (*MAKE, lambda params, **options: SMES(params, lr=0.1, alpha=0.3, **options)):
        for foreach in (False, True):
            whole = nn.Parameter(values.clone())
            sharded = nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
            optimizers = make([whole], foreach=foreach), make([sharded], foreach=foreach)
            for i in range(4):
                whole.grad = gradient * (i - 1.5)
                # A gradient in another placement than its parameter's is brought to it.
                sharded.grad = distribute_tensor(whole.grad, mesh, [Shard(i % 2)])
                for optimizer in optimizers:
                    optimizer.step(loss=float(i % 2))
                assert torch.equal(sharded.full_tensor(), whole), (i, foreach)
            state = optimizers[1].state_dict()
            again = make([sharded], foreach=foreach)
            again.load_state_dict(state)
            name = "momentum_buffer" if isinstance(again, LCAM) else "exp_avg"
            assert torch.equal(again.state[sharded][name].full_tensor(), optimizers[0].state[whole][name])


def fully_sharded_training_goes_on_from_a_distributed_checkpoint(folder: str) -> None:
    """FSDP2: saved by both processes, loaded into a new model and optimizer, and continued bit for bit."""

    def trainer(make: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = fully_shard(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), mesh=mesh)
        return model, make(model.parameters())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for i in steps:
            optimizer.zero_grad()
            loss = model(torch.full((2, 3), float(i + dist.get_rank()))).square().mean()
            loss.backward()
            optimizer.step(loss=loss)

    mesh = init_device_mesh("cpu", (2,))
    for k, make in enumerate(MAKE):
        model, optimizer = trainer(make)
        train(model, optimizer, range(3))
        place = f"{folder}/{k}"
        checkpoint.save({"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
                        checkpoint_id=place)  # fmt: skip
        other, resumed = trainer(make)
        state = {"model": get_model_state_dict(other), "optimizer": get_optimizer_state_dict(other, resumed)}
        checkpoint.load(state, checkpoint_id=place)
        set_model_state_dict(other, state["model"])
        set_optimizer_state_dict(other, resumed, state["optimizer"])
        train(model, optimizer, range(3, 6))
        train(other, resumed, range(3, 6))
        for p, q in zip(model.parameters(), other.parameters()):
            assert torch.equal(p.full_tensor(), q.full_tensor())
        groups = optimizer.param_groups[0], resumed.param_groups[0]
        assert torch.equal(groups[0]["loss_gate"], groups[1]["loss_gate"]) and groups[0]["loss_gate"][2] == 6


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    replicas_stay_equal(dist.get_rank())
    sharded_parameters_follow_whole_ones(dist.get_rank())
    fully_sharded_training_goes_on_from_a_distributed_checkpoint(sys.argv[1])
    dist.destroy_process_group()
    print("passed")
