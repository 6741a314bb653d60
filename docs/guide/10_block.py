# ---
# title: The block
# ---
# %% [markdown]
# # The block
#
# A selective scan mixes along the sequence and does nothing across channels. To become a layer of a network it needs
# company. Transformers alternate two kinds of layers, attention and a gated MLP; models before Mamba (H3, arXiv
# 2212.14052) did the same with a state space in the place of attention. Mamba melts both into **one block, repeated**
# (arXiv 2312.00752, figure 3). In this chapter we take it apart, draw it from the running module, count it, and find
# out what its most inconspicuous part is for.
#
# ## Drawn from the module
#
# One block, 64 wide, run on a sequence with all its insides shown. The widths on the arrows are the shapes of the
# tensors that ran through; the numbers in the boxes are the sizes of the parameters.

# %%
import itertools

import style
import torch
import torch.nn.functional as F
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

from mambakit import ops
from mambakit.lab.mechanisms import run_with_cache
from mambakit.lab.models import MambaForComposite
from mambakit.lab.tasks import InductionHeads
from mambakit.nn import Attention, Backbone, Mamba, Stepper

torch.manual_seed(0)
backbone = Backbone(d_model=64, n_layer=1).eval()
block = backbone.layers[0]
mixer = block.mixer
with torch.no_grad():
    _, cache = run_with_cache(backbone, torch.randn(1, 20, 64), "layers.0.*")
width = {name.rsplit(".", 1)[1]: tensor.shape[-1] for name, tensor in cache.items()}
for name, tensor in cache.items():
    print(f"{name:27}", tuple(tensor.shape))


def size_of(*owners: nn.Module | nn.Parameter) -> int:
    """How many numbers parameters, or the parameters of modules, hold."""
    return sum(p.numel() for o in owners for p in ([o] if isinstance(o, nn.Parameter) else o.parameters()))


# %% tags=["hide"]
fig, ax = style.figure(height=5.6)
SIDE, MAIN, GATE, ROUND = 1.5, 4.2, 7.2, 9.2
boxes = {
    "norm": (MAIN, 9.2, "norm", block.norm),
    "in_proj": (MAIN, 8.0, "in_proj", mixer.in_proj),
    "conv1d": (MAIN, 6.6, "conv1d, then SiLU", mixer.conv1d),
    "x_proj": (SIDE, 5.3, "x_proj", mixer.x_proj),
    "dt_proj": (SIDE, 4.1, "dt_proj, softplus", mixer.dt_proj),
    "scan": (MAIN, 2.9, "selective_scan\nA_log, D", mixer.A_log, mixer.D),
    "gate": (GATE, 2.9, "× SiLU(z)"),
    "out_proj": (MAIN, 1.5, "out_proj", mixer.out_proj),
    "add": (MAIN, 0.3, "+"),
}


def arrow(points: list[tuple[float, float]], label: object = "", at: tuple[float, float] = (0, 0)) -> None:
    """A line through points that ends in an arrow, and the width of what runs through it."""
    for start, end in itertools.pairwise(points[:-1]):
        ax.plot(*zip(start, end, strict=True), color=style.QUIET, linewidth=1)
    ax.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": style.QUIET, "linewidth": 1})
    ax.text(points[0][0] + at[0], points[0][1] + at[1], str(label), fontsize=8, color=style.COLOURS[0])


for x, y, text, *owners in boxes.values():
    wide, tall = (0.6, 0.5) if text == "+" else (2.3, 1.12 if "\n" in text else 0.86)
    ax.add_patch(
        FancyBboxPatch(
            (x - wide / 2, y - tall / 2),
            wide,
            tall,
            boxstyle="round,pad=0.02,rounding_size=0.12",
            linewidth=0.8,
            facecolor="white" if not owners else style.COLOURS[4],
            edgecolor=style.INK,
            alpha=0.85,
        )
    )
    held = f"\n{size_of(*owners)}" if owners else ""
    ax.text(x, y, text + held, ha="center", va="center", fontsize=8, linespacing=1.1)
