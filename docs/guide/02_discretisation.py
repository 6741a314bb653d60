# ---
# title: Discretisation
# ---
# %% [markdown]
# # Discretisation
#
# The spring moves all the time; samples arrive one by one. To go from $h' = Ah + Bu$ to a step
#
# $$ h_{t+1} = \bar A\, h_t + \bar B\, u_t $$
#
# is to *discretise*, and the rule chosen decides whether the step is cheap, true, and stable. There are five rules
# worth knowing. One of them is what Mamba's paper says, another is what Mamba's code does.
#
# ## The exact step, and what may be approximated in it
#
# The solution of the last chapter over one step of length $\Delta$ is
#
# $$ h(t + \Delta) = e^{\Delta A}\, h(t) + \int_0^\Delta e^{(\Delta - s) A} B\, u(t + s)\, ds. $$
#
# Two things in it are hard: the exponential of a matrix, and an input that is known only at the ends. Each rule
# answers both.
#
# **Euler.** The slope now is the slope all the way: $h(t + \Delta) \approx h + \Delta\,(Ah + Bu)$. So
# $\bar A = 1 + \Delta A$, $\bar B = \Delta B$.
#
# **Runge-Kutta.** Look at the slope at the start, twice in the middle, at the end, and average with weights one, two,
# two and one. For a linear system this is the series of the exponential to the fourth power: with $z = \Delta A$,
# $\bar A = 1 + z + \frac{z^2}{2} + \frac{z^3}{6} + \frac{z^4}{24}$, and $\bar B$ likewise.
#
# **Bilinear** (the trapezoid, Tustin's rule). Average the slopes at both ends,
# $h_{t+1} = h_t + \frac{\Delta}{2}A(h_t + h_{t+1}) + \Delta B u$. The unknown stands on both sides; solve for it:
# $\bar A = (1 - \frac{\Delta}{2}A)^{-1}(1 + \frac{\Delta}{2}A)$ and $\bar B = (1 - \frac{\Delta}{2}A)^{-1}\Delta B$.
#
# **Zero-order hold (ZOH).** Let the input stand still for a step; then the integral can be done:
# $\bar A = e^{\Delta A}$ and $\bar B = \int_0^\Delta e^{sA}ds\, B = A^{-1}(e^{\Delta A} - 1)\,B$. Nothing else is
# approximated.
#
# **Exponential Euler.** Keep the exact $\bar A = e^{\Delta A}$, but replace the integral by length times height:
# $\bar B = \Delta B$.

# %%
import math

import style
import torch

from mambakit import ops
from mambakit.lab.background import (
    METHODS,
    MassOnSpring,
    discretise,
    error_order,
    matrix_exponential,
    modes_kernel,
    sequential,
    simulate,
)

names = {
    "euler": "Euler",
    "bilinear": "bilinear",
    "runge_kutta4": "Runge-Kutta",
    "zoh": "zero-order hold",
    "exponential_euler": "exponential Euler",
}
spring = MassOnSpring(mass=1.0, stiffness=4.0, damping=0.4)
system = spring.system()
lam = torch.linalg.eigvals(system.A)[0]
rows = []
for method, name in names.items():
    Ab, Bb = discretise(system.A, system.B, dt=0.5, method=method)
    rows.append((name, Ab[0, 0].item(), Ab[0, 1].item(), Bb[0].item(), torch.linalg.eigvals(Ab).abs().max().item()))
style.table(["rule", "Ab[0,0]", "Ab[0,1]", "Bb[0]", "largest |eigenvalue| of Ab"], rows)

# %% [markdown]
# The last column matters most. Every step multiplies the state by $\bar A$, so what it does after a thousand steps is
# decided by its eigenvalues: below 1 in absolute value the state fades, above 1 it explodes. The true value,
# $|e^{\Delta\lambda}|$, is {{ math.exp(0.5 * lam.real):.3f }}. Euler has turned a spring that comes to rest into one
# that flies apart.

