// The encoders' tasks: words for masks, vectors with their map, a question over a text, classes.

import { call } from "./api.js";
import { clear, el, failed, ms, percent, say, svg, table, tabs } from "./dom.js";
import { paint } from "./draw.js";
import { cosine, pca } from "./maths.js";
import { missing, picker } from "./models.js";

const TEXTS = ["A cat sits on the mat.", "A kitten lies on a rug.", "The dog sleeps in its basket.", "Stocks fell sharply on Monday.", "The market lost three percent.", "Interest rates are rising."].join("\n");
const CONTEXT = "The transept is the part of a church that crosses the nave. It gives the building the shape of a cross, and in a cathedral it often ends in great windows.";
const TASKS = [
  ["embeddings", "Embeddings", [["texts", "Texts, one on each line", 7, TEXTS]], embed, "Embed"],
  ["fill", "Fill", [["text", "Text with a mask", 3, "Paris is the [MASK] of France."]], fill, "Fill in"],
  ["answers", "Question", [["question", "Question", 1, "What shape does it give the building?"], ["context", "Text", 6, CONTEXT]], find, "Answer"],
  ["classifications", "Classes", [["texts", "Texts, one on each line", 4, "The food was wonderful.\nI waited for an hour and left."]], sort, "Classify"],
];

export function tasks(root, models, view) {
  const panels = TASKS.map((task) => panel(task, models, view));
  const bar = tabs("Tasks", TASKS.map(([id, title]) => [id, title, `task-${id}`]),
    (TASKS.find(([id]) => models.some((model) => model.tasks.includes(id))) ?? TASKS[0])[0], (id) => panels.forEach((one) => { one.hidden = one.id !== `task-${id}`; }));
  root.append(el("h2", { id: "tasks-title", text: "Tasks" }), bar, ...panels);
}

function panel([id, title, fields, work, verb], models, view) {
  // Encoders are made for these tasks; a decoder does some of them too.
  const pick = picker([...models].sort((a, b) => a.tasks.includes("completions") - b.tasks.includes("completions")), id);
  const inputs = Object.fromEntries(fields.map(([name, label, rows, value]) => [name, el("textarea", { id: `${id}-${name}`, rows: String(rows), value })]));
  const out = el("div", { class: "out", "aria-live": "polite" });
  const button = el("button", { type: "submit", class: "main", text: verb, disabled: !pick.model });
  const inspect = el("button", { type: "button", text: "Inspect", disabled: !pick.model, onclick: () => view.open({ model: pick.model.id, text: Object.values(inputs).map((input) => input.value).join("\n") }) });
  async function run(event) {
    event.preventDefault();
    const given = Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, input.value]));
    button.disabled = true;
    out.setAttribute("aria-busy", "true");
    const begin = performance.now();
    try {
      const parts = await work(pick.model.id, given);
      clear(out, parts, el("p", { class: "note", text: `In ${ms(performance.now() - begin)}.` }));
    } catch (error) {
      clear(out, failed(error));
    }
    out.setAttribute("aria-busy", "false");
    button.disabled = false;
  }
  const form = el("form", { onsubmit: run }, el("div", { class: "row" }, pick),
    fields.map(([name, label]) => el("div", { class: "field wide" }, el("label", { for: `${id}-${name}`, text: label }), inputs[name])),
    el("div", { class: "row" }, button, inspect));
  return el("div", { id: `task-${id}`, role: "tabpanel", "aria-labelledby": `tab-${id}` }, pick.model ? "" : missing(id), form, out);
}

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

async function embed(model, { texts }) {
  const input = lines(texts).slice(0, 60);
  if (!input.length) throw new Error("write at least one text");
  const reply = await call("/v1/embeddings", { model, input });
  const rows = reply.data.map((one) => one.embedding);
  const names = input.map((text, i) => `${i + 1}`);
  say(`${rows.length} vectors of ${rows[0].length} numbers`);
  const matrix = table("Cosine similarity of each pair", ["Text", ...names], rows.map((x, i) => [`${names[i]}: ${input[i].length > 30 ? `${input[i].slice(0, 29)}…` : input[i]}`,
    ...rows.map((y) => { const c = cosine(x, y); return paint(el("td", { class: "number", text: c.toFixed(2) }), c); })]), { class: "matrix" });
  return [el("p", { text: `${rows.length} vectors of ${rows[0].length} numbers, ${reply.usage.prompt_tokens} tokens.` }), rows.length > 2 ? map(input, rows) : "", matrix];
}

