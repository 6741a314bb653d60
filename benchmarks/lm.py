"""Language models beside transformers and llama.cpp with the same weights: `python -m benchmarks.lm`.

    python -m benchmarks.lm                     mamba-130m: reading a prompt, a training step, going on from the prompt
    python -m benchmarks.lm --shape mamba2-130m
    python -m benchmarks.lm --only training     one of reading, training, decoding
    python -m benchmarks.lm --quick             a small model, a turn each: whether all of it runs

All take turns in one process; medians. Weights are random. llama.cpp is measured where llama-cpp-python is installed
(pip install 'mambakit[bench-llama]', which compiles it). One run of transformers' backward takes minutes.

The training step is that of one 24th of the model, one layer and one 24th of the vocabulary, a sequence of 512: all of
the model's parts grow alike, and 24 of transformers' layers would take an hour.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import machine
from benchmarks.baselines import stepwise_scan
from benchmarks.case import Goal, times
from benchmarks.llama import Llama
from benchmarks.timing import Pace, run_once, take_turns
from mambakit.lm.gguf_file import write_gguf
from mambakit.lm.model import MambaForCausalLM
from mambakit.lm.quantisation import quantise
from mambakit.lm.speed import SHAPES, Products, Speed, measure, random_model

PARTS = ("reading", "training", "decoding")
QUICK = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2}
FIRST = 8  # tokens that a peer reads before it goes on, which it does as fast from any length
READING_GOAL = 1.4  # times its matrix products
TRAINING_GOAL = Goal(100)
BOUND_GOAL = 0.7  # of what reading the weights allows
BATCH_GOAL = 4  # times the tokens a second of one row
# How we store weights, and what is nearest of llama.cpp.
WEIGHTS = {"float32": "f32", "bfloat16": "f16", "int8": "q8_0", "int4": None}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompt: int = 512
    new_tokens: int = 64
    turns: int = 5
    batches: tuple[int, ...] = (1, 8)


FULL, SMALL = Sizes(), Sizes(prompt=16, new_tokens=4, turns=1, batches=(1, 2))
Verdicts = list[tuple[bool, str]]


def reading(make: Callable[[], MambaForCausalLM], sizes: Sizes, folder: Path) -> tuple[Table, Verdicts, dict[str, Any]]:
    """The forward over a prompt: with the logits of its last position, which generation needs, and with all."""
    model = make()
    ids = torch.randint(model.config.vocab_size, (1, sizes.prompt))
    stock = stock_model(model, folder)
    last, whole = Products(model, 1, sizes.prompt), Products(model, 1, sizes.prompt, all_logits=True)
    runs: dict[str, Callable[[], object]] = {
        "its matrix products, last logits": last,
        "mambakit, last logits": lambda: model(ids, logits_to_keep=1),
        "its matrix products, all logits": whole,
        "mambakit, all logits": lambda: model(ids),
        "transformers, all logits": lambda: stock(ids, use_cache=False),
    }
    opened = llama(model, "f32", folder, sizes)
    if opened is not None:
        runs["llama.cpp f32, last logits"] = lambda: opened.read(ids[0].tolist())
    with torch.no_grad():
        found = take_turns(runs, Pace(turns=sizes.turns, turn_seconds=1e-6, budget_seconds=120))
    if opened is not None:
        opened.close()
    table, ours = _table("reading", "ms", "of its products", "ours is faster by"), {}
    for name, timing in found.items():
        kind = name.split(", ")[1]
        products, own = found[f"its matrix products, {kind}"].median, found[f"mambakit, {kind}"].median
        ours[kind] = own / products
        other = "" if name.startswith(("its", "mambakit")) else times(timing.median / own)
        table.add_row(name, f"{timing.median:,.1f}", f"{timing.median / products:.2f}x", other)
    verdicts = [
        (ratio <= READING_GOAL, f"a prompt of {sizes.prompt}, {kind}: {ratio:.2f}x its products ({READING_GOAL}x)")
        for kind, ratio in ours.items()
    ]
    if opened is None:
        table.add_row("llama.cpp", "not installed", "", "")
    return table, verdicts, {name: timing.median for name, timing in found.items()}


def training(shape: str, quick: bool, sizes: Sizes, folder: Path) -> tuple[Table, Verdicts, dict[str, Any]]:
    """A training step of one 24th of the model."""
    whole = SHAPES[shape] | (QUICK if quick else {})
    layers = whole["num_hidden_layers"]
    part = {**whole, "num_hidden_layers": 1, "vocab_size": -(-whole["vocab_size"] // layers // 8) * 8}
    model = random_model(shape, **part)
    ids = torch.randint(model.config.vocab_size, (1, sizes.prompt))
    stock = stock_model(model, folder)
    runs = {"mambakit": lambda: _training_step(model, ids)}
    if shape == "mamba-130m":
        runs["unbind loop"] = lambda: _with_unbind_loop(lambda: _training_step(model, ids))
    found = take_turns(runs, Pace(turns=sizes.turns, turn_seconds=1e-6))
    found["transformers (one run)"] = run_once(lambda: _training_step(stock, ids))
    table, own = (
        _table(f"training step, 1/{layers} of the model", "ms", "", "ours is faster by"),
        found["mambakit"].median,
    )
    for name, timing in found.items():
        table.add_row(name, f"{timing.median:,.1f}", "", "" if name == "mambakit" else times(timing.median / own))
    ratio = found["transformers (one run)"].median / own
    goal = f"training step at {sizes.prompt}: {times(ratio)} as fast as transformers ({TRAINING_GOAL})"
    return table, [(TRAINING_GOAL.met(ratio), goal)], {name: timing.median for name, timing in found.items()}


def decoding(
    make: Callable[[], MambaForCausalLM], sizes: Sizes, folder: Path
) -> tuple[Table, Verdicts, dict[str, Any]]:
    """Tokens one after another, in every way of storing weights, beside llama.cpp's nearest and transformers."""
    model = make()
    ids = torch.randint(model.config.vocab_size, (1, sizes.prompt))
    table = _table("decoding", "batch", "first token ms", "tokens/s", "reading allows", "share", "MB", "peak MB")
    verdicts: Verdicts = []
    record: dict[str, Any] = {}
    for weights, type in WEIGHTS.items():
        opened = None if type is None else llama(model, type, folder, sizes)
        peers: list[float] = []
        found: list[Speed] = []
        for batch in sizes.batches:
            print(f"decoding, {weights}, batch {batch} ...", file=sys.stderr)
            # llama.cpp takes a turn after each of ours, on one row.
            turn = partial(_turn_of_llama, opened, ids, sizes, peers) if opened and batch == 1 else _nothing
            found.append(
                measure(
                    partial(_stored, model, weights),
                    weights,
                    batch,
                    prompt=sizes.prompt,
                    new_tokens=sizes.new_tokens,
                    turns=sizes.turns,
                    on_turn=turn,
                )
            )
        for speed in found:
            table.add_row(*_cells(speed))
            record[f"{weights}, batch {speed.batch}"] = speed.record()
        one = found[0]
        verdicts.append(
            (one.share_of_bound >= BOUND_GOAL, f"{weights}: {one.share_of_bound:.0%} of the bound ({BOUND_GOAL:.0%})")
        )
        gain = found[-1].tokens_per_second / one.tokens_per_second
        verdicts.append(
            (gain >= BATCH_GOAL, f"{weights}: batch {found[-1].batch} {times(gain)} one row ({BATCH_GOAL}x)")
        )
        if opened is not None:
            rate = 1 / statistics.median(peers)
            opened.close()
            table.add_row(f"llama.cpp {type}", "1", "", f"{rate:,.1f}", "", "", "", "")
            record[f"llama.cpp {type}"] = rate
            ratio = one.tokens_per_second / rate
            verdicts.append((ratio >= 1, f"{weights}: {times(ratio)} llama.cpp's {type}"))
    stock = stock_model(model, folder)
    rate = _rate_of_transformers(stock, ids, sizes.new_tokens)
    table.add_row("transformers", "1", "", f"{rate:,.1f}", "", "", "", "")
    return table, verdicts, record | {"transformers": rate}