# %%
dt, steps = 0.5, 24
start = torch.tensor([1.0, 0.0], dtype=torch.float64)
times = dt * torch.arange(steps + 1, dtype=torch.float64)
fine = torch.linspace(0, dt * steps, 600, dtype=torch.float64)
free = {method: simulate(system, method, lambda t: 0.0, dt, steps, start) for method in METHODS}

# %% tags=["hide"]
fig, ax = style.figure(height=2.8)
ax.plot(fine, spring.motion(fine)[:, 0], color=style.QUIET, linewidth=1.0, label="exact")
for method, marker in (("euler", "o"), ("bilinear", "s"), ("runge_kutta4", "^"), ("zoh", "D")):
    ax.plot(times, free[method][:, 0], marker, markersize=4, label=names[method])
ax.set(xlabel="time, s", ylabel="position", ylim=(-2.1, 2.1))
fig.legend(loc="outside upper center", ncols=5)
style.caption(
    fig,
    "A spring let go at 1, in steps of half a second. Euler explodes, the bilinear rule swings a little too slowly, "
    "Runge-Kutta fades a little too fast, and the exponential (zero-order hold) is exact: there is no input to hold.",
)

# %% [markdown]
# ## Orders, measured
#
# Halve the step: how much better does it get? If the error after a fixed time goes like $\Delta^p$, the rule is of
# order $p$, and $p$ is the slope of a line on doubly logarithmic paper. Below, the spring runs for two seconds, once
# by itself and once pushed by $u = e^{-t}$. The truth is known to fifteen digits in both cases, for $e^{-t}$ is just
# one more linear state.


# %%
def pushed_exactly(end: float) -> torch.Tensor:
    """The state at `end` from `start` under u(t) = exp(-t)."""
    A = torch.zeros(3, 3, dtype=torch.float64)
    A[:2, :2], A[:2, 2], A[2, 2] = system.A, system.B, -1.0
    together = matrix_exponential(A * end)
    return (together @ torch.tensor([*start.tolist(), 1.0], dtype=torch.float64))[:2]


end = 2.0
counts = torch.tensor([8, 16, 32, 64, 128, 256])
cases = {
    "no input": (lambda t: 0.0, spring.motion(torch.tensor([end]))[0]),
    "moving input": (lambda t: math.exp(-t), pushed_exactly(end)),
}
errors = {
    case: {
        method: torch.stack(
            [(simulate(system, method, u, end / n, n, start)[-1] - truth).norm() for n in counts.tolist()]
        )
        for method in METHODS
    }
    for case, (u, truth) in cases.items()
}


def slope(method: str, case: str) -> str:
    """The order that a straight line through the logarithms of the last four errors shows."""
    found = errors[case][method][-4:]
    if found.max() < 1e-11:
        return "none to see"
    x, y = torch.log(end / counts[-4:]), torch.log(found)
    return f"{(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item():.2f}"


style.table(
    ["rule", "order, no input", "order, moving input", "error in 32 steps, moving input"],
    [(name, *(slope(m, case) for case in cases), errors["moving input"][m][2].item()) for m, name in names.items()],
)

# %% tags=["hide"]
fig, axes = style.figure(columns=2, sharey=True)
for ax, case in zip(axes, cases, strict=True):
    for method, marker in zip(METHODS, "os^Dv", strict=True):
        ax.loglog(end / counts, errors[case][method].clamp(min=1e-16), marker=marker, markersize=4, label=names[method])
    ax.set(title=case, xlabel="step, s")
axes[0].set_ylabel("error after two seconds")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
style.caption(
    fig,
    "Error against step on logarithmic axes: the slope is the order. Without an input the exponentials are exact. "
    "With an input that moves they are of first order, like Euler, but start from a far smaller error.",
)

# %% [markdown]
# A held input makes an error of its own: within a step it does not move, while the true one does. So zero-order hold
# is exact for what it assumes, and of first order for what it does not. For tokens this is no loss at all: nothing
# lies between two words. For audio it is a real choice, and S4 used the bilinear rule, of second order. Mamba-3
# returns to a rule of second order, a learned trapezoid (arXiv 2603.15569).
#
# ## Stability: where in the plane it works
#
# One mode, $h' = \lambda h$, is multiplied by a function of $z = \Delta\lambda$ alone in each step. The truth, $e^z$,
# fades whenever the real part of $z$ is negative. A rule is safe where its own factor is at most 1.

