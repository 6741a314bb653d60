"""The benchmark of language models runs whole, at a small size, and what it compares with computes the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.lm import QUICK, SMALL, _unbind_loop, llama, stock_model

from mambakit.lm.speed import random_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What a quick run printed, and its record."""
    record = tmp_path_factory.mktemp("lm") / "record.json"
    command = [sys.executable, "-m", "benchmarks.lm", "--quick", "--json", str(record)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(record.read_text())


def test_every_part_is_measured(ran: tuple[str, dict]) -> None:
    printed, record = ran
    assert {"reading", "training", "decoding"} <= set(record)
    assert record["reading"]["mambakit, last logits"] > 0
    assert {"mambakit", "unbind loop", "transformers (one run)"} <= set(record["training"])
    for weights in ("float32", "bfloat16", "int8", "int4"):
        assert record["decoding"][f"{weights}, batch 2"]["tokens_per_second"] > 0
    assert record["decoding"]["float32, batch 1"]["weight_bytes"] > record["decoding"]["int4, batch 1"]["weight_bytes"]
    assert "first token ms" in printed
    assert "PASS" not in printed, "the goals are those of the whole size"


def test_the_peers_compute_what_ours_computes(tmp_path: Path) -> None:
    model, ids = random_model("mamba-130m", **QUICK), torch.randint(256, (1, SMALL.prompt))
    with torch.no_grad():
        ours = model(ids).logits
        torch.testing.assert_close(stock_model(model, tmp_path)(ids).logits, ours, atol=1e-4, rtol=1e-4)
        with _unbind_loop():
            torch.testing.assert_close(model(ids).logits, ours, atol=1e-4, rtol=1e-4)


def test_llama_reads_and_steps_as_ours_does(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model, ids = random_model("mamba-130m", **QUICK), torch.randint(256, (1, SMALL.prompt))
    opened = llama(model, "f32", tmp_path, SMALL)
    assert opened is not None
    with torch.no_grad():
        whole = model(ids).logits[0]
    for _ in range(2):  # a prompt starts afresh
        read = torch.from_numpy(opened.read(ids[0, :-1].tolist()).copy())
        step = torch.from_numpy(opened.step(int(ids[0, -1])).copy())
        torch.testing.assert_close(read, whole[-2], atol=1e-3, rtol=0)
        torch.testing.assert_close(step, whole[-1], atol=1e-3, rtol=0)
    opened.close()


def test_the_loop_over_unbind_computes_what_the_models_of_transformers_compute() -> None:
    from benchmarks.compat import both, forward, training_step

    models, ids = both("mamba", 32, 8), torch.randint(2, 30, (2, 9))
    assert list(models) == ["alone", "unbind", "served"]
    for run in (forward, training_step):
        for model in models.values():
            run(model, ids)
    alone, looped = (dict(models[name].named_parameters()) for name in ("alone", "unbind"))
    for name, parameter in alone.items():
        torch.testing.assert_close(looped[name].grad, parameter.grad, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        found = [model.eval()(ids, use_cache=False).logits for model in models.values()]
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], atol=1e-4, rtol=1e-3)
