// The server's key: asked for once, where the server wants one, and held until this window is closed.

import { el } from "./dom.js";

const NAME = "transept.key";
let open = null;

export const known = () => sessionStorage.getItem(NAME);

/** This key was taken by the server. Links cannot carry it, so those to closed addresses go. */
export function held(key) {
  sessionStorage.setItem(NAME, key);
  for (const link of document.querySelectorAll("footer a")) link.hidden = true;
}

/** A key to try in place of one that was refused (null: none was sent); null where the reader gives none. */
export function asked(refused) {
  const other = known();
  if (other && other !== refused) return Promise.resolve(other);
  open ??= dialog(refused).finally(() => { open = null; });
  return open;
}

function dialog(refused) {
  return new Promise((done) => {
    const input = el("input", { id: "key", type: "password", autocomplete: "off", required: true, pattern: "[!-~]+", "aria-describedby": "key-why" });
    const why = refused ? "This is not the key of this server." : "This server was started with a key, and answers nobody without it.";
    const form = el("form", { onsubmit: (event) => { event.preventDefault(); box.returnValue = input.value.trim(); box.close(); } },
      el("h2", { id: "key-title", text: "Key of the server" }), el("p", { id: "key-why", role: refused ? "alert" : null, text: why }),
      el("label", { for: "key", text: "Key" }), input,
      el("p", { class: "note", text: "It stays in this window until the window is closed." }),
      el("button", { type: "submit", text: "Use it" }), el("button", { type: "button", class: "quiet", text: "Cancel", onclick: () => box.close() }));
    const box = el("dialog", { id: "key-dialog", "aria-labelledby": "key-title" }, form);
    box.addEventListener("close", () => { box.remove(); done(box.returnValue || null); });
    document.body.append(box);
    box.showModal();
  });
}
