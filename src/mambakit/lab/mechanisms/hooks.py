"""Running a model with every intermediate of its layers shown, kept, or replaced.

| name                           | shape (batch, length, ...)                | what it is                              |
|--------------------------------|-------------------------------------------|-----------------------------------------|
| `embedded`                     | d_model                                   | what enters the first layer             |
| `layers.I.mixer.input`         | d_model                                   | the normed stream that the mixer reads  |
| `layers.I.mixer.projected`     | the width of in_proj                      | everything that in_proj makes           |
| `layers.I.mixer.z`             | d_inner; heads, headdim in Mamba-3        | the gate, before its silu               |
| `layers.I.mixer.convolved`     | d_inner; with B and C in Mamba-2          | past convolution and silu, if there is  |
| `layers.I.mixer.x`             | d_inner; heads, headdim in Mamba-2, -3    | the values that are written into h      |
| `layers.I.mixer.B`, `.C`       | state; groups, state in Mamba-2, -3;      | what writes into h, and what reads it,  |
|--------------------------------|-------------------------------------------|-----------------------------------------|
| `layers.I.mixer.delta`         | d_inner; heads in Mamba-2, -3             | the step, past bias and softplus        |
| `layers.I.mixer.decay`         | d_inner, state; heads in Mamba-2, -3      | exp(delta A), the share of h that stays |
| `layers.I.mixer.trap`          | heads                                     | Mamba-3: before its sigmoid             |
| `layers.I.mixer.angles`        | pairs                                     | Mamba-3: before pi tanh(angles) delta   |
| `layers.I.mixer.states` *      | d_inner, state; heads, headdim, state     | h after every step                      |
| `layers.I.mixer.mixing` *      | (batch, d_inner or heads, [rank, rank,]   | token-mixing matrix: [.., i, j] is from |
|--------------------------------|-------------------------------------------|-----------------------------------------|
| `layers.I.mixer.scan_output`   | d_inner; [rank,] heads, headdim           | y with D, before the gate               |
| `layers.I.mixer.gated`         | d_inner                                   | past gate and norm, what out_proj reads |
| `layers.I.mixer.output`        | d_model                                   | what the mixer adds to the stream       |
| `layers.I.mlp.output`          | d_model                                   | what the MLP adds, where there is one   |
| `layers.I.residual`            | d_model                                   | the stream after the layer              |
| `final`                        | d_model                                   | past the last norm, what the head reads |

* on request: they cost more than the run itself, and a pattern finds them where it ends in their name.

Layers of other mixers (S4D, attention) show their input and output. States that are replaced are what is read at their
positions; what is carried on is not theirs: for that replace `decay`, `x`, `B` or `delta`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from mambakit.errors import DataError
from mambakit.lab.mechanisms import taken_apart
from mambakit.lab.mechanisms.stack import Stack, stack_of

Hook = Callable[[Tensor], Tensor | None]


class Cache(Mapping[str, Tensor]):
    """What a run went through, by name; the tensors are those of the run itself, so that gradients reach them.

    >>> model = nn.Backbone(16, 2, mixer_options={"d_state": 4})
    >>> _, cache = run_with_cache(model, torch.randn(1, 10, 16))
    >>> cache["layers.1.mixer.delta"].shape
    torch.Size([1, 10, 32])
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        raise KeyError(f"{name} was not kept; kept: {_listed(name, self._tensors)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def by_layer(self, name: str) -> dict[int, Tensor]:
        """The tensors `layers.I.NAME` by I, of the layers that have one."""
        found = {key: key.split(".", 2) for key in self._tensors if key.startswith("layers.")}
        return {int(parts[1]): self._tensors[key] for key, parts in found.items() if parts[2] == name}

    def detached(self) -> "Cache":
        """The same without the run's graph."""
        return Cache({name: tensor.detach() for name, tensor in self._tensors.items()})


def hook_names(model: nn.Module) -> tuple[str, ...]:
    """Every name of the model's hook points, in the order of a run; those on request among them.

    Raises DataError for a model without a stack of blocks, or with several.
    """
    names = ["embedded"]
    for index, layer in enumerate(stack_of(model).layers):
        points = ("input", *taken_apart.points_of(layer.mixer), "output")
        names += [f"layers.{index}.mixer.{point}" for point in points]
        if layer.mlp is not None:
            names.append(f"layers.{index}.mlp.output")
        names.append(f"layers.{index}.residual")
    return (*names, "final")


def run_with_cache(
    model: nn.Module, inputs: Any, names: str | Iterable[str] | None = None, **arguments: Any
) -> tuple[Any, Cache]:
    """`model(inputs, **arguments)`, and what it went through.

    Args:
        model: a `nn.Backbone`, or a module that holds one: language models, those of the lab.
        inputs, arguments: what the model is called with.
        names: a name or pattern of the table above, or several: `layers.*.mixer.delta`; None keeps all but those on
            request.

    Raises DataError for a name that the model does not have, and for a model that runs its layers more than once.
    """
    wanted = matching(model, ["*"] if names is None else [names] if isinstance(names, str) else names)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        def hook(tensor: Tensor) -> None:
            if name in kept:
                raise DataError(f"{name} came up twice in one call: cache a call that runs each layer once")
            kept[name] = tensor

        return hook

    return run_with_hooks(model, inputs, {name: keep(name) for name in wanted}, **arguments), Cache(kept)


def run_with_hooks(model: nn.Module, inputs: Any, hooks: Mapping[str, Hook], **arguments: Any) -> Any:
    """`model(inputs, **arguments)` with functions at its hook points.

    Args:
        model, inputs, arguments: as in `run_with_cache`.
        hooks: functions by name or pattern; each gets the tensor, and returns another of the same shape to go on with,
            or None to leave it.

    Raises DataError for a name that the model does not have, and for a replacement of another shape.
    """
    with hooked(model, hooks) as reached:
        output = model(inputs, **arguments)
    if missed := [name for pattern in hooks for name in matching(model, [pattern]) if name not in reached]:
        raise DataError(f"{missed[0]} never came up: this call of the model does not run that part of it")
    return output


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[set[str]]:
    """Functions at the model's hook points, as in `run_with_hooks`, for every call within the `with`.

    What `as` gives is the set of names that came up so far. Contexts don't nest: the inner one's functions would take
    the place of the outer one's.
    """
    stack = stack_of(model)
    by_name: dict[str, list[Hook]] = {}
    for pattern, function in hooks.items():
        for name in matching(model, [pattern]):
            by_name.setdefault(name, []).append(function)
    _check(model, stack)
    undo: list[Callable[[], Any]] = []
    reached: set[str] = set()
    try:
        _attach(stack, by_name, reached, undo)
        yield reached
    finally:
        for each in undo:
            each()


class _Points:
    """The hook points under one prefix."""

    def __init__(self, prefix: str, hooks: Mapping[str, list[Hook]], reached: set[str]) -> None:
        self._prefix, self._hooks, self._reached = prefix, hooks, reached

    def asked(self, name: str) -> bool:
        return self._prefix + name in self._hooks

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        self._reached.add(self._prefix + name)
        for hook in self._hooks.get(self._prefix + name, ()):
            version = tensor._version
            replacement = hook(tensor)
            if replacement is None or replacement is tensor:
                if tensor._version == version:
                    continue
                replacement = tensor.clone()  # edited in place: another object says that it is not what was computed
            if replacement.shape != tensor.shape:
                expected, got = tuple(tensor.shape), tuple(replacement.shape)
                raise DataError(f"the hook at {self._prefix}{name} must return a tensor of shape {expected}, got {got}")
            tensor = replacement.to(tensor)
        return tensor


def _attach(stack: Stack, hooks: Mapping[str, list[Hook]], reached: set[str], undo: list[Callable[[], Any]]) -> None:
    """Put the functions in place, and into `undo` what takes each away; names go into `reached` as they come up."""
    whole = _Points("", hooks, reached)
    for index, layer in enumerate(stack.layers):
        points = _Points(f"layers.{index}.mixer.", hooks, reached)
        if index == 0:
            undo.append(layer.register_forward_pre_hook(_on_first_argument(whole, "embedded")).remove)
        undo.append(layer.register_forward_hook(_on_result(whole, f"layers.{index}.residual")).remove)
        if layer.mlp is not None:
            undo.append(layer.mlp.register_forward_hook(_on_result(whole, f"layers.{index}.mlp.output")).remove)
        undo.append(layer.mixer.register_forward_pre_hook(_on_first_argument(points, "input")).remove)
        undo.append(layer.mixer.register_forward_hook(_on_result(points, "output")).remove)
        if taken_apart.points_of(layer.mixer):
            undo.append(taken_apart.attach(layer.mixer, points))
    undo.append(stack.norm_f.register_forward_hook(_on_result(whole, "final")).remove)


def _on_first_argument(points: _Points, name: str) -> Callable[..., Any]:
    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (points(name, arguments[0]), *arguments[1:])

    return before


def _on_result(points: _Points, name: str) -> Callable[..., Any]:
    def after(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> Any:
        if isinstance(result, Tensor):
            return points(name, result)
        return (points(name, result[0]), *result[1:])  # y and the state

    return after


def matching(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The names that the patterns find, in the order of a run; DataError for a pattern that finds none."""
    names = hook_names(model)
    found: set[str] = set()
    for pattern in patterns:
        last = pattern.rsplit(".", 1)[-1]
        hits = {
            name
            for name in names
            if fnmatchcase(name, pattern)
            and (name.rsplit(".", 1)[-1] == last or not name.endswith(taken_apart.ON_REQUEST))
        }
        if not hits:
            raise DataError(f"{pattern} is no hook point of this model; there are: {_listed(pattern, names)}")
        found |= hits
    return [name for name in names if name in found]


def _listed(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names), n=5, cutoff=0.5)
    return ", ".join(near) + ", ..." if near else ", ".join(names)


def _check(model: nn.Module, stack: Stack) -> None:
    if any({"forward", "mix"} & layer.mixer.__dict__.keys() for layer in stack.layers):
        raise DataError("the model has hooks in place already: leave the other context first, or give all hooks to one")
    if any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules()):
        raise DataError(
            "gradient checkpointing runs layers again without the hooks: call gradient_checkpointing_disable()"
        )
    if any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in model.modules()):
        raise DataError("a compiled model runs past its hooks: pass the model as it was before torch.compile")
