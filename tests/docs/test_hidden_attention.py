"""The interactive figure of the guide's chapter on induction heads: its JavaScript computes what the library does."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mambakit.lab import mechanisms
from mambakit.nn import Backbone

SCRIPT = Path(__file__).parents[2] / "docs" / "guide" / "hidden_attention.js"
NODE = shutil.which("node")
WIDTH, SYMBOLS = 16, 12

pytestmark = pytest.mark.skipif(NODE is None, reason="Node is not installed")


class Speller(nn.Module):
    """A small language model with weights that no step of the forward leaves without a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.backbone = Backbone(WIDTH, 2, "mamba2", {"headdim": 8, "d_state": 4})
        self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(self.embedding(tokens))[0])


def exported(model: Speller) -> dict:
    """The model as the chapter writes it into its page."""
    arrays = {
        "embedding": model.embedding.weight,
        "norm_f": model.backbone.norm_f.weight,
        "head": model.head.weight,
    }
    for index, layer in enumerate(model.backbone.layers):
        mixer = layer.mixer
        arrays |= {
            f"{index}.norm": layer.norm.weight,
            f"{index}.in_proj": mixer.in_proj.weight,
            f"{index}.conv": mixer.conv1d.weight,
            f"{index}.conv_bias": mixer.conv1d.bias,
            f"{index}.dt_bias": mixer.dt_bias,
            f"{index}.A_log": mixer.A_log,
            f"{index}.D": mixer.D,
            f"{index}.gate_norm": mixer.norm.weight,
            f"{index}.out_proj": mixer.out_proj.weight,
        }
    flat = {name: parameter.detach().numpy().astype("<f4").ravel() for name, parameter in arrays.items()}
    tensors, start = {}, 0
    for name, array in flat.items():
        tensors[name] = [start, len(array)]
        start += len(array)
    return {
        "layers": 2,
        "width": WIDTH,
        "heads": mixer.heads,
        "headdim": mixer.headdim,
        "state": mixer.d_state,
        "taps": mixer.d_conv,
        "eps": 1e-5,
        "symbols": SYMBOLS,
        "tensors": tensors,
        "weights": base64.b64encode(np.concatenate(list(flat.values())).tobytes()).decode(),
    }


def run_in_node(expression: str, given: dict) -> dict:
    """The value of a JavaScript expression of `f`, what the script exports, and `given`."""
    program = (
        f"const f = require({json.dumps(str(SCRIPT))});"
        "const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        f"console.log(JSON.stringify({expression}));"
    )
    done = subprocess.run(
        [str(NODE), "-e", program], input=json.dumps(given), capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


def test_the_figure_computes_the_librarys_logits_and_hidden_attention() -> None:
    torch.manual_seed(0)
    model, tokens = Speller(), torch.randint(SYMBOLS, (1, 11))
    with torch.no_grad():
        logits, cache = mechanisms.run_with_cache(model, tokens, "layers.*.mixer.mixing")
    got = run_in_node(
        "f.mambaForward(given.model, f.mambaTensors(given.model), given.tokens)",
        {"model": exported(model), "tokens": tokens[0].tolist()},
    )
    torch.testing.assert_close(torch.tensor(got["logits"]), logits[0], rtol=1e-4, atol=1e-4)
    for layer in (0, 1):
        matrix = cache[f"layers.{layer}.mixer.mixing"][0]
        rows = [
            [[*row, *[0.0] * (len(tokens[0]) - len(row))] for row in head] for head in got["mixing"][layer]
        ]  # JavaScript leaves out what lies above the diagonal
        torch.testing.assert_close(torch.tensor(rows), matrix, rtol=1e-4, atol=1e-5)


def test_letters_of_both_alphabets_have_symbols_and_all_else_is_a_space() -> None:
    got = run_in_node("given.texts.map((text) => f.mambaSymbols(text, 34))", {"texts": ["aZ я", "ё!1а"]})
    assert got == [[0, 25, 33, 31], [32, 33, 33, 0]]
