// The Inspector: what a model read, and the views that open it. It stands beside an answer, or alone with a text of its own.

import { call } from "./api.js";
import { ablation } from "./ablation.js";
import { clear, el, failed, say, tabs } from "./dom.js";
import { missing, picker } from "./models.js";
import { attention, cost, lens, positions, rollout, time } from "./views.js";

const VIEWS = [
  ["attention", "Attention", attention], ["rollout", "Rollout", rollout], ["lens", "Logit lens", lens], ["ablation", "Heads off", ablation],
  ["positions", "Positions", positions], ["time", "Time", time], ["cost", "Cost", cost],
];
const TEXT = "The animal did not cross the street because it was too tired.";

export function inspector(root, models) {
  const state = { model: null, messages: null, card: null, view: "attention", open: false };
  const pick = picker(models, "inspect", "Model", changed);
  const title = el("h2", { id: "inspector-title", tabindex: "-1", text: "Inspector" });
  const close = el("button", { type: "button", class: "quiet", text: "Close", onclick: () => { shut(); state.from?.focus(); } });
  const input = el("textarea", { id: "inspected", rows: "2", value: TEXT });
  const target = el("textarea", { id: "target", rows: "2", "aria-describedby": "target-help" });
  const targetField = el("div", { class: "field wide", hidden: true }, el("label", { for: "target", text: "What was written" }), target,
    el("span", { class: "about", id: "target-help", text: "Empty: the model's own answer." }));
  const textField = el("div", { class: "field wide" }, el("label", { for: "inspected", text: "Text" }), input);
  const talk = el("p", { class: "note", hidden: true });
  const look = el("div", { class: "row" }, el("button", { type: "submit", class: "main", text: "Look inside", disabled: !pick.model }));
  const views = Object.fromEntries(VIEWS.map(([id, , make]) => [id, make({ call: ask, state, refresh })]));
  const panel = el("div", { id: "inspector-panel", role: "tabpanel", "aria-labelledby": "tab-attention" });
  const out = el("div", { class: "out", id: "inspector-out" });
  let control = null;
  const bar = tabs("Views", VIEWS.map(([id, name]) => [id, name, "inspector-panel"]), "attention", (id) => {
    state.view = id;
    panel.setAttribute("aria-labelledby", `tab-${id}`);
    clear(panel, views[id].controls, out);
    refresh();
  });
  root.append(el("div", { class: "panel-head" }, title, close), pick.model ? "" : missing("inspect"), el("div", { class: "row" }, pick), talk,
    el("form", { onsubmit: (event) => { event.preventDefault(); refresh(); } }, textField, targetField, look), bar, panel);

  /** The text under inspection, as every request names it. */
  function read() {
    const text = state.messages ? { messages: state.messages } : { input: input.value };
    return { model: state.model, ...text, ...(targetField.hidden || !target.value ? {} : { target: target.value }) };
  }

  function ask(view, more = {}, text = true) {
    return call(`/v1/inspect/${view}`, { ...(text ? read() : { model: state.model }), ...more }, control?.signal);
  }

  async function changed(model) {
    state.model = model?.id ?? null;
    state.card = null;
    state.heads = new Set();
    if (state.open) await refresh();
  }

  async function refresh() {
    if (!state.open || !state.model) return;
    control?.abort();
    const mine = control = new AbortController();
    out.setAttribute("aria-busy", "true");
    try {
      if (!state.card) {
        state.card = await ask("card", { length: null }, false);
        if (mine.signal.aborted) return;
        targetField.hidden = !state.card.kinds.includes("cross");
        for (const view of Object.values(views)) view.fit?.(state.card);
      }
      const nodes = await views[state.view].load();
      if (mine.signal.aborted) return;
      clear(out, nodes);
      out.dataset.view = state.view;
    } catch (error) {
      if (mine.signal.aborted) return;
      clear(out, failed(error));
    }
    out.setAttribute("aria-busy", "false");
  }

  function shut() {
    state.open = false;
    root.hidden = true;
    self.alone = false;
    control?.abort();
    document.body.classList.remove("open");
  }

  const self = {
    alone: false,
    close: shut,
    /** Opens on a text, or on a conversation whose last message is the answer `text`; with nothing: on what it held. */
    open({ model, messages = null, text, prompt = null }) {
      self.alone = document.body.dataset.page === "inspect";
      state.from = self.alone ? null : document.activeElement;
      close.hidden = self.alone;
      if (text !== undefined) {
        state.messages = messages && [...messages, ...(text ? [{ role: "assistant", content: text }] : [])];
        input.value = messages ? text : `${prompt ?? ""}${text}`;
      }
      conversation();
      root.hidden = false;
      state.open = true;
      document.body.classList.toggle("open", true);
      if (model && model !== pick.model?.id) pick.choose(model);
      else if (!state.model && pick.model) pick.refill();
      else refresh();
      if (!self.alone) {
        title.focus();
        say("The inspector is open.");
      }
    },
  };

  function conversation() {
    talk.hidden = !state.messages;
    textField.hidden = look.hidden = Boolean(state.messages);
    if (state.messages) {
      clear(talk, `The conversation of ${state.messages.length} messages in the model's chat template, the answer included. `,
        el("button", { type: "button", text: "Inspect a text instead", onclick: () => { state.messages = null; conversation(); refresh(); input.focus(); } }));
    }
  }
  return self;
}
