// The page: which part of it is shown, the colours, and what each part knows of the models.

import { call } from "./api.js";
import { blind } from "./blind.js";
import { chat } from "./chat.js";
import { $, failed, say } from "./dom.js";
import { inspector } from "./inspector.js";
import { tasks } from "./tasks.js";

const PAGES = ["chat", "tasks", "blind", "inspect"];
const THEMES = { system: "", light: "light", dark: "dark" };

function show() {
  const page = PAGES.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat";
  document.body.dataset.page = page;
  for (const name of PAGES.slice(0, 3)) $(`page-${name}`).hidden = name !== page;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${document.querySelector("nav [aria-current]").textContent} – Transept`;
  if (page === "inspect") view.open({});
  else if (view.alone) view.close();
}

function coloured(name) {
  document.documentElement.dataset.theme = THEMES[name];
  $("theme").textContent = `Theme: ${name}`;
  localStorage.setItem("transept.theme", name);
  window.dispatchEvent(new Event("recolour"));
}

let models = [];
try {
  models = (await call("/v1/models")).data;
} catch (error) {
  $("main").prepend(failed(error));
}
const view = inspector($("inspector"), models);
chat($("page-chat"), models, view);
tasks($("page-tasks"), models, view);
blind($("page-blind"), models);

const names = Object.keys(THEMES);
$("theme").addEventListener("click", () => {
  const next = names[(names.indexOf(localStorage.getItem("transept.theme") || "system") + 1) % names.length];
  coloured(next);
  say(`Colours: ${next}`);
});
coloured(names.includes(localStorage.getItem("transept.theme")) ? localStorage.getItem("transept.theme") : "system");
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  (document.body.dataset.page === "inspect" ? $("inspector-title") : $("main")).focus();
});
window.addEventListener("hashchange", show);
show();
document.body.dataset.ready = "yes";
