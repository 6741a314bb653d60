# ---
# title: Selection
# ---
# %% [markdown]
# # Selection
#
# One change turns S4 into the layer called S6, the heart of Mamba: **the step $\Delta$ and the vectors $B$ and $C$
# are made from the input, anew at every token** (arXiv 2312.00752). This chapter builds it from the end: first a
# memory that solves the task of the last chapter without any training, then the equations, then a look into a trained
# layer to see whether it does what we think it does.
#
# ## A clock that stops
#
# The last chapter ended with a wish: let time stand still at every silence. In a state-space model time *is* the step
# $\Delta$: one mode is multiplied by $e^{\Delta A}$ and is written to with $\Delta B u$. With $\Delta = 0$ it is
# multiplied by one, and nothing is written. So set $\Delta = 1$ for a letter and $\Delta = 0$ for silence, and run the
# library's own scan: one channel for each of six letters, four modes a channel.

# %%
import inspect
from collections.abc import Callable

import style
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit import ops
from mambakit.lab.mechanisms import delta_trace, run_with_hooks
from mambakit.lab.models import MambaForComposite
from mambakit.lab.tasks import SelectiveCopying, accuracy
from mambakit.nn import S4D, Mamba
from mambakit.ops.reference.selective_scan import selective_scan as definition

letters, kinds = 4, 6
decays = torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=torch.float64)  # of the four modes, for one unit of time
A = decays.log().expand(kinds, letters)  # (dim, state)


def state_after(tokens: Tensor, delta: Tensor, write: Tensor) -> Tensor:
    """The final state (batch, dim, state): steps delta (batch, length), B = write (batch, length) for all modes."""
    u = F.one_hot(tokens, kinds + 2)[..., 1:-1].double()  # a channel for each letter
    B = write[..., None].expand(-1, -1, letters)
    _, state = ops.selective_scan(u, delta[..., None].expand_as(u), A, B, B, return_final_state=True)
    return state


def read_off(state: Tensor) -> Tensor:
    """The letters (batch, letters), if exactly four steps of time have passed since the first was written."""
    ages = torch.arange(letters - 1, -1, -1, dtype=torch.float64)
    powers = decays[:, None] ** ages  # (state, letters): how much of the letter of each age is left in each mode
    return torch.linalg.solve(powers, state.transpose(1, 2)).argmax(-1) + 1


rows = []
for length in (16, 256, 4096):
    task = SelectiveCopying(length=length, data_tokens=letters, vocabulary=kinds + 2)
    tokens, targets, _ = task.batch("test", 200, length + letters, torch.Generator().manual_seed(0))
    tokens = tokens[:, :length]
    letter = (tokens > 0).double()
    for clock, delta in (("stops at silence", letter), ("runs on", torch.ones_like(letter))):
        read = read_off(state_after(tokens, delta, torch.ones_like(letter)))
        rows.append((length, clock, 100 * (read == targets).double().mean().item()))
style.table(["length", "the clock", "tokens right, %"], rows)

# %% [markdown]
# All of it, at any length, with four numbers of memory for each letter and no training. The silence is not *forgotten*
# by this memory, it never *happened*: after the scan the state is, bit for bit, that of the four letters read one
# after another. With a clock that runs on, the oldest letters have faded by an unknown amount, and the reading is
# wrong. Everything depends on who turns the clock, and that must be the token itself.
#
# ## The equations
#
# This is Algorithm 2 of the paper beside Algorithm 1, with the shapes for one token of `dim` channels. What is new is
# marked with a star.
#
# | S4 (time-invariant) | S6 (selective) |
# |---|---|
# | $A$ (dim, state): a parameter | $A$ (dim, state): a parameter |
# | $B$ (dim, state): a parameter | $B_t = W_B\, x_t$ (state,) * |
# | $C$ (dim, state): a parameter | $C_t = W_C\, x_t$ (state,) * |
# | $\Delta$ (dim,) $= \mathrm{softplus}(b)$ | $\Delta_t = \mathrm{softplus}(b + W_\Delta\, x_t)$ (dim,) * |
# | $\bar A, \bar B$ (dim, state) | $\bar A_t = e^{\Delta_t A}$, $\bar B_t = \Delta_t B_t$ (dim, state) * |
# | $y = K * x$: either form | $h_t = \bar A_t h_{t-1} + \bar B_t x_t$, $\;y_t = C_t h_t$: recurrence only * |
#
# $A$ stays a parameter. It does not need to be selective, for it acts only through $\Delta_t A$, and $\Delta_t$ is.
# $B_t$ and $C_t$ are shared by all channels, as keys and queries are; $\Delta_t$ is each channel's own. And here is the
# departure of the code from the paper once more: the paper's $\bar B$ is that of zero-order hold, the code's is
# Euler's (chapter 2).
#
# In code, with the same letters:


