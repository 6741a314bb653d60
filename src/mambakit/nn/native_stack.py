"""Steps taken by the compiled extension, a whole stack of layers in one call; native/step.cpp says how.

It reads parameters where they are, in float32, bfloat16 or float16 each, and computes in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mambakit.nn.backbone import Backbone
from mambakit.nn.block import Block, GatedMLP
from mambakit.nn.linear import Linear
from mambakit.nn.mamba import DeltaProjection, Mamba
from mambakit.nn.mamba2 import GatedRMSNorm, Mamba2
from mambakit.nn.mamba3 import Mamba3, RMSNorm
from mambakit.nn.quantised import QuantisedEmbedding, QuantisedLinear
from mambakit.ops import dispatch
from mambakit.ops.cpu import native

# The modules that it knows, themselves and not subclasses: those may compute something else.
_MODULES = {
    *(Backbone, Block, GatedMLP, Mamba, Mamba2, Mamba3),
    *(DeltaProjection, GatedRMSNorm, RMSNorm, nn.RMSNorm, Linear, nn.Linear, nn.Conv1d, nn.ModuleList),
    *(nn.Embedding, QuantisedLinear, QuantisedEmbedding),
}
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_QUANTISED = (QuantisedLinear, QuantisedEmbedding)


def refusal(layer: nn.Module) -> str:
    """Why the compiled stack can't step `layer`; empty when it can."""
    for module in layer.modules():
        if type(module) not in _MODULES:
            return f"{type(module).__name__} is not among the modules that it knows"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{type(module).__name__} has hooks, which it would not call"
        if isinstance(module, Mamba) and module.b_c_dt_rms_eps is not None:
            return "b_c_dt_rms_eps is set, and it does not norm dt, B and C"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "the embedding has a max_norm, which it would not enforce"
        if isinstance(module, Block) and module.dropout and module.training:
            return "dropout is active: call eval() on the layer"
    for name, parameter in [*layer.named_parameters(), *layer.named_buffers()]:
        if parameter.dtype not in _DTYPES and not name.endswith("values"):
            return f"{name} is {parameter.dtype}"
        if not parameter.is_contiguous():
            return f"{name} is not contiguous"
        backend = dispatch.choose(parameter.device)
        if backend != "cpu":
            return f"operations on {name}, which is on {parameter.device}, go to the backend {backend!r}"
    return ""


