// The token strip: every token coloured by its probability; one that is chosen shows what else could have stood there.

import { joined } from "./api.js";
import { clear, el, percent, say, visible } from "./dom.js";

/** `branch(tokens, text)` is called with the tokens up to and with the alternative that was clicked, and their text. */
export function strip(tokens, branch) {
  const bar = el("div", { class: "strip", role: "toolbar", "aria-label": "Tokens of the answer" });
  const panel = el("div", { class: "alternatives", role: "group", "aria-label": "Alternatives", hidden: true });
  tokens.forEach((one, i) => bar.append(el("button", {
    type: "button", class: "token", tabindex: i ? "-1" : "0", vars: { "--p": one.p.toFixed(3) }, text: shown(one.token), data: { i },
    "aria-label": `${i + 1}: ${visible(one.token)}, ${percent(one.p)}`, "aria-pressed": "false",
    title: `${percent(one.p)}`, onclick: () => choose(i),
  })));
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.length, End: tokens.length }[event.key];
    const at = Number(document.activeElement?.dataset?.i ?? NaN);
    if (!step || Number.isNaN(at)) return;
    event.preventDefault();
    focus(Math.max(0, Math.min(tokens.length - 1, at + step)));
  });

  function focus(i) {
    for (const button of bar.children) button.tabIndex = Number(button.dataset.i) === i ? 0 : -1;
    bar.children[i].focus();
  }

  function choose(i) {
    for (const button of bar.children) button.setAttribute("aria-pressed", Number(button.dataset.i) === i);
    panel.hidden = false;
    const one = tokens[i];
    clear(panel,
      el("p", {}, "Token ", el("b", { text: visible(one.token) }), ` had ${percent(one.p)}. Go on from another:`),
      el("ol", {}, one.top.map((other) => alternative(i, one, other))));
    panel.scrollIntoView({ block: "nearest" });
    say(`${one.top.length} alternatives to ${visible(one.token)}`);
  }

  function alternative(i, one, other) {
    const text = joined(tokens.slice(0, i), other);
    const same = other.token === one.token;
    return el("li", {}, el("button", {
      type: "button", class: "alternative", vars: { "--p": other.p.toFixed(3) }, disabled: same || text === null || !branch,
      title: same ? "the token that was drawn" : text === null ? "a part of a character" : "go on from here",
      onclick: () => branch([...tokens.slice(0, i), { ...other, top: one.top }], text),
    }, el("span", { text: visible(other.token) }), el("span", { class: "number", text: percent(other.p) })));
  }

  const surprise = tokens.reduce((sum, one) => sum - Math.log(Math.max(one.p, 1e-12)), 0) / Math.max(1, tokens.length);
  return el("div", { class: "probabilities" },
    el("p", { class: "note", text: `The stronger a token's colour, the less likely it was. Perplexity ${Math.exp(surprise).toFixed(2)}. Arrow keys move, Enter shows alternatives.` }),
    bar, panel);
}

const shown = (token) => (token.includes("\n") ? token.replaceAll("\n", "⏎\n") : token === "" ? "∅" : token);