def stock_model(model: MambaForCausalLM, folder: Path) -> torch.nn.Module:
    """transformers' own class with the same weights."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder / "stock", format="hf")
    return AutoModelForCausalLM.from_pretrained(folder / "stock").eval()


def llama(model: MambaForCausalLM, type: str, folder: Path, sizes: Sizes) -> Llama | None:
    """llama.cpp with the same weights; None where it is not installed."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return None
    write_gguf(folder / f"{type}.gguf", model, type)
    return Llama(folder / f"{type}.gguf", sizes.prompt + sizes.new_tokens)


def _training_step(model: torch.nn.Module, ids: Tensor) -> None:
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()


def _with_unbind_loop(run: Callable[[], None]) -> None:
    with _unbind_loop():
        run()


@contextmanager
def _unbind_loop() -> Any:
    """Our model with the plain loop in the place of our scan."""
    from mambakit.nn import mamba

    class Operations:
        causal_conv1d, linear = staticmethod(mamba.ops.causal_conv1d), staticmethod(mamba.ops.linear)

        @staticmethod
        def selective_scan(*tensors: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            u, A = tensors[0], tensors[2]
            return stepwise_scan(*tensors), u.new_zeros(u.shape[0], *A.shape)

    before, mamba.ops = mamba.ops, Operations  # type: ignore[assignment]
    try:
        yield
    finally:
        mamba.ops = before


def _stored(model: MambaForCausalLM, weights: str) -> MambaForCausalLM:
    return quantise(copy.deepcopy(model), weights)


def _turn_of_llama(opened: Llama, ids: Tensor, sizes: Sizes, seconds: list[float]) -> None:
    logits = opened.read(ids[0, :FIRST].tolist())
    for _ in range(sizes.new_tokens):
        start = time.perf_counter()
        logits = opened.step(int(logits.argmax()))
        seconds.append(time.perf_counter() - start)


@torch.no_grad()
def _rate_of_transformers(stock: Any, ids: Tensor, new_tokens: int) -> float:
    cache = stock(ids[:, :FIRST], use_cache=True).cache_params
    token, seconds = ids[:, -1:], []
    for _ in range(new_tokens):
        start = time.perf_counter()
        token = stock(token, use_cache=True, cache_params=cache).logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)


