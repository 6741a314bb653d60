"""Two processes that share each batch train as one process does."""

import json
import socket

import pytest
import torch
from safetensors.torch import load_file
from tests.training.toy import squared_error, toy_model, training_data, validation_data

from mambakit.training import TrainingConfig, copy_weights, fit

# 22 samples: the last batch of an epoch has one, so that a process goes without.
CONFIG = TrainingConfig(epochs=2, batch_size=7, learning_rate=0.05, clip_norm=0.5, gradient_accumulation=2)


def run_two_processes(start_script, folder, how):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        start_script("parallel_run.py", folder, CONFIG.model_dump_json(), how, RANK=rank, LOCAL_RANK=rank, **shared)
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one_does_and_resume(start_script, tmp_path):
    run_two_processes(start_script, tmp_path, "afresh")
    model = toy_model()
    record = fit(model, squared_error, training_data(), validation_data(), CONFIG, quiet=True)
    for rank in (0, 1):
        weights = load_file(tmp_path / f"weights-{rank}.safetensors")
        for name, weight in copy_weights(model).items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-9, atol=1e-12)
    history = json.loads((tmp_path / "history.json").read_text())
    for entry, entry_of_one in zip(history, record.history, strict=True):
        assert entry.pop("seconds") >= 0
        assert entry == pytest.approx({name: value for name, value in entry_of_one.items() if name != "seconds"})

    # As if the run had been killed after its first epoch.
    for path in sorted((tmp_path / "run" / "checkpoints" / "000002").iterdir()):
        path.unlink()
    first = load_file(tmp_path / "weights-0.safetensors")
    run_two_processes(start_script, tmp_path, "resume")
    second = load_file(tmp_path / "weights-0.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
