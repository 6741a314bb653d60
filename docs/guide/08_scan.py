# ---
# title: The scan
# ---
# %% [markdown]
# # The scan
#
# Selection has cost us the convolution. What is left is a recurrence, $h_t = a_t h_{t-1} + b_t$, with an $a_t$ and a
# $b_t$ of its own for every step, and it looks hopelessly sequential: to know the thousandth state one needs the 999th.
#
# One does not. A bookkeeper with a thousand entries and ten assistants gives each a hundred of them, and has all
# running balances in little more than a tenth of the time. The same works here, since the recurrence is linear. The
# technique is called a *prefix sum* or *scan*, is as old as parallel computers, and comes in several forms that trade
# work for waiting. In this chapter all of them are built, drawn, counted and timed.
#
# ## Two steps are one step
#
# A step is a function, $h \mapsto a h + b$, and two numbers say all about it: the pair $(a, b)$. Take a step $(a, b)$
# and then a step $(a', b')$:
#
# $$ a'(a h + b) + b' = (a'a)\, h + (a' b + b') . $$
#
# Again a step of the same kind! So define
#
# $$ (a, b) \bullet (a', b') = (a'a,\; a'b + b') $$
#
# Two steps have become one *without knowing the state they start from*. That is where the linearity is used: two steps
# of an RNN, $\tanh(w' \tanh(wh + b) + b')$, are nothing shorter than two steps.
#
# And the grouping does not matter, $(p \bullet q) \bullet r = p \bullet (q \bullet r)$. There is nothing to compute:
# both sides are *first p, then q, then r*, and doing things one after another is associative, whatever they are. (The
# order does matter.) With letters, for those who want to see it, both sides are
# $(a''a'a,\; a''a'b + a''b' + b'')$.

# %%
import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import style
import torch
from torch import Tensor

from mambakit import ops
from mambakit.lab.background import SCANS
from mambakit.lab.background import blelloch as blelloch_tensors
from mambakit.ops.inputs import CHUNK
from mambakit.ops.portable import selective_scan as portable

Combine = Callable[[Any, Any], Any]


