# ---
# title: "SSD: the scan is a matrix"
# ---
# %% [markdown]
# # SSD: the scan is a matrix
#
# So far a selective scan was something that *happens*: step after step, a state moves along. This chapter freezes it
# into a picture. Write down, for each output, which inputs it is made of and with what weights, and the whole scan is
# one lower-triangular matrix, $y = Mx$. Attention is a matrix of the same shape. Put the two side by side and the
# difference is not "recurrence against attention", it is one property of the matrix: **every block below the diagonal
# has a low rank**.
#
# From that property alone follows Mamba-2 (arXiv 2405.21060): an algorithm that multiplies by $M$ in blocks, as
# matrix products, which is what processors are fastest at. The paper calls it *structured state-space duality*, SSD.
#
# ## Unrolling one head
#
# Mamba-2 groups channels into *heads*. One head reads a matrix $x$ of `length` rows and `headdim` columns; its state
# is a matrix too, `headdim` by `state`. With the step $\Delta_t$ and **one number** $A < 0$ for all of the head:
#
# $$ h_t = e^{\Delta_t A}\, h_{t-1} + \Delta_t\, x_t B_t^\top, \qquad y_t = h_t C_t . $$
#
# Follow what was written at step $j$ until it is read at step $i$. It enters as $\Delta_j x_j B_j^\top$, fades by
# $e^{\Delta_t A}$ at each step $t = j+1, \dots, i$, and is read by $C_i$:
#
# $$ y_i = \sum_{j \le i} M_{ij}\, x_j, \qquad
#    M_{ij} = \underbrace{(C_i \cdot B_j)}_{\text{does } i \text{ ask for } j\,?}\;
#             \underbrace{e^{A(\Delta_{j+1} + \dots + \Delta_i)}}_{L_{ij}:\ \text{is it still there?}}\;
#             \underbrace{\Delta_j}_{\text{was it let in?}} $$
#
# Three factors, three questions. The first is attention's $QK^\top$ under other names, without a softmax. The second
# is new: a mask of decays instead of attention's mask of zeros and ones. The third is the gate of selection.

# %%
import math
from functools import partial

import style
import torch
from matplotlib.patches import Rectangle

from mambakit import ops
from mambakit.lab.background import block_ranks, multiply_in_chunks, ssd_matrix
from mambakit.lab.figures import DIVERGING
from mambakit.nn import Mamba, Mamba2

torch.manual_seed(0)
length, state, headdim = 64, 4, 8
A = torch.tensor(-0.5, dtype=torch.float64)
B, C = torch.randn(2, length, state, dtype=torch.float64) / math.sqrt(state)
x = torch.randn(length, headdim, dtype=torch.float64)
delta = torch.full((length,), 0.05, dtype=torch.float64)  # most tokens are passed by ...
delta[[5, 22, 23, 41]] = 1.5  # ... a few are written with force, over what was there

scores = C @ B.T
total = (A * delta).cumsum(0)
decays = torch.exp(total[:, None] - total).tril()
M = scores * decays * delta
from_library = ssd_matrix(delta, A, B, C)

# %% tags=["hide"]
fig, axes = style.figure(columns=3, height=2.5)
for ax, (title, values) in zip(axes, {"C Bᵀ": scores, "L": decays, "M = (C Bᵀ) ∘ L ∘ Δ": M}.items(), strict=True):
    limit = 0.5 * values.abs().max().item()  # half, so that faint entries show
    ax.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
    ax.grid(False)
    ax.set(title=title, xlabel="from position j")
axes[0].set_ylabel("to position i")
style.caption(
    fig,
    "The three factors of a selective scan. Left: all pairs of C and B. Middle: the decays, with steps down where a "
    "large delta overwrites the past. Right: the token-mixing matrix; four columns stand out, those of a large delta.",
)

# %% [markdown]
# The middle panel is worth a second look. Every long step is a cliff: below it, everything from before has faded at
# once. Between cliffs the mask is nearly flat. A selective model decides, token by token, where its memory ends.
#
# ## Low rank, and why
#
# Cut $M$ into blocks of 8 by 8 and ask for the rank of each. For comparison, do the same with causal
# softmax attention made of the *same* $B$ and $C$ as keys and queries.

