"""The language-model commands as they are typed, from a text file to generated text."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from tests.cli.command_line import assert_one_line_error, command, environment, mambakit
from typer.testing import CliRunner

from mambakit.cli import app
from mambakit.errors import ArtefactError, DataError

pytest.importorskip("transformers")

SMALL = ["--d-model", "16", "--layers", "2", "--context", "32", "--learning-rate", "0.02", "--dropout", "0"]
LINE = "the quick brown fox jumps over the lazy dog.\n"


def here(*arguments: object) -> Result:
    """Run an lm command in this process: much sooner, and an error stays an exception."""
    return CliRunner().invoke(app, ["lm", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a model of it, and what training printed."""
    folder = tmp_path_factory.mktemp("lm")
    (folder / "text.txt").write_text(LINE * 200)
    done = mambakit("lm", "train", "--data", "text.txt", *SMALL, "--epochs", 6, cwd=folder, fresh=True)
    assert done.returncode == 0, done.stderr
    (folder / "train.txt").write_text(done.stdout)
    return folder


def test_train_learns_the_text_and_prints_what_it_held_out(made: Path) -> None:
    printed = (made / "train.txt").read_text()
    assert "training: epoch 6/6" in printed
    nats = float(printed.split(" nats/byte")[0].split()[-1])
    assert nats < 1.0, "log(256) is 5.5, and the text repeats one line"
    assert "stored as lm-model" in printed
    assert not (made / "lm-model.run").exists()