def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two steps as one: first the first, then the second."""
    (a, b), (later_a, later_b) = first, second
    return later_a * a, later_a * b + later_b


torch.manual_seed(0)
p, q, r = ((torch.rand(100, dtype=torch.float64), torch.randn(100, dtype=torch.float64)) for _ in range(3))
left, right = combine(combine(p, q), r), combine(p, combine(q, r))
style.check("(p q) r and p (q r)", torch.stack(left), torch.stack(right), 1e-15)
print("and in the other order, (p q) against (q p):", f"{(combine(p, q)[1] - combine(q, p)[1]).abs().max():.2f} apart")

# %% [markdown]
# ## Four ways to add up
#
# A scan takes a list of items $x_1, x_2, \dots, x_L$ and an associative operation, and returns all prefixes: $x_1$,
# $x_1 \bullet x_2$, $x_1 \bullet x_2 \bullet x_3$, and so on. Here are four. Each is written for *any* items and any
# operation, and that will pay off in a moment.


# %%
def sequential(items: list, combine: Combine) -> list:
    """One after another."""
    return list(itertools.accumulate(items, combine))


def hillis_steele(items: list, combine: Combine) -> list:
    """In every round each item takes in what stands 1, 2, 4, ... places before it (1986)."""
    distance = 1
    while distance < len(items):
        items = [
            combine(items[i - distance], item) if i >= distance else item  # all at the same time
            for i, item in enumerate(items)
        ]
        distance *= 2
    return items


def blelloch(items: list, combine: Combine) -> list:
    """Pair neighbours, scan the pairs, which are half as many, and fill in what lies between (1990)."""
    if len(items) == 1:
        return items
    pairs = blelloch([combine(*items[i : i + 2]) for i in range(0, len(items) - 1, 2)], combine)
    return [
        items[0] if i == 0 else pairs[i // 2] if i % 2 else combine(pairs[i // 2 - 1], item)
        for i, item in enumerate(items)
    ]


def chunked(items: list, combine: Combine, size: int = 4) -> list:
    """Scan chunks side by side; then scan their ends; then give every chunk what came before it."""
    chunks = [sequential(items[i : i + size], combine) for i in range(0, len(items), size)]
    ends = sequential([chunk[-1] for chunk in chunks], combine)
    later = [
        [combine(before, item) for item in chunk[:-1]] + [end]
        for before, chunk, end in zip(ends, chunks[1:], ends[1:], strict=False)
    ]
    return [*chunks[0], *itertools.chain(*later)]


NETWORKS = {"sequential": sequential, "Hillis-Steele": hillis_steele, "Blelloch": blelloch, "chunked": chunked}

# %% [markdown]
# Since they do not care what the items are, they can be handed items that *draw*. An item remembers its column and
# how long the chain of combinations behind it is; each combination draws a line. The pictures are therefore no
# illustrations of the code, they are its trace.


# %%
class Pen:
    """An item that draws how it is made: in its column, one level below the deeper of the two that it is made of."""

    def __init__(self, column: int, level: int = 0, covers: tuple[int, int] | None = None) -> None:
        self.column, self.level = column, level
        self.covers = covers or (column, column + 1)

    def then(self, second: "Pen", made: list["Pen"], ax=None) -> "Pen":
        """Self and then second; they must be neighbours, or the result would skip something."""
        assert self.covers[1] == second.covers[0]
        new = Pen(second.column, max(self.level, second.level) + 1, (self.covers[0], second.covers[1]))
        made.append(new)
        if ax is not None:
            ax.plot([self.column, new.column], [self.level, new.level], color=style.COLOURS[0], linewidth=1.1)
            ax.plot([second.column, new.column], [second.level, new.level], color=style.QUIET, linewidth=0.8)
            ax.plot(new.column, new.level, "o", color=style.COLOURS[5], markersize=4)
        return new


def trace(network: Callable, length: int, ax=None) -> list[Pen]:
    """All combinations of a network, in the order in which they are made; draws them on `ax`."""
    made: list[Pen] = []
    if ax is not None:
        ax.plot(range(length), [0] * length, "o", color=style.INK, markersize=4)
    found = network([Pen(column) for column in range(length)], lambda first, second: first.then(second, made, ax))
    assert [item.covers for item in found] == [(0, t + 1) for t in range(length)]  # every prefix, whole
    return made


# %% tags=["hide"]
fig, axes = style.figure(2, 2, height=5.4)
for ax, (name, network) in zip(axes.flat, NETWORKS.items(), strict=True):
    made = trace(network, 16, ax)
    ax.set(title=f"{name}: {len(made)} combinations, depth {max(pen.level for pen in made)}")
    ax.set(xlim=(-0.7, 15.7), ylim=(max(pen.level for pen in made) + 0.7, -0.7), xticks=range(0, 16, 3))
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.grid(axis="x", visible=False)
for ax in axes[:, 0]:
    ax.set_ylabel("time")
for ax in axes[1]:
    ax.set_xlabel("position")
style.caption(
    fig,
    "Four networks for 16 items, drawn by the code that scans. Black dots are inputs, each orange dot is one "
    "combination; dots of one height can be made at the same time. Each network ends with all sixteen prefixes.",
)

# %% [markdown]
# The drawing items do one more thing: they refuse to combine what does not join, and at the end every prefix is
# checked to be whole. An operation that is associative sees nothing but intervals that join, so this *proves* the
# network right for every such operation, at this length.
#
# ## Work and depth
#
# Two numbers describe a network. **Work** is how many combinations are made in all, **depth** the longest chain of
# them, which is the time it takes when there are processors without end. Counted by running it:

# %%
lengths = (16, 256, 1024)
rows = []
for name, network in NETWORKS.items():
    for length in lengths:
        made = trace(network if name != "chunked" else lambda x, f: chunked(x, f, math.isqrt(len(x))), length)
        rows.append((name, length, len(made), len(made) / (length - 1), max(pen.level for pen in made)))
style.table(["network", "items", "work", "work / sequential", "depth"], rows)

# %% [markdown]
# - **Sequential**: $L - 1$ combinations in a chain of $L - 1$. The least work there is, and the longest wait.
# - **Hillis-Steele**: depth $\log_2 L$, the least there is, for $L \log_2 L - L + 1$ combinations.
# - **Blelloch**: $2L - \log_2 L - 2$ combinations at depth $2 \log_2 L - 2$: nearly the best of both. (His own form,
#   which the library's `blelloch` follows, scans *before* each item and needs one combination more for each.)
# - **Chunked**, chunks of $c$: under $2L$ combinations at depth $c + L/c - 2$, least where $c = \sqrt L$.
#
# Real machines lie between one processor and infinitely many. With $P$ of them a level of $n$ combinations takes
# $\lceil n / P \rceil$ turns:

# %%
processors = [2**k for k in range(11)]
turns = {}
for name, network in NETWORKS.items():
    made = trace(network if name != "chunked" else lambda x, f: chunked(x, f, 32), 1024)
    levels = torch.tensor([pen.level for pen in made]).bincount()
    turns[name] = [sum(-(-n // P) for n in levels.tolist()) for P in processors]

# %% tags=["hide"]
fig, ax = style.figure(height=2.8)
for (name, counts), marker in zip(turns.items(), "os^D", strict=True):
    ax.loglog(processors, counts, marker=marker, markersize=4, label=name)
ax.set(xlabel="processors", ylabel="turns for 1024 items")
ax.set_xscale("log", base=2)
fig.legend(loc="outside upper center", ncols=4)
style.caption(
    fig,
    "Time by the number of processors, counted from the networks. With one, sequential is best; Hillis-Steele pays "
    "only once there are very many; what lies between belongs to Blelloch and, with a few dozen processors, to chunks.",
)

# %% [markdown]
# With one processor every parallel scan is a loss: twice the work. And a layer has not one scan to do but
# $\text{batch} \times \text{channels} \times \text{states}$ of them, independent of each other. As long as those alone
# keep all processors busy, the sequential scan over the length is the best choice there is.
#
# ## The formula that does not work
#
# There seems to be a shortcut: with $P_t = a_1 a_2 \cdots a_t$, the solution is $h_t = P_t \sum_{s \le t} b_s / P_s$,
# a cumulated product and a cumulated sum, which every library has. Try it:


# %%
def shortcut(a: Tensor, b: Tensor) -> Tensor:
    """h_t = P_t sum_s b_s / P_s."""
    P = a.cumprod(0)
    return P * (b / P).cumsum(0)


rows = []
for length in (32, 128, 512, 2048):
    a, b = 0.5 + 0.5 * torch.rand(length, 64), torch.randn(length, 64)
    exact = SCANS["sequential"](a.double(), b.double()).h
    difference = [(h.double() - exact).norm() / exact.norm() for h in (shortcut(a, b), blelloch_tensors(a, b).h)]
    broken = (~shortcut(a, b).isfinite()).double().mean()
    rows.append((length, difference[0].item(), 100 * broken.item(), difference[1].item()))
style.table(["length", "error of the shortcut", "not a number, %", "error of Blelloch's scan"], rows)

# %% [markdown]
# $P_t$ falls exponentially and leaves the range of floating point; dividing by it is the end. Scans only ever
# multiply factors of at most one, so nothing can overflow. This is why kernels combine pairs.
#
# ## Timed
#
# Now on tensors, where one combination handles a whole row of channels and states. The library keeps all four in
# `mambakit.lab.background`; we time them on one core, and beside them the layer's real scan, `ops.selective_scan`,
# which also makes $e^{\Delta A}$ and $\Delta B u$ from its inputs and reads the states out with $C$.

# %%
torch.set_num_threads(1)
dim, state = 16, 16
sizes = [2**k for k in range(5, 12)]


def timed(length: int) -> dict[str, float]:
    """Seconds of a call of each scan."""
    u, delta = torch.randn(1, length, dim), torch.rand(1, length, dim)
    A, B, C = -torch.rand(dim, state), torch.randn(1, length, state), torch.randn(1, length, state)
    a = torch.exp(delta[0, :, :, None] * A)
    b = delta[0, :, :, None] * B[0, :, None] * u[0, :, :, None]
    named = dict(zip(NETWORKS, SCANS.values(), strict=True))  # the library's, in the same order
    calls = {name: partial(scan, a, b) for name, scan in named.items()}
    for says, backend in (("definition", "reference"), ("portable", "portable"), ("this machine's fastest", None)):
        calls[f"ops, {says}"] = partial(ops.selective_scan, u, delta, A, B, C, backend=backend)
    return {name: style.measure(call, repeats=5) for name, call in calls.items()}


found = [timed(length) for length in sizes]
seconds = {name: [times[name] for times in found] for name in found[0]}

# %% tags=["hide"]
fig, ax = style.figure(height=3.4)
for i, (name, times) in enumerate(seconds.items()):
    ax.loglog(
        sizes,
        [1e3 * t for t in times],
        label=name,
        color=style.COLOURS[i if i < 6 else 7],
        marker="os^Dv*P"[i],
        markersize=4,
        linestyle="-" if name in NETWORKS else "--",
    )
ax.set(xlabel="length", ylabel="milliseconds")
ax.set_xscale("log", base=2)
fig.legend(loc="outside lower center", ncols=3)
style.caption(
    fig,
    "Time of one call by length, 16 channels of 16 states, on one core. Solid: scans over given a and b. Dashed: the "
    "whole selective scan. What counts on one core is not depth but how many passes over memory, and calls, are made.",
)

# %%
last = {name: times[-1] for name, times in seconds.items()}
fastest = last["ops, this machine's fastest"]
style.table(
    [f"at length {sizes[-1]}", "ms", "times the fastest"],
    [(name, 1e3 * t, t / fastest) for name, t in sorted(last.items(), key=lambda item: item[1])],
)

# %% [markdown]
# One core does not reward a small depth. Hillis-Steele makes $\log_2 L$ passes over everything, and pays for each; the
# sequential scan makes one, but in as many calls of PyTorch as there are steps. Blelloch's scan and the chunked one
# need few calls *and* few passes. But the compiled kernel is ahead of them all, and it is sequential over the length.
# Its secret is the next chapter's: it never writes $a$, $b$ or $h$ to memory.
#
# ## What mambakit's kernels do
#
# - **`cpu`**, compiled: blocks of channels in parallel on all threads; over the length one step after another, the
#   states in the nearest cache. For the backward it keeps the state before every 32nd step.
# - **`portable`**, plain PyTorch: all channels at once as one tensor; over the length chunks of 32 steps one after
#   another, Hillis-Steele inside each. It keeps the same states.
# - **`triton`**, GPU: blocks of channels in parallel, and segments of the length in parallel too: the states that the
#   segments end in, the carry from segment to segment, then the outputs. That is the chunked scan above, in its three
#   parts. It keeps the state before every 8th step.
#
# A processor with a few cores has enough to do with the channels alone, so its kernel takes the least work. A GPU
# needs tens of thousands of things to do at once, which a short batch does not have; its kernels cut the length too.
# (How they fare is in the tables of the page *On a GPU*.) The scan inside the chunks of the portable backend is short
# enough to be read here:

# %%
print(f"# chunks of {CHUNK} steps\n{inspect.getsource(portable._scan)}")

# %% [markdown]
# ## Check
#
# The four functions of this chapter, run on pairs of tensors, against the recurrence; and the scan of the states with
# `ops.selective_scan`, on every backend that runs here.

# %%
length = 45  # no power of two, no multiple of a chunk
a, b = 0.9 * torch.rand(length, 8, dtype=torch.float64), torch.randn(length, 8, dtype=torch.float64)
h, by_steps = torch.zeros(8, dtype=torch.float64), []
for a_t, b_t in zip(a, b, strict=True):
    h = a_t * h + b_t
    by_steps.append(h)
for name, network in NETWORKS.items():
    pairs = network(list(zip(a, b, strict=True)), combine)
    style.check(f"{name} and the recurrence", torch.stack([b for _, b in pairs]), torch.stack(by_steps), 1e-14)

u, delta = torch.randn(1, length, dim), torch.rand(1, length, dim)
A, B, C = -torch.rand(dim, state), torch.randn(1, length, state), torch.randn(1, length, state)
h = blelloch_tensors(torch.exp(delta[0, :, :, None] * A), (delta * u)[0, :, :, None] * B[0, :, None]).h
for backend in ("reference", "portable", None):
    y = ops.selective_scan(u, delta, A, B, C, backend=backend)
    style.check(
        f"Blelloch's scan and ops.selective_scan, {backend or 'fastest'}", (h * C[0, :, None]).sum(-1), y[0], 1e-5
    )

# %% [markdown]
# ## Exercises
#
# **1.** Scans are for more than sums. Find an associative operation for the running mean and variance of a series, and
# run it through `blelloch`.
#
# **2.** Which chunk size has the least depth for 1024 items, and which the least work? Count.
#
# **3.** The gradient of a scan is a scan. If $g_t$ is the gradient of the loss with respect to $h_t$ *directly*, and
# $G_t$ the gradient with everything that comes later, find the recurrence of $G$, compute it with the library's
# `blelloch`, and compare with autograd.

# %% [markdown] tags=["answer"]
# **1.** Three numbers describe a stretch of a series: how many values $n$, their mean $m$, and the sum $S$ of squared
# distances from it. Two neighbouring stretches join to $n + n'$, the weighted mean, and
# $S + S' + \frac{n n'}{n + n'}(m' - m)^2$.


# %% tags=["answer"]
def join(first: tuple, second: tuple) -> tuple:
    """Statistics of two stretches together."""
    (n, m, S), (n2, m2, S2) = first, second
    return n + n2, (n * m + n2 * m2) / (n + n2), S + S2 + n * n2 / (n + n2) * (m2 - m) ** 2


series = torch.randn(100, dtype=torch.float64)
n, mean, S = blelloch([(1, value, torch.tensor(0.0)) for value in series], join)[-1]
style.check("the running variance of all and torch's", S / (n - 1), series.var(), 1e-13)

# %% [markdown] tags=["answer"]
# **2.** Depth is least at $\sqrt L$. The work, $2L - c - L/c$, is least at the ends, where nothing is chunked any more,
# and largest at $\sqrt L$, but everywhere under $2L$.

# %% tags=["answer"]
found = []
for c in (1, 4, 16, 32, 64, 256, 1024):
    made = trace(lambda x, f, c=c: chunked(x, f, c), 1024)
    found.append((c, len(made), max(pen.level for pen in made)))
style.table(["chunk", "work", "depth"], found)

# %% [markdown] tags=["answer"]
# **3.** $h_t$ acts on the loss directly and through $h_{t+1} = a_{t+1} h_t + b_{t+1}$. So
# $G_t = g_t + a_{t+1} G_{t+1}$: the same recurrence run backwards, with each $a$ moved by one place.

# %% tags=["answer"]
b.requires_grad_(True)
weights = torch.randn(length, 8, dtype=torch.float64)
(by_autograd,) = torch.autograd.grad((SCANS["sequential"](a, b).h * weights).sum(), b)
later = torch.cat([a[1:], torch.ones_like(a[:1])])
style.check(
    "the reversed scan and autograd", blelloch_tensors(later.flip(0), weights.flip(0)).h.flip(0), by_autograd, 1e-14
)