# %%
real, imaginary = torch.meshgrid(torch.linspace(-4, 2, 241), torch.linspace(-4, 4, 321), indexing="xy")
z = torch.complex(real, imaginary)
regions = {
    method: discretise(z.flatten(), torch.ones_like(z.flatten()), 1.0, method)[0].abs().reshape(z.shape)
    for method in ("euler", "runge_kutta4", "bilinear", "zoh")
}

# %% tags=["hide"]
fig, axes = style.figure(columns=4, height=2.5, sharey=True)
for ax, (method, factor) in zip(axes, regions.items(), strict=True):
    ax.contourf(real, imaginary, factor, levels=[0, 1], colors=[style.COLOURS[0]], alpha=0.35)
    ax.contour(real, imaginary, factor, levels=[1], colors=[style.COLOURS[0]], linewidths=1.2)
    ax.axvline(0, color=style.QUIET, linewidth=0.8)
    ax.set(title=names[method], xlabel="real part of z", aspect="equal")
axes[0].set_ylabel("imaginary part of z")
style.caption(
    fig,
    "Where each rule fades (shaded). It should be exactly the left half of the plane. Euler manages one disc, "
    "Runge-Kutta a larger patch; the bilinear rule and the exponential get it right for every step, however long.",
)

# %% [markdown]
# Why this decides everything for S4: in its simplest form the modes have imaginary parts $\pi n$ (chapter 5). With 64
# states and a step of 0.1 the fastest has $z = -0.05 + {{ 0.1 * math.pi * 31:.1f }}i$, far outside anything Euler or
# Runge-Kutta survive. An *implicit* rule or an exponential is not a luxury there. The bilinear rule pays in another
# coin: it squeezes all frequencies into half a turn per step, so that this mode turns by
# {{ 2 * math.atan(0.1 * math.pi * 31 / 2):.2f }} instead of {{ 0.1 * math.pi * 31:.2f }} radians. A learned $A$ does
# not mind.
#
# ## Try it
#
# One complex mode. Left, the place of $\bar A$ in the plane: inside the circle it fades. Right, what a single knock,
# spread over one step, leaves behind; the grey line is the truth for a knock in no time.