def test_transformers_opens_what_train_stored(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(made / "lm-model").eval()
    assert type(model).__module__.startswith("transformers")
    ids = AutoTokenizer.from_pretrained(made / "lm-model")("the quick brown fox jumps over", return_tensors="pt")
    assert model(**ids, labels=ids["input_ids"]).loss < 1.2


def test_eval_prints_what_train_printed(made: Path) -> None:
    done = here("eval", "--model", made / "lm-model", "--data", made / "text.txt", "--last", 0.1, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert f"{found['nats_per_byte']:.4f} nats/byte" in (made / "train.txt").read_text()
    shown = here("eval", "--model", made / "lm-model", "--data", made / "text.txt", "--last", 0.1)
    assert f"perplexity {found['perplexity']:.4f}" in shown.stdout
    assert "tokens/s" in shown.stdout


def test_eval_shows_what_fewer_bits_lose(made: Path) -> None:
    options = ["--model", made / "lm-model", "--data", made / "text.txt", "--last", 0.1]
    plain = json.loads(here("eval", *options, "--json").stdout)
    done = here("eval", *options, "--weights", "int8,bfloat16", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {**found, "weights": None, "tokens_per_second": 0} == {**plain, "weights": None, "tokens_per_second": 0}
    assert list(found["weights"]) == ["float32", "int8", "bfloat16"]
    sizes = [found["weights"][name]["bytes_of_weights"] for name in ("int8", "bfloat16", "float32")]
    assert sizes == sorted(set(sizes))
    for name in ("int8", "bfloat16"):
        assert 0 < abs(found["weights"][name]["perplexity"] / plain["perplexity"] - 1) < 0.02
    shown = here("eval", *options, "--weights", "int8").stdout
    assert f"{found['weights']['int8']['perplexity']:.4f}" in shown
    assert isinstance(here("eval", *options, "--weights", "int8,int5").exception, DataError)


def test_generate_from_weights_of_8_bits_goes_on_as_the_text_does(made: Path) -> None:
    options = ["--model", made / "lm-model", "--max-new-tokens", 40, "--temperature", 0, "--quiet"]
    whole, fewer = (here("generate", "the quick", *options, *more).stdout for more in ([], ["--weights", "int8"]))
    assert whole[:20] == fewer[:20]
    with_dtype = here("generate", "the", *options, "--weights", "int8", "--dtype", "bfloat16")
    assert isinstance(with_dtype.exception, DataError)


def test_generate_goes_on_as_the_text_does_and_draws_by_the_seed(made: Path) -> None:
    options = ["--model", made / "lm-model", "--max-new-tokens", 40]
    done = mambakit("lm", "generate", "the quick brown fox ju", *options, "--temperature", 0, cwd=made)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the quick brown fox ju")
    assert "tokens read and made" in done.stderr
    drawn = [
        here("generate", "the", *options, "--quiet", "--temperature", 3, "--seed", seed).stdout for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    stopped = here("generate", "the quick", *options, "--temperature", 0, "--stop", " ", "--quiet").stdout
    assert " " not in stopped


def test_a_saved_state_is_gone_on_from(made: Path, tmp_path: Path) -> None:
    likeliest = ["--model", made / "lm-model", "--temperature", 0, "--quiet", "--max-new-tokens"]
    whole = here("generate", "the quick brown", *likeliest, 20).stdout
    assert here("generate", "the quick", *likeliest, 0, "--save-state", tmp_path / "s").exit_code == 0
    assert here("generate", " brown", *likeliest, 20, "--state", tmp_path / "s").stdout == whole


@pytest.mark.parametrize("format", ["state-spaces", "state-spaces-bin", "hf"])
def test_convert_keeps_the_model_and_its_tokenizer(format: str, made: Path, tmp_path: Path) -> None:
    done = here("convert", made / "lm-model", tmp_path / "other", "--format", format)
    assert done.exit_code == 0, done.output
    results = [
        here("eval", "--model", folder, "--data", made / "text.txt", "--last", 0.05, "--json").stdout
        for folder in (made / "lm-model", tmp_path / "other")
    ]
    first, second = (json.loads(result)["nats_per_token"] for result in results)
    assert first == second
    assert isinstance(here("convert", made / "lm-model", tmp_path / "other").exception, ArtefactError)


def test_bench_prints_speed_beside_its_floor_and_writes_it(made: Path, tmp_path: Path) -> None:
    sizes = ["--prompt", 8, "--new-tokens", 2, "--turns", 1, "--batch", "1,2", "--weights", "float32,bfloat16"]
    done = here("bench", made / "lm-model", *sizes, "--json", tmp_path / "speed.json")
    assert done.exit_code == 0, done.output
    runs = json.loads((tmp_path / "speed.json").read_text())["runs"]
    assert [(run["weights"], run["batch"]) for run in runs] == [
        ("float32", 1),
        ("float32", 2),
        ("bfloat16", 1),
        ("bfloat16", 2),
    ]
    assert "memory read at" in done.stdout
    for wrong in (["--batch", "0"], ["--batch", "x"], ["--shape", "mamba-130m"]):
        assert here("bench", made / "lm-model", *wrong).exit_code == 2
    assert here("bench").exit_code == 2
    assert isinstance(here("bench", made / "lm-model", "--weights", "int2").exception, DataError)


def test_convert_writes_the_file_of_llama_with_the_tokenizer(made: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    done = here("convert", made / "lm-model", "--to", "gguf", "--type", "q8_0", "--out", file)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{file}: gguf, q8_0, ")
    assert len(done.stdout.splitlines()) == 1, "nothing is lost"
    fields = gguf.GGUFReader(file).fields
    assert fields["general.architecture"].contents() == "mamba"
    assert fields["tokenizer.ggml.tokens"].contents()[256] == "<|endoftext|>"
    (made / "lm-model" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        bare = here("convert", made / "lm-model", tmp_path / "bare.gguf", "--to", "gguf")
    finally:
        (tmp_path / "tokenizer.json").rename(made / "lm-model" / "tokenizer.json")
    assert "without a vocabulary" in bare.stdout.splitlines()[1]
    assert isinstance(here("convert", made / "lm-model", file, "--to", "gguf").exception, ArtefactError)
    wrong = here("convert", made / "lm-model", tmp_path / "x", "--to", "gguf", "--type", "q4_k")
    assert isinstance(wrong.exception, DataError)
    for refused in (["--to", "hf", "--type", "f16"], ["--to", "gguf", "--dtype", "float16"], ["--out", "y"]):
        assert here("convert", made / "lm-model", tmp_path / "x", *refused).exit_code == 2
    assert here("convert", made / "lm-model").exit_code == 2


@pytest.mark.parametrize("mixer", ["mamba3", "attention", "mamba2,attention"])
def test_other_mixers_and_a_trained_tokenizer_train_too(mixer: str, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    options = ["--data", made / "text.txt", "--out", out, "--mixer", mixer, "--tokenizer", 280, "--epochs", 1, "-q"]
    done = here("train", *options, *SMALL)
    assert done.exit_code == 0, done.output
    assert here("generate", "the", "--model", out, "--max-new-tokens", 3, "--seed", 1).exit_code == 0


def test_the_transformer_is_as_large_as_the_mamba() -> None:
    from mambakit.cli.lm.train import _model
    from mambakit.lm import MambaForCausalLM

    sizes = []
    for mixer in ("mamba", "attention"):
        with torch.device("meta"):
            model = MambaForCausalLM(_model(264, [mixer], 256, 6, None, 0.1))
        sizes.append(model.num_parameters())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_minutes_become_a_number_of_steps(made: Path, tmp_path: Path) -> None:
    done = here("train", "--data", made / "text.txt", "--out", tmp_path / "m", *SMALL, "--minutes", 0.02, "-q")
    assert done.exit_code == 0, done.output
    history = json.loads((tmp_path / "m" / "training.json").read_text())["training"]["history"]
    assert len(history) == 11


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_weights_of_an_uninterrupted_one(made: Path, tmp_path: Path) -> None:
    options = ["lm", "train", "--data", made / "text.txt", *SMALL, "--epochs", 12]
    assert mambakit(*options, "--out", "whole", cwd=tmp_path).returncode == 0
    killed = subprocess.Popen(
        command(*options, "--out", "killed"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "killed.run" / "checkpoints" / "000002"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists(), "it was killed before its end"
    assert mambakit(*options, "--out", "killed", "--resume", cwd=tmp_path).returncode == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_train_one_model(made: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mambakit.cli", "lm"]
    options = ["train", "--data", str(made / "text.txt"), *SMALL, "--epochs", "1", "--out", "both"]
    done = subprocess.run(
        [*launch, *options], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("stored as both") == 1
    assert not (tmp_path / "both.run").exists()


def test_what_can_be_mended_is_said_in_one_line(made: Path, tmp_path: Path) -> None:
    done = mambakit("lm", "train", "--data", "absent.txt", cwd=tmp_path)
    assert_one_line_error(done, "absent.txt is not there")
    there = here("train", "--data", made / "text.txt", "--out", made / "lm-model")
    assert isinstance(there.exception, ArtefactError)
    assert isinstance(here("generate", "x", "--model", tmp_path).exception, ArtefactError)
    both = here("train", "--data", made / "text.txt", "--epochs", 1, "--minutes", 1)
    assert both.exit_code == 2
    unknown = here("train", "--data", made / "text.txt", "--out", tmp_path / "x", "--mixer", "lstm")
    assert isinstance(unknown.exception, DataError)
    for mixer in ("s4d", "mamba,mamba2"):
        unstorable = here("train", "--data", made / "text.txt", "--out", tmp_path / "x", "--mixer", mixer).exception
        assert isinstance(unstorable, ArtefactError), "said before anything is trained"
        assert "mamba-ssm has one of" in str(unstorable)
        assert not (tmp_path / "x.run").exists()
    bad = here("train", "--data", made / "text.txt", "--precision", "int8")
    assert bad.exit_code == 2
    assert "--precision" in bad.output


def test_the_command_line_starts_without_the_libraries_of_the_room() -> None:
    heavy = ("transformers", "tokenizers", "peft", "trl", "datasets", "pandas", "accelerate")
    program = f"import sys; from mambakit.cli import app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
