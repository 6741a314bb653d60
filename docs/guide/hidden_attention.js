// The interactive figure of chapter 11: a small Mamba-2, its forward in plain arithmetic, and its token-mixing matrix.
// `mambaForward` is a function of its arguments alone, so that a test can run it without a page. The chapter writes the
// model into the page as JSON: {layers, width, heads, headdim, state, taps, eps, symbols, tensors, weights}, where
// `weights` is base64 of float32 and `tensors` says where each begins.

function mambaTensors(model) {
  const bytes = Uint8Array.from(atob(model.weights), (c) => c.charCodeAt(0));
  const numbers = new Float32Array(bytes.buffer);
  const found = {};
  for (const [name, [from, size]] of Object.entries(model.tensors)) found[name] = numbers.subarray(from, from + size);
  return found;
}

const LATIN = "abcdefghijklmnopqrstuvwxyz", CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюяё";

// Letters of two alphabets share the model's symbols, of which it knows nothing but whether they are the same.
function mambaSymbols(text, symbols) {
  return Array.from(text.toLowerCase(), (letter) => {
    const latin = LATIN.indexOf(letter), cyrillic = CYRILLIC.indexOf(letter);
    return latin >= 0 ? latin : cyrillic >= 0 ? cyrillic : symbols - 1;
  });
}

// Logits (length, symbols) and mixing[layer][head][i][j], what position i receives from j.
function mambaForward(model, tensors, tokens) {
  const { layers, width, heads, headdim, state, taps, eps, symbols } = model;
  const inner = heads * headdim, convolved = inner + 2 * state, length = tokens.length;
  const silu = (v) => v / (1 + Math.exp(-v));
  const softplus = (v) => (v > 20 ? v : Math.log1p(Math.exp(v)));
  const times = (matrix, vector, rows) =>
    Array.from({ length: rows }, (_, r) => {
      let sum = 0;
      for (let c = 0; c < vector.length; c++) sum += matrix[r * vector.length + c] * vector[c];
      return sum;
    });
  const normed = (vector, weight) => {
    const scale = 1 / Math.sqrt(vector.reduce((sum, v) => sum + v * v, 0) / vector.length + eps);
    return vector.map((v, i) => v * scale * weight[i]);
  };

  const stream = tokens.map((token) => Array.from(tensors.embedding.subarray(token * width, (token + 1) * width)));
  const mixing = [];
  for (let layer = 0; layer < layers; layer++) {
    const w = (name) => tensors[`${layer}.${name}`];
    const rows = 2 * inner + 2 * state + heads;
    const projected = stream.map((vector) => times(w("in_proj"), normed(vector, w("norm")), rows));
    const z = projected.map((p) => p.slice(0, inner));
    const raw = projected.map((p) => p.slice(inner, inner + convolved));
    const delta = projected.map((p) => p.slice(inner + convolved).map((v, h) => softplus(v + w("dt_bias")[h])));
    const xBC = raw.map((_, t) =>
      Array.from({ length: convolved }, (_, c) => {
        let sum = w("conv_bias")[c];
        for (let k = 0; k < taps; k++) {
          const from = t - (taps - 1) + k;
          if (from >= 0) sum += w("conv")[c * taps + k] * raw[from][c];
        }
        return silu(sum);
      })
    );
    const B = xBC.map((v) => v.slice(inner, inner + state));
    const C = xBC.map((v) => v.slice(inner + state));
    const y = xBC.map(() => new Array(inner).fill(0));
    const ofHeads = [];
    for (let h = 0; h < heads; h++) {
      const A = -Math.exp(w("A_log")[h]);
      const M = [];
      for (let i = 0; i < length; i++) {
        M.push(new Array(i + 1));
        let logDecay = 0;
        for (let j = i; j >= 0; j--) {
          let score = 0;
          for (let n = 0; n < state; n++) score += C[i][n] * B[j][n];
          M[i][j] = score * Math.exp(logDecay) * delta[j][h];
          logDecay += A * delta[j][h];
          for (let p = 0; p < headdim; p++) y[i][h * headdim + p] += M[i][j] * xBC[j][h * headdim + p];
        }
        for (let p = 0; p < headdim; p++) y[i][h * headdim + p] += w("D")[h] * xBC[i][h * headdim + p];
      }
      ofHeads.push(M);
    }
    mixing.push(ofHeads);
    for (let t = 0; t < length; t++) {
      const gated = normed(y[t].map((v, c) => v * silu(z[t][c])), w("gate_norm"));
      const added = times(w("out_proj"), gated, width);
      stream[t] = stream[t].map((v, c) => v + added[c]);
    }
  }
  const logits = stream.map((vector) => times(tensors.head, normed(vector, tensors.norm_f), symbols));
  return { logits, mixing };
}

