"""transformers' models with the stand-ins beside the same models without: `python -m benchmarks.compat`.

Each family's modeling file is imported twice into one process, before `mambakit.compat.install()` and after, and they
take turns. A training step is forward and backward; decoding is one token after another from a prompt of 16.

transformers' scan of Mamba-1 indexes each step, whose backward grows with the square of the length, and a speed-up over
that flatters: the same model with the plain loop over `unbind` in its place is shown too.
"""

import argparse
import functools
import warnings
from collections.abc import Callable

import torch

import mambakit.compat
from benchmarks.baselines import unbind_scan_of_transformers
from benchmarks.families import FAMILIES, VOCABULARY, make, modeling_of
from benchmarks.timing import Pace, take_turns

PACE = Pace(turns=5, least_turns=2, turn_seconds=0.001, budget_seconds=20.0)
PROMPT, NEW = 16, 24
_SCAN = "mamba_selective_scan"  # its name in the modeling files of Mamba-1's families


def training_step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.train()
    model.zero_grad()
    model(tokens, use_cache=False).logits.logsumexp(-1).mean().backward()


@torch.no_grad()
def forward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.eval()
    model(tokens, use_cache=False)


def decoding(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.eval()
    prompt = tokens[:, :PROMPT]
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]


RUNS: dict[str, Callable[[torch.nn.Module, torch.Tensor], None]] = {
    "training step": training_step,
    "forward": forward,
    "decoding": decoding,
}


def both(family: str, hidden: int, state: int) -> dict[str, torch.nn.Module]:
    """The model as transformers has it, with the loop over unbind (Mamba-1's families), and under the stand-ins."""
    sizes = {"hidden": hidden, "state": state, "chunk": 256}
    alone = make(family, modeling_of(family), **sizes)
    modeling = modeling_of(family)
    looped = {}
    if hasattr(modeling, _SCAN):
        setattr(modeling, _SCAN, unbind_scan_of_transformers)
        looped["unbind"] = make(family, modeling, **sizes)
    with warnings.catch_warnings():  # other families that came before are not run again
        warnings.simplefilter("ignore", RuntimeWarning)
        mambakit.compat.install()
    served = make(family, modeling_of(family), **sizes)
    mambakit.compat.uninstall()
    return {"alone": alone, **looped, "served": served}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--state", type=int, default=16)
    options = parser.parse_args()
    tokens = torch.randint(2, VOCABULARY, (options.batch, options.length))
    print(f"batch {options.batch}, length {options.length}, hidden {options.hidden}, state {options.state}, ", end="")
    print(f"2 or 3 layers, float32, {torch.get_num_threads()} threads; medians in ms, alone / served")
    print("(and with the loop over unbind in the place of transformers' scan / served)")
    for family in options.families:
        models = both(family, options.hidden, options.state)
        cells = []
        for name, run in RUNS.items():
            runs = {kind: functools.partial(run, model, tokens) for kind, model in models.items()}
            if name == "decoding":  # which has steps of its own, and no scan
                runs.pop("unbind", None)
            times = take_turns(runs, PACE)
            before, after = times["alone"].median, times["served"].median
            cells.append(f"{name} {before:7.0f} / {after:5.0f} = {before / after:6.1f}x")
            if "unbind" in times:
                looped = times["unbind"].median
                cells[-1] += f" (loop {looped:7.0f} = {looped / after:5.1f}x)"
        print(f"{family:17}", "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
