# ---
# title: Induction heads
# ---
# %% [markdown]
# # Induction heads: learn short, read long
#
# "The wizard tipped his hat. It was raining, the road was long, and in the evening the wizard tipped his ..." You know
# what follows, because you have seen what followed last time. A circuit that does this is called an *induction head*:
# find the last time that this token came up, and say what came after it. In Transformers its birth is a visible event
# of training, and it carries much of what is called learning in context (arXiv 2209.11895).
#
# The chapter on selective copying showed that a time-invariant model can't choose *what* to keep. Here the model has to
# choose what to keep **and** to know it again when it is asked for. The task in its purest form (arXiv 2312.00752,
# section 4.1.2):
#
# ```
#   3 7 * 5 2 8 1 1 4 ... 9 *    ->    5
# ```
#
# A special token comes once, somewhere, and once more at the end. What followed it the first time? We train a small
# Mamba on short sequences, read ever longer ones with it, let S4D try the same, and then open the model to see how it
# does it.

# %%
import base64
import json
from pathlib import Path

import numpy as np
import style
import torch
import torch.nn.functional as F
from torch import nn

from mambakit.lab import mechanisms
from mambakit.lab.evaluation import accuracy_at_length
from mambakit.lab.tasks import InductionHeads
from mambakit.nn import Backbone

task = InductionHeads(length=32, vocabulary=16, longest=1 << 13)
SPECIAL = task.vocabulary - 1
example = task.batch("train", 2, 16, torch.Generator().manual_seed(1))
for tokens, answer in zip(example.tokens.tolist(), example.targets[:, 0].tolist(), strict=True):
    print(" ".join("*" if token == SPECIAL else str(token) for token in tokens), " -> ", answer)

# %% [markdown]
# ## Training
#
# Two layers, 32 wide; the loss is on the answer alone. 400 steps at 32 tokens, until the task is understood, then
# 300 at 256, which cost little and teach the model to let *less* of the noise in. S4D gets the same data, steps
# and number of parameters, give or take a percent.


# %%
class Reader(nn.Module):
    """Tokens to the logits of what follows; `read` carries the state on."""

    def __init__(self, mixer, options, tokens=16, width=32):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.backbone = Backbone(width, 2, mixer, options)
        self.head = nn.Linear(width, tokens, bias=False)

    def read(self, tokens, state=None, start=0):
        return self.backbone(self.embedding(tokens), state)

    def forward(self, tokens):
        return self.head(self.read(tokens)[0])  # (batch, length, tokens)