/** Labels beside their points: right, left, above or below, wherever they cover the least of the others. */
function placed(points, names, w, h) {
  const taken = points.map(([x, y]) => [x - 7, y - 7, x + 7, y + 7]);
  return points.map(([x, y], i) => {
    const long = (names[i].length + 3) * 7.6;
    const tries = [[x + 10, y + 5, "start"], [x - 10, y + 5, "end"], [x, y - 12, "middle"], [x, y + 22, "middle"]].map(([tx, ty, anchor]) => {
      const left = anchor === "start" ? tx : anchor === "end" ? tx - long : tx - long / 2;
      const box = [left, ty - 13, left + long, ty + 4];
      const outside = Math.max(0, -box[0]) + Math.max(0, box[2] - w) + Math.max(0, -box[1]) + Math.max(0, box[3] - h);
      const covered = taken.reduce((sum, b, j) => (j === i ? sum : sum + Math.max(0, Math.min(b[2], box[2]) - Math.max(b[0], box[0])) * Math.max(0, Math.min(b[3], box[3]) - Math.max(b[1], box[1]))), 0);
      return { at: [tx, ty], anchor, box, bad: 100 * outside + covered };
    });
    const best = tries.reduce((a, b) => (b.bad < a.bad ? b : a));
    taken.push(best.box);
    return { x, y, at: best.at, anchor: best.anchor, text: names[i] };
  });
}

/** The texts as points of a plane. */
function map(texts, rows) {
  const { points, shares } = pca(rows);
  const [w, h, pad] = [640, 360, 34];
  const most = Math.max(...points.flat().map(Math.abs)) || 1;
  const reach = Math.min((w / 2 - pad) / Math.max(...points.map((p) => Math.abs(p[0])), most * 0.05), (h / 2 - pad) / Math.max(...points.map((p) => Math.abs(p[1])), most * 0.05));
  const place = ([x, y]) => [w / 2 + x * reach, h / 2 - y * reach];
  const labels = placed(points.map(place), texts.map((text, i) => text.length > 26 ? `${text.slice(0, 25)}…` : text), w, h);
  const picture = svg("svg", { viewBox: `0 0 ${w} ${h}`, class: "map", role: "img", "aria-label": "Map of the texts; the table below it has the coordinates", id: "map" },
    svg("path", { d: `M0 ${h / 2}H${w}M${w / 2} 0V${h}`, class: "axis" }),
    ...labels.map(({ x, y, at, anchor, text }, i) => svg("g", {}, svg("title", { text: texts[i] }), svg("circle", { cx: x, cy: y, r: 6, class: "dot" }),
      svg("text", { x: at[0], y: at[1], "text-anchor": anchor }, `${i + 1}`, svg("tspan", { class: "more", text: ` ${text}` })))));
  const told = table("Coordinates of the map", ["Text", "x", "y"], texts.map((text, i) => [text, ...points[i].map((value) => value.toFixed(3))]));
  return el("figure", {}, picture, el("figcaption", { text: `The first two principal components hold ${percent(shares[0])} and ${percent(shares[1])} of the variance; texts that lie close mean something alike.` }),
    el("details", {}, el("summary", { text: "As a table" }), told));
}

async function fill(model, { text }) {
  const reply = await call("/v1/fill", { model, input: text, top: 8 });
  say(`The likeliest word is ${reply.data[0]?.[0]?.token}`);
  return reply.data.map((found, i) => bars(`Mask ${i + 1}`, found.map((one) => [one.token, one.score, one.text])));
}

async function find(model, { question, context }) {
  const [{ text, start, end, score }] = (await call("/v1/answers", { model, question, context })).data;
  say(`The answer is ${text}`);
  // Offsets count characters, a browser's strings count UTF-16 units.
  const all = [...context];
  return [el("p", {}, el("b", { text: text || "no answer" }), ` (${percent(score)})`),
    el("p", { class: "quoted" }, all.slice(0, start).join(""), el("mark", { text: all.slice(start, end).join("") }), all.slice(end).join(""))];
}

async function sort(model, { texts }) {
  const input = lines(texts);
  const reply = await call("/v1/classifications", { model, input });
  say(reply.data.map((one) => one.label).join(", "));
  return reply.data.map((one) => bars(input[one.index], Object.entries(one.scores).sort((a, b) => b[1] - a[1]).slice(0, 10).map(([name, p]) => [name, p])));
}

/** Names with their probabilities as bars, in a table. */
export function bars(caption, rows, what = "Probability", more = "Text") {
  return table(caption, ["Name", what, ...(rows[0]?.length > 2 ? [more] : [])], rows.map(([name, p, last]) => [name,
    el("td", {}, el("span", { class: "bar", vars: { "--p": p.toFixed(4) } }), ` ${percent(p)}`), ...(last === undefined ? [] : [last])]));
}
