"""The causal convolution on the GPU.

A program takes a block of channels through a tile of rows, with the last `width - 1` inputs in registers, so that every
input is read from memory once. Memory is what both directions wait for: loads of the next rows are under way at any
time, and tiles are as long as lets all programs run at once. The backward recomputes what stood before the activation,
and keeps the last `width` gradients of it the same way:

    g_t  = grad_y_t activation'(bias + sum_k weight_k x_{t - (width - 1) + k})
    dx_s = sum_k weight_k g_{s + (width - 1) - k},    dweight_k = sum_t g_t x_{t - (width - 1) + k}

Sums over rows are taken tile by tile and then over the tiles, in a fixed order. Tiles never cross sequences.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.ops.inputs import ConvInputs
from mambakit.ops.packing import sequence_bounds
from mambakit.ops.triton.causal_conv1d_kernels import convolve, gradients, sum_tiles
from mambakit.ops.triton.counting import ceil_div, power_of_two
from mambakit.ops.triton.launch import on_device_of, processors_of, rows_contiguous, stride_divisor

ABSENT_GRADIENTS = True  # what `backward` takes in place of zeros: `mambakit.ops.operator`

_LONGEST_ROW = 1 << 22  # elements from a row to the next


Strides = tuple[int, ...]


class Config(NamedTuple):
    """How a kernel is cut up."""

    channels: int  # of a program, at most
    ahead: int  # rows whose loads are under way
    warps: int
    registers: int  # of a thread, at most
    least: int  # rows of a tile
    most: int = 256

    def resident(self) -> int:
        """Programs that a multiprocessor has registers for: each of its four parts has 16384."""
        return 16384 // (32 * self.registers) * 4 // self.warps


def forward_config(width: int, size: int) -> Config:
    """By the width of the window and the size of an element in bytes."""
    if size == 8:
        return Config(128, 2, 4, 255, 16)
    if width > 8:
        return Config(128, 4, 4, 128, 64)
    if width > 4:
        return Config(256, 8 if size == 2 else 4, 2, 128, 16)
    return Config(256, 8, 2, 96, 16) if size == 2 else Config(256, 4, 2, 80, 16)


def backward_config(width: int, size: int) -> Config:
    """As `forward_config`."""
    if size == 8 or width > 8:
        return Config(128, 4, 4, 255, 64)
    return Config(128, 8 if size == 2 else 4, 2, 96 if width <= 4 else 168, 32)


def forward(inputs: ConvInputs, y: Tensor, final_state: Tensor, config: Config | None = None) -> None:
    """Fill y and the final state."""
    x, weight, state = _readable(inputs.x), inputs.weight, inputs.initial_state
    config = config or forward_config(weight.shape[1], x.element_size())
    layout, table = _cut(inputs, x, config, 0)
    launch = _forward_launch(layout)
    if launch is not None:
        state = None if state is None else state.contiguous()
        with on_device_of(x):
            launch(x, weight, inputs.bias, state, y, final_state, table)


def backward(
    inputs: ConvInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    grads: ConvInputs,
    config: Config | None = None,
) -> None:
    """Fill `grads`."""
    x, grad_y = _readable(inputs.x), _readable(grad_y)
    weight, state = inputs.weight, inputs.initial_state
    channels, width = weight.shape
    if channels == 0:
        return
    config = config or backward_config(width, x.element_size())
    layout, table = _cut(inputs, x, config, width - 1)
    tiles, launch, sum_up = _backward_launches(layout, grad_y.stride())
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    partial = weight.new_empty(tiles, width + 1, channels, dtype=wide)
    with on_device_of(x):
        if launch is not None:
            state = None if state is None else state.contiguous()
            outer = None if grad_final_state is None else grad_final_state.contiguous()
            launch(x, weight, inputs.bias, state, grad_y, outer, grads.x, grads.initial_state, partial, table)
        sum_up(partial, grads.weight, grads.bias)


class Layout(NamedTuple):
    """What launches follow from."""

    shape: torch.Size  # (batch, length, channels)
    strides: Strides  # of x
    taps: torch.Size  # (channels, width)
    taps_strides: Strides
    silu: bool
    device: torch.device
    pack: int | None  # tiles of a pack
    config: Config

    def rows(self, shared: int) -> tuple[int, int, int]:
        """(all tiles, those of a sequence, rows of a tile that walks along `shared` rows more)."""
        rows = _rows(self.shape, self.config, self.device, shared)
        if self.pack is not None:
            return self.pack, 1, rows
        tiles = max(1, ceil_div(self.shape[1], rows))
        return self.shape[0] * tiles, tiles, rows

    def constants(self) -> dict[str, Any]:
        """Of both kernels."""
        block = _block(self.config, self.shape[2])
        return {
            "WIDTH": self.taps[1], "SILU": self.silu, "BLOCK": block, "WHOLE": self.shape[2] % block == 0,
            "AHEAD": self.config.ahead, "DIVISOR": stride_divisor(*self.strides[:2]),
            "num_warps": self.config.warps, "maxnreg": self.config.registers,
        }  # fmt: skip


@functools.lru_cache(maxsize=512)
def _forward_launch(layout: Layout) -> Callable[..., None] | None:
    """All that follows from shapes and strides, found out once; None where nothing is to be done."""
    _, length, channels = layout.shape
    all_tiles, tiles, rows = layout.rows(0)
    if all_tiles * channels == 0:
        return None
    constants = layout.constants()
    return convolve.bind(
        (all_tiles * ceil_div(channels, constants["BLOCK"]),), length, channels, tiles, rows, *layout.strides[:2],
        *layout.taps_strides, **constants, STEPS=(layout.strides[1], channels) if constants["WHOLE"] else None,
        DIVISOR_Y=stride_divisor(channels),
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _backward_launches(
    layout: Layout, grad_strides: Strides
) -> tuple[int, Callable[..., None] | None, Callable[..., None]]:
    """(all tiles, the launch that takes gradients, None without tiles, and the one that sums over tiles)."""
    _, length, channels = layout.shape
    width = layout.taps[1]
    all_tiles, tiles, rows = layout.rows(width - 1)
    constants = layout.constants()
    steps = (layout.strides[1], grad_strides[1], channels) if constants["WHOLE"] else None
    launch = None if all_tiles == 0 else gradients.bind(
        (all_tiles * ceil_div(channels, constants["BLOCK"]),), length, channels, tiles, rows, *layout.strides[:2],
        *grad_strides[:2], *layout.taps_strides, **constants, STEPS=steps,
        DIVISOR_G=stride_divisor(*grad_strides[:2]), DIVISOR_X=stride_divisor(channels),
    )  # fmt: skip
    sum_up = sum_tiles.bind(
        (ceil_div(channels, 32), width + 1), all_tiles, channels, WIDTH=width, BLOCK=32, TILES=64
    )  # fmt: skip
    return all_tiles, launch, sum_up


def _block(config: Config, channels: int) -> int:
    return min(config.channels, power_of_two(channels, 32))


def _rows(shape: torch.Size, config: Config, device: torch.device, shared: int) -> int:
    """Rows of a tile: as many as leave no more programs than run at once, or, where that is too many rows, than run in
    a few rounds, so that the last round is as full as the first. A program walks along `shared` rows more, all of them
    a multiple of the rows ahead."""
    batch, length, channels = shape
    columns = batch * ceil_div(channels, _block(config, channels))
    at_once = processors_of(device) * config.resident()
    rounds = ceil_div(length * columns, at_once * config.most)
    tiles = max(at_once * rounds // max(columns, 1), 1)
    rows = max(ceil_div(length, tiles), config.least)
    return ceil_div(rows + shared, config.ahead) * config.ahead - shared


def _readable(x: Tensor) -> Tensor:
    """`x` with strides that the kernels take: offsets within a tile fit 32 bits."""
    return rows_contiguous(x) if abs(x.stride(1)) < _LONGEST_ROW else x.contiguous()


def _cut(inputs: ConvInputs, x: Tensor, config: Config, shared: int) -> tuple[Layout, Tensor | None]:
    """The layout of inputs whose x is read as `x`, and the tiles of a pack, at least one a sequence.

    Rows of that table are (sequence, its first row, its length, the tile's first row in it).
    """
    weight = inputs.weight
    layout = Layout(x.shape, x.stride(), weight.shape, weight.stride(), inputs.silu, x.device, None, config)
    if inputs.cu_seqlens is None:
        return layout, None
    batch, length, _ = x.shape
    rows = _rows(x.shape, config, x.device, shared)
    bounds = sequence_bounds(batch, length, inputs.cu_seqlens)
    table = [
        (sequence, start, end - start, first)
        for sequence, (start, end) in enumerate(itertools.pairwise(bounds))
        for first in range(0, max(1, end - start), rows)
    ]
    return layout._replace(pack=len(table)), torch.tensor(table, dtype=torch.int64).reshape(-1, 4).to(x.device)
