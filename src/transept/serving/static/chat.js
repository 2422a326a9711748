// Chat: streaming, stop, regenerate, sampling, answers in JSON, and branches from another token.

import { answer, joined } from "./api.js";
import { clear, el, failed, ms, say } from "./dom.js";
import { missing, picker } from "./models.js";
import { strip } from "./tokens.js";

const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05, value: "0.7" }, "0 always takes the likeliest token"],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }, "the likeliest tokens that together have this probability"],
  ["top_k", "Top k", { min: 1, max: 100000, step: 1 }, "so many of the likeliest tokens"],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01, value: "0.1" }, "tokens with this share of the likeliest one's probability"],
  ["seed", "Seed", { min: 0, max: 2 ** 53 - 1, step: 1 }, "the same seed gives the same answer"],
  ["max_tokens", "Longest answer", { min: 1, max: 65536, step: 1, value: "256" }, "in tokens"],
];
const SCHEMA = `{
  "type": "object",
  "properties": {
    "name": {"type": "string"},
    "age": {"type": "integer"}
  },
  "required": ["name", "age"],
  "additionalProperties": false
}`;
const ENDS = { stop: "ended by itself", length: "cut at its longest", stopped: "stopped", tool_calls: "a call" };

export function chat(root, models, view) {
  const turns = [];
  let running = null;
  const pick = picker(models, "completions", "Model");
  const settings = controls();
  const log = el("div", { class: "log", id: "log", role: "log", "aria-label": "Conversation", tabindex: "0" });
  const input = el("textarea", { id: "prompt", rows: "3", "aria-describedby": "prompt-help", onkeydown: typed });
  const send = el("button", { type: "submit", class: "main", text: "Send" });
  const stop = el("button", { type: "button", id: "stop", text: "Stop", disabled: true, onclick: () => running?.abort() });
  const fresh = el("button", { type: "button", class: "quiet", text: "New conversation", onclick: () => { running?.abort(); turns.length = 0; draw(); input.focus(); } });
  const form = el("form", { class: "composer", onsubmit: (event) => { event.preventDefault(); ask(); } },
    el("label", { for: "prompt", text: "Message" }), input,
    el("p", { id: "prompt-help", class: "note", text: "Enter sends, Shift+Enter begins a line, Escape stops the answer." }),
    el("div", { class: "row" }, send, stop, fresh));
  root.append(el("h2", { id: "chat-title", text: "Chat" }), el("div", { class: "row" }, pick), ...(pick.model ? [] : [missing("chat")]), settings.node, log, form);
  root.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  draw();

  function typed(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  }

  function ask() {
    const text = input.value;
    if (!text.trim() || running || !pick.model || !settings.read()) return;
    input.value = "";
    turns.push({ role: "user", content: text }, { role: "assistant", versions: [], at: 0 });
    draw();
    run(turns.length - 1);
  }

  /** What stands before a turn, as the API takes it. */
  function before(i) {
    const system = settings.system();
    const said = turns.slice(0, i).map((turn) => (turn.role === "user" ? turn : { role: "assistant", content: turn.versions[turn.at].text }));
    return system && !settings.plain() ? [{ role: "system", content: system }, ...said] : said;
  }

  /** A new version of an answer, from its beginning or from the tokens of `begun`. */
  async function run(i, begun = [], prefix = "") {
    const options = settings.read();
    if (running || !options || !pick.model) return;
    const turn = turns[i];
    turns.length = i + 1;
    const version = { text: prefix, tokens: [...begun], finish: null, model: pick.model.id, plain: settings.plain(), messages: before(i), begin: performance.now(), first: null, open: turn.versions[turn.at]?.open };
    turn.versions.push(version);
    turn.at = turn.versions.length - 1;
    if (prefix) delete options.response_format;
    const control = running = new AbortController();
    stop.disabled = false;
    send.disabled = true;
    draw();
    const node = log.lastElementChild.querySelector(".text");
    try {
      const request = { model: version.model, plain: version.plain, messages: version.messages, prefix, options };
      for await (const piece of answer(request, control.signal)) {
        if (piece.text || piece.tokens.length) version.first ??= performance.now() - version.begin;
        version.text += piece.text;
        version.tokens.push(...piece.tokens);
        version.finish = piece.finish ?? version.finish;
        version.usage = piece.usage ?? version.usage;
        node.firstChild.data = version.text;
        if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
      }
    } catch (error) {
      if (control.signal.aborted) version.finish = "stopped";
      else version.error = error;
    }
    version.took = performance.now() - version.begin;
    running = null;
    stop.disabled = true;
    send.disabled = false;
    draw();
    say(version.error ? "No answer." : `Answer ${ENDS[version.finish] ?? "ended"}, ${version.tokens.length || version.usage?.completion_tokens || 0} tokens.`);
  }

  function draw() {
    // What had the focus is about to go; the conversation takes it, so that Tab goes on from there.
    const inside = log.contains(document.activeElement);
    clear(log, turns.map((turn, i) => (turn.role === "user" ? question(turn) : reply(turn, i))));
    if (!turns.length) log.append(el("p", { class: "note", text: "Nothing has been said yet." }));
    if (inside) log.focus();
    log.scrollTop = log.scrollHeight;
  }

  const question = (turn) => el("article", { class: "user" }, el("h3", { text: "You" }), el("div", { class: "text", text: turn.content }));

  function reply(turn, i) {
    const version = turn.versions[turn.at];
    if (!version) return el("article", { class: "assistant" });
    const busy = version.took === undefined;
    const article = el("article", { class: "assistant", data: { finish: version.finish ?? "" } }, el("h3", { text: version.model }),
      el("div", { class: "text", "aria-busy": String(busy) }, document.createTextNode(version.text)),
      version.error ? failed(version.error) : "", busy ? "" : el("p", { class: "note stats", text: told(version) }));
    if (!busy) article.append(actions(turn, i, version));
    if (!busy && version.open && version.tokens.length) article.append(strip(version.tokens, exact(version) ? (tokens, text) => run(i, tokens, text) : null));
    return article;
  }

  function actions(turn, i, version) {
    const last = turn.versions.length - 1;
    const turnTo = (at) => { turn.at = at; draw(); };
    return el("div", { class: "row actions" },
      el("button", { type: "button", text: "Regenerate", onclick: () => run(i) }),
      el("button", { type: "button", text: "Probabilities", "aria-expanded": String(Boolean(version.open)), disabled: !version.tokens.length,
        onclick: () => { version.open = !version.open; draw(); log.children[i].querySelector("[aria-expanded]").focus(); } }),
      el("button", { type: "button", text: "Inspect", onclick: () => view.open({ model: version.model, messages: version.plain ? null : version.messages, text: version.text, prompt: version.plain ? version.messages.map((m) => m.content).join("\n") : null }) }),
      el("button", { type: "button", text: "Copy", onclick: () => navigator.clipboard.writeText(version.text).then(() => say("Copied")) }),
      last ? el("span", { class: "versions" },
        el("button", { type: "button", "aria-label": "Earlier version", text: "‹", disabled: !turn.at, onclick: () => turnTo(turn.at - 1) }),
        ` ${turn.at + 1} of ${last + 1} `,
        el("button", { type: "button", "aria-label": "Later version", text: "›", disabled: turn.at === last, onclick: () => turnTo(turn.at + 1) })) : "");
  }
  return { turns };
}

