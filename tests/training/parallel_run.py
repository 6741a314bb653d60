"""One of several processes of a data-parallel run; the first writes weights and history."""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file
from toy import squared_error, toy_model, training_data, validation_data

from mambakit.training import TrainingConfig, copy_weights, fit


def main(folder: Path, settings: str, resume: bool) -> None:
    model = toy_model()
    config = TrainingConfig.model_validate_json(settings)
    options = {"run_dir": folder / "run", "resume": resume, "quiet": True}
    record = fit(model, squared_error, training_data(), validation_data(), config, **options)
    state = PartialState()
    save_file(copy_weights(model), folder / f"weights-{state.process_index}.safetensors")
    if state.is_main_process:
        (folder / "history.json").write_text(json.dumps(record.history))
    state.wait_for_everyone()
    state.destroy_process_group()


main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume")