# %%
class S6(nn.Module):
    """Algorithm 2, on x (batch, length, dim)."""

    def __init__(self, dim: int, state: int) -> None:
        super().__init__()
        rank = -(-dim // 16)  # of W_delta: a step for every channel, from a few features
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(dim, 1))
        self.W_B, self.W_C = nn.Linear(dim, state, bias=False), nn.Linear(dim, state, bias=False)
        self.W_delta = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim))

    def forward(self, x: Tensor) -> Tensor:
        A, B, C = -torch.exp(self.A_log), self.W_B(x), self.W_C(x)
        delta = F.softplus(self.W_delta(x))  # (batch, length, dim)
        h, y = x.new_zeros(len(x), *A.shape), []
        for t in range(x.shape[1]):
            A_bar = torch.exp(delta[:, t, :, None] * A)  # (batch, dim, state)
            B_bar = delta[:, t, :, None] * B[:, t, None, :]  # (batch, dim, state)
            h = A_bar * h + B_bar * x[:, t, :, None]
            y.append((h * C[:, t, None, :]).sum(-1))
        return torch.stack(y, dim=1)


# %% [markdown]
# The library's definition, which every faster backend is tested against, is hardly longer. It adds what surrounds the
# recurrence in Mamba: the skip $Du$, the gate $\mathrm{silu}(z)$, and a state to start from and to hand on.

# %%
print(inspect.getsource(definition).split("    y = []\n")[1])

# %% [markdown]
# ## The step as a gate
#
# Take $A = -1$, $B = C = 1$ and one state. Under zero-order hold, $\Delta = \mathrm{softplus}(v)$ makes
#
# $$ h_t = (1 - g_t)\, h_{t-1} + g_t\, x_t, \qquad g_t = \mathrm{sigmoid}(v_t) $$
#
# (theorem 1 of the paper; chapter 2 has the two lines of algebra): the gate of a gated RNN. In general a channel has
# 16 states, $A = -1, \dots, -16$ at first, and one $\Delta$ turns them all, each at its own rate. The left panel shows
# what a token does to the past, the right what it writes.

# %% tags=["hide"]
delta = torch.logspace(-3, 1, 200)
fig, axes = style.figure(columns=2, height=2.7)
for n, colour in zip((1, 4, 16), style.COLOURS, strict=False):
    axes[0].semilogx(delta, torch.exp(-n * delta), color=colour, label=f"A = -{n}")
    axes[1].loglog(delta, -torch.expm1(-n * delta) / n, color=colour)
axes[1].loglog(delta, delta, color=style.INK, linestyle=":", label="Δ, as the code has it")
for ax in axes:
    ax.axvspan(1e-3, 0.1, color=style.GRID, alpha=0.6, linewidth=0)
axes[0].set(title="kept of the past: exp(ΔA)", xlabel="step Δ", ylim=(0, 1.03))
axes[1].set(title="written: (exp(ΔA) - 1) / A", xlabel="step Δ")
fig.legend(loc="outside lower center", ncols=4)
style.caption(
    fig,
    "A small step skips: all is kept, nothing is written. A large step resets: the past is forgotten and the input "
    "takes its place. Grey: where Mamba's steps begin. Under the code's Euler rule what is written has no ceiling.",
)

