# ---
# title: The state while decoding
# ---
# %% [markdown]
# # The state while decoding
#
# Training sees whole sequences, and there a Transformer and a Mamba are rivals on equal terms. Use is different: one
# token comes, one answer goes out, and then the next. Now the question is what has to be kept between two tokens, and
# what one token costs. This is where a state-space model has its natural advantage, and this last chapter measures it,
# from bytes to batches.
#
# Everything here rests on one promise, which the library makes for each of its layers and tests for each backend:
# `y, state = layer(x, state)` gives the same whether a sequence is read **at once, in pieces, or step by step**.
#
# ## What has to be kept
#
# Attention keeps a key and a value for every token, in every layer: the *KV cache*. A Mamba keeps $h$, and the last few
# inputs of its convolution. Let four small models read more and more tokens, and weigh what they hand on:

# %%
import itertools
import time
from functools import partial

import style
import torch
from torch.utils._pytree import tree_leaves, tree_map

from mambakit import ops
from mambakit.lab.mechanisms import fit_probe
from mambakit.nn import Backbone, Stepper

torch.manual_seed(0)
width, layers = 128, 4
models = {
    "Mamba-1": Backbone(width, layers, "mamba"),
    "Mamba-2": Backbone(width, layers, "mamba2", {"headdim": 64, "d_state": 64}),
    "Mamba-3": Backbone(width, layers, "mamba3", {"headdim": 64, "d_state": 64}),
    "attention": Backbone(width, layers, "attention", {"n_heads": 4}, d_intermediate=2 * width),
}
models = {name: model.eval().requires_grad_(False) for name, model in models.items()}


def weight_of(state):
    """Bytes of all tensors of a state."""
    return sum(part.numel() * part.element_size() for part in tree_leaves(state))


