# ---
# title: Fusion and recomputation
# ---
# %% [markdown]
# # Fusion and recomputation
#
# The scans of the last chapter were counted in combinations. On today's machines that is the wrong currency. An
# addition costs a fraction of a nanosecond; fetching its operands from main memory costs a hundred times more. What
# decides the speed of a selective scan is **how many bytes it moves**, and what decides whether a model fits on the
# machine at all is **how many it keeps** for the gradient. Mamba has one idea for each: fusion, and recomputation
# (arXiv 2312.00752, section 3.3).
#
# ## The large tensor
#
# Everything about the inputs of the scan is modest: `u` and `delta` are (batch, length, dim). The state is not. It is
# (batch, dim, state) *at every step*, 16 times as much as the input in Mamba, 128 times in Mamba-2. Whoever writes
# the equations as they stand forms three tensors of that size: $\bar A$, $\bar B u$ and $h$.

# %%
import functools
import math
from collections.abc import Callable

import style
import torch
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambakit import ops

torch.set_num_threads(1)
DIM, STATE = 64, 16
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs_of(length: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """u, delta, A, B, C for one sequence, each to be differentiated."""
    generator = torch.Generator().manual_seed(length)
    made = [
        torch.randn(1, length, DIM, generator=generator, dtype=dtype),
        0.1 * torch.rand(1, length, DIM, generator=generator, dtype=dtype),
        -torch.rand(DIM, STATE, generator=generator, dtype=dtype),
        torch.randn(1, length, STATE, generator=generator, dtype=dtype),
        torch.randn(1, length, STATE, generator=generator, dtype=dtype),
    ]
    return tuple(t.requires_grad_() for t in made)  # type: ignore[return-value]


def steps_of(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The equations as they stand, from the state h (1, dim, state): y (1, length, dim) and the state after."""
    A_bar = torch.exp(delta[..., None] * A)  # (1, length, dim, state)
    B_bar_u = (delta * u)[..., None] * B[:, :, None]  # (1, length, dim, state)
    states = []
    for a_t, b_t in zip(A_bar.unbind(1), B_bar_u.unbind(1), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return (torch.stack(states, dim=1) * C[:, :, None]).sum(-1), h


def unfused(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y, every intermediate a tensor of its own."""
    return steps_of(u, delta, A, B, C, u.new_zeros(1, DIM, STATE))[0]


# %% [markdown]
# ## Counting the bytes
#
# PyTorch lets us stand between a program and its operations and look at each one. The counter below adds up what an
# operation reads (its arguments) and writes (its results); views move nothing and are left out. To it, an operation of
# mambakit is one operation: what happens inside never leaves the processor's caches, and that is exactly the point.


# %%
class Traffic(TorchDispatchMode):
    """Adds up the bytes that go into operations and come out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        after = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if after and not func.is_view:
            self.operations += 1
            self.bytes += sum(t.numel() * t.element_size() for t in before + after)
        return result


def traffic(call: Callable[[], object]) -> Traffic:
    """What a call moves."""
    with torch.no_grad(), Traffic() as counter:
        call()
    return counter


length = 512
given = inputs_of(length)
whole = length * DIM * STATE * 4  # bytes of one (1, length, dim, state) tensor
counts = {"unfused": traffic(lambda: unfused(*given)), "fused": traffic(lambda: ops.selective_scan(*given))}
style.table(
    ["forward", "operations", "megabytes moved", "in tensors of (length, dim, state)"],
    [(name, c.operations, c.bytes / 1e6, c.bytes / whole) for name, c in counts.items()],
)

# %% [markdown]
# Both compute the same numbers, and the fused scan moves {{ counts["unfused"].bytes / counts["fused"].bytes:.0f}}
# times fewer bytes. By hand: it must read `u`, `delta`, `B`, `C` and write `y`, about $3 + 2 \cdot \text{state} /
# \text{dim}$ numbers for each step and channel. The unfused scan reads and writes 16 numbers a dozen times.
#
# ## Where the bytes live
#
# Memory is a ladder. At the top are the registers of the processor, a few kilobytes that cost nothing to reach. Below
# lie caches, larger and slower, and at the bottom main memory, large and slow. A GPU has the same ladder under other
# names: registers, shared memory (SRAM, some hundred kilobytes for each group of cores), and its main memory (HBM).
# How steep is it? Multiply arrays of growing size by a number, on this machine, and divide the bytes by the time:

# %%
sizes = [2**k for k in range(15, 27)]  # bytes of the array that is read, and of the one that is written
bandwidth = []
for size in sizes:
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    repeats = max(1, 2**23 // size)

    def pass_over(source=source, target=target, repeats=repeats):
        """Read all of one array and write all of another."""
        for _ in range(repeats):
            torch.mul(source, 1.5, out=target)

    bandwidth.append(2 * size * repeats / style.measure(pass_over, repeats=7) / 1e9)

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=2.9, width_ratios=(1, 1.15))
rungs = [
    ("registers", "registers"),
    ("caches (L1, L2)", "shared memory, SRAM"),
    ("last cache (L3)", "L2 cache"),
    ("main memory", "main memory, HBM"),
]
for i, (cpu, gpu) in enumerate(rungs):
    half = 0.45 + 0.18 * i
    axes[0].add_patch(Rectangle((-half, -i), 2 * half, 0.9, facecolor=style.COLOURS[4], alpha=0.9 - 0.2 * i))
    axes[0].text(0, -i + 0.45, cpu, ha="center", va="bottom", fontsize=8)
    axes[0].text(0, -i + 0.40, gpu, ha="center", va="top", fontsize=7.5, color=style.QUIET)
axes[0].annotate("", (1.25, -2.9), (1.25, 0.8), arrowprops={"arrowstyle": "->", "color": style.QUIET})
axes[0].text(1.3, -1, "larger, slower", rotation=-90, va="center", fontsize=8, color=style.QUIET)
axes[0].set(xlim=(-1.1, 1.5), ylim=(-3.2, 1.1), title="the ladder: CPU, and GPU below")
axes[0].axis("off")
axes[1].semilogx([2 * size / 1e6 for size in sizes], bandwidth, marker="o", markersize=4)
axes[1].set(xlabel="megabytes that are gone over", ylabel="GB/s", title="measured here, one core", ylim=(0, None))
style.caption(
    fig,
    "Left: the memory of a processor, and in grey what it is called on a GPU. Right: how fast one core goes over an "
    "array by its size. Small arrays suffer from the cost of a call, large ones fall out of the caches.",
)

# %% [markdown]
# The peak of the curve is {{ max(bandwidth) / bandwidth[-1]:.1f}} times its right end on the machine that built this
# page. The unfused scan of a real model lives at the right end: for 1536 channels and 2048 tokens each of its large
# tensors has {{ 1536 * 2048 * STATE * 4 / 1e6:.0f}} MB, is written out by one operation and fetched back by the next.
# The fused scan keeps the state of a block of channels, a few kilobytes, at the top of the ladder from the first step
# to the last. That is all there is to kernel fusion: **the same equations, but the intermediate values never come down
# the ladder.**

# %%
lengths = [128, 256, 512, 1024, 2048]
forward = {"unfused": [], "fused": []}
for n in lengths:
    given = inputs_of(n)
    with torch.no_grad():
        forward["unfused"].append(style.measure(functools.partial(unfused, *given), repeats=3))
        forward["fused"].append(style.measure(functools.partial(ops.selective_scan, *given), repeats=3))
ratio = [a / b for a, b in zip(forward["unfused"], forward["fused"], strict=True)]
style.table(
    ["length", "unfused, ms", "fused, ms", "ratio"],
    [(n, 1e3 * a, 1e3 * b, a / b) for n, a, b in zip(lengths, *forward.values(), strict=True)],
)

# %% [markdown]
# Not all of the ratio is bytes: the unfused loop also pays PyTorch's price for a call at every step, and the compiled
# kernel works on several channels with each instruction.
#
# ## What the gradient keeps
#
# Training has a second bill. The backward pass needs the values of the forward pass: the gradient of $a_t h_{t-1}$ with
# respect to $a_t$ is $h_{t-1}$. So autograd keeps them all, from the first step to the end of the sequence, in every
# layer. PyTorch tells what it keeps through *saved-tensor hooks*; we count each piece of memory once.


# %%
def kept(call: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result.grad_fn is not None
    return sum(storages.values())


length = 1024
given = inputs_of(length)
whole = length * DIM * STATE * 4
saved = {
    "unfused": kept(lambda: unfused(*given)),
    "mambakit": kept(lambda: ops.selective_scan(*given)),
    "the inputs": sum(t.numel() * 4 for t in given),
}
style.table(
    ["kept for the backward", "megabytes", "bytes a step", "in tensors of (length, dim, state)"],
    [(name, size / 1e6, size / length, size / whole) for name, size in saved.items()],
)

# %% [markdown]
# The unfused scan keeps {{ saved["unfused"] / whole:.1f}} of the large tensors. Mambakit's keeps
# {{ saved["mambakit"] / saved["the inputs"]:.2f}} times its inputs, which the program holds anyway. How can it
# differentiate without the states?
#
# ## Recomputation, by hand
#
# By computing them a second time. The trick is general, and known as *gradient checkpointing*: keep the state before
# every $k$-th step only. In the backward pass, take the last chunk, run its $k$ steps again from the state kept before
# it, now with everything needed for the gradient; use it, throw it away, go on to the chunk before. Time: one forward
# pass more. Memory: $L/k$ states kept, and those of one chunk at a time.
#
# The code is short, since autograd does the work inside a chunk:


# %%
class Recomputed(torch.autograd.Function):
    """The scan in chunks, which keeps its inputs and the state before each chunk."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, chunk):
        h, y = u.new_zeros(1, DIM, STATE), torch.empty_like(u)
        starts = u.new_empty(-(-u.shape[1] // chunk), 1, DIM, STATE)
        for i in range(len(starts)):
            part, starts[i] = slice(i * chunk, (i + 1) * chunk), h
            y[:, part], h = steps_of(u[:, part], delta[:, part], A, B[:, part], C[:, part], h)
        ctx.chunk = chunk
        ctx.save_for_backward(u, delta, A, B, C, starts)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        u, delta, A, B, C, starts = ctx.saved_tensors
        grad_u, grad_delta, grad_A, grad_B, grad_C = (torch.zeros_like(t) for t in (u, delta, A, B, C))
        carry = torch.zeros_like(starts[0])  # the gradient of the state after the chunk
        for i in reversed(range(len(starts))):
            part = slice(i * ctx.chunk, (i + 1) * ctx.chunk)
            cut = [
                t.detach().requires_grad_() for t in (u[:, part], delta[:, part], A, B[:, part], C[:, part], starts[i])
            ]
            with torch.enable_grad():
                y, h = steps_of(*cut)  # once more, this time with a graph
            found = torch.autograd.grad((y, h), cut, (grad_y[:, part], carry))
            grad_u[:, part], grad_delta[:, part], grad_B[:, part], grad_C[:, part] = (found[j] for j in (0, 1, 3, 4))
            grad_A += found[2]
            carry = found[5]
        return grad_u, grad_delta, grad_A, grad_B, grad_C, None


def recomputed(*given: Tensor, chunk: int = 32) -> Tensor:
    """The scan with the states recomputed."""
    return Recomputed.apply(*given, chunk)


# %% [markdown]
# What is kept is one thing; what a pass needs at its worst moment is another, for a chunk's states come on top. This
# *peak* we take from PyTorch's profiler, which records every piece of memory that is taken and given back. (Python's
# `tracemalloc` would see none of it. Nor does the profiler see the scratch memory of the compiled kernels: one chunk
# of one block of channels, some tens of kilobytes for each thread.)


# %%
def peak(call: Callable[[], Tensor]) -> int:
    """The most bytes that forward and backward held at one moment, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call().sum().backward()
    assert profiler.profiler is not None
    moments = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for moment in sorted(moments, key=lambda e: e.start_ns()):
        now += moment.nbytes()
        highest = max(highest, now)
    for tensor in given:
        tensor.grad = None
    return highest


def seconds(call: Callable[[], Tensor]) -> float:
    """Of forward and backward together."""

    def both() -> None:
        torch.autograd.grad(call().sum(), given)

    return style.measure(both, repeats=3)


ways = {
    "unfused": lambda: unfused(*given),
    "recomputed by hand": lambda: recomputed(*given),
    "mambakit": lambda: ops.selective_scan(*given),
}
rows = [(name, kept(call) / 1e6, peak(call) / 1e6, 1e3 * seconds(call)) for name, call in ways.items()]
style.table(["forward and backward, length 1024", "kept, MB", "peak, MB", "ms"], rows)

# %%
chunks = [2**k for k in range(11)]
peaks = [peak(lambda k=k: recomputed(*given, chunk=k)) / whole for k in chunks]
best, c = chunks[peaks.index(min(peaks))], peak(ways["unfused"]) / whole
least = math.sqrt(length / c)

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=2.7)
axes[0].loglog(chunks, peaks, marker="o", markersize=4, label="measured")
axes[0].loglog(chunks, [1 / k + c * k / length for k in chunks], linestyle=":", color=style.INK, label="1/k + c k/L")
axes[0].set(xlabel="steps of a chunk, k", ylabel="peak, in large tensors", title="by the chunk")
axes[0].legend()
axes[0].set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
axes[0].yaxis.minorticks_off()
for row, colour in zip(rows, style.COLOURS, strict=False):
    axes[1].barh(row[0], row[2], color=colour)
axes[1].invert_yaxis()
axes[1].set(xlabel="peak, MB", title="by the way it is computed")
axes[1].grid(axis="y", visible=False)
style.caption(
    fig,
    "Left: the peak of forward and backward against the chunk, in units of one (length, dim, state) tensor. Short "
    "chunks keep many states, long ones recompute many at once; what is missing to the dotted line are the outputs and "
    "the gradients of the inputs. Right: the three ways at length 1024.",
)

# %% [markdown]
# The kept states are $1/k$ of the large tensor. A chunk needs what the whole unfused scan needs, $c =$ {{ c:.1f}} large
# tensors, for $k$ of $L$ steps. The sum $1/k + ck/L$ is least at $k = \sqrt{L/c} =$ {{ least:.0f}};
# measured, the best of the chunks tried has {{ best }} steps.
#
# And the price in time? Recomputing by hand takes {{ rows[1][3] / rows[0][3]:.1f}} times as long as keeping everything,
# in plain PyTorch. In a fused kernel it may be less than nothing: to *keep* a state means to write it to main memory
# and to read it back, and at the bottom of the ladder that can take longer than to make it again at the top.
#
# ## What the kernels do
#
# **On the CPU.** A task takes a block of channels of one sequence through time, one step after another. Its states
# stay in the nearest cache; $e^{\Delta A}$ is made there, as a power of two, used once and never stored. For the
# backward it writes the state before every 32nd step. The backward walks these marks from the last to the first: it
# recomputes a chunk, both states and decays, then sweeps it backwards.
#
# **On a GPU** the same, with registers in the place of the cache, with states kept before every 8th step, and with
# segments of the length in parallel (chapter 8). What this comes to on an H200, beside mamba-ssm and beside what the
# hardware's bandwidth allows, is in the tables of the page *On a GPU*, where it wins and where it does not: nothing
# on this page was measured on a GPU, since these pages are built without one.
#
# One could go further and fuse the projections and the convolution in as well. mamba-ssm does so for Mamba-1; here
# they are operations of their own, which keeps every joint open for whoever wants to look inside.
#
# ## Check
#
# Keeping, recomputing and the kernel give the same gradients, in float64, at a length that no chunk divides.

# %%
given = inputs_of(75, torch.float64)
weights = torch.randn(1, 75, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
gradients = {name: torch.autograd.grad((call() * weights).sum(), given) for name, call in ways.items()}
for name in ("recomputed by hand", "mambakit"):
    for letter, got, want in zip(("u", "delta", "A", "B", "C"), gradients[name], gradients["unfused"], strict=True):
        style.check(f"the gradient of {letter}, {name}, and autograd's", got, want, 1e-12)

# %% [markdown]
# ## Exercises
#
# **1.** Mamba-130m has 24 layers of 1536 channels with 16 states. How much memory would its unfused scans keep for one
# sequence of 2048 tokens in float32? Use what was measured above for each step.
#
# **2.** How fast *could* the fused forward be, if it did nothing but move its bytes? Its inputs here fit into a cache,
# so take the best bandwidth of the curve. Compare with the time measured, and say what the kernel spends its time on.
#
# **3.** Two levels of checkpoints keep even less: keep a state every $k^2$ steps, recompute those every $k$ from it,
# and then the steps. What are memory and time for $L = k^3$? Extend it to $\log L$ levels.

# %% [markdown] tags=["answer"]
# **1.** Both measures grow in proportion to length, channels and states:

# %% tags=["answer"]
for name in ("unfused", "mambakit"):
    per_channel = saved[name] / 1024 / DIM
    print(f"{name}: {24 * 1536 * 2048 * per_channel / 1e9:.1f} GB for the scans of one sequence")

# %% [markdown] tags=["answer"]
# **2.** The floor is the bytes over the bandwidth:

# %% tags=["answer"]
floor = counts["fused"].bytes / 512 / max(bandwidth) / 1e9  # seconds a step of the sequence
print(f"bytes alone: {1e6 * floor:.2f} µs a step; measured: {1e6 * forward['fused'][-1] / lengths[-1]:.2f} µs")
exponentials = DIM * STATE
print(
    f"and {exponentials} exponentials a step: {1e9 * forward['fused'][-1] / lengths[-1] / exponentials:.2f} ns for each"
)

# %% [markdown] tags=["answer"]
# The kernel is no longer bound by memory but by arithmetic, above all by one exponential for every state and step.
# To move fewer bytes still would not help it: fusion has done its work. (Mamba-2 goes on from here: one
# decay for a whole head leaves so few exponentials that matrix products can be the main work, chapter 12.)
#
# **3.** Memory $3k = 3 L^{1/3}$ states at a time, time two extra forward passes. With $\log_2 L$ levels, halving each
# time, $\log_2 L$ states are held and about $\log_2 L$ extra passes are made: $O(\log L)$ memory for
# $O(L \log L)$ time.