ax.text(MAIN, 10.45, "hidden", ha="center", fontsize=8.5)
arrow([(MAIN, 10.35), (MAIN, 9.65)], 64, (0.12, -0.62))
arrow([(MAIN, 8.77), (MAIN, 8.45)], width["input"], (0.12, -0.28))
arrow([(MAIN, 7.57), (MAIN, 7.05)], f"{width['x']}  (x)", (0.12, -0.38))
arrow([(MAIN + 1.15, 8.0), (GATE, 8.0), (GATE, 3.35)], f"{width['z']}  (z)", (0.3, 0.12))
arrow([(MAIN, 6.17), (MAIN, 3.5)], width["x"], (0.12, -0.5))
arrow([(MAIN, 6.0), (SIDE, 6.0), (SIDE, 5.75)], width["x"], (-1.6, 0.1))
arrow([(SIDE, 4.87), (SIDE, 4.55)], mixer.dt_rank, (0.12, -0.28))
arrow([(SIDE + 1.15, 5.3), (MAIN - 0.6, 5.3), (MAIN - 0.6, 3.5)], f"{width['B']} (B), {width['C']} (C)", (0.1, 0.12))
arrow([(SIDE, 3.67), (SIDE, 2.9), (MAIN - 1.15, 2.9)], f"{width['delta']}  (Δ)", (0.12, -0.6))
arrow([(MAIN + 1.15, 2.9), (GATE - 1.15, 2.9)], width["scan_output"], (0.1, 0.12))
arrow([(GATE, 2.47), (GATE, 1.5), (MAIN + 1.15, 1.5)], width["gated"], (0.12, -0.6))
arrow([(MAIN, 1.07), (MAIN, 0.57)], width["output"], (0.12, -0.35))
arrow([(MAIN, 10.0), (ROUND, 10.0), (ROUND, 0.3), (MAIN + 0.32, 0.3)], "residual", (3.2, 0.1))
arrow([(MAIN, 0.03), (MAIN, -0.6)], 64, (0.12, -0.45))
ax.set(xlim=(0, 9.6), ylim=(-0.8, 10.8))
ax.axis("off")
style.caption(
    fig,
    "Mamba's block, drawn from a running module: normed, widened and split in two; one half is convolved, steers the "
    "scan and is scanned, the other gates the result; narrowed again, and added to what came in.",
)

# %% [markdown]
# And as code, with the names that `nn.Mamba` gives its parameters, which are those of the published checkpoints:


# %%
def by_hand(m: Mamba, x: Tensor) -> Tensor:
    """What nn.Mamba computes, one line a box."""
    u, z = m.in_proj(x).chunk(2, dim=-1)  # (batch, length, d_inner) each
    u = m.conv1d(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)  # padded in front, the rest cut off: causal
    u = F.silu(u)
    dt, B, C = m.x_proj(u).split([m.dt_rank, m.d_state, m.d_state], dim=-1)
    delta = F.softplus(F.linear(dt, m.dt_proj.weight) + m.dt_proj.bias)  # (batch, length, d_inner)
    y = ops.selective_scan(u, delta, -torch.exp(m.A_log), B, C)
    y = (y + m.D * u) * F.silu(z)
    return m.out_proj(y)


x = torch.randn(2, 50, 64)
with torch.no_grad():
    style.check("the block by hand and nn.Mamba", by_hand(mixer, x), mixer(x)[0], 1e-5)

# %% [markdown]
# ## Counting
#
# The smallest published Mamba is 768 wide and has 24 such blocks. Its parameters, counted on the module:

# %%
layer = Mamba(768)
total = size_of(layer)
style.table(
    ["parameter", "shape", "numbers", "% of the layer"],
    [(name, " x ".join(map(str, p.shape)), p.numel(), 100 * p.numel() / total) for name, p in layer.named_parameters()],
)
stack = Backbone(768, 24, device="meta")  # shapes without memory
embedding = 50_280 * 768
print(f"24 blocks {size_of(stack)} + embedding {embedding} = {size_of(stack) + embedding} parameters")