def _nothing() -> None:
    pass


def _cells(speed: Speed) -> list[str]:
    return [
        f"mambakit {speed.weights}",
        str(speed.batch),
        f"{1e3 * speed.first_token_seconds:,.0f}",
        f"{speed.tokens_per_second:,.1f}",
        f"{speed.bound_tokens_per_second:,.1f}",
        f"{speed.share_of_bound:.0%}",
        f"{speed.weight_bytes / 1e6:,.0f}",
        "-" if speed.peak_bytes is None else f"{speed.peak_bytes / 1e6:,.0f}",
    ]


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def main() -> None:
    """Print the tables and what of the goals is met."""
    options = _options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(width=None if Console().is_terminal else 120)
    sizes, changes = (SMALL, QUICK) if options.quick else (FULL, {})
    asked = {"prompt": options.prompt, "turns": options.turns}
    sizes = replace(sizes, **{name: number for name, number in asked.items() if number})

    def make() -> MambaForCausalLM:
        return random_model(options.shape, **changes)

    console.print(", ".join(f"{name} {fact}" for name, fact in machine.describe().items()), highlight=False)
    console.print(f"{options.shape}, prompt {sizes.prompt}, load average {machine.load_average()}", highlight=False)
    verdicts: Verdicts = []
    record: dict[str, Any] = {"machine": machine.describe(), "shape": options.shape, "quick": options.quick}
    for part in PARTS:
        if options.only not in (None, part):
            continue
        with tempfile.TemporaryDirectory() as name:
            if part == "training":
                table, found, record[part] = training(options.shape, options.quick, sizes, Path(name))
            else:
                run = reading if part == "reading" else decoding
                table, found, record[part] = run(make, sizes, Path(name))
        console.print(table)
        verdicts += found
    if options.quick:
        verdicts = []  # the goals are those of the whole size
    for passed, sentence in verdicts:
        console.print(f"{'PASS' if passed else 'FAIL'}  {sentence}", highlight=False)
    console.print(f"load average {machine.load_average()} at the end", highlight=False)
    if options.json:
        record["verdicts"] = [{"passed": passed, "what": sentence} for passed, sentence in verdicts]
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="mamba-130m")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--prompt", type=int, help=f"tokens that are read, {FULL.prompt} where the goals are named")
    parser.add_argument("--turns", type=int, help=f"of whose times the medians are shown, {FULL.turns}")
    parser.add_argument("--quick", action="store_true", help="a small model and a turn each")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure to FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
