"""One of several processes that share a sequence: each holds what it computes against one process's result."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from mambakit.nn import S4D, Backbone, ContextParallel, Mamba, Mamba2, Mamba3

WIDTH, LENGTH = 8, 17
LAYERS = {
    "mamba": lambda: Mamba(WIDTH, d_state=3, d_conv=3, dtype=torch.float64),
    "mamba2": lambda: Mamba2(WIDTH, d_state=3, headdim=4, n_groups=2, dtype=torch.float64),
    "mamba3": lambda: Mamba3(WIDTH, d_state=4, headdim=4, dtype=torch.float64),
    "mamba3 mimo": lambda: Mamba3(WIDTH, d_state=4, headdim=8, mimo_rank=2, dtype=torch.float64),
    "s4d": lambda: S4D(WIDTH, d_state=6, dtype=torch.float64),
    "backbone": lambda: Backbone(WIDTH, 3, ["mamba", "mamba2", "s4d"], {"mamba2": {"headdim": 4}}, dtype=torch.float64),
    "backbone of mamba3": lambda: Backbone(WIDTH, 2, "mamba3", {"d_state": 4, "headdim": 4}, dtype=torch.float64),
}


def check(name: str, layer: nn.Module) -> None:
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    _, start = layer(torch.randn(2, 4, WIDTH, dtype=torch.float64))
    start = tree_map(lambda leaf: leaf.detach().requires_grad_(), start)
    leaves = tree_leaves(start)
    expected, last = layer(x, start)
    total = expected.sin().sum() + sum(leaf.sum() for leaf in tree_leaves(last))
    wanted = torch.autograd.grad(total, [x, *layer.parameters(), *leaves])

    with ContextParallel(layer) as ranks:
        part = ranks.part(x.detach()).clone().requires_grad_()
        y, state = layer(part, start if ranks.rank == 0 else None)
        at_end = sum(s.sum() for s in tree_leaves(state)) if ranks.rank == ranks.size - 1 else 0.0
        (y.sin().sum() + at_end).backward()
        ranks.sum_gradients()
    torch.testing.assert_close(y, ranks.part(expected), msg=lambda m: f"{name}: {m}")
    torch.testing.assert_close(part.grad, ranks.part(wanted[0]), msg=lambda m: f"{name}, gradient of x: {m}")
    parameters = list(layer.named_parameters())
    for (field, parameter), grad in zip(parameters, wanted[1:], strict=False):
        torch.testing.assert_close(parameter.grad, grad, msg=lambda m, field=field: f"{name}, gradient of {field}: {m}")
    if ranks.rank == 0:
        torch.testing.assert_close([leaf.grad for leaf in leaves], list(wanted[1 + len(parameters) :]))
    if ranks.rank == ranks.size - 1:
        torch.testing.assert_close(tree_leaves(state), tree_leaves(last))
    with torch.no_grad(), ranks:  # without gradients, and a second time
        torch.testing.assert_close(layer(part, start if ranks.rank == 0 else None)[0], ranks.part(expected))
    torch.testing.assert_close(layer(x, start)[0], expected)  # closed, every process is on its own again


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        layer = make()
        check(name, layer)
    with pytest.raises(ValueError, match="attention"):
        ContextParallel(Backbone(WIDTH, 1, "attention", {"n_heads": 2}))
    dist.barrier()
    dist.destroy_process_group()


main()