# %%
size = 8
ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
softmax = torch.softmax((4 * scores).masked_fill(ahead, -math.inf), dim=1)
ranks, attention_ranks = block_ranks(M, size), block_ranks(softmax, size)
below = torch.ones_like(ranks, dtype=torch.bool).tril(-1)
print(f"SSD: rank of the blocks below the diagonal at most {ranks[below].max()}, with a state of {state}")
print(f"softmax attention: up to {attention_ranks[below].max()}")

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=3.0)
for ax, (title, found) in zip(axes, {"SSD": ranks, "softmax attention": attention_ranks}.items(), strict=True):
    shown = found.double().masked_fill(torch.ones_like(below).triu(1), math.nan)
    ax.imshow(shown, cmap=style.SEQUENTIAL, vmin=0, vmax=size)
    for i in range(len(found)):
        for j in range(i + 1):
            ax.text(j, i, int(found[i, j]), ha="center", va="center", color="white" if found[i, j] < 5 else "black")
    ax.grid(False)
    ax.set(title=title, xlabel="block of inputs", xticks=[], yticks=[])
axes[0].set_ylabel("block of outputs")
style.caption(
    fig,
    "The rank of every 8 x 8 block. Below the diagonal the blocks of SSD never exceed the size of the state, 4; those "
    "of softmax attention are full. On the diagonal both are triangular and full.",
)

# %% [markdown]
# There is nothing lucky about it. Take a block with rows $i$ after some moment $m$ and columns $j$ before it. All that
# goes from the columns to the rows must pass through the state at $m$, and the state has only `state` dimensions:
#
# $$ M_{ij} = \underbrace{C_i\, e^{A(\Delta_{m+1} + \dots + \Delta_i)}}_{\text{reads the state at } m}\;\cdot\;
#             \underbrace{e^{A(\Delta_{j+1} + \dots + \Delta_m)}\, \Delta_j B_j}_{\text{writes into it}} . $$
#
# A tall matrix times a wide one, with `state` in between. Such a matrix $M$ is called **semiseparable**. Its rank *is*
# the state: a recurrent model with a small memory and a matrix with low-rank blocks are the same thing said twice. It
# also says what softmax attention pays for: no fixed number of states can stand for it, so it keeps every key and
# value.
#
# ## Two orders of computing
#
# Brackets may be moved, and each order has a price. Per head, with $T$ for the length, $N$ for the state and $P$ for
# headdim:
#
# - **Like attention**: form $M$, multiply. $T^2 (N + P)$ multiplications, all in large matrix products.
# - **Like a recurrence**: move $h$ along. About $3\,T N P$ of them, $T$ steps in a row, no matrix product in sight.
#
# Both are a few lines:


# %%
def as_attention(x, dt, A, B, C):
    """x (length, heads, headdim), dt (length, heads), A (heads,), B and C (length, state)."""
    total = (dt * A).cumsum(0)
    ahead = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)[..., None]
    L = torch.exp((total[:, None] - total).masked_fill(ahead, -math.inf))  # (length, length, heads)
    return torch.einsum("ijh,jhp->ihp", (C @ B.T)[..., None] * L * dt, x)


def as_recurrence(x, dt, A, B, C):
    h, y = x.new_zeros(*x.shape[1:], B.shape[1]), []
    for x_t, dt_t, B_t, C_t in zip(x, dt, B, C, strict=True):
        h = torch.exp(dt_t * A)[:, None, None] * h + (dt_t[:, None] * x_t)[..., None] * B_t
        y.append(h @ C_t)  # (heads, headdim)
    return torch.stack(y)


def inputs(length, heads=4, headdim=64, state=64):
    x = torch.randn(length, heads, headdim)
    dt = torch.rand(length, heads) * 0.1
    B, C = torch.randn(2, length, state) / math.sqrt(state)
    return x, dt, -torch.linspace(1, 8, heads), B, C


def in_chunks(x, dt, A, B, C, **options):
    """The library's: chunks, described below."""
    return ops.ssd(x[None], dt[None], A, B[None], C[None], **options)[0]


with torch.no_grad():
    given = inputs(300)
    style.check("attention's order and the recurrence", as_attention(*given), as_recurrence(*given), 1e-4)
    style.check("attention's order and chunks", as_attention(*given), in_chunks(*given), 1e-4)

    lengths = [128, 256, 512, 1024, 2048]
    seconds = {
        name: [style.measure(partial(order, *inputs(n)), repeats=3) for n in lengths]
        for name, order in {"attention": as_attention, "recurrence": as_recurrence, "chunks": in_chunks}.items()
    }
powers = {  # the slopes of straight lines through the points of the figure
    name: (torch.tensor(lengths).log2().diff() * torch.tensor(each).log2().diff()).sum().item() / (len(lengths) - 1)
    for name, each in seconds.items()
}