lengths = [128, 512, 2048, 8192]
text = torch.randn(1, lengths[-1], width)
states = {}
for name, model in models.items():
    if name == "attention":  # a cache of the same tokens again and again weighs and takes as much as one of a long text
        _, state = model(text[:, :128])
        states[name] = [tree_map(lambda part, n=n: part.repeat_interleave(n // 128, dim=1), state) for n in lengths]
        continue
    states[name], state, start = [], None, 0
    for n in lengths:
        for piece in text[:, start:n].split(512, dim=1):
            _, state = model(piece, state)
        states[name].append(state)
        start = n
held = {name: [weight_of(state) / 1024 for state in of_lengths] for name, of_lengths in states.items()}
parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
style.table(
    ["model", "parameters", *(f"KiB after {n}" for n in lengths)],
    [[name, parameters[name], *kib] for name, kib in held.items()],
)
a_token = (held["attention"][-1] - held["attention"][0]) / (lengths[-1] - lengths[0])
even = held["Mamba-1"][0] / a_token

# %% [markdown]
# Attention adds {{ a_token:.1f}} KiB a token; Mamba-1 stays at {{ held["Mamba-1"][0]:.0f}} KiB for ever. They are even
# after {{ even:.0f}} tokens: for *short* contexts a cache is the smaller of the two. After {{ lengths[-1] }} it is
# {{ held["attention"][-1] / held["Mamba-1"][-1]:.0f}} times as large, and the ratio has no ceiling.
#
# ## What a token costs
#
# A step must read all that is kept. Time one token at each of these lengths. The Mambas step through `nn.Stepper`,
# which takes a step of the whole stack in one compiled call; to be fair, next to it Mamba-1 steps through the same
# PyTorch code as attention.

# %%
token = torch.randn(1, width)


def seconds_by_length(name, through_layers):
    """Median seconds of one step after each length."""
    found = []
    for state in states[name]:
        if through_layers:
            found.append(style.measure(partial(models[name], token[:, None], state), repeats=15))
        else:
            stepper = Stepper(models[name])
            stepper.load(state)
            found.append(style.measure(partial(stepper, token), repeats=15))
    return found


times = {
    "attention": seconds_by_length("attention", True),
    "Mamba-1, layer by layer": seconds_by_length("Mamba-1", True),
    "Mamba-1, one call": seconds_by_length("Mamba-1", False),
    "Mamba-2, one call": seconds_by_length("Mamba-2", False),
    "Mamba-3, one call": seconds_by_length("Mamba-3", False),
}

# %% tags=["hide"]
fig, (left, right_panel) = style.figure(columns=2, height=4.0)
for kib in held.values():
    left.loglog(lengths, kib, "o-", markersize=3.5, base=2)
for (name, each), colour, line in zip(times.items(), (3, 0, 0, 1, 2), ("-", "--", "-", "-", "-"), strict=True):
    milliseconds = [1e3 * s for s in each]
    right_panel.loglog(
        lengths, milliseconds, "o", ls=line, color=style.COLOURS[colour], markersize=3.5, label=name, base=2
    )
for ax in (left, right_panel):
    ax.set_yscale("log", base=10)
    ax.set_xlabel("tokens read")
fig.legend(*right_panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
left.set(ylabel="kept, KiB", title="memory")
right_panel.set(ylabel="a token, milliseconds", title="time")
style.caption(
    fig,
    "What is kept (left) and what one more token takes (right), by the number of tokens read so far, on one core. "
    "Lines of a state are level; those of the cache rise.",
)

# %% [markdown]
# From {{ lengths[0] }} to {{ lengths[-1] }} tokens, attention's step became
# {{ times["attention"][-1] / times["attention"][0]:.1f}} times as long, Mamba-1's
# {{ times["Mamba-1, one call"][-1] / times["Mamba-1, one call"][0]:.1f}} times (the rest is noise of the clock). And
# one compiled call took {{ times["Mamba-1, layer by layer"][0] / times["Mamba-1, one call"][0]:.0f}} times less than
# the same arithmetic layer by layer: at these sizes most of a step in Python *is* Python. `Stepper.backend` says who
# takes the steps, here {{ Stepper(models["Mamba-1"]).backend }}; on a GPU a captured graph does.
#
# ## Reading a prompt
#
# A prompt is known in advance, so there is no need to read it token by token. Read it at once, and only then step
# (*prefill*). If it is too long to be held at once, read it in chunks; the state carries over. The three ways must
# agree:

# %%
model, prompt = models["Mamba-1"], text[:, :300]
at_once, state_at_once = model(prompt)
pieces, carried = [], None
for piece in prompt.split(77, dim=1):
    y, carried = model(piece, carried)
    pieces.append(y)
stepper = Stepper(model)
steps = torch.stack([stepper(x) for x in prompt.unbind(1)], dim=1)
style.check("read in chunks and at once", torch.cat(pieces, dim=1), at_once, 1e-5)
style.check("read step by step and at once", steps, at_once, 1e-5)
for one, other in zip(tree_leaves(stepper.state), tree_leaves(state_at_once), strict=True):
    assert torch.allclose(one, other, atol=1e-4)

chunks = [1, 4, 16, 64, 256, 1024]
by_chunk = []
for size in chunks:
    started, carried = time.perf_counter(), None
    count = min(1024, 64 * size)  # single tokens are slow: a few tell as much
    for piece in text[:, :count].split(size, dim=1):
        _, carried = model(piece, carried)
    by_chunk.append(1e6 * (time.perf_counter() - started) / count)

# %% tags=["hide"]
fig, ax = style.figure(height=2.5)
ax.loglog(chunks, by_chunk, "o-", base=2)
ax.set_yscale("log", base=10)
ax.set(xlabel="tokens in a chunk", ylabel="microseconds a token")
style.caption(fig, "Reading a prompt in chunks: time a token by the size of the chunk. The result is the same for all.")

# %% [markdown]
# In chunks of 256 a token took {{ by_chunk[chunks.index(256)]:.0f}} microseconds, one by one {{ by_chunk[0]:.0f}}.
# Memory while reading is that of one chunk, so that a prompt of a million tokens needs no more of it than one of a
# thousand.
#
# ## Batches
#
# Sequences that are decoded together share the reading of the weights. What each adds is its state, of the same size
# for all, whatever they have read: no padding, no paging, no fragmentation, the things that serve a KV cache fill books
# with. Prompts of different lengths can be read as one packed sequence; each leaves its state:

# %%
cut = torch.tensor([0, 90, 100, 300])  # three prompts of 90, 10 and 200 tokens, one after another
_, packed = model(prompt, cu_seqlens=cut)
single = [model(prompt[:, first:last])[1] for first, last in itertools.pairwise(cut.tolist())]
together = [part.flatten() for part in tree_leaves(packed)]
alone = [torch.cat([tree_leaves(state)[at] for state in single]).flatten() for at in range(len(together))]
style.check("states of packed prompts and of separate ones", torch.cat(together), torch.cat(alone), 1e-5)

batches = [1, 2, 4, 8, 16, 32]
rate = []
for size in batches:
    many = Stepper(model, batch_size=size)
    rate.append(size / style.measure(partial(many, torch.randn(size, width)), repeats=15))
style.table(
    ["rows", "tokens a second", "KiB of state"],
    [[n, r, held["Mamba-1"][0] * n] for n, r in zip(batches, rate, strict=True)],
)

# %% [markdown]
# ## What the state holds
#
# Constant memory has a price, and it is no secret: what does not fit is forgotten. A *probe* measures it. Let a scan
# read random symbols, take its final state, and ask by linear regression for the symbol that came $k$ steps earlier. Do
# it twice: with a step $\Delta$ that is the same for all symbols, and with one that is small except at a single marked
# symbol, as a trained selective model would choose it.

# %%
torch.manual_seed(1)
symbols, dim, count, distance = 8, 16, 1500, 64
drawn = torch.randint(symbols, (count, distance))
vectors = torch.randn(symbols, dim)[drawn]  # (count, distance, dim)
reach = [0, 1, 2, 4, 8, 16, 32, 63]


def readable(delta, size):
    """Share of the symbols k steps back that a linear probe reads off the final state, for each k of `reach`."""
    torch.manual_seed(2)
    A = -torch.arange(1.0, size + 1).expand(dim, size)
    B = torch.randn(1, distance, size).expand(count, -1, -1)
    _, h = ops.selective_scan(vectors, delta, A, B, B, return_final_state=True)  # h (count, dim, size)
    asked = [drawn[:, distance - 1 - k] for k in reach]
    return [fit_probe(h[:1000], wanted[:1000]).score(h[1000:], wanted[1000:]) for wanted in asked]


alike = torch.full((count, distance, dim), 0.1)
probes = {f"alike, {size} states" if size > 1 else "alike, one state": readable(alike, size) for size in (1, 4, 16)}
selective = {}
for k in reach:
    delta = torch.full((count, distance, dim), 1e-4)
    delta[:, distance - 1 - k] = 1.0
    selective[k] = readable(delta, 4)[reach.index(k)]

# %% tags=["hide"]
fig, ax = style.figure(height=2.8)
for name, shares in probes.items():
    ax.plot(reach, shares, "o-", markersize=3.5, label=name)
ax.plot(
    reach, list(selective.values()), "s--", markersize=3.5, label="the marked symbol, 4 states", color=style.COLOURS[5]
)
ax.axhline(1 / symbols, color=style.QUIET, linewidth=0.8, linestyle=":")
ax.set_xscale("symlog", base=2, linthresh=1)
ax.set(xlabel="steps back", ylabel="read off the state", ylim=(0, 1.05), xlim=(-0.2, 75))
ax.set_xticks(reach, map(str, reach))
ax.legend()
style.caption(
    fig,
    "How many of the symbols k steps back a linear probe finds in the final state; dotted is guessing. Written alike, "
    "more states reach further back. Written selectively, one symbol is found at any distance.",
)

# %% [markdown]
# A larger state reaches further, but never far. A *selective* state does not try to keep everything: it keeps the
# symbol that mattered, from {{ reach[-1] }} steps back as well as from one ({{ min(selective.values()):.0%}} at
# worst). The figure also shows what a state of fixed size will never do: repeat word for word a long text when it did
# not know that it would be asked to. For that there are hybrids, with a layer of attention here and there.
#
# ## Going back: speculation
#
# In *speculative decoding* (arXiv 2211.17192) a small model drafts a few tokens, and the large one checks them all in
# one call, which is hardly slower than one step. Where they disagree, one must go back to the last token that was
# right. A cache is cut to length. A state can't be run backwards, but it is small, and so one simply *keeps* the one
# before the draft, and reads the accepted tokens again. States are plain tensors that no call changes in place;
# keeping one costs a reference.


# %%
class Speaker:
    """A model of 32 tokens that always says the likeliest."""

    def __init__(self, backbone, noise):
        self.backbone = backbone
        generator = torch.Generator().manual_seed(4)
        self.embedding, head, error = torch.randn(3, 32, width, generator=generator)
        self.head = head + noise * error  # noise makes a draft of the model itself

    @torch.no_grad()
    def read(self, tokens, state):
        """What it would say after each of the tokens (a list), and the state after the last."""
        hidden, state = self.backbone(self.embedding[torch.tensor([tokens])], state)
        return (hidden[0] @ self.head.T).argmax(-1).tolist(), state


target, draft = Speaker(models["Mamba-1"], 0.0), Speaker(models["Mamba-1"], 0.25)


def plainly(count):
    said, state = [0], None
    while len(said) <= count:
        (answer,), state = target.read(said[-1:], state)
        said.append(answer)
    return said[: count + 1]


def speculatively(count, ahead=4):
    said, state, draft_state, calls, returns = [0], None, None, 0, 0  # the states have not read the last token yet
    while len(said) <= count:
        guesses, trial = [], draft_state
        for _ in range(ahead):
            (guess,), trial = draft.read([(said + guesses)[-1]], trial)
            guesses.append(guess)
        answers, after = target.read([said[-1], *guesses], state)  # one call for all
        calls += 1
        agreed = 0
        while agreed < ahead and guesses[agreed] == answers[agreed]:
            agreed += 1
        accepted = [said[-1], *guesses[:agreed]]
        if agreed < ahead:
            returns += 1
            _, after = target.read(accepted, state)  # back to the state that was kept, and on to where it was right
        _, draft_state = draft.read(accepted, draft_state)
        state, said = after, said + answers[: agreed + 1]
    return said[: count + 1], calls, returns


spoken, (speculated, calls, returns) = plainly(60), speculatively(60)
style.check("drafted and checked, and spoken plainly", torch.tensor(speculated), torch.tensor(spoken), 0.0)
stepper.load(state_at_once)
copying = style.measure(lambda: tree_map(torch.clone, state_at_once))
print(f"60 tokens by {calls} checks, after {returns} of which the model went back")
print(f"copying the whole state takes {copying / times['Mamba-1, one call'][0]:.1f} times as long as one step")

# %% [markdown]
# ## Check
#
# That the state after a prompt is all there is to know: continue from a copy of it, in another stepper, and compare
# with a model that has read everything from the start. For all three generations.

# %%
for name in ("Mamba-1", "Mamba-2", "Mamba-3"):
    _, after_prompt = models[name](text[:, :200])
    stepper = Stepper(models[name])
    stepper.load(tree_map(torch.clone, after_prompt))
    continued = torch.stack([stepper(x) for x in text[0, 200:220, None]], dim=1)
    style.check(
        f"{name} continued from its state, and read anew", continued, models[name](text[:, :220])[0][:, 200:], 1e-5
    )

# %% [markdown]
# ## Exercises
#
# **1.** Grouped-query attention shares each key and value among several heads. With one key-value head for four query
# heads, at how many tokens is the cache as large as Mamba-1's state above?

# %% [markdown] tags=["answer"]
# A quarter of the keys and values, so about four times as many tokens. Besides keys and values this implementation
# keeps each token's position, eight bytes a layer, which do not shrink.

# %% tags=["answer"]
grouped = Backbone(width, layers, "attention", {"n_heads": 4, "n_kv_heads": 1})
with torch.no_grad():
    a_grouped_token = weight_of(grouped(text[:, :100])[1]) / 1024 / 100
print(f"even after {held['Mamba-1'][0] / a_grouped_token:.0f} tokens instead of {even:.0f}")

# %% [markdown]
# **2.** The library keeps states in float32 even for models in bfloat16. Take a state of one that loses a thousandth in
# every step, and let it fade for a thousand steps, once as it is and once rounded to bfloat16 after each step.

# %% [markdown] tags=["answer"]
# bfloat16 has eight bits of precision. Just below one its numbers lie $1/256$ apart, so $0.999$ rounds back to $1$, and
# the state never moves. Slow memory, the most valuable, suffers most. Weights and activations in bfloat16 do no such
# harm, since nothing accumulates in them.

# %% tags=["answer"]
exact = rounded = torch.ones(1, 1, 1)  # (batch, dim, state)
nothing, slowly, rate, unit = torch.zeros(1, 1), torch.full((1, 1), 1e-3), -torch.ones(1, 1), torch.ones(1, 1)
for _ in range(1000):
    _, exact = ops.selective_scan_step(exact, nothing, slowly, rate, unit, unit)
    _, rounded = ops.selective_scan_step(rounded, nothing, slowly, rate, unit, unit)
    rounded = rounded.bfloat16().float()
print(f"after a thousand steps: {exact.item():.3f}, and rounded {rounded.item():.3f}")

# %% [markdown]
# **3.** Two machines read one half of a text each, with *one* scan. How do you make the state after the whole text of
# what they have? Why does it not work for a stack of layers?

# %% [markdown] tags=["answer"]
# The scan is linear in its state: what the first half left decays through the second, and what the second half wrote,
# starting from zero, is added, $h = e^{A \sum \Delta}\, h_{\text{first}} + h_{\text{second}}$. That is the prefix sum
# of chapter 8, and how a sequence is spread over several GPUs. The second layer, however, reads outputs of the first,
# and in the second half those depend on the state of the first: layers must take turns, one exchange of states each.

# %% tags=["answer"]
u, delta = torch.randn(1, 80, 6).double(), torch.rand(1, 80, 6).double()
A, B, C = -torch.rand(6, 4).double(), torch.randn(1, 80, 4).double(), torch.randn(1, 80, 4).double()
scan = partial(ops.selective_scan, return_final_state=True)
_, whole = scan(u, delta, A, B, C)
_, first = scan(u[:, :40], delta[:, :40], A, B[:, :40], C[:, :40])
_, second = scan(u[:, 40:], delta[:, 40:], A, B[:, 40:], C[:, 40:])
joined = torch.exp(A * delta[:, 40:].sum(1)[..., None]) * first + second
style.check("two halves joined and the whole", joined, whole, 1e-12)

# %% [markdown]
# ## Where to go next
#
# That was the guide: from a weight on a spring to a language model's state. What you now know is enough to read the
# library's sources, which use the same letters: `mambakit/ops/reference` has every scan in a page. To use it:
#
# - [Language models](../how-to/language-models.md): load a public checkpoint, generate, fine-tune.
# - [Predict a stream](../how-to/predict-a-stream.md): the state carried from tick to tick, in production.
# - [Forecast prices](../how-to/forecast-prices.md), with honest baselines beside the model.
# - [Mechanisms](../mechanisms.md) and [the lab](../lab.md): open a model of your own, repeat an ablation, or run the
#   published ones.
# - [Choose a mixer](../how-to/choose-a-mixer.md), when you wonder which of the three to take.