def train(mixer, options, seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, losses = Reader(mixer, options), []
    plan = [(32, 32)] * 400 + [(256, 8)] * 300  # length and batch of each step
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=len(plan), pct_start=0.1)
    for length, size in plan:
        batch = task.batch("train", size, length, generator)
        loss = F.cross_entropy(model(batch.tokens)[:, -1], batch.targets[:, 0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses


tries = {
    "Mamba, seed 0": ("mamba", {"d_state": 16, "dt_min": 1e-4}, 0),
    "Mamba, seed 1": ("mamba", {"d_state": 16, "dt_min": 1e-4}, 1),
    "S4D": ("s4d", {"d_state": 80}, 0),
}
trained = {name: train(*how) for name, how in tries.items()}
models = {name: model for name, (model, _) in trained.items()}
sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
lengths = [length for length in task.lengths if length >= 64]
right = {
    name: [
        accuracy_at_length(model, task, length, 48, 4096, torch.device("cpu"))["token"]
        for length in lengths
        if length <= 4096 or name != "S4D"
    ]
    for name, model in models.items()
}

# %% tags=["hide"]
fig, (left, right_panel) = style.figure(columns=2, height=2.9, width_ratios=(2, 3))
for (name, (_, losses)), line in zip(trained.items(), ("-", "--", "-"), strict=True):
    colour = style.COLOURS[1] if name == "S4D" else style.COLOURS[0]
    smooth = np.convolve(losses, np.ones(20) / 20, mode="valid")
    left.plot(smooth, line, color=colour, linewidth=1.2)
    right_panel.plot(lengths[: len(right[name])], right[name], f"o{line}", color=colour, markersize=3.5, label=name)
left.axhline(np.log(15), color=style.QUIET, linewidth=0.8, linestyle=":")
left.set(xlabel="step", ylabel="loss, nats")
right_panel.axhline(1 / 15, color=style.QUIET, linewidth=0.8, linestyle=":")
right_panel.axvspan(50, 256, color=style.GRID, zorder=0, linewidth=0)
right_panel.set_xscale("log", base=2)
right_panel.set(xlabel="tokens read", ylabel="answers right", xlim=(55, 1.2 * lengths[-1]), ylim=(-0.03, 1.05))
right_panel.legend()
style.caption(
    fig,
    "Left: the training loss; dotted is that of guessing. Mamba guesses for a while and then understands all at once. "
    "Right: accuracy by length, up to 32 times the longest of training (shaded).",
)

# %% [markdown]
# The two Mambas, of {{ sizes["Mamba, seed 0"] }} parameters, answer {{ right["Mamba, seed 0"][4]:.0%}} and
# {{ right["Mamba, seed 1"][4]:.0%}} right at 1024 tokens, four times their longest training sequence, and
# {{ right["Mamba, seed 0"][-1]:.0%}} and {{ right["Mamba, seed 1"][-1]:.0%}} at {{ lengths[-1] }}. S4D, of
# {{ sizes["S4D"] }}, answers {{ right["S4D"][0]:.0%}} at 64; guessing gives 7%. (Mamba's paper trains some three
# hundred times as many steps, and reports perfect answers up to a million tokens.)
#
# Why does the curve bend down at all? Nothing in the model knows about length. But each token of noise lets the state
# decay by $e^{\Delta A}$ and adds $\Delta B x$ to it. With $\Delta = 10^{-4}$ a thousand tokens of it don't matter,
# and a hundred thousand do. Reading long means closing the gate *tightly*.
#
# The loss curve has a famous shape: a plateau at the loss of guessing, then a cliff. An induction head is of no use by
# halves. It needs a part that marks what follows the special token, and a part that looks for marks.
#
# ## Opening it
#
# How does it do it? First look at the steps $\Delta$ while it reads. Here is a sequence of 32 with the special token at
# place 10 and the answer at 11:

# %%
model, place, size = models["Mamba, seed 0"], 10, 64
torch.manual_seed(3)
tokens = torch.randint(SPECIAL, (size, 32))
tokens[:, place] = tokens[:, -1] = SPECIAL
answers = tokens[:, place + 1]
with torch.no_grad():
    logits, cache = mechanisms.run_with_cache(model, tokens, ["layers.*.mixer.delta"])
    sources = [
        mechanisms.source_attribution(model, tokens, answers, index).values[:, : tokens.shape[1]].mean(0)
        for index in (0, 1)
    ]
layer = int(sources[1].abs().max() > sources[0].abs().max())
written = sources[layer].argmax().item()
style.check("the hooked model and the plain one", logits, model(tokens).detach(), 1e-5)

# %% tags=["hide"]
fig, axes = style.figure(rows=2, columns=2, height=3.6, sharex=True)
for index in (0, 1):
    steps = cache[f"layers.{index}.mixer.delta"].mean(0)  # (length, channels), over the sequences
    axes[0, index].plot(steps, color=style.COLOURS[4], linewidth=0.5, alpha=0.3)
    axes[0, index].plot(steps.median(1).values, color=style.COLOURS[0])
    axes[0, index].set(yscale="log", title=f"layer {index + 1}", ylim=(1e-5, 10))
    axes[1, index].bar(range(32), sources[index], color=style.COLOURS[0])
    axes[1, index].set(xlabel="position")
    for ax in axes[:, index]:
        ax.axvspan(place + 0.5, place + 1.5, color=style.COLOURS[1], alpha=0.3, linewidth=0)
axes[0, 0].set_ylabel("Δ")
axes[1, 0].set_ylabel("adds to the logit")
style.caption(
    fig,
    "Above: the step of every channel (thin) and their median at each position, averaged over 64 sequences. Below: "
    "what each position adds, through the state of that layer, to the logit of the answer, whose place is shaded.",
)

# %% [markdown]
# What reaches the end through a state comes from one place, {{ written }}, in layer {{ layer + 1 }}, where the steps
# of some channels leap by orders of magnitude: there the gate opens, and hardly anywhere else. (The other layer's
# bars have a scale of their own; they are next to nothing.) The answer itself stands at 11. That the gate opens
# {{ written - place - 1 }} later is the work of the convolution, which carries a token up to three places on: the
# mark need not come in time, as long as the answer is still in the window.
#
# Adding up is suggestive; cutting is proof. `mechanisms.blocked` sets entries of the hidden attention to zero:
# position $i$ receives nothing from $j$ through that layer's state. Cut the end off from that place, and count the
# right answers:

# %%
last = tokens.shape[1] - 1


@torch.no_grad()
def with_cuts(cuts):
    """Share of right answers with entries of the mixing matrices at zero, {layer: entries}."""
    hooks = {f"layers.{at}.mixer.mixing": mechanisms.blocked(entries) for at, entries in cuts.items()}
    cut = mechanisms.run_with_hooks(model, tokens, hooks)
    return (cut[:, -1].argmax(-1) == answers).double().mean().item()


others = [(last, j) for j in range(last) if j != written]
after = {
    "nothing": with_cuts({}),
    f"end from {written}, layer 1": with_cuts({0: [(last, written)]}),
    f"end from {written}, layer 2": with_cuts({1: [(last, written)]}),
    f"end from all but {written}, both layers": with_cuts({0: others, 1: others}),
}
style.table(["what is cut", "right answers"], [[name, f"{share:.0%}"] for name, share in after.items()])

# %% [markdown]
# One entry of a matrix of {{ 32 * 33 // 2 }} carries the answer. But how does the model know where to open the gate,
# when the tokens there are random? Only the neighbour to the left tells, and what sees neighbours before the state
# does is the **convolution**: its four taps hand every position the three tokens before it, and the step $\Delta$ is
# made of what they see. That is the first half of an induction head, "what came before me?", for which a Transformer
# needs a whole layer. The second half, "keep what is marked, and give it back on demand", is the selective scan. S4D
# has the first half, in its kernels; but its steps and its $B$ can't depend on what it sees, and so it never gets the
# second.
#
# ## Hidden attention of what you type
#
# Now a model to play with. It is a Mamba-2 (whose heads give one matrix each) that has been shown nothing but made-up
# words, three to a text, told once and then repeated: "kalo bine kalo duf bine". It knows no language. All that it can
# do is remember which letter followed which, *in the text before it*. Train it here, on the spot:

# %%
LETTERS, LENGTH = 33, 40  # as many letters as the larger of two alphabets has
SPACE = LETTERS


def made_up(count, generator):
    """Texts (count, LENGTH + 1) of three words without a common letter, and where a letter could be known."""
    texts = torch.full((count, LENGTH + 1), SPACE)
    known = torch.zeros(count, LENGTH + 1, dtype=torch.bool)
    letters = torch.rand(count, LETTERS, generator=generator).argsort(1)[:, :15].unflatten(1, (3, 5))
    sizes = torch.randint(3, 6, (count, 3), generator=generator).tolist()
    order = torch.randint(3, (count, LENGTH), generator=generator).tolist()
    for row in range(count):
        at, told = 0, set()
        for word in [0, 1, 2, *order[row]]:
            end = min(at + sizes[row][word], LENGTH + 1)
            texts[row, at:end] = letters[row, word, : end - at]
            known[row, at + 1 : end] = word in told
            told.add(word)
            at = end + 1
            if at > LENGTH:
                break
    return texts, known


def train_on_words(steps=700):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Reader("mamba2", {"headdim": 24, "d_state": 16}, tokens=LETTERS + 1, width=48)
    texts, known = made_up(6000, generator)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(texts), (32,), generator=generator)
        asked = known[rows, 1:]
        loss = F.cross_entropy(model(texts[rows, :-1])[asked], texts[rows, 1:][asked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


speller = train_on_words()
fresh, asked = made_up(500, torch.Generator().manual_seed(1))
with torch.no_grad():
    found = (speller(fresh[:, :-1]).argmax(-1) == fresh[:, 1:])[asked[:, 1:]].double().mean().item()
print(f"letters of repeated words foretold, in texts never seen: {found:.0%} (guessing: {1 / LETTERS:.0%})")

# %% tags=["hide"]
mixer = speller.backbone.layers[0].mixer
arrays = {"embedding": speller.embedding.weight, "norm_f": speller.backbone.norm_f.weight, "head": speller.head.weight}
for index, layer in enumerate(speller.backbone.layers):
    of_layer = {
        "norm": layer.norm.weight,
        "in_proj": layer.mixer.in_proj.weight,
        "conv": layer.mixer.conv1d.weight,
        "conv_bias": layer.mixer.conv1d.bias,
        "dt_bias": layer.mixer.dt_bias,
        "A_log": layer.mixer.A_log,
        "D": layer.mixer.D,
        "gate_norm": layer.mixer.norm.weight,
        "out_proj": layer.mixer.out_proj.weight,
    }
    arrays |= {f"{index}.{name}": parameter for name, parameter in of_layer.items()}
flat = {name: parameter.detach().numpy().astype("<f4").ravel() for name, parameter in arrays.items()}
starts = np.cumsum([0, *(len(array) for array in flat.values())])
exported = {
    "layers": 2,
    "width": 48,
    "heads": mixer.heads,
    "headdim": mixer.headdim,
    "state": mixer.d_state,
    "taps": mixer.d_conv,
    "eps": 1e-5,
    "symbols": LETTERS + 1,
    "tensors": {name: [int(start), len(array)] for (name, array), start in zip(flat.items(), starts, strict=False)},
    "weights": base64.b64encode(np.concatenate(list(flat.values())).tobytes()).decode(),
}
script = Path(style.__file__).with_name("hidden_attention.js").read_text(encoding="utf-8")
sentence = "fox and jug met fox and ju"
chosen = "font: inherit; color: inherit; background: var(--md-default-bg-color)"
style.html(f"""
<div class="interactive" id="hidden-attention">
<p><label><span data-part="ask">Type a sentence that repeats itself:</span>
<input data-part="text" type="text" maxlength="48" value="{sentence}" autocomplete="off" spellcheck="false"
 style="width: 100%; font: inherit; padding: 0.3em; color: inherit; background: transparent;
 border: 1px solid var(--md-default-fg-color--light); border-radius: 0.2em"></label></p>
<p><select data-part="layer" aria-label="layer" style="{chosen}"></select>
<select data-part="head" aria-label="head" style="{chosen}"></select>
<strong data-part="next"></strong></p>
<svg data-part="grid" role="img" aria-label="hidden attention" style="width: 100%; display: block; margin: auto"></svg>
<p data-part="value" aria-live="polite">-</p>
<script type="application/json" data-model>{json.dumps(exported)}</script>
<script>{script}</script>
</div>""")

# %% [markdown]
# Rows receive, columns send. Point at a cell, or touch it, to read its value; blue adds, orange takes away. Type the
# beginning of something you typed before, and watch in the second layer where its last letter looks: at the letter
# that came *after* it last time, whose convolution has told it what it came after. That is the induction head, drawn
# from the weights. Words with few letters in common work best, since it was raised on such. Then spell a word
# differently the second time, or use a letter in two words. Everything is computed in your browser; nothing leaves
# it.
#
# ## Check
#
# The figure's arithmetic is plain loops in JavaScript. Here it is once more in NumPy, statement for statement, against
# the library's own model and its hidden attention.


# %%
def forward(tensors, tokens):
    """Logits (length, symbols) and mixing (layers, heads, length, length), as hidden_attention.js computes them."""
    heads, headdim, state, taps = (exported[name] for name in ("heads", "headdim", "state", "taps"))
    inner, mixing = heads * headdim, []

    def silu(v):
        return v / (1 + np.exp(-v))

    def normed(v, weight):
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + exported["eps"]) * weight

    stream = tensors["embedding"].reshape(-1, 48)[tokens]
    for layer in range(2):
        w = {name.split(".")[1]: t for name, t in tensors.items() if name.startswith(f"{layer}.")}
        projected = normed(stream, w["norm"]) @ w["in_proj"].reshape(-1, 48).T
        z, raw, dt = np.split(projected, [inner, 2 * inner + 2 * state], axis=1)
        delta = np.log1p(np.exp(dt + w["dt_bias"]))  # (length, heads)
        padded = np.concatenate([np.zeros((taps - 1, raw.shape[1])), raw])
        kernel = w["conv"].reshape(-1, taps)
        xBC = silu(w["conv_bias"] + sum(kernel[:, k] * padded[k : k + len(raw)] for k in range(taps)))
        x, B, C = np.split(xBC, [inner, inner + state], axis=1)
        total = np.cumsum(-np.exp(w["A_log"]) * delta, axis=0).T  # (heads, length)
        gaps = np.where(np.tri(len(raw), dtype=bool), total[:, :, None] - total[:, None], -np.inf)
        M = (C @ B.T) * np.exp(gaps) * delta.T[:, None]
        values = x.reshape(-1, heads, headdim)
        y = np.einsum("hij,jhp->ihp", M, values) + w["D"][:, None] * values
        stream = stream + normed(y.reshape(-1, inner) * silu(z), w["gate_norm"]) @ w["out_proj"].reshape(48, -1).T
        mixing.append(M)
    return normed(stream, tensors["norm_f"]) @ tensors["head"].reshape(-1, 48).T, np.stack(mixing)


ids = ["abcdefghijklmnopqrstuvwxyz".find(letter) if letter != " " else SPACE for letter in sentence]
with torch.no_grad():
    logits, cache = mechanisms.run_with_cache(speller, torch.tensor([ids]), "layers.*.mixer.mixing")
ours, matrices = forward({name: array.astype(np.float64) for name, array in flat.items()}, ids)
theirs = torch.stack([cache[f"layers.{layer}.mixer.mixing"][0] for layer in (0, 1)])
style.check("the figure's logits and the library's", ours, logits[0], 1e-4)
style.check("the figure's hidden attention and the library's", matrices, theirs, 1e-4)
print(f"weights inside the page: {len(exported['weights']) / 1000:.0f} kB; after '{sentence}' it expects", end=" ")
print(repr("abcdefghijklmnopqrstuvwxyz"[ours[-1].argmax()] if ours[-1].argmax() < 26 else " "))

# %% [markdown]
# ## Exercises
#
# **1.** Take the convolution away from the trained Mamba: set every tap to zero but the present's. What is left of its
# answers? Why?

# %% [markdown] tags=["answer"]
# The place where the answer must be written looks like any other when its left neighbours can't be seen, so the gate
# has nothing to go by. (A model *trained* without a convolution may still learn the task in two layers, for the first
# layer's state can tell the second what came before.)

# %% tags=["answer"]
present_only = {}
for index in (0, 1):
    convolution = models["Mamba, seed 0"].backbone.layers[index].mixer.conv1d
    kept = torch.zeros_like(convolution.weight)
    kept[..., -1] = convolution.weight[..., -1].detach()
    present_only[f"backbone.layers.{index}.mixer.conv1d.weight"] = kept
with torch.no_grad():
    blind = torch.func.functional_call(model, present_only, (tokens,))[:, -1].argmax(-1)
print(f"right without the convolution's past: {(blind == answers).double().mean():.0%}")

# %% [markdown]
# **2.** Put *two* special tokens into the noise, at places 8 and 20, with different followers. Which one does the model
# answer with? It was never trained on this.

# %% [markdown] tags=["answer"]
# The state adds both; with a large $\Delta$ the later one overwrites the earlier, with a small one they share it. So a
# model trained on one occurrence has its habit decided by how large its $\Delta$ happens to be.

# %% tags=["answer"]
double = torch.randint(SPECIAL, (400, 32), generator=torch.Generator().manual_seed(5))
double[:, [8, 20, -1]] = SPECIAL
with torch.no_grad():
    said = model(double)[:, -1].argmax(-1)
clear = double[:, 9] != double[:, 21]
share = [(said == double[:, at])[clear].double().mean().item() for at in (9, 21)]
print(f"with the earlier: {share[0]:.0%}, with the later: {share[1]:.0%}")

# %% [markdown]
# **3.** At which length does noise win? Estimate it from the steps: take the largest $\Delta |A|$ that matters as the
# median over channels at noise positions of the second layer, with the slowest rate of each channel, and compare its
# inverse with the curve above.

# %% [markdown] tags=["answer"]
# $1/(\Delta|A|)$ is the number of tokens after which a third of a memory is left. It is only an estimate: the channels
# that matter are not the median ones, and what noise *adds* counts beside what it takes.

# %% tags=["answer"]
_, cache = mechanisms.run_with_cache(model, tokens, "layers.*.mixer.delta")
for index in (0, 1):
    slowest = torch.exp(model.backbone.layers[index].mixer.A_log).min(1).values  # (channels,)
    noise = cache[f"layers.{index}.mixer.delta"][:, 14:30].mean((0, 1))  # (channels,)
    horizon = 1 / (noise * slowest)
    middle, longest = horizon.median(), horizon.max()
    print(f"layer {index + 1}: a third is left after {middle:.0f} tokens (median), {longest:.0f} (longest)")
