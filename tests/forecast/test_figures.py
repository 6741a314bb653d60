"""The figures: their files, and the geometry of the fan."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from mambakit.forecast.charts import along_the_way
from mambakit.forecast.figures import draw_evaluation, draw_fan
from mambakit.forecast.predictor import forecast_series

PNG = b"\x89PNG\r\n\x1a\n"


def test_both_figures_are_png_files_with_something_in_them(trained, saved, tmp_path: Path) -> None:
    draw_fan(forecast_series(saved, trained.prepared.series), trained.prepared.series, tmp_path / "fan.png")
    draw_evaluation(trained, tmp_path / "evaluation.png")
    for name in ("fan.png", "evaluation.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 20_000  # an empty canvas of this size takes about 8,000 bytes


def test_the_fan_passes_through_every_forecast_and_starts_at_the_current_price(trained, saved) -> None:
    forecast = forecast_series(saved, trained.prepared.series)
    mean, quantiles = along_the_way(forecast.horizons, forecast.mean, forecast.quantiles, np.arange(31))
    np.testing.assert_allclose(mean[[1, 5, 10, 30]], forecast.mean)
    np.testing.assert_allclose(quantiles[[1, 5, 10, 30]], forecast.quantiles)
    assert mean[0] == 0.0
    assert not quantiles[0].any()


def test_the_quantiles_of_the_fan_never_cross(trained, saved) -> None:
    forecast = forecast_series(saved, trained.prepared.series)
    _, quantiles = along_the_way(forecast.horizons, forecast.mean, forecast.quantiles, np.arange(31))
    assert (np.diff(quantiles, axis=1) >= 0).all()


def test_drawing_leaves_the_global_state_of_pyplot_alone() -> None:
    code = "import sys; import mambakit.forecast.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
