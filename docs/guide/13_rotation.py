# ---
# title: "Mamba-3: a state that turns"
# ---
# %% [markdown]
# # Mamba-3: a state that turns
#
# A light switch is the simplest machine with a memory: press it and it is on, press it again and it is off. Is the
# light on after a thousand presses? You need one bit of state. Yet Mamba-1 and Mamba-2, with thousands of numbers in
# their state, can't learn it for sequences longer than those they were trained on. This chapter shows why, and the
# three things that Mamba-3 (arXiv 2603.15569) changes: **rotation**, the **trapezoid's rule**, and **several inputs to
# one state** (MIMO).
#
# ## What decay can't do
#
# The task is called *parity*: given bits, is the number of ones so far odd? Look at one number of a decaying state:
#
# $$ h_t = a_t\, h_{t-1} + b_t, \qquad a_t = e^{\Delta_t A} > 0 . $$
#
# Whatever the token, this map has a positive slope, so it preserves order: if $h < h'$ before the token, then
# $a_t h + b_t < a_t h' + b_t$ after it. Now let $h$ be where the state lies after an even number of ones and $h'$ after
# an odd one. A one must *exchange* them. No map of positive slope does that. A mixture of many such numbers can fake it
# for short sequences, by counting and having the output layer remember which counts are odd; but for every length there
# is a longer one at which it breaks (arXiv 2411.12537 proves it for finite precision; arXiv 2404.08819 looks at the
# wider class of such tasks).
#
# The cure is one sign: a multiplication by $-1$ exchanges. And the smooth road from $1$ to $-1$, along which a network
# can learn by gradients, leads through the complex plane. $e^{i\varphi}$ is $1$ at $\varphi = 0$ and $-1$ at $\pi$:
# a *rotation*.
#
# ## A switch built by hand
#
# Two numbers of state, read as a point in the plane. Write the point $(1, 0)$ at a start token and let nothing decay.
# A zero leaves it where it is, a one turns it by $\pi$. Read its first coordinate: $+1$ is even, $-1$ is odd. In the
# library's scan of Mamba-3 the turn of a step is $\pi \tanh(\text{angles}_t)\, \Delta_t$:

# %%
import math

import style
import torch
import torch.nn.functional as F
from torch import nn

from mambakit import ops
from mambakit.lab import mechanisms
from mambakit.lab.tasks import Parity
from mambakit.nn import Backbone, Mamba3
from mambakit.ops.rotation import rotate

torch.manual_seed(0)
length = 100_000
bits = torch.randint(2, (1, length + 1))
bits[:, 0] = 0  # the start token
written = torch.zeros(1, length + 1, 1, 1)  # (batch, length, heads, headdim)
written[:, 0] = 1.0
one = torch.ones(1, length + 1, 1)  # (batch, length, heads)
point = torch.tensor([1.0, 0.0]).expand(1, length + 1, 1, 2)  # (batch, length, groups, state)
switch = ops.mamba3_scan(
    written,
    dt=one,
    A=0 * one,  # no decay
    B=point,
    C=point,
    trap=40 * one,  # see below: the input of the present step alone
    angles=20.0 * bits[..., None],  # tanh(20) is 1: a turn by pi
)[0, 1:, 0, 0]
parity = bits[0, 1:].cumsum(0) % 2
right = ((switch < 0) == parity.bool()).double().mean().item()
print(f"right after each of {length} bits: {right:.1%}")

