"""`torchrun --nproc-per-node 2 -m benchmarks.gpu_parallel`: one long sequence, and one large batch, on several GPUs.

Checks that context parallelism (`mambakit.nn.ContextParallel`) gives the outputs and gradients of one GPU, then times
training steps of a backbone: one GPU alone, the sequence in parts, and the batch in parts.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mambakit.nn import Backbone, ContextParallel

_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node 2 -m benchmarks.gpu_parallel")
    parser.add_argument("--length", type=int, default=65536, help="of the measured sequence")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--mixers", default="mamba,mamba2,mamba3", help="which of them")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available() or "RANK" not in os.environ:
        sys.exit("benchmarks.gpu_parallel needs CUDA GPUs and torchrun, a process for each GPU")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    record: dict[str, Any] = {"gpus": dist.get_world_size(), "gpu": torch.cuda.get_device_name(), "cases": []}
    for mixer in options.mixers.split(","):
        errors = compare(mixer)
        times = measure(mixer, options.layers, options.length)
        record["cases"].append({"mixer": mixer, "length": options.length, "errors": errors, "milliseconds": times})
        if dist.get_rank() == 0:
            worst = max(errors, key=lambda name: errors[name])
            print(f"{mixer}: largest difference from one GPU {errors[worst]:.1e} ({worst})")
            alone = times["one GPU"]
            for name, milliseconds in times.items():
                print(f"{mixer}: {name} {milliseconds:.1f} ms, {alone / milliseconds:.2f}x", flush=True)
    if options.json and dist.get_rank() == 0:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def compare(mixer: str) -> dict[str, float]:
    """||parallel - alone|| / ||alone|| of outputs, states and gradients, the largest over ranks; in float32."""
    layer, x = _backbone(mixer, 3, 256, torch.float32), _sequence(2, 1001, 256, torch.float32)
    expected, last = layer(x)
    grads = torch.autograd.grad(expected.sin().sum(), [x, *layer.parameters()])
    with ContextParallel(layer) as ranks:
        part = ranks.part(x.detach()).clone().requires_grad_()
        y, state = layer(part)
        y.sin().sum().backward()
        ranks.sum_gradients()
    pairs = {"y": (y, ranks.part(expected)), "gradient of x": (part.grad, ranks.part(grads[0]))}
    if ranks.rank == ranks.size - 1:
        ends = zip(tree_leaves(state), tree_leaves(last), strict=True)
        pairs |= {f"state {i}": pair for i, pair in enumerate(ends)}
    for (name, parameter), grad in zip(layer.named_parameters(), grads[1:], strict=True):
        pairs[f"gradient of {name}"] = (parameter.grad, grad)
    errors = {name: ((a - b).norm() / b.norm().clamp(min=1e-12)).item() for name, (a, b) in pairs.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, errors)
    return {name: max(found[name] for found in gathered if name in found) for name in gathered[-1]}


def measure(mixer: str, layers: int, length: int) -> dict[str, float]:
    """Medians of a forward and backward pass in bfloat16, in ms: of the slowest rank."""
    layer = _backbone(mixer, layers, 768, torch.bfloat16)
    x = _sequence(1, length, 768, torch.bfloat16)

    def alone() -> None:
        layer(x)[0].float().square().mean().backward()

    times = {"one GPU": _median(alone, layer)}
    with ContextParallel(layer) as ranks:
        part = ranks.part(x.detach()).clone()

        def shared() -> None:
            layer(part)[0].float().square().mean().backward()
            ranks.sum_gradients()

        times[f"the sequence on {ranks.size} GPUs"] = _median(shared, layer)
    rows = torch.randn(dist.get_world_size(), length // 8, 768, device="cuda", dtype=torch.bfloat16)
    own = rows[dist.get_rank()][None]
    times["a batch of short ones on one GPU"] = _median(
        lambda: layer(rows)[0].float().square().mean().backward(), layer
    )
    data_parallel = nn.parallel.DistributedDataParallel(layer, device_ids=[torch.cuda.current_device()])
    times[f"that batch on {ranks.size} GPUs"] = _median(
        lambda: data_parallel(own)[0].float().square().mean().backward(), layer
    )
    return times


def _median(step: Callable[[], None], layer: nn.Module) -> float:
    times = []
    for index in range(_STEPS + 3):
        layer.zero_grad(set_to_none=True)
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _backbone(mixer: str, layers: int, width: int, dtype: torch.dtype) -> Backbone:
    torch.manual_seed(0)
    return Backbone(width, layers, mixer, device="cuda", dtype=dtype)


def _sequence(batch: int, length: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(batch, length, width, generator=generator, device="cuda").to(dtype).requires_grad_()


if __name__ == "__main__":
    main()
