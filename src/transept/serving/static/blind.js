// Blind A/B: two models answer, unlabelled and in random order; votes are kept in this browser and weighed against chance.

import { answer } from "./api.js";
import { clear, download, el, failed, percent, say, table } from "./dom.js";
import { fair, wilson } from "./maths.js";
import { missing, picker } from "./models.js";

const STORE = "transept.votes";
const PROMPTS = ["Explain in two sentences why the sky is blue.", "Write a haiku about a stone bridge.", "What is the capital of Portugal, and what is it known for?", "Give three reasons to learn to cook.", "Tell a very short story about a lost key.", "How does a bicycle stay upright?"];
const OWN = "a text of your own";

/** The votes kept here. */
export function votes() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

/** Wins of `a` over `b` among the votes on this pair, with Wilson's interval and the test against an even chance; ties count for neither. */
export function score(all, a, b) {
  const pair = all.filter((vote) => (vote.a === a && vote.b === b) || (vote.a === b && vote.b === a));
  const won = pair.filter((vote) => vote.winner === a).length;
  const lost = pair.filter((vote) => vote.winner === b).length;
  return { votes: pair.length, won, lost, ties: pair.length - won - lost, share: won + lost ? won / (won + lost) : null, interval: wilson(won, won + lost), p: fair(won, won + lost) };
}

