// Small helpers: elements, formats, and the page's one voice for screen readers.

/** An element with properties ("on..." are listeners, "data"/"vars" are maps) and children. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  set(node, props);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(node, props);
  node.append(...children);
  return node;
}

function set(node, props) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name === "vars") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
}

export const $ = (id) => document.getElementById(id);

/** Says something to screen readers, once. */
export function say(text) {
  $("said").textContent = text;
}

export function clear(node, ...children) {
  node.replaceChildren(...children.flat().filter(Boolean));
  return node;
}

export function failed(error) {
  return el("p", { class: "error", role: "alert", text: error.message || String(error) });
}

export const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : `${(100 * p).toFixed(p >= 0.001 ? 1 : 3)} %`);

export function count(n) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (n >= size) return `${(n / size).toPrecision(3)} ${unit}`;
  return `${n}`;
}

export const ms = (n) => (n >= 1000 ? `${(n / 1000).toFixed(2)} s` : n >= 10 ? `${n.toFixed(0)} ms` : `${n.toFixed(2)} ms`);

/** A token as it can be read: spaces and line ends are shown. */
export function visible(token) {
  return token === "" ? "∅" : token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·").replaceAll("▁", "·").replaceAll("Ġ", "·");
}

/** A table from a caption, names of columns, and rows whose first cell names the row. */
export function table(caption, columns, rows, props = {}) {
  const head = el("tr", {}, columns.map((name) => el("th", { scope: "col", text: name })));
  const body = rows.map((row) => el("tr", {}, row.map((cell, i) => (cell instanceof Node && cell.nodeName === "TD" ? cell
    : el(i ? "td" : "th", i ? {} : { scope: "row" }, cell instanceof Node ? cell : String(cell))))));
  // A region that scrolls must be reachable by keyboard.
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", props, el("caption", { text: caption }), el("thead", {}, head), el("tbody", {}, body)));
}

/** Buttons of which one is pressed; arrow keys move between them. */
export function tabs(label, names, chosen, pick) {
  const bar = el("div", { class: "tabs", role: "tablist", "aria-label": label });
  names.forEach(([id, title, panel]) => bar.append(el("button", { type: "button", role: "tab", id: `tab-${id}`, "aria-controls": panel, data: { id }, text: title, onclick: () => choose(id) })));
  function choose(id, focus = false) {
    for (const tab of bar.children) {
      const on = tab.dataset.id === id;
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      if (on && focus) tab.focus();
    }
    pick(id);
  }
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const open = [...bar.children].filter((tab) => !tab.hidden);
    const at = open.indexOf(document.activeElement);
    if (!step || at < 0) return;
    event.preventDefault();
    choose(open[(at + step + open.length) % open.length].dataset.id, true);
  });
  bar.choose = choose;
  choose(chosen);
  return bar;
}

/** Hands the reader a file. */
export function download(name, type, content) {
  const link = el("a", { href: URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