# %% [markdown]
# Two projections hold {{ 100 * size_of(layer.in_proj, layer.out_proj) / total:.0f}} % of it all: from $D$ to $4D$ and
# from $2D$ to $D$, $6D^2$ together. Two Mamba blocks therefore weigh what attention and MLP of a Transformer weigh,
# $4D^2 + 8D^2$, and a Mamba has twice as many layers as a Transformer of its size. What makes the sequence model,
# $A$, $D$, $\Delta$, $B$, $C$ and the convolution, is the small change.
#
# ## What the short convolution is for
#
# Between the projection and the scan sits a convolution over four tokens, each channel with its own four weights. It
# is no larger than a rounding error, and papers hardly mention it. Take it out, and see. The task is the one promised
# in chapter 6: when a token comes again, say what followed it the last time (`lab.tasks.InductionHeads`).

# %%
task = InductionHeads(length=16, vocabulary=8)


def learn(layers: int, d_conv: int, steps: int = 240) -> tuple[list[int], list[float]]:
    """The accuracy on new sequences along the training of a model of this depth and convolution."""
    torch.manual_seed(0)
    model = MambaForComposite(layers, None, task.vocabulary, 32, 16, d_conv=d_conv, mixer="mamba")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    generator, at, right = torch.Generator().manual_seed(1), [], []
    test = task.batch("test", 500, task.length, torch.Generator().manual_seed(2))
    for step in range(1, steps + 1):
        tokens, targets, _ = task.batch("train", 32, task.length, generator)
        loss = F.cross_entropy(model(tokens), targets[:, 0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 20 == 0:
            with torch.no_grad():
                at.append(step)
                right.append((model(test.tokens).argmax(-1) == test.targets[:, 0]).float().mean().item())
    return at, right


cases = {
    "one layer, four taps": (1, 4),
    "one layer, two taps": (1, 2),
    "one layer, no convolution": (1, 1),
    "two layers, no convolution": (2, 1),
}
curves = {name: learn(*case) for name, case in cases.items()}

# %% tags=["hide"]
fig, ax = style.figure(height=2.7)
for (name, (at, right)), marker in zip(curves.items(), "os^D", strict=True):
    ax.plot(at, right, marker=marker, markersize=3.5, label=name)
ax.axhline(1 / 7, color=style.QUIET, linestyle=":", linewidth=1)
ax.set(xlabel="training step", ylabel="right", ylim=(0, 1.05))
fig.legend(loc="outside lower center", ncols=2)
style.caption(
    fig,
    "Induction with and without the short convolution. The dotted line is guessing. A convolution of two tokens is "
    "enough; without one neither a layer nor two get anywhere in this time.",
)

# %% [markdown]
# With four taps {{ 100 * curves["one layer, four taps"][1][-1]:.0f}} % are right at the end, with two
# {{ 100 * curves["one layer, two taps"][1][-1]:.0f}} %, without a convolution
# {{ 100 * curves["one layer, no convolution"][1][-1]:.0f}} %. The reason is simple. To remember *what follows the
# star*, the gate $\Delta_t$ must open at the token after it. But $\Delta_t$, $B_t$ and $C_t$ are made from the token
# at $t$ alone, and that token does not know what stood before it. The convolution tells it. It is a glance over the
# shoulder, and turns *write this token* into *write this token, if the last one was a star*: a key and its value in
# one place. Attention has to build the same from two layers, one of which copies the previous token. (In principle a
# second layer of Mamba can play that part too; here it did not learn it in the same time.)
#
# How far back does a block look through its convolution, and how far through its state? An impulse tells.

# %%
torch.manual_seed(1)
probe = Mamba(64)
with torch.no_grad():
    taps = probe.conv1d.weight[:, 0].flip(1)  # the present first
    x = torch.zeros(1, 64, 128)
    x[0, 0] = torch.randn(128)
    convolved = ops.causal_conv1d(x, probe.conv1d.weight.squeeze(1))[0]
    delta, B, C = probe.select(torch.randn(1, 1, 128).expand(1, 64, 128))  # one token over and over
    impulse = torch.zeros(1, 64, 128)
    impulse[0, 0] = 1.0
    scanned = ops.selective_scan(
        impulse, delta, -torch.exp(probe.A_log), B, C, delta_bias=probe.dt_proj.bias, delta_softplus=True
    )[0]

# %% tags=["hide"]
fig, axes = style.figure(columns=2, height=2.4)
axes[0].stem(range(10), convolved[:10].norm(dim=1) / convolved.norm(), basefmt=" ")
axes[0].set(
    title="convolution: four tokens, then nothing", xlabel="steps after the impulse", ylabel="response, relative"
)
axes[1].semilogy(range(64), scanned.abs()[:, ::16], linewidth=1.2)
axes[1].set(title="scan: fading, each channel at its rate", xlabel="steps after the impulse")
style.caption(
    fig,
    "The response to an impulse of a new block's convolution (length of the vector of all channels) and of its scan "
    "(eight channels, the same token at every step; a dip is a change of sign). The one is short, the other fades.",
)

# %% [markdown]
# ## Gate, norm, residual
#
# **The gate.** The second half of `in_proj`, $z$, never sees the sequence. It multiplies the result by
# $\mathrm{silu}(z_t)$: what the scan has found is let through where the present token wants it. This is the gated MLP
# of a Transformer, with the scan in the place of its first half.
#
# **The norm** comes first in the block, not last, so that the residual stream itself is never normed but adds up
# undisturbed. It is RMSNorm, $x / \sqrt{\mathrm{mean}(x^2)}$ times a weight. The sum is kept in float32 even where the
# rest computes in bfloat16.
#
# **The residual** grows with every block that adds to it. So `Backbone` starts with `out_proj` divided by the root of
# the number of blocks: variances of independent contributions add up, and $n$ of them with $1/n$ each make one. We
# undo it, and watch the stream of a new model of 32 blocks, with an input as small as a new embedding:

# %%
torch.manual_seed(0)
deep = Backbone(64, 32)
x = 0.02 * torch.randn(2, 64, 64)
streams = {}
with torch.no_grad():
    for name, factor in (("as it is", 1.0), ("out_proj not divided", len(deep.layers) ** 0.5)):
        for layer in deep.layers:
            layer.mixer.out_proj.weight *= factor
        _, kept = run_with_cache(deep, x, ["embedded", "layers.*.residual"])
        streams[name] = [t.square().mean().sqrt().item() for t in kept.values()]

# %% tags=["hide"]
fig, ax = style.figure(height=2.2)
for name, stream in streams.items():
    ax.plot(stream, label=name)
ax.set(xlabel="after block", ylabel="size of the stream (RMS)", ylim=(0, None))
ax.legend()
style.caption(
    fig, "Root mean square of the residual stream through 32 new blocks, as they are and with larger outputs."
)

# %% [markdown]
# Through 32 blocks the stream grows {{ streams["as it is"][-1] / streams["as it is"][0]:.1f}} times; undivided,
# {{ streams["out_proj not divided"][-1] / streams["out_proj not divided"][0]:.0f}} times, and what the embedding said
# is drowned before training begins. At the end of the stack stands one more norm, `norm_f`, and in a language model
# the head. That is the whole architecture: no positions are encoded anywhere, for the recurrence knows what came
# first.
#
# ## What a block carries
#
# Called without a state a block starts afresh; with the state of an earlier call it carries on. The state has two
# parts, and their sizes do not depend on how much was read:

# %%
_, state = backbone(torch.randn(1, 1000, 64))
style.table(
    ["part of the state", "shape", "what it is"],
    [
        ("conv", " x ".join(map(str, state[0].conv.shape)), "the last d_conv - 1 inputs of the convolution"),
        ("ssm", " x ".join(map(str, state[0].ssm.shape)), "h: d_state numbers for each inner channel"),
    ],
)

# %% [markdown]
# In mambakit one rule holds for every layer: a whole sequence, any way of cutting it up, and single steps give the same
# outputs and the same state. So one can train on whole sequences, read a long prompt in pieces, and then go on token
# by token, with one set of weights and one code path to trust. That is the check of this chapter.
#
# ## Check

# %%
torch.manual_seed(0)
model = Backbone(d_model=64, n_layer=3).eval()
x = torch.randn(2, 40, 64)
with torch.no_grad():
    whole, after = model(x)

    state, parts = None, []
    for part in x.split([1, 13, 0, 26], dim=1):  # an empty part changes nothing
        y, state = model(part, state)
        parts.append(y)
    style.check("the whole sequence and pieces of 1, 13, 0 and 26", torch.cat(parts, dim=1), whole, 1e-5)
    for name in ("conv", "ssm"):
        style.check(
            f"the state {name} after both", *(torch.stack([getattr(s, name) for s in t]) for t in (state, after)), 1e-5
        )

    stepper = Stepper(model, batch_size=2)
    steps = torch.stack([stepper(x[:, t]).clone() for t in range(40)], dim=1)
    style.check("the whole sequence and the compiled stepper, one token a call", steps, whole, 1e-5)

    packed, _ = model(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 40, 80]))
    style.check("two sequences in a batch and packed end to end", packed[0].view(2, 40, 64), whole, 1e-5)