# %% [markdown]
# Two numbers, {{ length }} bits, no error. (The angle is added up in float64 inside and kept within one turn; a sum
# in float32 would drift.)
#
# ## Turning the state is turning B and C
#
# Now in general. Let pairs of state coordinates be complex numbers, and let a step not only shrink but turn them, by an
# angle $\varphi_t$ that depends on the token:
#
# $$ h_t = a_t\, e^{-i\varphi_t}\, h_{t-1} + \Delta_t\, x_t B_t, \qquad y_t = \mathrm{Re}\,(\overline{C_t}\, h_t) . $$
#
# One could implement complex states. But look at it from a frame that turns along, $\tilde h_t = e^{i\theta_t} h_t$
# with $\theta_t = \varphi_1 + \dots + \varphi_t$. There the state does not turn at all, and what is written and read
# turns instead:
#
# $$ \tilde h_t = a_t\, \tilde h_{t-1} + \Delta_t\, x_t\, \underbrace{e^{i\theta_t} B_t}_{k_t}, \qquad
#    y_t = \mathrm{Re}\,(\overline{\underbrace{e^{i\theta_t} C_t}_{q_t}}\, \tilde h_t) . $$
#
# So a complex Mamba is a real one with $B$ and $C$ rotated by a running angle. Every kernel for real states still
# serves, which is why Mamba-3 can afford it. Attention knows the trick as RoPE, rotary positions (arXiv 2104.09864):
# there the angle grows evenly, with position; here each token says how far to turn. Both computations, side by side:


# %%
def turning(x, a, turn, dt, B, C):
    """The complex recurrence, step by step; x, a, turn, dt (length,), B and C (length,) complex."""
    h, y = torch.zeros((), dtype=torch.complex128), []
    for t in range(len(x)):
        h = a[t] * torch.exp(-1j * turn[t]) * h + dt[t] * x[t] * B[t]
        y.append((C[t].conj() * h).real)
    return torch.stack(y)


def in_the_turning_frame(x, a, turn, dt, B, C):
    """The same by a real scan: of keys and queries that turn."""
    theta = turn.cumsum(0)
    k, q = (torch.view_as_real(torch.exp(1j * theta) * t) for t in (B, C))  # (length, 2)
    rate = torch.log(a) / dt  # per step and head
    return ops.mamba3_scan(
        x[None, :, None, None],
        dt[None, :, None],
        rate[None, :, None],
        k[None, :, None],
        q[None, :, None],
        torch.full((1, len(x), 1), 40.0, dtype=torch.float64),
        torch.zeros(1, len(x), 1, dtype=torch.float64),  # already turned
    )[0, :, 0, 0]


steps = 60
x, a, dt = torch.randn(steps).double(), 0.8 + 0.2 * torch.rand(steps).double(), 0.1 + torch.rand(steps).double()
turn = math.pi * (2 * torch.rand(steps).double() - 1)
B, C = torch.randn(2, steps, dtype=torch.complex128)
direct, turned = turning(x, a, turn, dt, B, C), in_the_turning_frame(x, a, turn, dt, B, C)
style.check("a turning state and turned B and C", turned, direct, 1e-12)

# %% [markdown]
# ## Learned, not built
#
# Building a switch by hand proves little; can gradient descent find it? Train one layer of Mamba-2 and one of Mamba-3,
# of the same width and state, with the parity of every prefix as the answer. Sequences grow as training goes on, from
# 16 bits to 128; then we read up to 2048. Three seeds each. The step $\Delta$ starts large: to turn by $\pi$ it
# must be near one, and models that begin with the small steps of a language model take far longer to get there.


# %%
class Reader(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.embedding = nn.Embedding(2, 16)
        options = {"d_state": 16, "headdim": 16, "dt_min": 0.1, "dt_max": 1.0}
        self.backbone = Backbone(16, 1, mixer, options)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens):
        return self.head(self.backbone(self.embedding(tokens))[0])  # (batch, length, 2)


task = Parity(supervise="every")
longest = 128  # of training


