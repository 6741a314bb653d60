"""The data side as its first users wrote it down: the same calls, line by line, on the built-in prices."""

import asyncio

import numpy as np

from mambakit.forecast import (
    DataAugmentor,
    SequenceGenerator,
    TimeSeriesFeatureEngineer,
    fetch_historical_prices,
    validate_data_quality,
)


async def pipeline() -> tuple[np.ndarray, dict[int, np.ndarray], np.ndarray, dict[int, np.ndarray]]:
    prices = await fetch_historical_prices(["AAPL"], days=2000)

    is_valid, msg = validate_data_quality(prices["AAPL"])
    assert is_valid, msg

    prices = prices["AAPL"]
    is_valid, message = validate_data_quality(prices, min_samples=100, max_missing_ratio=0.05)
    if not is_valid:
        print(f"Data quality issue: {message}")

    engineer = TimeSeriesFeatureEngineer(windows=[5, 10, 20, 60], include_volume=False)

    features = engineer.extract_features(prices)

    generator = SequenceGenerator(
        sequence_length=60,  # 60-day lookback
        prediction_horizons=[1, 5, 10, 30],
        stride=1,  # Sliding window step
    )

    X, y = generator.generate_sequences(features, prices)

    augmentor = DataAugmentor(augmentation_rate=0.5)

    X_aug, y_aug = augmentor.augment(X, y)
    return X, y, X_aug, y_aug


def test_the_steps_from_prices_to_augmented_samples_run_as_written(capsys) -> None:
    X, y, X_aug, y_aug = asyncio.run(pipeline())
    assert capsys.readouterr().out == ""
    samples = 2000 - 60 - 59 - 30  # the warm-up, the first window, the longest horizon
    assert X.shape == (samples, 60, 32)
    assert {horizon: target.shape for horizon, target in y.items()} == dict.fromkeys((1, 5, 10, 30), (samples, 1))
    assert X_aug.shape == X.shape
    assert list(y_aug) == list(y)
    assert np.isfinite(X_aug).all()
    assert 0.4 < (X_aug != X).any(axis=(1, 2)).mean() < 0.6
