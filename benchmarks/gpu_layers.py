"""What stands around the scans on a GPU: the convolution, the gated norm, whole training steps, generation.

The models have the shape of Mamba-130m and Mamba-2-130m: 24 layers, d_model 768, 50280 tokens; weights are random.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_case import OURS, Case, Contender, Floor

VOCABULARY, WIDTH, LAYERS = 50280, 768, 24
BATCH = 8  # of a training step
PROMPT, NEW = 100, 100
_HALF = torch.bfloat16
_PLAINLY = f"{OURS}, kernel by kernel"


def cases() -> Iterator[Case]:
    """All cases, whole models first."""
    for mixer in ("mamba", "mamba2"):
        yield _training(mixer)
        yield _generation(mixer, 1)
    yield _convolution(8, 2048, 2048)
    yield _norm(16384, 1536)
    yield _short_training("mamba")
    for mixer in ("mamba", "mamba2"):
        yield _generation(mixer, 64)
    yield _convolution(1, 65536, 2048)
    yield _short_training("mamba2")


def _convolution(batch: int, length: int, channels: int) -> Case:
    elements = batch * length * channels
    shape = (batch, length, channels)
    return Case(
        "causal convolution",
        f"({batch}, {length}, {channels}), width 4, silu",
        _HALF,
        {
            OURS: partial(_our_convolution, shape),
            "causal-conv1d": partial(_their_convolution, shape, channels_last=False),
            "causal-conv1d, channels last": partial(_their_convolution, shape, channels_last=True),
        },
        {"causal-conv1d": (0.9, 1.0), "causal-conv1d, channels last": (None, None)},
        Floor(bytes=4 * elements, exponentials=elements),
        Floor(bytes=(4 + 6) * elements, exponentials=2 * elements),
        exact=_exact_convolution,
    )


def _convolution_inputs(shape: tuple[int, int, int], dtype: torch.dtype = _HALF) -> dict[str, Tensor]:
    """x, weight, bias and the gradient of y; the same for everybody."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, grad = (torch.randn(*shape, generator=generator, device="cuda").to(_HALF) for _ in range(2))
    weight = torch.randn(shape[2], 4, generator=generator, device="cuda").to(_HALF)
    bias = torch.randn(shape[2], generator=generator, device="cuda").to(_HALF)
    return {name: t.to(dtype) for name, t in {"x": x, "weight": weight, "bias": bias, "grad": grad}.items()}


_SMALL = (2, 500, 256)


def _our_convolution(shape: tuple[int, int, int]) -> Contender:
    from mambakit.ops import causal_conv1d

    def function(t: Mapping[str, Tensor]) -> Tensor:
        return causal_conv1d(t["x"], t["weight"], t["bias"], activation="silu")

    return _differentiable(function, _convolution_inputs(shape), _convolution_inputs(_SMALL))


