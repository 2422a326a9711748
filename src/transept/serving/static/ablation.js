// Heads off: switch heads of attention off and see at once what the model says without them.

import { clear, el, percent, say, table, visible } from "./dom.js";
import { paint } from "./draw.js";
import { bars } from "./tasks.js";

export function ablation({ call, state, refresh }) {
  const grid = el("div", { class: "scroll heads-grid" });
  const kinds = el("div", { class: "row" });
  const told = el("p", { class: "note", id: "heads-off", text: "No head is off." });
  let card = null, kind = null, later = 0;

  function soon() {
    const off = [...state.heads].length;
    told.textContent = off ? `${off} ${off > 1 ? "heads are" : "head is"} off.` : "No head is off.";
    clearTimeout(later);
    later = setTimeout(refresh, 250);
  }

  const key = (layer, head) => `${kind}/${layer}/${head}`;

  function toggle(keys, on) {
    for (const one of keys) if (on) state.heads.add(one); else state.heads.delete(one);
    for (const button of grid.querySelectorAll("[data-key]")) button.setAttribute("aria-pressed", String(state.heads.has(button.dataset.key)));
    soon();
  }

  function draw() {
    const [layers, heads] = [card.layers[kind], card.heads[kind]];
    const rows = Array.from({ length: layers }, (_, layer) => el("tr", {},
      el("th", { scope: "row" }, el("button", { type: "button", class: "quiet head", tabindex: "-1", data: { at: `${layer}/-1` }, "aria-label": `All heads of layer ${layer}`, text: String(layer), onclick: () => {
        const all = Array.from({ length: heads }, (_, head) => key(layer, head));
        toggle(all, !all.every((one) => state.heads.has(one)));
      } })),
      Array.from({ length: heads }, (_, head) => el("td", {}, el("button", {
        type: "button", class: "head", tabindex: layer || head ? "-1" : "0", data: { key: key(layer, head), at: `${layer}/${head}` }, "aria-pressed": String(state.heads.has(key(layer, head))),
        "aria-label": `Layer ${layer}, head ${head} off`, text: String(head), onclick: () => toggle([key(layer, head)], !state.heads.has(key(layer, head))),
      })))));
    clear(grid, el("table", { class: "grid" }, el("caption", { text: "Layers and their heads; a head that is pressed is off. Arrow keys move." }), el("tbody", {}, rows)));
    clear(kinds, card.kinds.length < 2 ? "" : card.kinds.map((name) => el("button", { type: "button", "aria-pressed": String(name === kind), text: name, onclick: () => { kind = name; draw(); } })),
      el("button", { type: "button", text: "All heads on again", onclick: () => toggle([...state.heads], false) }));
  }

  grid.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    const at = document.activeElement?.dataset?.at?.split("/").map(Number);
    if (!step || !at) return;
    event.preventDefault();
    const next = grid.querySelector(`[data-at="${at[0] + step[0]}/${at[1] + step[1]}"]`);
    if (!next) return;
    for (const button of grid.querySelectorAll("button")) button.tabIndex = button === next ? 0 : -1;
    next.focus();
  });

  return {
    controls: el("div", {}, kinds, grid, told),
    fit(found) {
      card = found;
      kind = card.kinds[0];
      if (kind) draw();
    },
    async load() {
      if (!kind) return el("p", { class: "note", text: "This model has no attention." });
      const heads = [...state.heads].map((one) => { const [name, layer, head] = one.split("/"); return { kind: name, layer: Number(layer), head: Number(head) }; });
      const found = await call("ablation", { heads, top: 5, max_tokens: 16 });
      say(heads.length ? `Divergence ${found.divergence.toFixed(2)} bits` : "");
      return compared(found);
    },
  };
}

function compared({ tokens, before, after, divergence }) {
  const side = (title, one, id) => el("div", { id }, el("h3", { text: title }), bars(one.at === null ? "Classes" : `At token ${one.at}, ${visible(tokens[one.at]?.text ?? "")}`, one.guesses.map((guess) => [visible(guess.token), guess.p])),
    one.text === null ? "" : el("p", { class: "quoted", text: one.text }));
  const rows = tokens.map((token, i) => [token, before.probabilities[i], after.probabilities[i]]).map(([token, p, q], i) => (p === null || q === null ? null
    : [`${i}: ${visible(token.text)}`, percent(p), percent(q), paint(el("td", { class: "number", text: `${q >= p ? "+" : "−"}${(100 * Math.abs(q - p)).toFixed(1)}` }), q - p)])).filter(Boolean);
  return [el("p", {}, "The two differ by ", el("b", { text: `${divergence.toFixed(3)} bits` }), " (Kullback–Leibler)."),
    el("div", { class: "compare" }, side("All heads", before, "before"), side("With heads off", after, "after")),
    rows.length ? el("details", {}, el("summary", { text: "Probability of every token of the text" }), table("Probability of each token given what stands before it", ["Token", "All heads", "Heads off", "Points"], rows)) : ""];
}