class CompiledSteps:
    """A layer that `refusal` has nothing against, and its state in float32.

    Args:
        layer: a Backbone, a Block or a mixer.
        d_model: its width.
        state: the layer's, of the sequences that it will step; it is copied.
        embedding, head: what stands before it and after it, if anything does.
    """

    def __init__(
        self,
        layer: nn.Module,
        d_model: int,
        state: Any,
        embedding: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        with torch.inference_mode(False):  # which would let no one else change what it makes
            self._state = tree_map(lambda part: part.detach().to("cpu", torch.float32, copy=True).contiguous(), state)
            batch = tree_leaves(state)[0].shape[0]
            self._x, self._y = torch.zeros(2, batch, d_model)
            self._stack = build(layer, self._state, self._x, self._y)
            self._tokens = None
            if embedding is not None:
                table = matrix(embedding)
                self._x = torch.zeros(batch, dtype=torch.long)
                self._tokens = table.rows
                self._stack.set_embedding(table, self._x)
            if head is not None:
                weight, bias = weight_and_bias(head)
                self._y = torch.zeros(batch, weight.rows)
                self._stack.set_output(weight, bias, self._y)

    @property
    def state(self) -> Any:
        """A copy."""
        return tree_map(torch.clone, self._state)

    def load(self, state: Any) -> None:
        """Take over a state of the same form."""
        with torch.no_grad():
            for part, new in zip(tree_leaves(self._state), tree_leaves(state), strict=True):
                part.copy_(new)

    def step(self, x: Tensor) -> Tensor:
        """What goes in and comes out as of the stepper; gradients are not being recorded, or x needs none."""
        self._x.copy_(x)
        if self._tokens is not None and not all(0 <= token < self._tokens for token in self._x.tolist()):
            raise IndexError(f"tokens must be at least 0 and below {self._tokens}, got {x.tolist()}")
        self._stack.step(torch.get_num_threads())
        return self._y.clone()


def build(layer: nn.Module, state: Any, x: Tensor, y: Tensor) -> Any:
    """The native stack that steps `layer` from x to y, both (batch, d_model), and advances `state`, all in place.

    x, y and the state are float32 and contiguous.
    """
    whole = isinstance(layer, Backbone)
    stack = native.Stack(x, y, **_norm(layer.norm_f if whole else None))
    parts: list[Any] = list(layer.layers) if whole else [layer]  # type: ignore[arg-type]
    for part, of_part in zip(parts, state if whole else [state], strict=True):
        if not isinstance(part, Block):
            _add_mixer(stack, part, of_part, {**_norm(None), "residual": False})
            continue
        _add_mixer(stack, part.mixer, of_part, {**_norm(part.norm), "residual": True})
        if part.mlp is not None:
            stack.add_mlp(**_norm(part.norm2), residual=True, fc1=matrix(part.mlp.fc1), fc2=matrix(part.mlp.fc2))
    return stack


def matrix(module: Any) -> Any:
    """The native matrix of a linear layer or an embedding, plain or quantised, used in place."""
    return native.Matrix(*module.matrix) if isinstance(module, _QUANTISED) else native.Matrix(module.weight.detach())


def weight_and_bias(linear: Any) -> tuple[Any, Tensor | None]:
    """Those of a linear layer, plain or quantised."""
    return matrix(linear), None if linear.bias is None else linear.bias.detach()


def _add_mixer(stack: Any, mixer: nn.Module, state: Any, around: dict[str, Any]) -> None:
    if isinstance(mixer, Mamba):
        stack.add_mamba(**around, **_mamba(mixer), **state._asdict())
    elif isinstance(mixer, Mamba2):
        stack.add_mamba2(**around, **_mamba2(mixer), **state._asdict())
    elif isinstance(mixer, Mamba3):
        stack.add_mamba3(**around, **_mamba3(mixer), **state._asdict())


def _norm(norm: Any) -> dict[str, Any]:
    return {"norm": None, "eps": 0.0} if norm is None else {"norm": norm.weight.detach(), "eps": norm.eps}


def _mamba(mixer: Mamba) -> dict[str, Any]:
    parameters = {
        **_convolution_and_projections(mixer),
        "x_proj": matrix(mixer.x_proj),
        "dt_proj": matrix(mixer.dt_proj),
        "dt_bias": mixer.dt_proj.bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
    }
    return _detached(parameters)


def _mamba2(mixer: Mamba2) -> dict[str, Any]:
    parameters = {
        **_convolution_and_projections(mixer),
        "A_log": mixer.A_log,
        "D": mixer.D,
        "dt_bias": mixer.dt_bias,
    }
    settings = {
        "dt_min": mixer.dt_limit[0],
        "dt_max": mixer.dt_limit[1],
        "groups": mixer.n_groups,
        "norm_before_gate": mixer.norm is not None and mixer.norm.norm_before_gate,
    }
    return {**_detached(parameters), **_gated_norm(mixer.norm), **settings}


def _mamba3(mixer: Mamba3) -> dict[str, Any]:
    parameters = {name: getattr(mixer, name) for name in ("D", "dt_bias", "B_bias", "C_bias")}
    parameters |= {name: getattr(mixer, name) for name in ("mimo_x", "mimo_z", "mimo_o")}
    parameters |= {"B_norm": mixer.B_norm.weight, "C_norm": mixer.C_norm.weight}
    parameters |= {"in_proj": matrix(mixer.in_proj), "out_proj": matrix(mixer.out_proj)}
    settings = {
        "B_eps": mixer.B_norm.eps,
        "C_eps": mixer.C_norm.eps,
        "groups": mixer.n_groups,
        "rational": mixer.A_activation == "rational",
        "A_floor": mixer.A_floor,
    }
    return {**_detached(parameters), **_gated_norm(mixer.norm), **settings}


def _convolution_and_projections(mixer: Mamba | Mamba2) -> dict[str, Any]:
    return {
        "in_proj": matrix(mixer.in_proj),
        "in_bias": mixer.in_proj.bias,
        "conv_weight": mixer.conv1d.weight,
        "conv_bias": mixer.conv1d.bias,
        "out_proj": matrix(mixer.out_proj),
        "out_bias": mixer.out_proj.bias,
    }


def _gated_norm(norm: GatedRMSNorm | None) -> dict[str, Any]:
    around = _norm(norm)
    return {"gated_norm": around["norm"], "gated_eps": around["eps"]}


def _detached(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: part.detach() if isinstance(part, Tensor) else part for name, part in parameters.items()}