# %% tags=["hide"]
fig, ax = style.figure(height=2.9)
for name, times in seconds.items():
    ax.loglog(lengths, [1e3 * each for each in times], "o-", label=name, base=2)
ax.set_yscale("log", base=10)
ax.set(xlabel="length", ylabel="milliseconds")
ax.legend()
style.caption(
    fig,
    "Time of one scan of four heads on one core, by length. The order of attention grows with the square of the "
    "length; the recurrence in Python and the chunked form of the library grow in proportion to it.",
)

# %% [markdown]
# In this run the time of attention's order grew as the length to the power of {{ powers["attention"]:.1f}}, that of
# chunks to the power of {{ powers["chunks"]:.1f}} and that of the recurrence of {{ powers["recurrence"]:.1f}}. (The
# recurrence here is a Python loop, and would be far faster in C++; on a GPU even then it would leave the matrix units
# idle.)
#
# ## The third order: blocks
#
# Why choose? Cut $M$ into blocks of size $c$. **On the diagonal** use attention's order: $c$ is small, so $c^2$ is
# harmless. **Below it** every block has the low-rank form above, so never form it: write each chunk's inputs into one
# state, carry states from chunk to chunk, read each chunk's outputs from the state before it. Four kinds of work, three
# of them matrix products and one a scan so short (one step a *chunk*) that it does not matter:

# %% tags=["hide"]
fig, ax = style.figure(height=3.6)
blocks, colours = 5, style.COLOURS
for i in range(blocks):
    for j in range(i + 1):
        own = i == j
        ax.add_patch(Rectangle((j, i), 1, 1, edgecolor=style.QUIET, facecolor=colours[1] if own else "#EEEEEE"))
        if own:
            ax.text(j + 0.5, i + 0.5, "(C Bᵀ) ∘ L", ha="center", va="center", color="black", fontsize=8)
        else:
            ax.add_patch(Rectangle((j + 0.06, i + 0.08), 0.16, 0.84, color=colours[4]))
            ax.add_patch(Rectangle((j + 0.3, i + 0.08), 0.64, 0.2, color=colours[2]))
            ax.add_patch(Rectangle((j + 0.3, i + 0.42), 0.2, 0.2, color=colours[3]))
ax.set(xlim=(-0.05, blocks + 4.3), ylim=(blocks + 0.05, -0.05), aspect="equal", xticks=[], yticks=[])
ax.spines[:].set_visible(False)
ax.grid(False)
legend = (
    (colours[1], "1. within a chunk: like attention"),
    (colours[2], "2. write: the chunk's inputs into one state"),
    (colours[3], "3. carry: states from chunk to chunk"),
    (colours[4], "4. read: outputs from the state before"),
)
for row, (colour, words) in enumerate(legend):
    ax.plot(blocks + 0.35, 0.5 + 0.6 * row, "s", color=colour, markersize=9)
    ax.text(blocks + 0.6, 0.5 + 0.6 * row, words, va="center", fontsize=8.5)
style.caption(
    fig,
    "The token-mixing matrix in chunks. Diagonal blocks are formed and multiplied; each block below is a tall factor "
    "that reads, a decay that carries, and a wide factor that writes, and is never formed.",
)

# %% [markdown]
# In code it is as short as it sounds. This is the chunked algorithm for one head, in the letters of the formulas
# (the library's own teaching version is `lab.background.multiply_in_chunks`):


# %%
def chunked(x, delta, A, B, C, c):
    h, y = x.new_zeros(B.shape[1], x.shape[1]), []  # the state, (state, headdim)
    for d, b, q, v in zip(*(t.split(c) for t in (delta, B, C, x)), strict=True):
        s = (A * d).cumsum(0)  # the log of the decay since the chunk began
        L = torch.exp(s[:, None] - s).tril()
        y.append(((q @ b.T) * L * d) @ v + torch.exp(s)[:, None] * (q @ h))  # 1. within, 4. read
        h = torch.exp(s[-1]) * h + ((torch.exp(s[-1] - s) * d)[:, None] * b).T @ v  # 3. carry, 2. write
    return torch.cat(y)


style.check("blocks and the matrix", chunked(x, delta, A, B, C, 16), M @ x, 1e-12)

# %% [markdown]
# How long should a chunk be? Multiplications per token: $c(N + P)$ within the chunk and $2NP$ through the state. The
# first wants $c$ small. But each chunk must also load and store an $N \times P$ state, and a matrix product of eight
# rows does not fill a processor: that wants $c$ large. So there is a best size, and it depends on the machine:

# %%
sizes = [4, 8, 16, 32, 64, 128, 256, 512, 1024]
with torch.no_grad():
    given = inputs(1024)
    calls = [partial(in_chunks, *given, chunk_size=c, backend="portable") for c in sizes]
    by_size = [style.measure(call, repeats=3) for call in calls]
    results = torch.stack([call() for call in calls])
best = sizes[by_size.index(min(by_size))]
spread = (results - results[0]).abs().max() / results[0].abs().max()

# %% tags=["hide"]
fig, ax = style.figure(height=2.6)
ax.loglog(sizes, [1e3 * each for each in by_size], "o-", base=2)
ax.set_yscale("log", base=10)
ax.set(xlabel="steps in a chunk", ylabel="milliseconds")
style.caption(
    fig,
    "Time of one scan of 1024 tokens in chunks of different sizes, with PyTorch's matrix products on one core. At "
    "the left end lies the recurrence, at the right end the order of attention.",
)

# %% [markdown]
# Here it was {{ best }}. At the left end the algorithm *is* the recurrence, at the right end, with one chunk as long as
# the sequence, it *is* attention's order: they are the two ends of one dial. The result does not depend on where it
# stands, here to {{ spread.item():.0e}} in float32. (The library takes 64 on a CPU, where a chunk of that size stays in
# the caches, and 16 to 64 rows a matrix product on a GPU.)
#
# ## What was given up for it
#
# All this hangs on $L$ being one matrix per head, beside $CB^\top$ and not inside it. In Mamba-1 each channel $p$ has
# its own step, and each of its $N$ states a rate of its own, so that the decay stands *under* the sum over states:
#
# $$ M^{(p)}_{ij} = \sum_{n=1}^{N} C_{in} B_{jn}\, e^{A_{pn} (\Delta_{j+1,p} + \dots + \Delta_{i,p})}\, \Delta_{jp} . $$
#
# There is a different matrix for each channel, and none is a product of a $C B^\top$ with a mask: no matrix products.
# Mamba-2 lets a head of `headdim` channels share one $\Delta$, and all their states share one rate. What it buys is a
# state that may be much larger at the same cost:

# %%
one, two = Mamba(d_model=256, d_state=16), Mamba2(d_model=256, d_state=128, headdim=64)
step_one, step_two = (m(torch.zeros(1, 1, 256))[1].ssm for m in (one, two))
style.table(
    ["", "Mamba-1", "Mamba-2"],
    [
        ["rates A", f"{tuple(one.A_log.shape)}: each channel and state", f"{tuple(two.A_log.shape)}: each head"],
        ["steps a token", f"{one.d_inner}: each channel", f"{two.heads}: each head"],
        ["B and C a token", f"{one.d_state}, for all channels", f"{two.d_state}, for all heads of a group"],
        ["numbers in the state", str(step_one.numel()), str(step_two.numel())],
        ["the convolution is over", "x", "x, B and C"],
        ["where B, C and the step come from", "x, past the convolution", "the layer's input, beside x"],
        ["norm before the last projection", "no", "yes"],
        ["parameters", str(sum(p.numel() for p in one.parameters())), str(sum(p.numel() for p in two.parameters()))],
    ],
)

# %% [markdown]
# Sharing $B$ and $C$ across heads while each head has its own $x$ is, in the language of attention, *multi-value*
# attention: one set of queries and keys, many values. `n_groups` gives each group of heads its own.
#
# What does one rate per head *cost*? Hold everything constant, and look at what an impulse leaves behind. A head of
# Mamba-2 leaves one exponential, whatever its state size: all its states decay together. A channel of Mamba-1 leaves
# a sum of {{ one.d_state }}, which can imitate a slow, scale-free fading that no single exponential can. Fit both to
# $1/(1 + t)$:

# %%
t = torch.arange(200, dtype=torch.float64)
target = 1 / (1 + t)
rates = torch.logspace(-3, 0.5, 200, dtype=torch.float64)
singles = torch.exp(-rates[:, None] * t)  # one rate: try two hundred, each with its best weight
weights = (singles * target).sum(1, keepdim=True) / singles.square().sum(1, keepdim=True)
errors = (weights * singles - target).norm(dim=1) / target.norm()
single = (weights * singles)[errors.argmin()]
many = torch.exp(-torch.logspace(-2.5, 0.5, 16, dtype=torch.float64)[:, None] * t)  # sixteen rates together
sums = torch.linalg.lstsq(many.T, target[:, None]).solution.T @ many
error_single, error_sum = errors.min().item(), ((sums[0] - target).norm() / target.norm()).item()