def _their_convolution(shape: tuple[int, int, int], channels_last: bool) -> Contender:
    from causal_conv1d import causal_conv1d_fn

    def function(t: Mapping[str, Tensor]) -> Tensor:
        x = t["x"].transpose(1, 2) if channels_last else t["x"]
        y = causal_conv1d_fn(x, t["weight"], t["bias"], activation="silu")
        return y.transpose(1, 2) if channels_last else y

    def arranged(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return t if channels_last else {k: v.transpose(1, 2).contiguous() if v.dim() == 3 else v for k, v in t.items()}

    measured = _differentiable(function, arranged(_convolution_inputs(shape)), arranged(_convolution_inputs(_SMALL)))
    if channels_last or measured.results is None:
        return measured
    found = measured.results
    back = lambda: {k: v.transpose(1, 2) if v.dim() == 3 else v for k, v in found().items()}  # noqa: E731
    return Contender(measured.forward, measured.forward_backward, back)


def _exact_convolution() -> dict[str, Tensor]:
    from mambakit.ops import causal_conv1d

    def function(t: Mapping[str, Tensor]) -> Tensor:
        return causal_conv1d(t["x"], t["weight"], t["bias"], activation="silu", backend="reference")

    return _results(function, _convolution_inputs(_SMALL, torch.float64))


def _norm(rows: int, dim: int) -> Case:
    elements = rows * dim
    return Case(
        "gated RMS norm",
        f"({rows}, {dim}), gate before the norm",
        _HALF,
        {OURS: partial(_our_norm, rows, dim), "mamba-ssm": partial(_their_norm, rows, dim)},
        {"mamba-ssm": (None, None)},
        Floor(bytes=6 * elements, exponentials=elements),
        Floor(bytes=(6 + 10) * elements, exponentials=2 * elements),
        exact=lambda: _results(_norm_by_reference, _norm_inputs(300, dim, torch.float64)),
    )


def _norm_inputs(rows: int, dim: int, dtype: torch.dtype = _HALF) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    x, z, grad = (torch.randn(rows, dim, generator=generator, device="cuda").to(_HALF) for _ in range(3))
    weight = torch.randn(dim, generator=generator, device="cuda").to(_HALF)
    return {name: t.to(dtype) for name, t in {"x": x, "weight": weight, "z": z, "grad": grad}.items()}


def _norm_by_reference(t: Mapping[str, Tensor]) -> Tensor:
    from mambakit.ops import gated_rms_norm

    return gated_rms_norm(t["x"], t["weight"], t["z"], backend="reference")


def _our_norm(rows: int, dim: int) -> Contender:
    from mambakit.ops import gated_rms_norm

    def function(t: Mapping[str, Tensor]) -> Tensor:
        return gated_rms_norm(t["x"], t["weight"], t["z"])

    return _differentiable(function, _norm_inputs(rows, dim), _norm_inputs(300, dim))


def _their_norm(rows: int, dim: int) -> Contender:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    def function(t: Mapping[str, Tensor]) -> Tensor:
        return rmsnorm_fn(t["x"], t["weight"], None, z=t["z"], eps=1e-5, group_size=None, norm_before_gate=False)

    return _differentiable(function, _norm_inputs(rows, dim), _norm_inputs(300, dim))


def _training(mixer: str) -> Case:
    length = 2048
    return Case(
        *_training_step(mixer, length),
        {
            OURS: lambda: _steps(_our_model(mixer), _our_loss, length),
            "mamba-ssm": lambda: _steps(_their_model(mixer), _their_loss, length),
        },
        {"mamba-ssm": (None, 1.0)},
        *_training_floors(length),
        notes=("forward: the loss in training mode; forward+backward: with gradients and a step of fused AdamW",),
    )


def _short_training(mixer: str) -> Case:
    length = 512
    return Case(
        *_training_step(mixer, length),
        {
            OURS: lambda: _captured_steps(_our_model(mixer), length),
            _PLAINLY: lambda: _steps(_our_model(mixer), _our_loss, length),
            "transformers": lambda: _steps(_slow_model(mixer), _their_loss, length),
        },
        {"transformers": (None, 100.0), _PLAINLY: (None, None)},
        *_training_floors(length),
        notes=("ours: loss and gradients captured as a graph, as mambakit's own training takes them",),
    )


def _training_step(mixer: str, length: int) -> tuple[str, str, torch.dtype]:
    name = {"mamba": "Mamba-130m", "mamba2": "Mamba-2-130m"}[mixer]
    return f"training step, {name}", f"batch {BATCH}, length {length}", _HALF


def _training_floors(length: int) -> tuple[Floor, Floor]:
    parameters, tokens = 130e6, BATCH * length
    # Forward 2 and backward 4 operations a weight and token; weights, gradients and AdamW's two moments once.
    forward = Floor(bytes=2 * parameters, matrix_operations=2 * parameters * tokens)
    return forward, Floor(bytes=2 * parameters * 10, matrix_operations=6 * parameters * tokens)


def _steps(model: Any, loss_of: Callable[[Any, Tensor], Tensor], length: int) -> Contender:
    ids, optimizer = _tokens(length), _optimizer(model)
    slow = getattr(model, "by_the_slow_path", False)
    hiding = _hidden_kernels if slow else contextlib.nullcontext

    def forward() -> None:
        with torch.no_grad(), hiding():
            loss_of(model, ids)

    def step() -> None:
        with hiding():
            loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if slow:
        with hiding():
            loss_of(model, ids[:1, :4]).backward()
    return Contender(forward, step, once=slow)


def _captured_steps(model: Any, length: int) -> Contender:
    from mambakit.training.captured import CapturedGradients

    batch, optimizer = {"tokens": _tokens(length)}, _optimizer(model)

    def compute(batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = _our_loss(model, batch["tokens"])
        loss.backward()
        return loss, {}

    gradients = CapturedGradients(compute, list(model.parameters()))

    def forward() -> None:
        with torch.no_grad():
            _our_loss(model, batch["tokens"])

    def step() -> None:
        gradients(batch)
        optimizer.step()

    for _ in range(4):  # the last but one captures
        step()
    if gradients.refused:
        raise NotImplementedError(f"no CUDA graph: {gradients.refused[0]}")
    return Contender(forward, step)


def _tokens(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, length), device="cuda")


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _our_model(mixer: str) -> Any:
    from mambakit.lm import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, mixer=mixer)
    with torch.device("cuda"):
        return MambaForCausalLM(config).to(_HALF).train()


