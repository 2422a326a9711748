// A choice among the models that do a task, and what is known of the one chosen.

import { count, el } from "./dom.js";

let number = 0;

/** A labelled select of the models that do `task`; `.model` is the chosen one, null where there is none. */
export function picker(models, task, label = "Model", changed = () => {}) {
  const fit = models.filter((model) => !task || model.tasks.includes(task));
  const id = `model-${++number}`;
  const select = el("select", { id, disabled: !fit.length, onchange: () => tell() },
    fit.length ? fit.map((model) => el("option", { value: model.id, text: model.id })) : el("option", { text: "none is served" }));
  const about = el("span", { class: "about" });
  const box = el("div", { class: "field model" }, el("label", { for: id, text: label }), select, about);
  function tell() {
    box.model = fit.find((model) => model.id === select.value) ?? null;
    about.textContent = box.model ? `${count(box.model.parameters)} parameters${box.model.context ? `, context ${box.model.context}` : ""}` : "";
    changed(box.model);
  }
  box.choose = (name) => {
    if (!fit.some((model) => model.id === name)) return;
    select.value = name;
    tell();
  };
  box.refill = tell;
  box.select = select;
  box.model = fit[0] ?? null;
  queueMicrotask(tell);
  return box;
}

/** What to do where no model does a task. */
export function missing(task) {
  const command = { chat: "transept pull smollm2-135m-instruct", embeddings: "transept pull minilm" }[task];
  return el("p", { class: "note" }, `No model that does ${task} is served. Start the server with one: `,
    el("code", { text: `${command ? `${command} && ` : ""}transept serve ${command ? command.split(" ")[2] : "MODEL"}` }));
}
