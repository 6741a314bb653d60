"""Kills training runs with SIGKILL, resumes them, and reports as JSON how each one ended.

Each run is a fork of this process, which has loaded everything and started no thread: hundreds of runs take seconds.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from toy import squared_error, toy_model, training_data, validation_data

from mambakit.training import TrainingConfig, copy_weights, fit

CONFIG = TrainingConfig(epochs=3, batch_size=8, learning_rate=0.05)
# Between any two of these calls nothing changes on the disk.
DISK_CALLS = ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir")


def train(run_dir: Path, kill_at: int | None) -> int:
    """Run to the end, or to death at the moment number `kill_at`; returns how many moments there were."""
    moments = itertools.count(1)
    passed = 0

    def moment() -> None:
        nonlocal passed
        passed = next(moments)
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            moment()
            return call(*arguments, **options)

        return wrapper

    # Flushing guards against a power cut, which no signal is; here it would only take time.
    os.fsync = lambda descriptor: None
    for name in DISK_CALLS:
        setattr(os, name, counted(getattr(os, name)))
    model = toy_model(dropout=0.3)
    options = {"run_dir": run_dir, "resume": True, "quiet": True}
    record = fit(model, counted(squared_error), training_data(), validation_data(), CONFIG, **options)
    history = [{name: value for name, value in entry.items() if name != "seconds"} for entry in record.history]
    outcome = {"weights": save(copy_weights(model)).hex(), "history": history, "best_epoch": record.best_epoch}
    (run_dir / "outcome.json").write_text(json.dumps(outcome))
    return passed


def start(run_dir: Path, kill_at: int | None = None) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            (run_dir / "moments").write_text(str(train(run_dir, kill_at)))
            code = 0
        finally:
            os._exit(code)
    return process


def ended_well(process: int) -> bool:
    """Wait for a run; raises if it ended otherwise than well or by SIGKILL."""
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status != 0:
        raise RuntimeError(f"a run failed with status {status}")
    return True


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # What loads with the first step loads here once, and not in each fork.
    fit(toy_model(), squared_error, training_data(), validation_data(), CONFIG, quiet=True)
    chance = random.Random(0)

    def new(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    def outcome(run_dir: Path) -> Any:
        return json.loads((run_dir / "outcome.json").read_text())

    whole = new("whole")
    ended_well(start(whole))
    moments = int((whole / "moments").read_text())

    once = []
    for moment in range(1, moments + 1):
        run_dir = new(f"killed-at-{moment}")
        killed = not ended_well(start(run_dir, kill_at=moment))
        finished = ended_well(start(run_dir))
        once.append(killed and finished and outcome(run_dir) == outcome(whole))

    often = new("killed-often")
    kills = 0
    while not ended_well(start(often, kill_at=chance.randint(1, moments // 2))):
        kills += 1

    anytime = new("killed-at-any-time")
    for _ in range(5):
        process = start(anytime)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        ended_well(process)
    ended_well(start(anytime))

    leftovers = [path.name for path in folder.rglob(".*.part")]
    print(
        json.dumps(
            {
                "whole": outcome(whole),
                "equal_when_killed_at_each_moment": once,
                "equal_when_killed_often": outcome(often) == outcome(whole),
                "kills": kills,
                "equal_when_killed_at_any_time": outcome(anytime) == outcome(whole),
                "leftovers": leftovers,
            }
        )
    )


main(Path(sys.argv[1]))
