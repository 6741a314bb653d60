"""How fast a model reads a prompt and goes on from it, each beside its floor, measured in the same process by turns.

    reading     the model's own matrix products on a prompt as long, in float32, and nothing between them
    going on    the bytes of the weights over the rate at which this machine reads memory, measured between the runs

The rate is of a product of a matrix of many megabytes and a vector, or of the sum of one, whichever is the faster.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mambakit import ops
from mambakit.errors import DataError
from mambakit.lm.config import MambaConfig
from mambakit.lm.generation import Decoder
from mambakit.lm.model import MambaForCausalLM
from mambakit.lm.quantisation import weight_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "mamba-130m": {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "mixer": "mamba"},
    "mamba2-130m": {"vocab_size": 50288, "hidden_size": 768, "num_hidden_layers": 24, "mixer": "mamba2"},
}
TURNS = 5
_READ_BYTES = 256 << 20  # more than any cache holds
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Speed:
    """What was measured of one way of storing the weights and one number of rows; seconds are medians of the turns."""

    weights: str
    batch: int
    prompt: int
    new_tokens: int
    weight_bytes: int  # that a step reads
    first_token_seconds: float  # to read the prompt and draw the first token
    products_seconds: float  # of the prompt's matrix products alone
    step_seconds: float  # of a token in every row
    read_rate: float  # bytes a second from memory
    peak_bytes: int | None  # of the process while it read and drew; None where the system does not tell

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of all rows together, as are the other rates."""
        return self.batch * self.prompt / self.first_token_seconds

    @property
    def over_products(self) -> float:
        """The time of the prompt over that of its products."""
        return self.first_token_seconds / self.products_seconds

    @property
    def tokens_per_second(self) -> float:
        """Drawn, one after another."""
        return self.batch / self.step_seconds

    @property
    def bound_tokens_per_second(self) -> float:
        """What reading every weight once for each step would allow."""
        return self.batch * self.read_rate / self.weight_bytes

    @property
    def share_of_bound(self) -> float:
        """Of what reading allows; more rows share a reading, and have more to compute."""
        return self.tokens_per_second / self.bound_tokens_per_second

    def record(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        derived = ("prompt_tokens_per_second", "over_products", "tokens_per_second", "bound_tokens_per_second")
        return asdict(self) | {name: getattr(self, name) for name in (*derived, "share_of_bound")}


def random_model(shape: str, **changes: Any) -> MambaForCausalLM:
    """A model of one of SHAPES with random weights, the same every time; speed does not depend on what they are."""
    if shape not in SHAPES:
        raise DataError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**{**SHAPES[shape], **changes})).eval()


def measure(
    make: Callable[[], MambaForCausalLM],
    weights: str,
    batch: int,
    *,
    prompt: int = 512,
    new_tokens: int = 64,
    turns: int = TURNS,
    on_turn: Callable[[], None] = lambda: None,
) -> Speed:
    """Measure a model with its weights stored in one way.

    Args:
        make: gives the model, its weights stored so.
        weights: the name of that, for the record.
        batch: rows that advance together.
        prompt, new_tokens: tokens of each row that are read, and that are drawn in a turn.
        turns: readings, products, drawings and measurements of memory, which alternate.
        on_turn: called after each.

    Raises DataError for sizes below 1.
    """
    sizes = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens, "turns": turns}
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"{name} must be at least 1, got {size}")
    model = make()
    ids = torch.randint(model.config.vocab_size, (batch, prompt))
    decoder, products = Decoder(model, batch), Products(model, batch, prompt)
    memory = torch.ones(_READ_BYTES // 4)
    times: dict[str, list[float]] = {name: [] for name in ("first", "products", "step", "read")}
    empty = decoder.cache()
    told = _forget_peak()
    for turn in range(turns + 1):
        decoder.load(empty)
        first = _seconds(lambda: (decoder.read(ids), decoder.logits.argmax(-1)))  # type: ignore[union-attr]
        steps = _step_seconds(decoder, new_tokens)
        alone, read = _seconds(products), read_seconds(memory)
        if turn > 0:  # the first warms up
            times["first"].append(first)
            times["products"].append(alone)
            times["read"].append(read)
            times["step"] += steps
        on_turn()
    peak = _peak() - memory.nbytes - products.nbytes if told else None
    found = {name: statistics.median(samples) for name, samples in times.items()}
    return Speed(
        weights,
        batch,
        prompt,
        new_tokens,
        read_bytes(model),
        found["first"],
        found["products"],
        found["step"],
        memory.nbytes / found["read"],
        peak,
    )


def read_bytes(model: MambaForCausalLM) -> int:
    """Bytes of weights that a step reads: all, but of an embedding that is not the head's one row."""
    tied = model.config.tie_word_embeddings
    return weight_bytes(model) - (0 if tied else weight_bytes(model.get_input_embeddings()))


def read_seconds(memory: Tensor) -> float:
    """How long it takes to read float32 `memory` once, in the faster of two ways."""
    width = 4096
    matrix, vector = memory[: memory.numel() // width * width].view(-1, width), torch.ones(width)
    share = memory.numel() / max(1, matrix.numel())
    return min(_seconds(lambda: torch.mv(matrix, vector)) * share, _seconds(memory.sum))


class Products:
    """The matrix products of a prompt in float32, each on operands of its own shape: a function without arguments.

    Args:
        model: whose linear layers these are; the head's is of one position a row, unless `all_logits`.
        batch, prompt: its rows and their tokens.
        all_logits: whether the head's is of every position.
    """

    def __init__(self, model: MambaForCausalLM, batch: int, prompt: int, *, all_logits: bool = False) -> None:
        counts = Counter(_shape(module) for module in _linear_layers(model.backbone))
        head = _shape(model.lm_head)
        self._runs = [(torch.randn(batch, prompt, n), torch.randn(m, n), times) for (m, n), times in counts.items()]
        self._runs.append((torch.randn(batch, prompt if all_logits else 1, head[1]), torch.randn(*head), 1))
        self.nbytes = sum(x.nbytes + weight.nbytes for x, weight, _ in self._runs)

    @torch.no_grad()
    def __call__(self) -> None:
        for x, weight, times in self._runs:
            for _ in range(times):
                ops.linear(x, weight)


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    from mambakit.nn.quantised import QuantisedLinear

    return [module for module in model.modules() if isinstance(module, nn.Linear | QuantisedLinear)]


def _shape(module: Any) -> tuple[int, int]:
    """(out, in)"""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.values.shape[0], module.matrix.columns


@torch.no_grad()
def _step_seconds(decoder: Decoder, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        decoder.step(decoder.logits.argmax(-1))  # type: ignore[union-attr]
        times.append(time.perf_counter() - start)
    return times


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _forget_peak() -> bool:
    """Let the process's peak of memory start anew; whether the system does."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