/** Whether the tokens put together are the text, so that one can go on from any of them. */
const exact = (version) => version.tokens.length > 0 && (joined(version.tokens.slice(0, -1), version.tokens.at(-1)) ?? version.text).startsWith(version.text);

function told(version) {
  const tokens = version.usage?.completion_tokens ?? version.tokens.length;
  const pace = version.first !== null && version.took > version.first ? `, ${(1000 * Math.max(0, tokens - 1) / (version.took - version.first)).toFixed(0)} tokens/s` : "";
  return `${tokens} tokens${pace}${version.first === null ? "" : `, first after ${ms(version.first)}`}, ${ENDS[version.finish] ?? version.finish ?? "no end"}`;
}

/** The settings: `read()` gives the request's options, or null where something is wrong and says so. */
function controls() {
  const system = el("textarea", { id: "system", rows: "2" });
  const plain = el("input", { id: "plain", type: "checkbox" });
  const probable = el("input", { id: "probable", type: "checkbox", checked: true });
  const numbers = NUMBERS.map(([name, label, range, help]) => {
    const field = el("input", { id: `set-${name}`, type: "number", inputmode: "decimal", ...range, "aria-describedby": `help-${name}` });
    return { name, field, node: el("div", { class: "field" }, el("label", { for: `set-${name}`, text: label }), field, el("span", { class: "about", id: `help-${name}`, text: help })) };
  });
  const format = el("select", { id: "format", onchange: check }, [["text", "Text"], ["json_object", "JSON, any object"], ["json_schema", "JSON after a schema"]].map(([value, text]) => el("option", { value, text })));
  const schema = el("textarea", { id: "schema", rows: "10", spellcheck: "false", class: "code", value: SCHEMA, "aria-describedby": "schema-state", oninput: check });
  const state = el("p", { id: "schema-state", class: "note" });
  const editor = el("div", { class: "field wide", hidden: true }, el("label", { for: "schema", text: "JSON schema" }), schema, state);

  function check() {
    editor.hidden = format.value !== "json_schema";
    try {
      const found = JSON.parse(schema.value);
      if (typeof found !== "object" || found === null || Array.isArray(found)) throw new Error("a schema is an object");
      schema.setCustomValidity("");
      state.textContent = "The schema is JSON.";
    } catch (error) {
      schema.setCustomValidity(editor.hidden ? "" : `This is not JSON: ${error.message}`);
      state.textContent = `This is not JSON: ${error.message}`;
    }
    schema.setAttribute("aria-invalid", String(!schema.validity.valid));
  }

  function read() {
    const wrong = [...numbers.map((one) => one.field), schema].find((field) => !field.validity.valid && !field.closest("[hidden]"));
    if (wrong) {
      node.open = true;
      wrong.reportValidity();
      wrong.focus();
      return null;
    }
    const options = Object.fromEntries(numbers.filter((one) => one.field.value !== "").map((one) => [one.name, Number(one.field.value)]));
    if (format.value !== "text" && !plain.checked) {
      options.response_format = { type: format.value };
      if (format.value === "json_schema") options.response_format.json_schema = { name: "answer", schema: JSON.parse(schema.value) };
    }
    return { ...options, top: probable.checked ? 5 : null };
  }

  const node = el("details", { class: "settings", id: "settings" }, el("summary", { text: "Settings" }),
    el("div", { class: "field wide" }, el("label", { for: "system", text: "System prompt" }), system),
    el("div", { class: "fields" }, numbers.map((one) => one.node),
      el("div", { class: "field" }, el("label", { for: "format", text: "Answer format" }), format)),
    editor,
    el("div", { class: "checks" }, el("label", {}, probable, " Probabilities of tokens"), el("label", {}, plain, " Plain continuation, without the chat template")));
  check();
  return { node, read, system: () => system.value.trim(), plain: () => plain.checked };
}
