"""Windows or whole sequences, one symbol or all of them: what each way of training a forecaster gains, and takes.

    python -m benchmarks.forecast_modes --workers 16 --json modes.json
    python -m benchmarks.forecast_modes --symbols AAPL,IBM --methods sequence,windows --part test

On the built-in prices, and on the 20 series of skfolio where that is installed (pip install --no-deps skfolio; its
prices are for tests and examples). The symbols of the two sources are kept apart, AAPL and AAPL-SKF: pooled models
learn from one source at a time.

The CRPS, twice the mean pinball loss of the quantiles on log returns, is divided by that of a random walk with constant
volatility; the part is the validation part, by which methods are chosen, unless the test part is asked for. On the
validation part the trained models have the advantage that it stopped and shrank them.

    ewma        drift, today's volatility times the square root of time, empirical quantiles
    untrained   the network before its first step: the volatility returns to its mean
    sequence    one model a symbol, a loss at every day
    windows     one model a symbol, a loss at the end of every window
    pooled      one model for all symbols of a source, by sequences
    unseen      as pooled, for a symbol that the model has not met: it was trained on the others of its half
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.prices import all_names, is_skfolio, read_series

METHODS = ("ewma", "untrained", "sequence", "windows", "pooled", "unseen")


@dataclass(frozen=True)
class Result:
    """One method on one symbol."""

    symbol: str
    method: str
    crps: list[float]  # at each horizon, over that of the random walk with constant volatility
    coverage_80: list[float]
    seconds: float  # of its training; of a pooled model, its share


def score(prepared, part, quantiles):
    """CRPS over the random walk's, and 80% coverage, at each horizon, of quantiles (samples, horizons, levels)."""
    import numpy as np

    from mambakit.forecast.config import QUANTILES

    returns = prepared.returns[part]
    deviation = prepared.returns[prepared.split.training].std(axis=0)
    from scipy.stats import norm

    walk = np.broadcast_to(deviation[:, None] * norm.ppf(QUANTILES), quantiles.shape)

    def crps(values):
        error = returns[..., None] - values
        levels = np.array(QUANTILES)
        return 2 * np.maximum(levels * error, (levels - 1) * error).mean(axis=(0, 2))

    low, high = (quantiles[..., QUANTILES.index(level)] for level in (0.1, 0.9))
    return (crps(quantiles) / crps(walk)).tolist(), ((low <= returns) & (returns <= high)).mean(axis=0).tolist()


def run(job) -> list[Result]:
    """One job: a method, the symbols that are trained together, those that are judged, and the settings."""
    method, symbols, judged, part_name, epochs, preset = job
    import numpy as np
    import torch

    from mambakit.forecast.config import QUANTILES, MambaConfig, default_training, pooled_training
    from mambakit.forecast.dataset import prepare_series
    from mambakit.forecast.pooled import prepare_pooled, prepare_unmet, train_pooled
    from mambakit.forecast.train import forecast_samples, train_prepared, untrained_model

    torch.set_num_threads(1)
    config = MambaConfig.preset(preset, training_mode="windows" if method == "windows" else "sequence")
    series = {symbol: read_series(symbol) for symbol in sorted({*symbols, *judged})}
    settings = default_training(config.training_mode, preset)
    if method in ("pooled", "unseen"):
        settings = pooled_training(config.training_mode, preset)
    if epochs is not None:
        settings = settings.model_copy(update={"epochs": epochs})
    started = time.perf_counter()
    if method in ("pooled", "unseen"):
        pool = prepare_pooled([series[symbol] for symbol in symbols], config)
        trained = train_pooled(pool, settings, quiet=True)
        seconds = (time.perf_counter() - started) / len(judged)
        results = []
        for symbol in judged:
            name = series[symbol].symbol
            met = name in trained.symbols
            prepared = pool[trained.symbols.index(name)] if met else prepare_unmet(series[symbol], pool)
            part = getattr(prepared.split, part_name)
            number = trained.symbols.index(name) + 1 if met else 0
            forecast = forecast_samples(trained.model, prepared.part(part), number)
            results.append(Result(symbol, method, *score(prepared, part, forecast.quantiles.numpy()), seconds))
        return results
    (symbol,) = symbols
    prepared = prepare_series(series[symbol], config)
    part = getattr(prepared.split, part_name)
    if method == "ewma":
        known = prepared.split.training
        drift = prepared.returns[known].mean(axis=0)
        scale = prepared.volatility[prepared.origins][:, None] * np.sqrt(config.prediction_horizons)
        shape = np.quantile((prepared.returns[known] - drift) / scale[known], QUANTILES, axis=0).T
        quantiles = drift[:, None] + scale[part][..., None] * shape
    elif method == "untrained":
        quantiles = forecast_samples(untrained_model(prepared, 0), prepared.part(part)).quantiles.numpy()
    else:
        trained_alone = train_prepared(prepared, settings, quiet=True)
        quantiles = forecast_samples(trained_alone.model, prepared.part(part)).quantiles.numpy()
    return [Result(symbol, method, *score(prepared, part, quantiles), time.perf_counter() - started)]