# %% [markdown]
# ## Exercises
#
# **1.** Write down the number of parameters of a Mamba layer as a formula in $D$ (`d_model`), $E$ (`expand`), $N$
# (`d_state`), $R$ (`dt_rank`) and $W$ (`d_conv`), and check it on a few layers.
#
# **2.** `in_proj` is linear, and so is the convolution before its SiLU. Merge them into one matrix that reads the last
# four inputs of the block. How much larger is it than the two? Why does nobody do that?
#
# **3.** Attention carries the keys and values of all tokens. After how many tokens does it carry more numbers than a
# Mamba layer of the same width? Count on `nn.Attention` and `nn.Mamba`.

# %% [markdown] tags=["answer"]
# **1.** In the order of the table: $EDN + ED + 2ED^2 + (W + 1)ED + ED(R + 2N) + (R + 1)ED + ED^2$.

# %% tags=["answer"]
for D, E, N, R, W in ((64, 2, 16, 4, 4), (96, 1, 8, 6, 3), (768, 2, 16, 48, 4)):
    formula = E * D * N + E * D + 2 * E * D**2 + (W + 1) * E * D + E * D * (R + 2 * N) + (R + 1) * E * D + E * D**2
    counted = size_of(Mamba(D, d_state=N, d_conv=W, expand=E, dt_rank=R))
    print(f"D {D}, E {E}, N {N}, R {R}, W {W}: formula {formula}, counted {counted}")
    assert formula == counted