def train(mixer, seed, steps=500):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Reader(mixer)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        reached = 16 + int((longest - 16) * max(0, step - 100) / (steps - 100))
        batch = task.batch("train", 32, int(torch.randint(reached // 2, reached + 1, ())), generator)
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, length):
    """Share of sequences whose last answer is right."""
    batch = task.batch("test", 256, length, torch.Generator().manual_seed(length))
    return (model(batch.tokens)[:, -1].argmax(-1) == batch.targets[:, -1]).double().mean().item()


seeds, lengths = (0, 1, 2), [8, 16, 32, 64, 128, 192, 256, 512, 1024, 2048]
models = {mixer: [train(mixer, seed) for seed in seeds] for mixer in ("mamba2", "mamba3")}
found = {mixer: [[accuracy(model, n) for n in lengths] for model in group] for mixer, group in models.items()}

# %% tags=["hide"]
fig, ax = style.figure(height=2.9)
for mixer, name, colour in (("mamba2", "Mamba-2", style.COLOURS[0]), ("mamba3", "Mamba-3", style.COLOURS[1])):
    for seed, curve in zip(seeds, found[mixer], strict=True):
        ax.plot(lengths, curve, "o-", color=colour, markersize=3, label=name if seed == 0 else None)
ax.set_xscale("log", base=2)
ax.axvspan(2, longest, color=style.GRID, zorder=0, linewidth=0)
ax.axhline(0.5, color=style.QUIET, linewidth=0.8, linestyle=":")
ax.set(xlabel="bits read", ylabel="last answer right", xlim=(7, 2300), ylim=(0.4, 1.03))
ax.legend()
style.caption(
    fig,
    "Parity at the end of sequences of different lengths, three seeds each; the lengths of training are shaded. Dotted "
    "is guessing.",
)

# %% [markdown]
# At 32 bits the three Mamba-2 answer {{ ", ".join(f"{curve[2]:.0%}" for curve in found["mamba2"]) }} right, where a
# coin has 50%, and the three Mamba-3 {{ ", ".join(f"{curve[2]:.0%}" for curve in found["mamba3"]) }}; at 128, the
# longest that they were trained on, {{ ", ".join(f"{curve[4]:.0%}" for curve in found["mamba2"]) }} and
# {{ ", ".join(f"{curve[4]:.0%}" for curve in found["mamba3"]) }}. But at 2048 Mamba-3 is at
# {{ ", ".join(f"{curve[-1]:.0%}" for curve in found["mamba3"]) }}. So it learns what the other can't, and it still
# does not read for ever. Why?
#
# Did it find *our* switch at all? Open them. With one layer and no convolution, the turn of a step depends on its token
# alone, so each pair of state coordinates has two turns, one for a 0 and one for a 1:


# %%
def turns_of(model, tokens):
    """(length, heads * pairs), how far each token turns each pair of the state."""
    names = ["layers.0.mixer.angles", "layers.0.mixer.delta"]
    with torch.no_grad():
        _, cache = mechanisms.run_with_cache(model, tokens[None], names)
    angles, delta = (cache[name][0] for name in names)
    return (math.pi * torch.tanh(angles)[:, None] * delta[..., None]).flatten(1)


def missed(turn, goal):
    """What a turn has too much for its goal, whole turns not counted."""
    return torch.remainder(turn - goal + math.pi, 2 * math.pi) - math.pi


both = [turns_of(model, torch.tensor([0, 1])) for model in models["mamba3"]]  # (2, heads * pairs) each
switches, drifts = [], []
for of_zero, of_one in both:
    errors = torch.stack([missed(of_zero, 0.0), missed(of_one, math.pi)])
    switches.append(errors.abs().sum(0).argmin().item())
    drifts.append(errors.mean(0)[switches[-1]].abs().item())  # a token, ones and zeros being equally frequent
breaks = [next((n for n, share in zip(lengths, curve, strict=True) if share < 0.75), None) for curve in found["mamba3"]]
style.table(
    ["seed", "turn at a 0", "turn at a 1", "drift a token", "a quarter turn after", "below 75% at"],
    [
        [seed, of_zero[at].item(), of_one[at].item(), drift, round(math.pi / 2 / drift), wrong or "never"]
        for seed, (of_zero, of_one), at, drift, wrong in zip(seeds, both, switches, drifts, breaks, strict=True)
    ],
)
batch = task.batch("test", 1, 200, torch.Generator().manual_seed(7))
path = (
    torch.remainder(turns_of(models["mamba3"][0], batch.tokens[0])[:, switches[0]].cumsum(0) / math.pi + 0.5, 2) - 0.5
)

# %% tags=["hide"]
fig, (left, right_panel) = style.figure(columns=2, height=3.0, width_ratios=(1, 2))
left.axvline(0, color=style.GRID)
for at in (-1, 1):
    left.axhline(at, color=style.GRID)
left.plot(*both[0] / math.pi, "o", color=style.COLOURS[0])
left.plot(*both[0][:, switches[0]] / math.pi, "o", markersize=11, markerfacecolor="none", color=style.COLOURS[5])
left.set(xlabel="turn at a 0, half turns", ylabel="turn at a 1, half turns", title="each pair of coordinates")
for value, colour in ((0, style.COLOURS[0]), (1, style.COLOURS[1])):
    where = (batch.targets[0] == value).nonzero()[:, 0]
    right_panel.plot(where, path[where], "o", markersize=3, color=colour, label=("even", "odd")[value])
right_panel.set(xlabel="bits read", ylabel="angle, half turns", title="angle of the circled pair", ylim=(-0.6, 1.6))
right_panel.legend(title="ones so far", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
style.caption(
    fig,
    "Left: how far a trained Mamba-3 turns each pair of its state at a 0 and at a 1; the grey lines cross at the "
    "switch built by hand. Right: the angle of the circled pair as it reads. Even and odd lie half a turn apart, and "
    "drift.",
)

# %% [markdown]
# It did: several pairs turn by almost nothing at a zero and by almost $\pm\pi$ at a one. *Almost* is the answer to
# the question. A pair that misses its turn by a hundredth is a quarter turn off after some hundred and fifty bits, and
# then even looks like odd. Training only makes the turn as exact as the longest sequences of training demand, and the
# table shows that it stops not far beyond. This is a different kind of limit from Mamba-2's: the exact solution exists,
# lies next to the learned one, and longer training gets closer to it. (Mamba-3's paper
# trains on up to 40 bits for tens of thousands of steps, and reports 100% at 160.)
#
# ## The trapezoid's rule
#
# The second change is about accuracy. A step of a continuous system $h' = Ah + Bx$ from $t-1$ to $t$ needs the
# integral of the input over the step. Mamba-1 and -2 approximate it by one end, $\Delta_t B_t x_t$: Euler's rule,
# whose error shrinks in proportion to the step. Mamba-3 weighs both ends, the one behind decayed by the step:
#
# $$ h_t = a_t h_{t-1} + (1 - \lambda_t)\,\Delta_t\, a_t\, B_{t-1} x_{t-1} + \lambda_t\, \Delta_t\, B_t x_t,
#    \qquad \lambda_t = \mathrm{sigmoid}(\text{trap}_t) . $$
#
# $\lambda = 1$ is Euler again, $\lambda = \tfrac12$ the classical trapezoid, whose error shrinks with the *square* of
# the step; the network chooses $\lambda_t$ for each token. Try it on $h' = -h + \sin t$, whose solution is known:


# %%
def solved(count, lam, end=5.0):
    """h(end) of h' = -h + sin t from h(0) = 0, in `count` steps of mamba3_scan."""
    times = torch.linspace(0, end, count + 1, dtype=torch.float64)
    all_one = torch.ones(1, count + 1, 1, dtype=torch.float64)
    trap = torch.logit(torch.tensor(lam, dtype=torch.float64)) * all_one
    unit = torch.eye(1, 2, dtype=torch.float64).expand(1, count + 1, 1, 2)
    step = (end / count) * all_one
    y = ops.mamba3_scan(torch.sin(times)[None, :, None, None], step, -all_one, unit, unit, trap, 0 * all_one)
    return y[0, -1, 0, 0].item()


exact = (math.sin(5.0) - math.cos(5.0) + math.exp(-5.0)) / 2
counts = [10, 20, 40, 80, 160, 320]
rules = {"λ = 1, Euler": 1 - 1e-15, "λ = 3/4": 0.75, "λ = 1/2, trapezoid": 0.5}
misses = {rule: [abs(solved(n, lam) - exact) for n in counts] for rule, lam in rules.items()}
orders = [math.log2(each[-2] / each[-1]) for each in misses.values()]

# %% tags=["hide"]
fig, ax = style.figure(height=2.7)
for rule, each in misses.items():
    ax.loglog([n / 5 for n in counts], each, "o-", label=rule, base=2)
ax.set_yscale("log", base=10)
ax.set(xlabel="steps a second", ylabel="error at t = 5")
ax.legend()
style.caption(fig, "Error of a smooth system: twice as many steps halve Euler's and quarter the trapezoid's.")

# %% [markdown]
# The measured orders are {{ orders[0]:.2f}} for Euler, {{ orders[1]:.2f}} for $\lambda = 3/4$ and
# {{ orders[2]:.2f}} for the trapezoid. Tokens are not samples of something smooth, so accuracy is not quite the point.
# This is: the state now takes in *two neighbouring tokens at once*, $B_{t-1}x_{t-1}$ and $B_t x_t$, which is what the
# short convolution was for. Mamba-3 drops the convolution; with the biases that it adds to $B$ and $C$ the trapezoid
# takes its place.
#
# ## Several inputs to one state
#
# The third change concerns decoding. There each token moves the whole state through memory for two multiplications per
# number: the processor waits. MIMO (multiple inputs, multiple outputs) does more work with the state while it is
# there: $r$ vectors are written per token, $h \leftarrow a h + \sum_r v_r k_r^\top$, and $r$ are read. The state keeps
# its size, the work on it grows $r$ times. The library's mixer takes `mimo_rank`:

# %%
rows = []
for rank in (1, 4):
    mixer = Mamba3(d_model=64, d_state=32, headdim=32, mimo_rank=rank)
    y, after = mixer(torch.randn(2, 10, 64))
    parts = mixer.split(mixer.in_proj(torch.randn(2, 10, 64)))
    assert y.shape == (2, 10, 64)
    assert after.ssm.shape == (2, 4, 32, 32), "the state has no axis of ranks"
    assert after.k.shape == (2, rank, 4, 32)
    rows.append(
        [rank, str(tuple(after.ssm.shape)), str(tuple(parts.B.shape)), sum(p.numel() for p in mixer.parameters())]
    )
style.table(
    ["rank", "state: batch, heads, headdim, state", "B: batch, length, [rank,] groups, state", "parameters"], rows
)

# %% [markdown]
# ## Check
#
# All of it at once, in float64: decay, rotation, trapezoid and four ranks, by the operator in chunks and by its
# definition step by step. And the layer read at once against the layer that reads one token at a time.

# %%
heads, headdim, state, rank = 3, 4, 8, 4
wide = {"dtype": torch.float64}
xs, steps_in, traps = (
    torch.randn(2, 70, heads, headdim, **wide),
    torch.rand(2, 70, heads, **wide),
    torch.randn(2, 70, heads),
)
Bs, Cs = torch.randn(2, 2, 70, rank, 1, state, **wide)
some_angles, mimo = torch.randn(2, 70, state // 2, **wide), torch.randn(3, heads, rank, headdim, **wide)
arguments = (xs, steps_in, -torch.rand(2, 70, heads, **wide), Bs, Cs, traps, some_angles)
options = {"mimo_x": mimo[0], "mimo_z": mimo[1], "mimo_o": mimo[2], "z": torch.randn_like(xs)}
fast = ops.mamba3_scan(*arguments, **options)
style.check("chunks and the definition", fast, ops.mamba3_scan(*arguments, **options, backend="reference"), 1e-12)

layer = Mamba3(16, d_state=8, headdim=8, dtype=torch.float64)
hidden, carried, outputs = torch.randn(1, 30, 16, **wide), None, []
with torch.no_grad():
    at_once, _ = layer(hidden)
    for token in hidden.unbind(1):
        y, carried = layer.step(token, carried)
        outputs.append(y)
style.check("the layer at once and step by step", torch.stack(outputs, dim=1), at_once, 1e-12)

# %% [markdown]
# ## Exercises
#
# **1.** Build a machine by hand that counts *modulo three*: which of 0, 1, 2 is the number of ones so far? Two numbers
# of state are enough.

# %% [markdown] tags=["answer"]
# Turn by $2\pi/3$ at a one: $\tanh(\text{angles}) = 2/3$. Now the point has three places, and one reading is not
# enough: read it with three vectors $C$ at the three angles, and the largest wins. Rotations of two coordinates can
# count modulo anything. What they can't do is keep track of things whose order matters (which of five cups hides the
# ball, after swaps): rotations of a plane commute, swaps don't.

# %% tags=["answer"]
third = torch.atanh(torch.tensor(2 / 3))
readings = []
for place in range(3):
    reader = torch.tensor([math.cos(2 * math.pi * place / 3), -math.sin(2 * math.pi * place / 3)]).expand_as(point)
    scan = ops.mamba3_scan(written, one, 0 * one, point, reader, 40 * one, third * bits[..., None])
    readings.append(scan[0, 1:, 0, 0])
counted = torch.stack(readings).argmax(0)
style.check("counted modulo three by turning, and by counting", counted, bits[0, 1:].cumsum(0) % 3, 0.0)

# %% [markdown]
# **2.** Let the turn be the same for all tokens, $\varphi_t = \varphi$, and nothing decay. Show that $q_i \cdot k_j$
# depends on $i$ and $j$ through $i - j$ alone, and check it with `ops.rotation`'s functions.

# %% [markdown] tags=["answer"]
# $\theta_i = i\varphi$, and for rotations
# $(R_{\theta_i} C) \cdot (R_{\theta_j} B) = C \cdot R_{\theta_j - \theta_i} B = C \cdot R_{(j - i)\varphi} B$. That
# is RoPE: with even turns, rotation tells distance and nothing else.

# %% tags=["answer"]
b, c = torch.randn(2, 2, **wide)
even = 0.3 * torch.arange(20, **wide)[:, None]  # (length, pairs)
products = rotate(c.expand(20, 2), even, True) @ rotate(b.expand(20, 2), even, True).T
style.check("the same on every diagonal", products[1:, 1:], products[:-1, :-1], 1e-12)

# %% [markdown]
# **3.** Write the trapezoid as a matrix: for scalar decays $a_t$ and $B = C = 1$, show that $M = L\,W$ with $L$ the
# decays of chapter 12 and $W$ with two diagonals. Check it against `ops.mamba3_scan`.

# %% [markdown] tags=["answer"]
# Define the input of step $t$ as $w_t = \lambda_t\Delta_t x_t + (1-\lambda_t)\Delta_t a_t x_{t-1}$; then
# $h_t = a_t h_{t-1} + w_t$ and $y = Lw$. So $W$ has $\lambda_t \Delta_t$ on the diagonal and
# $(1-\lambda_t)\Delta_t a_t$ below it: a convolution of width two whose taps depend on the data, in front of the scan.

# %% tags=["answer"]
n = 12
d, rate, trap = torch.rand(n, **wide), -torch.rand(n, **wide), torch.randn(n, **wide)
values, lam = torch.randn(n, **wide), torch.sigmoid(trap)
log_decay = (d * rate).cumsum(0)
L = torch.exp(log_decay[:, None] - log_decay).tril()
W = torch.diag(lam * d) + torch.diag(((1 - lam) * d * torch.exp(d * rate))[1:], -1)
unit = torch.eye(1, 2, **wide).expand(1, n, 1, 2)
per_head = (t[None, :, None] for t in (d, rate))
y = ops.mamba3_scan(
    values[None, :, None, None], *per_head, unit, unit, trap[None, :, None], torch.zeros(1, n, 1, **wide)
)
style.check("the trapezoid as a matrix", y[0, :, 0, 0], L @ W @ values, 1e-12)
