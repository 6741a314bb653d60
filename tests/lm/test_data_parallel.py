"""Two processes, as `accelerate launch` starts them, train one language model; each draws windows of its own."""

import socket
import subprocess
from pathlib import Path

import pytest
import torch
from tests.cli.command_line import command, environment

from mambakit.lm import MambaForCausalLM

OPTIONS = ["--d-model", "16", "--layers", "2", "--context", "32", "--learning-rate", "0.02", "--dropout", "0"]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_one_model_that_learns_the_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 200)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            command("lm", "train", "--data", "text.txt", *OPTIONS, "--epochs", 6),
            cwd=tmp_path,
            env={**environment(), **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    nats = float(outputs[0].split(" nats/byte")[0].split()[-1])
    assert nats < 1.0, "log(256) is 5.5, and the text repeats one line"
    assert MambaForCausalLM.from_pretrained(tmp_path / "lm-model").config.hidden_size == 16