# %% [markdown] tags=["answer"]
# **2.** Row $c$ of the merged matrix is row $c$ of `in_proj` four times over, each time multiplied by another tap.

# %% tags=["answer"]
with torch.no_grad():
    rows, taps = mixer.in_proj.weight[: mixer.d_inner], mixer.conv1d.weight[:, 0]  # (d_inner, d_model), (d_inner, 4)
    merged = (taps[:, :, None] * rows[:, None, :]).flatten(1)  # (d_inner, 4 * d_model)
    windows = F.pad(x, (0, 0, 3, 0)).unfold(1, 4, 1).transpose(2, 3).flatten(2)  # (batch, length, 4 * d_model)
    u, _ = mixer.split(mixer.in_proj(x))
    want, _ = mixer.convolve(u, None, None)
    style.check(
        "one matrix, and projection with convolution", F.silu(F.linear(windows, merged, mixer.conv1d.bias)), want, 1e-5
    )
print(f"{merged.numel()} numbers instead of {rows.numel() + taps.numel()}")

# %% [markdown] tags=["answer"]
# About four times the parameters and the work. The two small factors are a matrix of low rank in disguise: *the same*
# features of each token, weighed by age.
#
# **3.** A Mamba layer carries $2D(N + W - 1)$ numbers, attention $2D$ for each token: it overtakes at $N + W - 1$
# tokens, whatever the width.

# %% tags=["answer"]
x = torch.randn(1, 64, 64)
carried = sum(t.numel() for t in Mamba(64)(x)[1])
cached = Attention(64, n_heads=4)(x[:, :1])[1]
for_each = cached.keys.numel() + cached.values.numel()
print(f"Mamba {carried} numbers; attention {for_each} a token: as many after {carried / for_each:.0f} tokens")
