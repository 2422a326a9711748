// The Inspector's views. Each is {controls, fit(card), load()}: what can be set, and the nodes that show what the server found.

import { count, el, ms, percent, table, visible } from "./dom.js";
import { heatmap, paint, shade } from "./draw.js";
import { bars } from "./tasks.js";

let number = 0;

/** A labelled select; `fill` sets its options and keeps the choice where it still stands. */
function choice(label, changed) {
  const id = `choice-${++number}`;
  const select = el("select", { id, onchange: () => changed(select.value) });
  const box = el("div", { class: "field" }, el("label", { for: id, text: label }), select);
  box.select = select;
  box.fill = (options, chosen = select.value) => {
    select.replaceChildren(...options.map(([value, text]) => el("option", { value, text })));
    if (options.some(([value]) => String(value) === String(chosen))) select.value = chosen;
    box.hidden = options.length < 2;
  };
  return box;
}

const KINDS = { self: "a token's own text", encoder: "inside the source", cross: "from the answer to the source" };
const range = (n, name) => Array.from({ length: n }, (_, i) => [i, `${name} ${i}`]);

/** Where one token looks: a choice of the token, and the tokens that it looks at, as a table with bars. */
function looks(queries, keys, weights) {
  const from = choice("Where one token looks", () => draw());
  from.fill(queries.map((token, i) => [i, `${i}: ${visible(token.text)}`]), queries.length - 1);
  from.hidden = false;
  const out = el("div", {});
  function draw() {
    const row = weights[Number(from.select.value)];
    const order = row.map((_, j) => j).sort((a, b) => row[b] - row[a]).slice(0, 8).filter((j) => row[j] > 0);
    out.replaceChildren(bars(`Token ${from.select.value}, ${visible(queries[Number(from.select.value)].text)}, looks at`, order.map((j) => [`${j}: ${visible(keys[j].text)}`, row[j]]), "Weight"));
  }
  from.pick = (i) => { from.select.value = i; draw(); };
  draw();
  return { node: el("div", {}, from, out), pick: from.pick };
}

/** A map of weights with the table of one token beside it. */
function weighed(label, queries, keys, weights) {
  const list = looks(queries, keys, weights);
  const map = heatmap({
    values: weights, rows: queries.map((token) => token.text), columns: keys.map((token) => token.text), label, pick: (i) => list.pick(i),
    told: (i, j, w) => `${i} “${visible(queries[i].text)}” looks at ${j} “${visible(keys[j].text)}”: ${(100 * w).toFixed(1)} %`,
  });
  map.canvas.id = "heat";
  return [map.node, list.node];
}

export function attention({ call, refresh }) {
  const kind = choice("Attention", () => { heads(); refresh(); });
  const layer = choice("Layer", () => refresh()), head = choice("Head", () => show());
  let card = null, found = null, out = null;

  function heads() {
    const name = kind.select.value;
    layer.fill(range(card.layers[name] ?? 0, "layer"));
    head.fill(range(card.heads[name] ?? 0, "head"));
  }

  function show() {
    if (!found) return;
    const at = found.maps.find((one) => one.head === Number(head.select.value)) ?? found.maps[0];
    head.select.value = at.head;
    const small = found.maps.length < 2 ? "" : el("div", { class: "thumbs", role: "group", "aria-label": "Heads of this layer" }, found.maps.map((one) => el("button", {
      type: "button", "aria-pressed": String(one === at), "aria-label": `Head ${one.head}`, onclick: () => { head.select.value = one.head; show(); out.querySelector('.thumbs [aria-pressed="true"]').focus(); },
    }, thumb(one.weights), el("span", { text: one.head }))));
    out.replaceChildren(small, el("p", { class: "note" }, "Watched as ", el("code", { text: at.name }), ". Rows look, columns are looked at; rows sum to 1."),
      ...weighed(`Attention of layer ${at.layer}, head ${at.head}: ${found.queries.length} by ${found.keys.length} tokens`, found.queries, found.keys, at.weights));
  }

  return {
    controls: el("div", { class: "row" }, kind, layer, head),
    fit(told) {
      card = told;
      kind.fill(card.kinds.map((name) => [name, KINDS[name] ?? name]), card.kinds.includes("cross") ? "cross" : card.kinds[0]);
      heads();
    },
    async load() {
      if (!card.kinds.length) return el("p", { class: "note", text: "This model has no attention." });
      found = await call("attention", { kind: kind.select.value, layer: Number(layer.select.value), head: null });
      out = el("div", {});
      show();
      return out;
    },
  };
}

/** A small picture of a map. */
function thumb(weights) {
  const canvas = el("canvas", { width: weights[0].length, height: weights.length, "aria-hidden": "true" });
  const c = canvas.getContext("2d");
  const image = c.createImageData(canvas.width, canvas.height);
  weights.flat().forEach((w, k) => { image.data.set([...shade(Math.sqrt(w)), 255], 4 * k); });
  c.putImageData(image, 0, 0);
  return canvas;
}