# %% tags=["hide"]
style.html("""
<div class="interactive" id="discretisation-demo">
<style>
#discretisation-demo .controls{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.4rem 1.2rem}
#discretisation-demo label{display:block;font-size:.7rem}
#discretisation-demo input[type=range]{width:100%;height:1.8rem;margin:0;accent-color:var(--md-primary-fg-color)}
#discretisation-demo output{float:right;font-variant-numeric:tabular-nums}
#discretisation-demo .rules{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.3rem 0}
#discretisation-demo .rules label{display:flex;align-items:center;gap:.35rem;min-height:1.8rem}
#discretisation-demo .rules i{width:.7rem;height:.7rem;border-radius:50%}
#discretisation-demo .rules span{white-space:nowrap}
#discretisation-demo .pictures{display:flex;flex-wrap:wrap;align-items:flex-start;gap:.8rem}
#discretisation-demo svg{display:block;height:auto;overflow:hidden;color:var(--md-default-fg-color)}
#discretisation-demo .plane{flex:1 1 13rem;max-width:18rem}
#discretisation-demo .answer{flex:2 1 17rem;min-width:0}
#discretisation-demo text{fill:currentColor;font-size:12px;stroke:none}
#discretisation-demo [hidden]{display:none}
</style>
<div class="controls">
<label><span>step</span> <output></output>
<input type="range" data-name="dt" min="-1.7" max="0.5" step="0.01" value="-0.4" aria-label="step"></label>
<label><span>real part of A</span> <output></output>
<input type="range" data-name="re" min="-2" max="0.2" step="0.01" value="-0.4" aria-label="real part of A"></label>
<label><span>imaginary part of A</span> <output></output>
<input type="range" data-name="im" min="0" max="8" step="0.05" value="2" aria-label="imaginary part of A"></label>
</div>
<div class="rules">
<label><input type="checkbox" data-rule="euler" checked><i style="background:var(--figure-1)"></i>
<span><span>Euler</span>: <span data-in>fades</span><span data-out hidden>explodes</span></span></label>
<label><input type="checkbox" data-rule="tustin" checked><i style="background:var(--figure-2)"></i>
<span><span>bilinear</span>: <span data-in>fades</span><span data-out hidden>explodes</span></span></label>
<label><input type="checkbox" data-rule="zoh" checked><i style="background:var(--figure-3)"></i>
<span><span>zero-order hold</span>: <span data-in>fades</span><span data-out hidden>explodes</span></span></label>
</div>
<div class="pictures">
<svg class="plane" viewBox="0 0 240 240" role="img" aria-label="where the discrete A lies in the complex plane"></svg>
<svg class="answer" viewBox="0 0 400 240" role="img" aria-label="the impulse response over ten seconds"></svg>
</div>
<script>
(function () {
  var root = document.getElementById("discretisation-demo");
  if (!root || root.dataset.ready) return;
  root.dataset.ready = "yes";
  var plane = root.querySelector(".plane"), answer = root.querySelector(".answer");
  var rules = [["euler", 1], ["tustin", 2], ["zoh", 3]], seconds = 10, top = 1.6;
  function mul(a, b) { return [a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]]; }
  function div(a, b) {
    var d = b[0] * b[0] + b[1] * b[1];
    return [(a[0] * b[0] + a[1] * b[1]) / d, (a[1] * b[0] - a[0] * b[1]) / d];
  }
  function exp(a) { var r = Math.exp(a[0]); return [r * Math.cos(a[1]), r * Math.sin(a[1])]; }
  // Ab, and Bb / dt: what a knock of unit area leaves in the state
  function step(rule, A, dt) {
    var z = [dt * A[0], dt * A[1]];
    if (rule === "euler") return [[1 + z[0], z[1]], [1, 0]];
    if (rule === "tustin") {
      var low = [1 - z[0] / 2, -z[1] / 2];
      return [div([1 + z[0] / 2, z[1] / 2], low), div([1, 0], low)];
    }
    var e = exp(z), size = z[0] * z[0] + z[1] * z[1];
    return [e, size < 1e-12 ? [1, 0] : div([e[0] - 1, e[1]], z)];
  }
  function clip(x, most) { return Math.max(-most, Math.min(most, x)); }
  function px(x) { return (120 + 80 * clip(x, 1.4)).toFixed(1); }
  function py(y) { return (120 - 80 * clip(y, 1.4)).toFixed(1); }
  function tx(t) { return (30 + 362 * t / seconds).toFixed(1); }
  function ty(y) { return (112 - 100 * clip(y / top, 1.5)).toFixed(1); }
  function text(x, y, anchor, words) {
    return '<text x="' + x + '" y="' + y + '" text-anchor="' + anchor + '">' + words + "</text>";
  }
  function dot(x, y, radius, colour) {
    return '<circle cx="' + x + '" cy="' + y + '" r="' + radius + '" style="fill:' + colour + '"/>';
  }
  function line(path, paint) { return '<path d="' + path + '" fill="none" stroke-width="1.3" ' + paint + "/>"; }
  function draw() {
    var value = {};
    root.querySelectorAll("input[type=range]").forEach(function (input) {
      var name = input.dataset.name, now = name === "dt" ? Math.pow(10, input.value) : Number(input.value);
      value[name] = now;
      input.parentNode.querySelector("output").textContent = now.toFixed(2);
    });
    var A = [value.re, value.im], dt = value.dt, thin = 'stroke="currentColor" opacity=".35"';
    var left = line("M0 120H240M120 0V240", thin) + text(205, 134, "start", "1") + text(116, 36, "end", "i") +
      '<circle cx="120" cy="120" r="80" fill="none" stroke="currentColor" opacity=".7"/>';
    var right = line("M30 112H392M30 10V214", thin);
    [0, 2, 4, 6, 8, 10].forEach(function (t) { right += text(tx(t), 230, "middle", t); });
    [-1, 0, 1].forEach(function (y) { right += text(24, Number(ty(y)) + 3, "end", y); });
    var path = "";
    for (var i = 0; i <= 400; i++) {
      var t = seconds * i / 400;
      path += (i ? "L" : "M") + tx(t) + " " + ty(exp([A[0] * t, A[1] * t])[0]);
    }
    right += line(path, 'stroke="currentColor" opacity=".7"');
    rules.forEach(function (rule) {
      var input = root.querySelector('[data-rule="' + rule[0] + '"]'), row = input.parentNode;
      var made = step(rule[0], A, dt), fades = Math.hypot(made[0][0], made[0][1]) <= 1 + 1e-12;
      row.querySelector("[data-in]").hidden = !fades;
      row.querySelector("[data-out]").hidden = fades;
      if (!input.checked) return;
      var colour = "var(--figure-" + rule[1] + ")", h = made[1], d = "", dots = "";
      left += dot(px(made[0][0]), py(made[0][1]), 6, colour);
      for (var k = 1; k * dt <= seconds && Math.abs(h[0]) < 1e6; k++) {
        d += (d ? "L" : "M") + tx(k * dt) + " " + ty(h[0]);
        if (dt > 0.08 && Math.abs(h[0]) < top) dots += dot(tx(k * dt), ty(h[0]), 3, colour);
        h = mul(made[0], h);
      }
      right += line(d, 'style="stroke:' + colour + '"') + dots;
    });
    plane.innerHTML = left;
    answer.innerHTML = right;
  }
  root.addEventListener("input", draw);
  draw();
})();
</script>
</div>
""")