# %% [markdown]
# So there is a plain reading. **$\Delta$ small: skip this token. $\Delta$ large: forget, and write this token.** $B_t$
# says *what* of the token is written, $C_t$ what is asked for. Is that what a trained model does?
#
# ## Looking inside
#
# We train one layer on selective copying, and leave out the short convolution that Mamba has before its scan
# (`d_conv=1`), so that $\Delta_t$ depends on the token at $t$ and on nothing else.

# %%
task = SelectiveCopying(length=16, data_tokens=3, vocabulary=6)  # 0 is silence, 5 asks, 1 to 4 are letters
WHOLE = task.length + task.data_tokens


def train(steps: int, **options: float) -> MambaForComposite:
    """One layer of Mamba that copies selectively."""
    torch.manual_seed(0)
    model = MambaForComposite(1, None, task.vocabulary, 32, 16, mixer="mamba", mixer_options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens, targets, _ = task.batch("train", 32, WHOLE, generator)
        loss = F.cross_entropy(model(tokens, answers=3).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
    return model.eval()


model = train(600, d_conv=1, dt_min=0.1, dt_max=1.0)
tokens, targets, _ = task.batch("test", 1_000, WHOLE, torch.Generator().manual_seed(2))
with torch.no_grad():
    as_trained = accuracy(model(tokens, answers=3), targets)
    delta = delta_trace(model, tokens, answers=3)[0]  # (batch, length, d_inner)
masks = {"silence": tokens == 0, "letters": (tokens > 0) & (tokens < 5), "question marks": tokens == 5}
mean = {name: delta[mask].mean(0) for name, mask in masks.items()}  # (d_inner,) each
order = (mean["letters"] / mean["silence"]).argsort()

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=3.0, width_ratios=(1, 1))
for name, marker in (("silence", "o"), ("letters", "s")):
    axes[0].semilogy(mean[name][order].clamp(min=1e-8), marker, markersize=3, label=name)
axes[0].set(title="mean step of each channel", xlabel="channel, sorted", ylabel="Δ")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
row = tokens[0]
for channel, label in ((order[-1], "a clock of letters"), (order[0], "a clock of silence")):
    axes[1].plot(delta[0, :, channel].cumsum(0) / delta[0, :, channel].sum(), drawstyle="steps-post", label=label)
axes[1].set(title="two clocks on one sequence", ylabel="time passed, share", xticks=range(WHOLE), yticks=[0, 0.5, 1])
axes[1].set_xticklabels(["·abcd?"[token] for token in row])
axes[1].legend(loc="upper left", fontsize=7.5)
style.caption(
    fig,
    "Left: the step of every channel for silence and for letters. Channels on the right stand still in silence; those "
    "on the left do the opposite. Right: the running sum of steps of the two outermost channels along one sequence.",
)

# %%
stops, counts = (
    (mean["letters"] > 10 * mean["silence"]).sum().item(),
    (mean["silence"] > 10 * mean["letters"]).sum().item(),
)
style.table(
    ["channels", "how many", "step at silence", "step at letters", "step at question marks"],
    [
        (name, len(which), *(mean[kind][which].median().item() for kind in masks))
        for name, which in (
            ("wait in silence (ratio above 10)", order[len(order) - stops :]),
            ("wait at letters (ratio below 1/10)", order[:counts]),
            ("neither", order[counts : len(order) - stops]),
        )
    ],
)

# %% [markdown]
# The model answers {{ 100 * as_trained.token:.1f}} % of the tokens right, and it has invented the clock that stops: in
# {{ stops }} of {{ len(order) }} channels the step at silence is less than a tenth of that at letters, mostly by many
# orders of magnitude. It has also invented something that nobody told it to: {{ counts }} channels whose clock stops
# at *letters* and runs in silence. They know how long the silence was, which is what the first kind has thrown away.
#
# A pattern is not yet a cause. So we intervene: hold one of the inputs of the scan at its mean over all tokens, and
# leave all else as it is. What breaks was needed. Beside it, a second model of the same size as Mamba is usually made:
# with the convolution over four tokens, and with its customary first steps.


# %%
def held(model: nn.Module, name: str) -> float:
    """Token accuracy with an input of the scan held at its mean, the same at every position of every sequence."""
    hook = {f"layers.0.mixer.{name}": lambda value: value.mean((0, 1), keepdim=True).expand_as(value)}
    with torch.no_grad():
        return accuracy(run_with_hooks(model, tokens, hook, answers=3), targets).token


usual = train(600)
with torch.no_grad():
    as_usual = accuracy(usual(tokens, answers=3), targets)
    steps = delta_trace(usual, tokens, answers=3)[0]
ratios = (steps[masks["letters"]].mean(0) / steps[masks["silence"]].mean(0)).sort().values
style.table(
    ["held at its mean", "without convolution, tokens right, %", "with it, tokens right, %"],
    [
        ("nothing", 100 * as_trained.token, 100 * as_usual.token),
        *((name, 100 * held(model, name), 100 * held(usual, name)) for name in ("delta", "B", "C")),
    ],
)

# %% [markdown]
# Without the convolution all three are needed. With it the task is solved too, and holding $\Delta$ still does harm,
# but a look at the steps alone would not have told: the mean step at letters is between {{ ratios[0].item():.2f}} and
# {{ ratios[-1].item():.2f}} times that at silence, no channel stands still. Selection is then shared among $\Delta$,
# $B$ and the convolution, which can tell a letter among silence from silence before the scan sees either. So read
# traces of $\Delta$ with care, and test what you read by an intervention.
#
# ## What it costs
#
# In parameters, little. In time-invariant layers $B$ and $C$ are stored, in selective ones the matrices that make them
# are:

# %%
wide = 64
selective_layer = Mamba(wide, d_state=16, expand=1)
time_invariant = S4D(wide, d_state=32)  # 16 pairs of modes
style.table(
    ["of 64 channels with 16 states", "parameters"],
    [
        ("S4D: step", time_invariant.log_dt.numel()),
        ("S4D: B and C (complex)", time_invariant.B.numel() + time_invariant.C.numel()),
        (
            "S6: what makes the step",
            selective_layer.dt_rank * wide + sum(p.numel() for p in selective_layer.dt_proj.parameters()),
        ),
        ("S6: what makes B and C", 2 * selective_layer.d_state * wide),
    ],
)

# %% [markdown]
# What is lost is the convolution. A kernel is the answer to the question *what does an impulse do?*, and the answer
# now depends on everything else in the sequence. With it goes superposition, the response to a sum being the sum of
# the responses, and with superposition the FFT. Measured on the layer above, and on the same scan with everything it
# takes from the input held fast:

# %%
torch.manual_seed(0)
layer = S6(8, 4)
first, second = torch.randn(2, 1, 40, 8)
delta, B, C = 0.3 * torch.rand(1, 1, 8), torch.randn(1, 1, 4), torch.randn(1, 1, 4)
fixed = [delta.expand(1, 40, 8), -torch.exp(layer.A_log), B.expand(1, 40, 4), C.expand(1, 40, 4)]


def distance(respond: Callable[[Tensor], Tensor]) -> float:
    """Of the response to a sum from the sum of the responses, relative to the latter."""
    with torch.no_grad():
        whole, parts = respond(first + second), respond(first) + respond(second)
    return ((whole - parts).norm() / parts.norm()).item()


style.table(
    ["layer", "distance of the response to a sum from the sum of responses"],
    [
        ("S6", distance(layer)),
        ("the same scan with fixed steps, B and C", distance(lambda u: ops.selective_scan(u, *fixed))),
    ],
)

# %% [markdown]
# What is kept, though, is decisive: once $\Delta_t$, $B_t$ and $C_t$ are computed, which each token can do by itself,
# $h_t = \bar A_t h_{t-1} + \bar B_t x_t$ is still **linear in $h$**. A $\tanh$ around it, as in an RNN, would force us
# to go step by step. Without one, steps can be combined before their inputs are known, and a sequence can be read by
# many processors at once. That is the scan of the next chapter. What else is lost, the small memory footprint of a
# convolution, chapter 9 wins back.
#
# ## Check

# %%
layer, mamba = S6(32, 16), Mamba(32, d_state=16, expand=1)
x = torch.randn(2, 50, 32)
with torch.no_grad():
    mamba.x_proj.weight.copy_(torch.cat([layer.W_delta[0].weight, layer.W_B.weight, layer.W_C.weight]))
    mamba.dt_proj.weight.copy_(layer.W_delta[1].weight)
    mamba.dt_proj.bias.copy_(layer.W_delta[1].bias)
    delta, B, C = mamba.select(x)
    scanned = ops.selective_scan(
        x, delta, -torch.exp(mamba.A_log), B, C, delta_bias=mamba.dt_proj.bias, delta_softplus=True
    )
    style.check("Algorithm 2 by hand and the scan of nn.Mamba", layer(x), scanned, 1e-5)

sparse = torch.tensor([[0, 3, 0, 0, 1, 1, 0, 6, 0]])
dense, always = sparse[sparse > 0][None], torch.ones(1, 9, dtype=torch.float64)
style.check(
    "a clock stopped at silence and no silence at all",
    state_after(sparse, (sparse > 0).double(), always),
    state_after(dense, always[:, :4], always[:, :4]),
    1e-15,
)

# %% [markdown]
# ## Exercises
#
# **1.** The scan uses Euler's $\bar B = \Delta B$. Change what is given to `ops.selective_scan`, and not the scan, so
# that it computes exactly the gated RNN of theorem 1.
#
# **2.** In the memory without training, leave the clock running and gate only what is written: $\Delta = 1$
# everywhere, $B = 0$ at silence. Does the reading still work? Which of $\Delta$ and $B$ does selective copying need?
#
# **3.** The step of each of `dim` channels is made through a bottleneck of `dt_rank` features. Count what a full
# matrix would cost in a layer of `d_model` 768, as a share of all its parameters.

# %% [markdown] tags=["answer"]
# **1.** With $A = -1$ zero-order hold has $\bar B = 1 - e^{-\Delta}$. The scan multiplies by $\Delta$, so divide the
# input by it first.

# %% tags=["answer"]
v, x = torch.randn(2, 1, 30, 5, dtype=torch.float64)
delta, ones = F.softplus(v), torch.ones(1, 30, 1, dtype=torch.float64)
y = ops.selective_scan(-torch.expm1(-delta) / delta * x, delta, -torch.ones(5, 1, dtype=torch.float64), ones, ones)
h, gated = torch.zeros(1, 5, dtype=torch.float64), []
for x_t, g in zip(x.unbind(1), torch.sigmoid(v).unbind(1), strict=True):
    h = (1 - g) * h + g * x_t
    gated.append(h)
style.check("the scan with a corrected input and a gated RNN", y, torch.stack(gated, dim=1), 1e-12)

# %% [markdown] tags=["answer"]
# **2.** No. Silence writes nothing even without the gate, since its input is zero here: what does the harm is the
# *decay* during it, and $B$ can't stop that. In this memory only $\Delta$ can. (A model may also take rates $A$ near
# zero, which hardly decay; then it can't tell the order of letters by their decay either.)

# %% tags=["answer"]
tokens, targets, _ = SelectiveCopying(256, 4, 8).batch("test", 200, 260, torch.Generator().manual_seed(0))
letter = (tokens[:, :256] > 0).double()
for says, delta, write in (("delta", letter, letter**0), ("B", letter**0, letter), ("both", letter, letter)):
    read = read_off(state_after(tokens[:, :256], delta, write))
    print(f"gated by {says}: {100 * (read == targets).double().mean():.0f} % of the tokens")

# %% [markdown] tags=["answer"]
# **3.** Counted on a real layer:

# %% tags=["answer"]
big = Mamba(768)
all_parameters = sum(p.numel() for p in big.parameters())
bottleneck = 2 * big.dt_rank * big.d_inner
print(
    f"rank {big.dt_rank}: {100 * bottleneck / all_parameters:.1f} % of {all_parameters} parameters; "
    f"a full matrix would add {100 * (big.d_inner**2 - bottleneck) / all_parameters:.0f} %"
)
