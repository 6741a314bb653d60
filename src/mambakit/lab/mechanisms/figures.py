"""Figures of what goes on inside a model: each takes what this package computes, and returns a matplotlib Figure.

`mambakit.lab.figures.save` writes them as SVG or PNG.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from mambakit.errors import DataError
from mambakit.lab.figures import COLOURS, INK, QUIET, as_array, heat_map, in_style, panels, token_ticks
from mambakit.lab.mechanisms.attribution import Attribution

_MOST_PANELS = 12
_ACROSS = 4  # panels in a row


@in_style
def draw_mixing(
    matrices: Tensor, *, tokens: Sequence[str] | None = None, titles: Sequence[str] | None = None
) -> Figure:
    """Token-mixing matrices ("hidden attention"), a panel each: what position i, a row, receives from j, a column.

    Args:
        matrices: (length, length) or (panels, length, length), of one sequence: `cache["layers.0.mixer.mixing"][0]`.
        tokens: what stands at each position.
        titles: of the panels; None numbers them as heads.
    """
    values = as_array(matrices)
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[1] != values.shape[2] or not 1 <= len(values) <= _MOST_PANELS:
        raise DataError(
            f"matrices must be (panels, length, length), up to {_MOST_PANELS} of them, got {values.shape}: choose heads"
        )
    titles = _titles(titles, len(values), "head")
    across = min(_ACROSS, len(values))
    rows, length = -(-len(values) // across), values.shape[1]
    size = 3.6 if across == 1 else 2.5 if across == 2 else 2.0
    figure, axes = panels(rows, across, width=size * across + 0.9, height=size * rows + 0.45)
    limit = float(np.abs(values).max())
    future = np.triu(np.ones((length, length), dtype=bool), 1)
    for index, panel in enumerate(axes):
        if index >= len(values):
            panel.set_visible(False)
            continue
        last = index == len(values) - 1
        shown = np.ma.masked_array(values[index], mask=future)
        heat_map(panel, shown, signed=True, limit=limit, label="weight" if last else None)
        panel.set_aspect("equal")
        panel.set_facecolor("#EEEEEE")
        panel.set_title(titles[index])
        token_ticks(panel, tokens, length, along="xy")
        if index // across == rows - 1 or index + across >= len(values):
            panel.set_xlabel("from position j")
        if index % across == 0:
            panel.set_ylabel("to position i")
    return figure


@in_style
def draw_delta(traces: Mapping[int, Tensor], *, tokens: Sequence[str] | None = None) -> Figure:
    """The step at every position, a panel a layer: each head or channel a thin line, their median a thick one.

    Args:
        traces: (length, heads or channels) of one sequence by layer: `{i: t[0] for i, t in delta_trace(...).items()}`.
        tokens: what stands at each position.
    """
    if not traces:
        raise DataError("traces are empty: the model has no layer with a step")
    figure, axes = panels(len(traces), 1, height=1.1 + 1.25 * len(traces), sharex=True)
    for panel, (layer, trace) in zip(axes, traces.items(), strict=True):
        values = as_array(trace)
        if values.ndim != 2:
            raise DataError(f"the trace of layer {layer} must be (length, heads) of one sequence, got {values.shape}")
        positions = np.arange(len(values))
        opacity = max(0.08, min(0.5, 4 / values.shape[1]))
        lines = panel.plot(positions, values, color=COLOURS[4], linewidth=0.7, alpha=opacity)
        lines[0].set_label("each head or channel")
        panel.plot(positions, np.median(values, axis=1), color=COLOURS[0], marker="o", markersize=3, label="median")
        panel.set_yscale("log")
        panel.set_title(f"layer {layer}")
        panel.set_ylabel("delta")
        token_ticks(panel, tokens, len(values), along="x")
    axes[-1].set_xlabel("position" if tokens is None else "token")
    key = axes[0].legend(ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)
    for handle in key.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    return figure


@in_style
def draw_logit_lens(lens: Tensor, *, tokens: Sequence[str] | None = None, names: Sequence[str] | None = None) -> Figure:
    """What the model would say after each layer: the likeliest output in each cell, its probability as the colour.

    Args:
        lens: (layers + 1, length, outputs) of one sequence: `logit_lens(...)[:, 0]`.
        tokens: what stands at each position.
        names: of the outputs; None shows their numbers.
    """
    logits = as_array(lens)
    if logits.ndim != 3:
        raise DataError(f"lens must be (layers + 1, length, outputs) of one sequence, got {logits.shape}")
    layers, length, _ = logits.shape
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    best, likeliest = logits.argmax(-1), share.max(-1)
    figure, (panel,) = panels(width=max(4.0, 1.6 + 0.52 * length), height=1.3 + 0.36 * layers)
    heat_map(panel, likeliest[::-1], signed=False, limit=1.0, label="probability")
    for layer in range(layers):
        for position in range(length):
            word = str(best[layer, position]) if names is None else names[best[layer, position]]
            light = likeliest[layer, position] < 0.55
            place = (position, layers - 1 - layer)
            panel.annotate(word, place, ha="center", va="center", fontsize=7.5, color="white" if light else "black")
    rows = ["embedded", *(f"layer {layer}" for layer in range(layers - 1))]
    panel.set_yticks(range(layers), rows[::-1])
    token_ticks(panel, tokens, length, along="x")
    panel.set_xlabel("position" if tokens is None else "token")
    return figure


@in_style
def draw_attribution(attribution: Attribution, *, example: int = 0, names: Sequence[str] | None = None) -> Figure:
    """What each part adds to a logit, as bars, and their sum.

    Args:
        attribution: of `logit_attribution` or `source_attribution`.
        example: which of the batch.
        names: what to call the parts; None leaves their own names.
    """
    values = as_array(attribution.values)[example]
    labels = list(_titles(names, len(values), "")) if names is not None else list(attribution.parts)
    total = float(as_array(attribution.total)[example])
    figure, (panel,) = panels(height=0.9 + 0.24 * (len(values) + 1))
    heights = np.arange(len(values) + 1)
    colours = [COLOURS[5] if value > 0 else COLOURS[0] for value in values] + [QUIET]
    panel.barh(heights, [*values, total], color=colours, height=0.7)
    panel.axvline(0.0, color=INK, linewidth=0.8)
    panel.set_yticks(heights, [*labels, "sum"])
    panel.invert_yaxis()
    panel.grid(False, axis="y")
    panel.set_xlabel("added to the logit")
    for height, value in zip(heights, [*values, total], strict=True):
        side = 3 if value >= 0 else -3
        panel.annotate(
            f"{value:+.2f}" if abs(value) >= 0.005 else "0",
            (value, height),
            (side, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=7.5,
            color=QUIET,
        )
    panel.margins(x=0.12)
    return figure


@in_style
def draw_taps(cosines: Mapping[int, Tensor]) -> Figure:
    """The cosine between each two taps of the convolutions, a panel a layer.

    Args:
        cosines: (d_conv, d_conv) by layer: `tap_cosine(model)`.
    """
    if not 1 <= len(cosines) <= _MOST_PANELS:
        raise DataError(f"cosines must be of 1 to {_MOST_PANELS} layers, got {len(cosines)}")
    across = min(_ACROSS, len(cosines))
    rows = -(-len(cosines) // across)
    figure, axes = panels(rows, across, width=1.9 * across + 0.9, height=1.9 * rows + 0.5)
    for panel in axes[len(cosines) :]:
        panel.set_visible(False)
    for index, (panel, (layer, cosine)) in enumerate(zip(axes, cosines.items(), strict=False)):
        values = as_array(cosine)
        heat_map(panel, values, signed=True, limit=1.0, label="cosine" if index == len(cosines) - 1 else None)
        panel.set_aspect("equal")
        for (i, j), value in np.ndenumerate(values):
            strong = "white" if abs(value) > 0.6 else INK
            panel.annotate(f"{value:.2f}", (j, i), ha="center", va="center", fontsize=7, color=strong)
        ages = [f"t-{age}" if age else "t" for age in range(len(values) - 1, -1, -1)]
        panel.set_xticks(range(len(values)), ages, fontsize=7.5)
        panel.set_yticks(range(len(values)), ages, fontsize=7.5)
        panel.set_title(f"layer {layer}")
    return figure


@in_style
def draw_patching(
    names: Sequence[str], effects: Tensor, *, tokens: Sequence[str] | None = None, label: str = "metric"
) -> Figure:
    """What patching each name, a row, at each position, a column, does to a metric.

    Args:
        names, effects: as `patching_effects` returns them.
        tokens: what stands at each position.
        label: of the metric.
    """
    values = as_array(effects)
    if values.ndim != 2 or len(values) != len(names):
        raise DataError(f"effects must be (names, length) with {len(names)} rows, got {values.shape}")
    figure, (panel,) = panels(width=max(5.0, 2.6 + 0.3 * values.shape[1]), height=1.3 + 0.3 * len(names))
    signed = bool((values < 0).any())
    heat_map(panel, values, signed=signed, label=label)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    token_ticks(panel, tokens, values.shape[1], along="x")
    panel.set_xlabel("patched position" if tokens is None else "patched token")
    return figure


def _titles(titles: Sequence[str] | None, count: int, word: str) -> Sequence[str]:
    if titles is None:
        return [f"{word} {index}" for index in range(count)] if count > 1 else [""]
    if len(titles) != count:
        raise DataError(f"titles or names must be {count}, one for each, got {len(titles)}")
    return titles