def _our_loss(model: Any, ids: Tensor) -> Tensor:
    return model(ids, labels=ids).loss


def _their_model(mixer: str) -> Any:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(
        d_model=WIDTH,
        n_layer=LAYERS,
        vocab_size=VOCABULARY,
        ssm_cfg={"layer": "Mamba1" if mixer == "mamba" else "Mamba2"},
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        pad_vocab_size_multiple=8,
    )
    return MambaLMHeadModel(config, device="cuda", dtype=_HALF).train()


def _their_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(ids).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def _slow_model(mixer: str) -> Any:
    """transformers' model without the kernels that it would use: what its users without a CUDA toolkit have."""
    with _hidden_kernels():
        if mixer == "mamba":
            from transformers import MambaConfig, MambaForCausalLM

            config: Any = MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS)
            make: Any = MambaForCausalLM
        else:
            from transformers import Mamba2Config, Mamba2ForCausalLM

            sizes = {"num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1}
            config = Mamba2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, **sizes)
            make = Mamba2ForCausalLM
        with torch.device("cuda"):
            model = make(config).to(_HALF).train()
    model.by_the_slow_path = True
    return model


@contextlib.contextmanager
def _hidden_kernels() -> Iterator[None]:
    """Imports of mamba_ssm and causal_conv1d fail inside."""
    names = ("mamba_ssm", "causal_conv1d")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _generation(mixer: str, batch: int) -> Case:
    parameters = 130e6
    width = 2 * WIDTH
    state = 4 * LAYERS * width * (16 if mixer == "mamba" else 128)
    return Case(
        f"generation, {'Mamba' if mixer == 'mamba' else 'Mamba-2'}-130m",
        f"batch {batch}, prompt {PROMPT}, {NEW} new tokens",
        _HALF,
        {OURS: partial(_our_generation, mixer, batch), "mamba-ssm": partial(_their_generation, mixer, batch)},
        {"mamba-ssm": (1.0, None)},
        Floor(bytes=NEW * (2 * parameters + 2 * batch * state), matrix_operations=2 * parameters * batch * PROMPT),
        notes=("greedy; both replay CUDA graphs; the time is of the prompt and all tokens",),
    )


def _our_generation(mixer: str, batch: int) -> Contender:
    from mambakit.lm import Decoder, StateCache

    decoder = Decoder(_our_model(mixer).eval(), batch)
    ids = torch.randint(VOCABULARY, (batch, PROMPT), device="cuda")

    def run() -> Tensor:
        decoder.load(StateCache())
        decoder.read(ids)
        return torch.stack(list(decoder.generate(NEW)), dim=1)

    for _ in range(4):  # the first captures a token's graph, the last those of the prompt
        run()
    if decoder.backend != "graph":
        raise NotImplementedError(f"no CUDA graph: {decoder.reason}")
    return Contender(run)


def _their_generation(mixer: str, batch: int) -> Contender:
    model = _their_model(mixer).eval()
    ids = torch.randint(VOCABULARY, (batch, PROMPT), device="cuda")
    return Contender(lambda: model.generate(input_ids=ids, max_length=PROMPT + NEW, cg=True, top_k=1))


def _differentiable(
    function: Callable[[Mapping[str, Tensor]], Tensor], tensors: dict[str, Tensor], small: dict[str, Tensor]
) -> Contender:
    """A function of named tensors; "grad" among them is the gradient of its result."""
    grad = tensors["grad"]
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if name != "grad"}

    def forward() -> None:
        with torch.no_grad():
            function(leaves)

    def forward_backward() -> None:
        torch.autograd.grad(function(leaves), list(leaves.values()), grad)

    return Contender(forward, forward_backward, lambda: _results(function, small))


def _results(function: Callable[[Mapping[str, Tensor]], Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "grad"}
    y = function(leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), tensors["grad"])
    return {"y": y.detach(), **{f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}}