# %% [markdown]
# Three things to find: lengthen the step until Euler's point leaves the circle; make the imaginary part so large that
# zero-order hold's point goes around more than half a turn in a step (nobody can then tell its frequency from a
# slower one: *aliasing*); and see that the bilinear rule never leaves the circle while the real part is negative, but
# ends up at $-1$, jumping up and down, when the step is long.
#
# ## The learned step
#
# In a physical system $\Delta$ is the clock. In a network nobody knows the clock of the data, so it is a parameter,
# one for each channel, learned like any other as $\log\Delta$. It sets the memory: a mode with real part $\alpha$
# fades to a third in $1/(\Delta|\alpha|)$ steps. Here a channel is shown the output of a system whose step it does
# not know:

# %%
A, B = torch.tensor([-0.5 + 2.0j, -1.0 + 0.5j]), torch.ones(2, dtype=torch.complex64)
C = torch.tensor([1.0 + 0.0j, 0.5 - 0.5j])
hidden_step, length = 0.13, 60
wanted = modes_kernel(A, B, C, hidden_step, length) / hidden_step
log_dt = torch.tensor(math.log(0.03), requires_grad=True)
optimizer = torch.optim.Adam([log_dt], lr=0.05)
path = []
for _ in range(120):
    dt_now = log_dt.exp()
    loss = (modes_kernel(A, B, C, dt_now, length) / dt_now - wanted).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    path.append(log_dt.exp().item())
print(
    f"hidden {hidden_step}, first guess 0.03; after 30, 60, 120 updates: "
    f"{path[29]:.3f}, {path[59]:.3f}, {path[119]:.3f}"
)

# %% [markdown]
# There is a second way to see $\Delta$, and it is the one that Mamba will build on. Take the simplest system,
# $A = -1$, $B = 1$, under zero-order hold: $\bar A = e^{-\Delta}$, $\bar B = 1 - e^{-\Delta}$, two weights that add
# up to one. If the step is computed as $\Delta = \mathrm{softplus}(v) = \log(1 + e^v)$, then
# $e^{-\Delta} = 1/(1 + e^v)$, and
#
# $$ h_{t+1} = (1 - g)\, h_t + g\, u_t, \qquad g = \mathrm{sigmoid}(v). $$
#
# This is the gate of a gated RNN, exactly. A long step is an open gate: much time passes, the old fades, the new is
# let in. A step near zero is a closed one: no time has passed, nothing has happened. Chapter 7 lets the input choose.

