"""Figures hold what they were given, in the style's colours, and are written whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tests.lab.mechanism_models import LENGTH, Classifier, backbone, tokens

from mambakit.errors import DataError
from mambakit.lab.figures import COLOURS, save
from mambakit.lab.mechanisms import (
    delta_trace,
    logit_attribution,
    logit_lens,
    patching_effects,
    run_with_cache,
    tap_cosine,
)
from mambakit.lab.mechanisms.figures import (
    draw_attribution,
    draw_delta,
    draw_logit_lens,
    draw_mixing,
    draw_patching,
    draw_taps,
)

WORDS = list("abcdefg")


def pictures(figure: Figure) -> list[np.ma.MaskedArray]:
    return [image.get_array() for axes in figure.axes for image in axes.images]  # type: ignore[misc]


def words(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))}


def test_the_matrix_is_drawn_head_by_head_without_the_future() -> None:
    model, inputs = Classifier(backbone("mamba2")), tokens(1)
    matrix = run_with_cache(model, inputs, "layers.0.mixer.mixing")[1]["layers.0.mixer.mixing"][0]
    figure = draw_mixing(matrix, tokens=WORDS)
    shown = pictures(figure)
    assert len(shown) == 4
    for head, picture in enumerate(shown):
        np.testing.assert_allclose(picture.filled(0.0), matrix[head].detach().numpy())
        assert picture.mask.sum() == LENGTH * (LENGTH - 1) // 2
    assert {"head 0", "head 3", "from position j", "g"} <= words(figure)
    with pytest.raises(DataError, match="choose heads"):
        draw_mixing(torch.zeros(13, 4, 4))
    with pytest.raises(DataError, match="one for each of 7 positions, got 2"):
        draw_mixing(matrix, tokens=["a", "b"])


def test_delta_traces_are_drawn_layer_by_layer() -> None:
    traces = {layer: trace[0] for layer, trace in delta_trace(Classifier(backbone("mamba2")), tokens(1)).items()}
    figure = draw_delta(traces, tokens=WORDS)
    for axes, trace in zip(figure.axes, traces.values(), strict=True):
        median = axes.lines[-1]
        assert median.get_color() == COLOURS[0]
        np.testing.assert_allclose(median.get_ydata(), np.median(trace.detach().numpy(), axis=1))
        assert len(axes.lines) == 1 + 4
    with pytest.raises(DataError, match="no layer with a step"):
        draw_delta({})


def test_the_lens_shows_the_likeliest_output_of_each_layer() -> None:
    lens = logit_lens(Classifier(backbone("mamba2")), tokens(1))[:, 0]
    figure = draw_logit_lens(lens, tokens=WORDS)
    shares = lens.softmax(-1).amax(-1).detach().numpy()
    np.testing.assert_allclose(pictures(figure)[0], shares[::-1], rtol=1e-12)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == [str(int(best)) for best in lens.argmax(-1).flatten()]


def test_bars_of_an_attribution_end_with_their_sum() -> None:
    found = logit_attribution(Classifier(backbone("mamba2")), tokens(), 3)
    figure = draw_attribution(found, example=1)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(widths[:-1], found.values[1].detach().numpy())
    assert widths[-1] == pytest.approx(sum(widths[:-1]))
    assert {"embedded", "layers.1.mlp.output", "sum"} <= words(figure)
    with pytest.raises(DataError, match="one for each, got 1"):
        draw_attribution(found, names=["one"])


def test_taps_and_patches_are_drawn_as_given() -> None:
    model = Classifier(backbone("mamba2"))
    cosines = tap_cosine(model)
    shown = pictures(draw_taps(cosines))
    np.testing.assert_allclose(shown[1], cosines[1].detach().numpy())
    clean, other = tokens(1), tokens(1)
    _, cache = run_with_cache(model, clean, "layers.*.residual")
    names, effects = patching_effects(model, other, cache, "layers.*.residual", lambda logits: logits[0, 1])
    figure = draw_patching(names, effects, tokens=WORDS, label="logit")
    np.testing.assert_allclose(pictures(figure)[0], effects.numpy())
    assert {*names, "logit"} <= words(figure)


def test_files_hold_their_text_and_are_the_same_at_every_run(tmp_path: Path) -> None:
    matrix = torch.randn(2, 5, 5).tril()
    for name in ("one.svg", "two/one.svg", "one.png"):
        save(draw_mixing(matrix, titles=["first", "second"]), tmp_path / name)
    svg = (tmp_path / "one.svg").read_bytes()
    assert b"from position j" in svg
    assert svg == (tmp_path / "two" / "one.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="must end in"):
        save(draw_mixing(matrix), tmp_path / "one.jpg")