export function rollout({ call, refresh }) {
  const layer = choice("Up to layer", () => refresh());
  return {
    controls: el("div", { class: "row" }, layer),
    fit(card) {
      const layers = card.layers.self ?? card.layers.encoder ?? 0;
      layer.fill(range(layers, "layer"), layers - 1);
    },
    async load() {
      const found = await call("rollout", { layer: Number(layer.select.value) });
      return [el("p", { class: "note", text: "How much of each token below reached each token at this layer: the heads' mean, half of it the residual path, multiplied layer by layer (Abnar and Zuidema, 2020)." }),
        ...weighed(`Rollout over ${found.tokens.length} tokens`, found.tokens, found.tokens, found.rollout)];
    },
  };
}

export function lens({ call, refresh }) {
  const last = choice("Positions", () => refresh());
  last.fill([[4, "the last 4"], [8, "the last 8"], [16, "the last 16"], [32, "the last 32"]], 8);
  return {
    controls: el("div", { class: "row" }, last),
    async load() {
      const found = await call("lens", { top: 3, last: Number(last.select.value) });
      const rows = [...found.layers].reverse().map((layer) => [layer.name, ...layer.guesses.map((guesses, i) => paint(el("td", {
        title: `${guesses.map((one) => `${visible(one.token)} ${percent(one.p)}`).join(", ")}; ${layer.entropy[i].toFixed(1)} bits`,
      }, visible(guesses[0].token), el("span", { class: "aside", text: ` ${percent(guesses[0].p)}` })), guesses[0].p))]);
      return [el("p", { class: "note", text: "What the model would say next if it stopped at this layer (nostalgebraist, 2020). The stronger the colour, the surer it is; the first row is its answer." }),
        table("The likeliest next token by layer", ["Layer", ...found.tokens.map((token, i) => `${found.at[i]}: ${visible(token.text)}`)], rows, { class: "lens" })];
    },
  };
}

export function positions({ call }) {
  return {
    controls: el("div", {}),
    async load() {
      const found = await call("positions", { count: 64 }, false);
      if (!found.similarity.length) return el("p", { class: "note", text: found.told });
      const names = found.similarity.map((_, i) => `${i}`);
      const map = heatmap({ values: found.similarity, rows: names, columns: names, signed: true, label: `Similarity of ${found.count} positions`, told: (i, j, value) => `positions ${i} and ${j}: ${value.toFixed(3)}` });
      const far = [0, 1, 2, 4, 8, 16, 32, found.count - 1].filter((d) => d < found.count);
      const mean = (d) => { const all = found.similarity.slice(0, found.count - d).map((row, i) => row[i + d]); return all.reduce((a, b) => a + b, 0) / all.length; };
      return [el("p", { class: "note", text: found.told }), map.node, table("Mean over the pairs at a distance", ["Distance", "Similarity"], far.map((d) => [d, mean(d).toFixed(3)]))];
    },
  };
}

export function time({ call }) {
  return {
    controls: el("div", {}),
    async load() {
      const found = await call("latency", { runs: 3 });
      return [el("p", {}, "One pass over the text took ", el("b", { text: ms(1000 * found.seconds) }), ` (${found.usage.prompt_tokens} tokens, ${found.runs} runs). Its operations one by one, with attention unfused: ${ms(1000 * found.apart)}.`),
        table("Where the time went", ["Part", "Share", "Time"], found.parts.map((one) => [one.part, el("td", {}, el("span", { class: "bar", vars: { "--p": one.share.toFixed(4) } }), ` ${percent(one.share)}`), ms(1000 * one.seconds)]))];
    },
  };
}

export function cost({ call, state }) {
  const length = el("input", { id: "cost-length", type: "number", min: "1", max: String(2 ** 20), placeholder: "1024", onchange: () => again() });
  let again = () => {};
  return {
    controls: el("div", { class: "row" }, el("div", { class: "field" }, el("label", { for: "cost-length", text: "Tokens to count for" }), length)),
    async load() {
      const out = el("div", {});
      again = async () => out.replaceChildren(...shown(await call("card", { length: length.valueAsNumber || null }, false)));
      out.append(...shown(length.value ? await call("card", { length: length.valueAsNumber }, false) : state.card));
      return out;
    },
  };
}

function shown(card) {
  const facts = [["Family", card.family], ["Parameters", `${count(card.parameters)}${card.active === card.parameters ? "" : `, ${count(card.active)} of them met by one token`}`],
    ["Context", card.context ?? "no limit"], ["FLOPs", `${count(card.flops)} for ${card.length} tokens, ${percent(card.attention_flops / card.flops)} of them in attention's square`],
    ["Cache", card.cache_bytes ? `${count(card.cache_bytes)}B for ${card.length} tokens, ${count(card.cache_bytes_per_token)}B for each` : "none"],
    ["Watchable", card.names.join(", ")]];
  const total = Object.values(card.groups).reduce((a, b) => a + b, 0) || 1;
  return [el("dl", {}, facts.map(([name, value]) => [el("dt", { text: name }), el("dd", { text: String(value) })]).flat()),
    bars("Where the parameters are", Object.entries(card.groups).map(([name, n]) => [name, n / total, count(n)]), "Share", "Parameters")];
}