export function blind(root, models) {
  const first = picker(models, "completions", "First model"), second = picker(models, "completions", "Second model", told);
  second.select.append(el("option", { value: OWN, text: OWN }));
  const own = el("textarea", { id: "own", rows: "3" });
  const ownField = el("div", { class: "field wide", hidden: true }, el("label", { for: "own", text: "The text, written by a person" }), own);
  const prompt = el("textarea", { id: "blind-prompt", rows: "2", value: PROMPTS[0] });
  const length = el("input", { id: "blind-length", type: "number", min: "1", max: "2048", value: "96" });
  const ask = el("button", { type: "submit", class: "main", text: "Ask both", disabled: !first.model });
  const out = el("div", { class: "pair" });
  const verdict = el("div", { class: "row verdict" });
  const results = el("div", {});
  let round = null, running = null;
  if (second.select.options.length > 2) queueMicrotask(() => second.choose(second.select.options[1].value));
  second.select.addEventListener("change", () => { ownField.hidden = second.select.value !== OWN; });
  const form = el("form", { onsubmit: (event) => { event.preventDefault(); both(); } },
    el("div", { class: "row" }, first, second), ownField,
    el("div", { class: "field wide" }, el("label", { for: "blind-prompt", text: "Question for both" }), prompt),
    el("div", { class: "row" }, el("div", { class: "field" }, el("label", { for: "blind-length", text: "Longest answer in tokens" }), length), ask,
      el("button", { type: "button", text: "Another question", onclick: () => { prompt.value = PROMPTS[(PROMPTS.indexOf(prompt.value) + 1) % PROMPTS.length]; } })));
  root.append(el("h2", { id: "blind-title", text: "Blind A/B" }),
    el("p", { class: "note", text: "Two models answer the same question. You see both answers without names and in random order, and say which is better; then the names are told. After enough votes the interval says whether you can tell them apart at all." }),
    ...(first.model ? [] : [missing("chat")]), form, out, verdict, el("h3", { text: "What the votes say" }), results);
  told();

  const name = (box) => (box.select.value === OWN ? OWN : box.model?.id);

  async function both() {
    if (running || !first.model) return;
    const sides = [name(first), name(second)];
    if (sides[0] === sides[1]) return clear(out, failed(new Error("Choose two different models: an answer cannot win against itself.")));
    if (sides[1] === OWN && !own.value.trim()) return clear(out, failed(new Error("Write the text that is to stand beside the model's answer.")));
    running = new AbortController();
    ask.disabled = true;
    clear(verdict);
    clear(out, el("p", { class: "note", role: "status", text: "Both answer; nothing is shown before both are done, so that speed tells nothing." }));
    try {
      const texts = [];
      for (const side of sides) texts.push(side === OWN ? own.value.trim() : await whole(side, running.signal));
      // The order is drawn by the browser's own source of chance.
      const order = crypto.getRandomValues(new Uint8Array(1))[0] & 1 ? [1, 0] : [0, 1];
      round = { prompt: prompt.value, sides: order.map((i) => sides[i]), texts: order.map((i) => texts[i]) };
      clear(out, round.texts.map((text, i) => el("article", { class: "assistant" }, el("h3", { text: `Answer ${i + 1}` }), el("div", { class: "text", text }))));
      clear(verdict, el("button", { type: "button", text: "Answer 1 is better", onclick: () => vote(0) }), el("button", { type: "button", text: "Answer 2 is better", onclick: () => vote(1) }),
        el("button", { type: "button", text: "I cannot tell", onclick: () => vote(null) }));
      say("Both answers are here; which is better?");
    } catch (error) {
      clear(out, failed(error));
    }
    running = null;
    ask.disabled = false;
  }

  async function whole(model, signal) {
    const plain = !models.find((one) => one.id === model).tasks.includes("chat");
    const options = { temperature: 0.7, max_tokens: length.valueAsNumber || 96, top: null };
    let text = "";
    for await (const piece of answer({ model, plain, messages: [{ role: "user", content: prompt.value }], options }, signal)) text += piece.text;
    return text.trim();
  }

  function vote(side) {
    if (!round) return;
    const [a, b] = [...round.sides].sort();
    const all = [...votes(), { time: new Date().toISOString(), a, b, shown: round.sides, winner: side === null ? null : round.sides[side], prompt: round.prompt, texts: round.texts }];
    localStorage.setItem(STORE, JSON.stringify(all));
    [...out.children].forEach((article, i) => { article.querySelector("h3").textContent = `Answer ${i + 1}: ${round.sides[i]}`; });
    clear(verdict, el("p", { role: "status", text: `Counted. Answer 1 was ${round.sides[0]}, answer 2 was ${round.sides[1]}.` }));
    round = null;
    told();
    ask.focus();
  }

  function told() {
    const all = votes();
    const pairs = [...new Set(all.map((one) => JSON.stringify([one.a, one.b])))].map((pair) => JSON.parse(pair));
    if (!pairs.length) return clear(results, el("p", { class: "note", text: "No votes yet. They stay in this browser." }));
    const rows = pairs.map(([a, b]) => {
      const s = score(all, a, b);
      const [low, high] = s.interval;
      const line = s.won + s.lost ? `${percent(s.share)} (${percent(low)} to ${percent(high)})` : "–";
      const says = !(s.won + s.lost) ? "only ties" : low > 0.5 ? `${a} is preferred` : high < 0.5 ? `${b} is preferred` : "not to be told from chance";
      return [`${a} against ${b}`, s.won, s.lost, s.ties, line, s.p.toFixed(3), says];
    });
    clear(results, table("Votes by pair: the first model's share of wins with Wilson's 95 % interval", ["Pair", "Wins", "Losses", "Ties", "Share of wins", "p", "So"], rows),
      pairs.map(([a, b]) => interval(a, b, score(all, a, b))),
      el("div", { class: "row" },
        el("button", { type: "button", text: "Export as JSON", onclick: () => download("votes.json", "application/json", JSON.stringify(all, null, 1)) }),
        el("button", { type: "button", text: "Delete all votes", onclick: () => { if (confirm(`Delete ${all.length} votes?`)) { localStorage.removeItem(STORE); told(); } } })));
  }
}

/** The interval as a bar beside the mark of an even chance. */
const interval = (a, b, s) => el("div", { class: "interval", role: "img", "aria-label": `${a} against ${b}: ${percent(s.interval[0])} to ${percent(s.interval[1])}, even chance is 50 %`,
  vars: { "--low": s.interval[0].toFixed(4), "--high": s.interval[1].toFixed(4), "--at": (s.share ?? 0.5).toFixed(4) } }, el("span", { class: "range" }), el("span", { class: "even" }), s.share === null ? "" : el("span", { class: "dot" }));