# %%
v = torch.linspace(-4, 4, 9, dtype=torch.float64)
step = torch.nn.functional.softplus(v)
gates = [discretise(torch.tensor([-1.0 + 0j]), torch.tensor([1.0 + 0j]), d.item(), "zoh") for d in step]
style.check(
    "zero-order hold and the gate of an RNN", torch.cat([Bb.real for _, Bb in gates]), torch.sigmoid(v).float(), 1e-6
)

# %% [markdown]
# ## Where Mamba's code departs from its paper
#
# The paper (arXiv 2312.00752, equation 4) discretises by zero-order hold. The published code, and every code
# compatible with it, ours included, uses $e^{\Delta A}$ for $\bar A$ but $\Delta B$ for $\bar B$: the exponential
# Euler rule. It saves an expression that is delicate where $\Delta A$ is near zero. What does it change? For one mode
# the ratio of the two $\bar B$ is
#
# $$ \frac{\Delta}{(e^{\Delta A} - 1)/A} = \frac{\Delta A}{e^{\Delta A} - 1}, $$
#
# near 1 for short steps and about $\Delta|A|$ for long ones. Mamba starts with $A = -1, \dots, -16$ and steps between
# 0.001 and 0.1, and lets the input lengthen them. We run the library's own scan against an exact zero-order hold, for
# a constant step:

# %%
torch.manual_seed(0)
length, states = 400, 16
u = torch.randn(1, length, 1, dtype=torch.float64)
A = -torch.arange(1.0, states + 1, dtype=torch.float64)[None]  # (dim, state), as Mamba begins
B, C = torch.randn(2, 1, length, states, dtype=torch.float64).unbind()


def by_zoh(delta: torch.Tensor) -> torch.Tensor:
    """The same scan with the paper's Bb = (exp(delta A) - 1) / A * B."""
    Ab = torch.exp(delta[0, :, :, None] * A)  # (length, dim, state)
    h = sequential(Ab, (Ab - 1) / A * B[0, :, None] * u[0, :, :, None]).h
    return (h * C[0, :, None]).sum(-1)


rows = []
for dt in (0.001, 0.01, 0.1, 0.5, 2.0):
    delta = torch.full_like(u, dt)
    y, paper = ops.selective_scan(u, delta, A, B, C)[0], by_zoh(delta)
    ratio = (dt * A / torch.expm1(dt * A))[0]
    rows.append((dt, ratio[0].item(), ratio[-1].item(), 100 * ((y - paper).norm() / paper.norm()).item()))
style.table(["step", "Bb ratio for A = -1", "Bb ratio for A = -16", "difference in y, %"], rows)

# %% [markdown]
# At the shortest steps the rules are one; at 0.1, where Mamba's initial steps end, the fastest states are written
# {{ rows[2][2]:.2f }} times as loudly as the paper says, and the output differs by {{ rows[2][3]:.0f }} %. Does it
# matter? **With a constant step, no:** the ratio is a constant for each state and disappears into $B$, which is
# learned. **With a step that varies, it does change what the model is.** Under zero-order hold a long step lets the
# state settle at $-Bu/A$ and no further. Under the exponential Euler rule the write grows with $\Delta$ without a
# limit: $\Delta$ is a gate *and* a volume.
#
# The second consequence concerns time itself. Hold an input for one second and cut the second into more and more
# steps: time should not care.

# %%
one = torch.tensor([1.0], dtype=torch.float64)
pieces = (1, 2, 4, 8, 16)
held = {}
for method in ("zoh", "exponential_euler"):
    held[method] = []
    for n in pieces:
        Ab, Bb = discretise(-4.0 * one, one, 1.0 / n, method)
        held[method].append((Bb * (1 - Ab**n) / (1 - Ab)).item())  # Bb + Ab Bb + ... + Ab^(n-1) Bb