function mambaFigure(root) {
  const words = {
    en: {
      ask: "Type a sentence that repeats itself:", hint: "Point at a cell, or touch it.", grid: "hidden attention",
      to: "to", from: "from", next: "next", layer: "layer", head: "head", all: "all heads",
    },
    ru: {
      ask: "Наберите фразу, в которой есть повторы:", hint: "Наведите на клетку или коснитесь её.", grid: "скрытое внимание",
      to: "в", from: "из", next: "далее", layer: "слой", head: "голова", all: "все головы",
    },
  }[document.documentElement.lang.startsWith("ru") ? "ru" : "en"];
  const model = JSON.parse(root.querySelector("[data-model]").textContent);
  const tensors = mambaTensors(model);
  const part = (name) => root.querySelector(`[data-part=${name}]`);
  const [text, layer, head, grid, value, next] = ["text", "layer", "head", "grid", "value", "next"].map(part);
  part("ask").textContent = words.ask;
  grid.setAttribute("aria-label", words.grid);
  layer.setAttribute("aria-label", words.layer);
  head.setAttribute("aria-label", words.head);
  const option = (select, label, index) => select.add(new Option(label, index));
  for (let l = 0; l < model.layers; l++) option(layer, `${words.layer} ${l + 1}`, l);
  option(head, words.all, -1);
  for (let h = 0; h < model.heads; h++) option(head, `${words.head} ${h + 1}`, h);
  layer.value = String(model.layers - 1);
  let letters = [], shown = [];
  const label = (letter) => (letter === " " ? "␣" : letter);

  function matrix(mixing) {
    const chosen = mixing[Number(layer.value)], h = Number(head.value);
    if (h >= 0) return chosen[h];
    return chosen[0].map((row, i) => row.map((_, j) => chosen.reduce((sum, M) => sum + Math.abs(M[i][j]), 0)));
  }

  function draw() {
    letters = Array.from(text.value);
    if (!letters.length) {
      grid.replaceChildren();
      value.textContent = next.textContent = "";
      return;
    }
    const tokens = mambaSymbols(text.value, model.symbols);
    const { logits, mixing } = mambaForward(model, tensors, tokens);
    shown = matrix(mixing);
    let limit = 1e-12;
    for (const row of shown) for (const v of row) limit = Math.max(limit, Math.abs(v));
    const n = letters.length, cell = 10, edge = 12;
    const made = [];
    const put = (name, attributes, content) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, v] of Object.entries(attributes)) element.setAttribute(key, v);
      if (content !== undefined) element.textContent = content;
      made.push(element);
    };
    for (let i = 0; i < n; i++) {
      const middle = edge + (i + 0.5) * cell;
      const style = { "font-size": 7, fill: "currentColor", "text-anchor": "middle", "dominant-baseline": "central" };
      put("text", { ...style, x: edge / 2, y: middle }, label(letters[i]));
      put("text", { ...style, x: middle, y: edge / 2 }, label(letters[i]));
      for (let j = 0; j <= i; j++) {
        const colour = shown[i][j] < 0 ? "var(--figure-6)" : "var(--figure-1)";
        const share = Math.round((100 * Math.abs(shown[i][j])) / limit);
        put("rect", {
          x: edge + j * cell, y: edge + i * cell, width: cell - 0.5, height: cell - 0.5, "data-i": i, "data-j": j,
          style: `fill: color-mix(in srgb, ${colour} ${share}%, var(--figure-grid))`,
        });
      }
    }
    grid.setAttribute("viewBox", `0 0 ${edge + n * cell} ${edge + n * cell}`);
    grid.style.maxWidth = `${Math.min(40, 3 + 1.4 * n)}rem`;
    grid.replaceChildren(...made);
    value.textContent = words.hint;
    next.textContent = `${words.next}: ${likeliest(logits[n - 1], tokens)}`;
  }

  // The three likeliest symbols, spelled as the reader has spelled them.
  function likeliest(logits, tokens) {
    const top = Math.max(...logits), weights = logits.map((v) => Math.exp(v - top));
    const total = weights.reduce((a, b) => a + b, 0);
    const spelled = (symbol) => {
      const at = tokens.lastIndexOf(symbol);
      if (symbol === model.symbols - 1) return "␣";
      if (at >= 0) return letters[at].toLowerCase();
      return (/[а-яё]/i.test(text.value) ? CYRILLIC : LATIN)[symbol] || "?";
    };
    return weights
      .map((v, symbol) => [v / total, symbol])
      .sort((a, b) => b[0] - a[0])
      .slice(0, 3)
      .map(([share, symbol]) => `${spelled(symbol)} ${Math.round(100 * share)}%`)
      .join(", ");
  }

  function point(event) {
    const { i, j } = (event.target.dataset || {});
    if (i === undefined) return;
    for (const other of grid.querySelectorAll("[stroke]")) other.removeAttribute("stroke");
    event.target.setAttribute("stroke", "currentColor");
    const place = (at) => `${label(letters[at])} (${Number(at) + 1})`;
    value.textContent = `${words.to} ${place(i)} ${words.from} ${place(j)}: ${shown[i][j].toFixed(3)}`;
  }

  text.addEventListener("input", draw);
  layer.addEventListener("change", draw);
  head.addEventListener("change", draw);
  grid.addEventListener("pointerover", point);
  grid.addEventListener("pointerdown", point);
  draw();
}

if (typeof document !== "undefined") mambaFigure(document.getElementById("hidden-attention"));
if (typeof module !== "undefined") module.exports = { mambaTensors, mambaSymbols, mambaForward };
