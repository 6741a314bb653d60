"""The settings that a run begins with: `paper`, those that were published, and `mini`, for two cores and minutes.

A mini shows the effect that the paper found, small; its numbers are not the paper's.
"""

from dataclasses import replace

from mambakit.errors import DataError
from mambakit.lab.experiment import Experiment, ModelSettings, TrainingSettings
from mambakit.lab.tasks import (
    TASKS,
    AssociativeRecall,
    CompositeFunctions,
    InductionHeads,
    InverseMatching,
    ModularArithmetic,
    Parity,
    SelectiveCopying,
)

# arXiv 2509.17514: 1e-5 to 2.5e-4 in 10 of 200 epochs, cosine to 1e-5.
_ACHILLES = TrainingSettings(epochs=200, batch_size=2048, learning_rate=2.5e-4, evaluation_batch=4096)

# A turn by pi needs steps near one: those of a language model, 0.001 to 0.1, learn it far later.
_NEAR_ONE = {"dt_min": 0.1, "dt_max": 1.0}

PAPER: dict[str, Experiment] = {
    "composite": Experiment(
        CompositeFunctions(), ModelSettings(gamma=1.0, n_layers=2, d_model=32, d_state=128), _ACHILLES
    ),
    "inverse": Experiment(
        InverseMatching(layers=2),
        ModelSettings(gamma=1.0, n_layers=2, d_model=128, d_state=128),
        replace(_ACHILLES, batch_size=1024),
    ),
    # arXiv 2312.00752, appendix E.1
    "selective-copying": Experiment(
        SelectiveCopying(length=4096),
        ModelSettings(mixer="mamba", n_layers=2, d_model=64, d_state=16),
        TrainingSettings(
            steps=400_000,
            batch_size=64,
            learning_rate=1e-4,
            start_rate=1e-4,
            final_rate=1e-4,
            warmup=0.0,
            weight_decay=0.0,
            evaluate_every=4_000,
            evaluation_batch=64,
        ),
    ),
    "induction": Experiment(
        InductionHeads(length=256),
        ModelSettings(mixer="mamba", n_layers=2, d_model=64, d_state=16),
        TrainingSettings(
            steps=25 * 8192,
            batch_size=8,
            learning_rate=1e-3,
            start_rate=1e-3,
            final_rate=1e-3,
            warmup=0.0,
            weight_decay=0.0,
            evaluate_every=8192,
            evaluation_batch=64,
        ),
    ),
    # arXiv 2312.04927; the rate is one of logspace(-4, -2, 4)
    "mqar": Experiment(
        AssociativeRecall(length=64, pairs=4),
        ModelSettings(mixer="mamba", n_layers=2, d_model=64, d_state=16),
        TrainingSettings(
            epochs=64,
            batch_size=256,
            learning_rate=2.15e-3,
            start_rate=0.0,
            final_rate=0.0,
            warmup=0.1,
            weight_decay=0.1,
            evaluation_batch=256,
        ),
    ),
    # arXiv 2603.15569, "3-40 -> 160" read as a curriculum; the rate is one of [1e-4, 1e-2]
    "parity": Experiment(
        Parity(first_longest=40, longest=160, unseen=256, stages=4),
        ModelSettings(mixer="mamba3", n_layers=1, d_model=64, d_state=64, headdim=16, mixer_options=_NEAR_ONE),
        TrainingSettings(steps=40_000, batch_size=256, learning_rate=1e-3, evaluate_every=1_000),
    ),
    "modular-arithmetic": Experiment(
        ModularArithmetic(first_longest=40, longest=160, unseen=256, stages=4),
        ModelSettings(mixer="mamba3", n_layers=1, d_model=64, d_state=64, headdim=16, mixer_options=_NEAR_ONE),
        TrainingSettings(steps=40_000, batch_size=256, learning_rate=1e-3, evaluate_every=1_000),
    ),
}

_MINI_TRAINING = TrainingSettings(
    steps=2_000, batch_size=256, learning_rate=3e-3, evaluate_every=200, evaluation_samples=512
)

MINI: dict[str, Experiment] = {
    "composite": Experiment(
        CompositeFunctions(high=51, samples_per_pair=4_000, tests_per_pair=100),
        ModelSettings(gamma=1.0, n_layers=2, d_model=32, d_state=32),
        replace(_MINI_TRAINING, steps=1_400, batch_size=128),
    ),
    "inverse": Experiment(
        InverseMatching(layers=2, training_samples=20_000, test_samples=500),
        ModelSettings(gamma=0.5, n_layers=2, d_model=64, d_state=32),
        replace(_MINI_TRAINING, steps=2_400, batch_size=64),
    ),
    "selective-copying": Experiment(
        SelectiveCopying(length=64, data_tokens=4, vocabulary=8),
        ModelSettings(mixer="mamba", n_layers=2, d_model=32, d_state=16),
        replace(_MINI_TRAINING, steps=1_500, batch_size=32),
    ),
    "induction": Experiment(
        InductionHeads(length=64, longest=1 << 14, test_samples=256),
        ModelSettings(mixer="mamba", n_layers=2, d_model=64, d_state=16),
        # It is exact at 64 tokens after some 1,400 steps; those that follow make its memory long.
        replace(_MINI_TRAINING, steps=4_500, batch_size=16, final_rate=3e-4, weight_decay=0.0, length_samples=32),
    ),
    "mqar": Experiment(
        AssociativeRecall(length=16, pairs=2, vocabulary=64, training_samples=0, test_samples=500),
        ModelSettings(mixer="mamba2", n_layers=2, d_model=64, d_state=64),
        replace(_MINI_TRAINING, steps=800, batch_size=128, learning_rate=5e-3),
    ),
    "parity": Experiment(
        # Asked for every prefix and led from 6 to 160 bits, it learns in a minute what it is lucky to learn otherwise.
        Parity(
            shortest=2,
            first_longest=6,
            longest=160,
            unseen=256,
            stages=20,
            stage_steps=90,
            test_samples=500,
            supervise="every",
        ),
        ModelSettings(
            mixer="mamba3",
            n_layers=1,
            d_model=32,
            d_state=16,
            headdim=16,
            mixer_options=_NEAR_ONE,
        ),
        replace(_MINI_TRAINING, steps=2_200, batch_size=32, length_samples=128),
    ),
    # Mod 2 from left to right: + 1 turns by pi and * 0 forgets; the second layer pairs a sign with its number.
    "modular-arithmetic": Experiment(
        ModularArithmetic(
            longest=21, unseen=41, modulus=2, precedence=False, stages=4, stage_steps=300, test_samples=500
        ),
        ModelSettings(
            mixer="mamba3",
            n_layers=2,
            d_model=32,
            d_state=16,
            headdim=16,
            mixer_options=_NEAR_ONE,
        ),
        replace(_MINI_TRAINING, batch_size=64),
    ),
}

PRESETS = {"paper": PAPER, "mini": MINI}


def preset(task: str, name: str = "mini") -> Experiment:
    """The preset `name` of a task; DataError where there is none."""
    if task not in TASKS:
        raise DataError(f"the task must be one of {', '.join(TASKS)}, got {task!r}")
    if name not in PRESETS:
        raise DataError(f"the preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name][task]