truth = (1 - math.exp(-4.0)) / 4.0
style.table(
    ["steps in the second", "zero-order hold", "exponential Euler", "truth"],
    [(n, held["zoh"][i], held["exponential_euler"][i], truth) for i, n in enumerate(pieces)],
)
halving = error_order(torch.tensor(held["exponential_euler"]) - truth)

# %% [markdown]
# One long step of the code's rule overshoots {{ held["exponential_euler"][0] / truth:.1f }} times; the overshoot
# falls with order {{ halving[-1].item():.2f }}. A model trained at one sampling rate can be moved to another by
# rescaling $\Delta$ under zero-order hold; under the other rule only roughly. Language has no sampling rate, and
# there nobody has missed it.
#
# ## Check

# %%
delta = torch.rand(1, length, 1, dtype=torch.float64)
Ab = torch.exp(delta[0, :, :, None] * A)
h = sequential(Ab, delta[0, :, :, None] * B[0, :, None] * u[0, :, :, None]).h
style.check(
    "the library's scan and the exponential Euler rule",
    ops.selective_scan(u, delta, A, B, C)[0],
    (h * C[0, :, None]).sum(-1),
    1e-12,
)
on = simulate(system, "zoh", lambda t: 1.0, 0.5, 24, torch.zeros(2, dtype=torch.float64))
style.check("zero-order hold in steps of half a second and the closed form", on, spring.step_response(times), 1e-12)

# %% [markdown]
# ## Exercises
#
# **1.** For which steps does Euler's rule keep the spring of this chapter stable? Derive it from
# $|1 + \Delta\lambda| \le 1$, and try.
#
# **2.** The bilinear rule maps the imaginary axis onto the unit circle. Show it, and say what it does to the
# frequency $\omega$.
#
# **3.** Mamba-3 weighs the two ends of a step: $\bar B u$ becomes
# $\Delta\,((1-\theta)\, e^{\Delta A}B u_t + \theta\, B u_{t+1})$ with a learned $\theta$. Measure its order for
# $\theta = 1/2$ and for $\theta = 1$ with the spring under $u = e^{-t}$.

# %% [markdown] tags=["answer"]
# **1.** With $\lambda = \alpha + i\omega$: $(1 + \Delta\alpha)^2 + \Delta^2\omega^2 \le 1$ gives
# $\Delta \le -2\alpha/|\lambda|^2$, which for a spring that swings is $c/k$: the less damping, the shorter the step,
# and without damping no step is short enough.

# %% tags=["answer"]
limit = (-2 * lam.real / lam.abs() ** 2).item()
for factor in (0.99, 1.01):
    far = simulate(system, "euler", lambda t: 0.0, factor * limit, 4000, start)[-1].norm().item()
    print(f"step {factor} times {limit:.3f}: after 4000 steps the state has length {far:.2g}")

# %% [markdown] tags=["answer"]
# **2.** For $z = i\Delta\omega$ the factor is $(1 + z/2)/(1 - z/2)$, a number divided by its conjugate, so of
# absolute value 1 and angle $2\arctan(\Delta\omega/2)$. The discrete system turns at
# $\frac{2}{\Delta}\arctan\frac{\Delta\omega}{2}$ instead of $\omega$: slow frequencies pass unharmed, fast ones are
# all squeezed below half a turn a step, and none is aliased.
#
# **3.** The average of both ends is of second order; the value at the end alone is Mamba's rule, of first.

# %% tags=["answer"]
for theta in (0.5, 1.0):
    found = []
    for n in (64, 128, 256):
        d, h = end / n, start
        Ab, Bb = discretise(system.A, system.B, d, "exponential_euler")
        for k in range(n):
            h = Ab @ (h + (1 - theta) * Bb * math.exp(-k * d)) + theta * Bb * math.exp(-(k + 1) * d)
        found.append((h - pushed_exactly(end)).norm())
    print(f"theta {theta}: orders {[round(o, 2) for o in error_order(torch.stack(found)).tolist()]}")
