"""What the nine families of transformers compute, with the stand-ins or without.

Run as a program, `python -m tests.compat.families FILE [--stand-ins]`, it writes each family's logits, gradients and
generated tokens (and with the stand-ins, logits of packed sequences) to FILE: a modeling file looks for its kernels
once, so before and after are two processes.
"""

import argparse
import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from benchmarks.families import FAMILIES, VOCABULARY, WITHOUT_ATTENTION, make, modeling_of

LENGTH, BATCH, NEW = 21, 2, 6


def results(family: str) -> dict[str, Any]:
    """Logits and gradients in training and in evaluation, generated tokens, and how often which stand-in was called."""
    modeling = modeling_of(family)
    model, calls = make(family, modeling), _count_calls(modeling)
    tokens = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    found: dict[str, Any] = {}
    for mode in ("train", "eval"):
        getattr(model, mode)()
        model.zero_grad()
        logits = model(tokens, use_cache=False).logits
        logits.float().logsumexp(-1).square().mean().backward()
        found[f"{mode} logits"] = logits.detach()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                found[f"{mode} gradient of {name}"] = weight.grad
    model.train()
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    padded = model(tokens, attention_mask=mask, use_cache=False).logits
    found["logits beside padding"] = padded[mask.bool()].detach()
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": NEW, "do_sample": False}
    found["generated"] = model.generate(tokens, **options)
    found["calls"] = calls
    return found


def packed(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two sequences in one row, marked by seq_idx, and of each alone."""
    model = make(family, modeling_of(family), attention=False).train()
    tokens, cut = torch.randint(2, VOCABULARY, (1, LENGTH)), 8
    seq_idx = (torch.arange(LENGTH) >= cut).int()[None]
    together = model(tokens, seq_idx=seq_idx, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in (tokens[:, :cut], tokens[:, cut:])]
    return together.detach(), torch.cat(alone, 1).detach()


def _count_calls(modeling: ModuleType) -> dict[str, int]:
    """Counts what reaches the stand-ins, which transformers holds in the closures of its own functions."""
    calls: dict[str, int] = {}
    for function in list(vars(modeling).values()):
        for cell in getattr(function, "__closure__", None) or ():
            held = cell.cell_contents
            if callable(held) and getattr(held, "__module__", "").startswith("mambakit.compat"):
                cell.cell_contents = _counted(held, calls)
    return calls


def _counted(function: Any, calls: dict[str, int]) -> Any:
    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        calls[function.__name__] = calls.get(function.__name__, 0) + 1
        return function(*arguments, **named)

    return counted


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--stand-ins", action="store_true")
    options = parser.parse_args()
    if options.stand_ins:
        import mambakit.compat

        mambakit.compat.install()
    found = {family: results(family) for family in FAMILIES}
    if options.stand_ins:
        found["packed"] = {family: packed(family) for family in WITHOUT_ATTENTION}
    torch.save(found, options.file)


if __name__ == "__main__":
    main()
