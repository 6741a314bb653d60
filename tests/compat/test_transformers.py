"""transformers' own models give the same under the stand-ins, and are served by them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.families import FAMILIES, WITHOUT_ATTENTION
from tests.compat.agreement import assert_same
from tests.compat.families import LENGTH, NEW

pytest.importorskip("transformers")

STEPS = {"causal_conv1d_update", "selective_state_update"}
OF_MAMBA_1 = {"causal_conv1d_fn", "selective_scan_fn", *STEPS}
OF_MAMBA_2 = {"causal_conv1d_fn", "mamba_chunk_scan_combined", *STEPS}
SERVED = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), OF_MAMBA_1),
    **dict.fromkeys(("mamba2", "bamba", "zamba2", "nemotron_h", "granitemoehybrid", "falcon_h1"), OF_MAMBA_2),
}


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.compat.families", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict]]:
    """What families.py computed for every family, before and after; the families share two processes."""
    folder = tmp_path_factory.mktemp("families")
    run(str(folder / "before"))
    run(str(folder / "after"), "--stand-ins")
    return {name: torch.load(folder / name, weights_only=True) for name in ("before", "after")}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers_alone(family: str, results: dict) -> None:
    before, after = results["before"][family], results["after"][family]
    assert before.keys() == after.keys()
    assert any("gradient" in name for name in before)
    for name in before:
        if name not in ("generated", "calls"):
            try:
                assert_same(after[name], before[name], 1e-4 if "gradient" in name else 1e-5)
            except AssertionError as wrong:
                raise AssertionError(f"{name}: {wrong}") from wrong


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_are_those_of_transformers_alone(family: str, results: dict) -> None:
    before, after = results["before"][family]["generated"], results["after"][family]["generated"]
    assert before.shape[1] == LENGTH + NEW
    assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_convolution_scan_and_steps_are_served(family: str, results: dict) -> None:
    assert results["before"][family]["calls"] == {}
    assert set(results["after"][family]["calls"]) == SERVED[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", WITHOUT_ATTENTION)
def test_packed_sequences_are_kept_apart(family: str, results: dict) -> None:
    together, alone = results["after"]["packed"][family]
    assert_same(together, alone, 1e-5)