def jobs(symbols: Sequence[str], methods: Sequence[str], part: str, epochs: int | None, preset: str) -> list[tuple]:
    """What to do, the longest first."""
    rest = (part, epochs, preset)
    sources = [[symbol for symbol in symbols if is_skfolio(symbol) is skfolio] for skfolio in (False, True)]
    made = []
    for source in sources:
        if "pooled" in methods and source:
            made.append(("pooled", source, source, *rest))
        if "unseen" in methods and len(source) > 1:
            halves = source[::2], source[1::2]
            made += [("unseen", half, other, *rest) for half, other in (halves, halves[::-1])]
    for method in ("windows", "sequence", "untrained", "ewma"):
        if method in methods:
            made += [(method, [symbol], [symbol], *rest) for symbol in symbols]
    return made


def table(results: Sequence[Result], methods: Sequence[str]) -> str:
    """Means over the symbols of each source, a method a line."""
    import numpy as np

    lines = []
    for title, skfolio in (("built-in", False), ("skfolio", True)):
        own = [result for result in results if is_skfolio(result.symbol) is skfolio]
        if not own:
            continue
        horizons = len(own[0].crps)
        lines.append(f"{title}, {len({result.symbol for result in own})} symbols: CRPS over the random walk's at each")
        lines.append("horizon and their mean; 80% coverage; the mean of |coverage - 80%|; seconds a symbol")
        for method in methods:
            rows = [result for result in own if result.method == method]
            if not rows:
                continue
            crps, cover = (np.array([getattr(row, name) for row in rows]) for name in ("crps", "coverage_80"))
            cells = [f"{value:.4f}" for value in (*crps.mean(axis=0), crps.mean())]
            cells += [f"{value:.1%}" for value in cover.mean(axis=0)] + [f"{np.abs(cover - 0.8).mean():.1%}"]
            seconds = np.mean([row.seconds for row in rows])
            lines.append(f"  {method:<10}" + " ".join(f"{cell:>7}" for cell in cells) + f" {seconds:>8.1f}")
        assert horizons
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symbols", help="such as AAPL,XOM-SKF; all there are by default")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes")
    parser.add_argument("--part", choices=("validation", "test"), default="validation")
    parser.add_argument("--epochs", type=int, help="at most; by default those of each method")
    parser.add_argument("--preset", default="default", help="sizes of the model")
    parser.add_argument("--json", type=Path, help="also write every result to this file")
    options = parser.parse_args(arguments)
    symbols = options.symbols.split(",") if options.symbols else all_names()
    methods = options.methods.split(",")
    unknown = [name for name in symbols if name not in all_names()] + [name for name in methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; symbols are {', '.join(all_names())}")
    made = jobs(symbols, methods, options.part, options.epochs, options.preset)
    results: list[Result] = []
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for done, some in enumerate(pool.imap_unordered(run, made), start=1):
            results += some
            for each in some:
                ratio = sum(each.crps) / len(each.crps)
                line = f"{done}/{len(made)} {each.method} {each.symbol}: CRPS {ratio:.4f}, {each.seconds:.1f} s"
                print(line, file=sys.stderr, flush=True)
    print(table(results, methods))
    if options.json is not None:
        content = {"part": options.part, "preset": options.preset, "results": [asdict(each) for each in results]}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