# %% tags=["hide"]
fig, ax = style.figure(height=2.6)
ax.loglog(t + 1, target, label="1 / (1 + t)", color=style.INK)
ax.loglog(t + 1, sums[0], "--", label="one channel of Mamba-1, 16 rates")
ax.loglog(t + 1, single, label="one head of Mamba-2, one rate")
ax.set(xlabel="t + 1", ylabel="response", ylim=(1e-4, 2))
ax.legend()
style.caption(
    fig,
    "A memory that fades like a power of time, and the best imitations of it by one exponential and by sixteen.",
)

# %% [markdown]
# The best single rate misses by {{ 100 * error_single:.0f}} %, sixteen rates by {{ 100 * error_sum:.1g}} %. In a
# trained network the loss is smaller than it looks: there are many heads with different rates, $\Delta$ moves the rate
# with every token, and a state eight times as large remembers more facts. The paper's language models are better for
# the trade. But it is a trade, and on tasks that need many time scales in few heads it can be felt.
#
# ## Check
#
# One scan, five ways: the library's operator, its definition step by step, the matrix, the chunks, and Mamba-1's scan
# given the same rate in every state of every channel, which is all that tells SSD from S6.

# %%
as_batch = [t[None] for t in (x[:, None], delta[:, None])]  # a batch of one, one head
fast = ops.ssd(*as_batch, A[None], B[None], C[None])[0, :, 0]
slow = ops.ssd(*as_batch, A[None], B[None], C[None], backend="reference")[0, :, 0]
same_rate = A.expand(headdim, state)
scan = ops.selective_scan(x[None], delta[:, None].expand(-1, headdim)[None], same_rate, B[None], C[None])[0]
style.check("the matrix of three factors and the library's", M, from_library, 1e-12)
style.check("the operator and the matrix", fast, M @ x, 1e-12)
style.check("step by step and the matrix", slow, M @ x, 1e-12)
style.check("the library's chunks and the matrix", multiply_in_chunks(delta, A, B, C, x, 10), M @ x, 1e-12)
style.check("Mamba-1's scan with one rate and the matrix", scan, M @ x, 1e-12)

# %% [markdown]
# ## Exercises
#
# **1.** Set $A = 0$ and $\Delta = 1$. Which known layer is $M$ then? Write its recurrence, and check the two against
# each other.

# %% [markdown] tags=["answer"]
# $L$ becomes the mask of ones, and $y_i = \sum_{j \le i} (C_i \cdot B_j)\, x_j$: linear attention (arXiv 2006.16236)
# without its normaliser. The state is the running sum $\sum_j x_j B_j^\top$, which only ever grows: nothing is
# forgotten, and soon everything lies on top of everything else. The decay is what Mamba adds to it.

# %% tags=["answer"]
linear = ops.ssd(x[None, :, None], torch.ones(1, length, 1), torch.zeros(1), B[None], C[None])[0, :, 0]
running_sum = torch.einsum("tp,tn->tpn", x, B).cumsum(0)
style.check("SSD without decay and linear attention", linear, torch.einsum("tpn,tn->tp", running_sum, C), 1e-12)

# %% [markdown]
# **2.** Take the largest block below the diagonal: outputs from the second half, inputs from the first. Factor it into
# a tall and a wide matrix with `state` columns and rows, by the formula of the section on rank.

# %% [markdown] tags=["answer"]
# With $m$ the last step of the first half. What stands between the two factors is the state that a model carries from
# one half of a document to the other; all that the second half will ever know of the first is in it.

# %% tags=["answer"]
half = length // 2
reads = torch.exp(total[half:] - total[half - 1])[:, None] * C[half:]  # (32, state)
writes = (torch.exp(total[half - 1] - total[:half]) * delta[:half])[:, None] * B[:half]  # (32, state)
style.check("the block and its two factors", M[half:, :half], reads @ writes.T, 1e-12)

# %% [markdown]
# **3.** Suppose that moving one number of the state in and out of memory takes as long as $w$ multiplications. Which
# chunk size minimises the time per token? Where does it lie for $N = 128$, $P = 64$ and $w = 100$?

# %% [markdown] tags=["answer"]
# Per token $c(N + P) + 2NP + wNP/c$. The derivative $(N + P) - wNP/c^2$ vanishes at $c = \sqrt{wNP/(N + P)}$, here
# {{ math.sqrt(100 * 128 * 64 / (128 + 64)):.0f}}: between 64 and 128, about where implementations have ended up. More
# bandwidth moves it down, faster matrix units move it up.
