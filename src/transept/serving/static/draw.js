// Colours and maps: a matrix on a canvas, with its rows and columns named, that tells the cell under the pointer or the keyboard.

import { el, visible } from "./dom.js";

const part = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(/\s+/).map(Number);

/** The colour of a value from -1 to 1 between the page's three colours of maps. */
export function shade(value) {
  const low = part("--map-none"), high = part(value < 0 ? "--map-less" : "--map-more");
  const w = Math.min(1, Math.abs(value));
  return low.map((channel, i) => Math.round(channel + (high[i] - channel) * w));
}

/** Colours a table's cell by a value from -1 to 1; its text stays readable on either ground. */
export function paint(cell, value) {
  cell.classList.add("painted");
  cell.classList.toggle("less", value < 0);
  cell.style.setProperty("--w", Math.min(1, Math.abs(value)).toFixed(3));
  return cell;
}

/**
 * A map of a matrix: {values[rows][columns], rows, columns, signed, label, told(i, j, value)}.
 * Arrow keys move a cell, whose value is told below the map as for the pointer.
 */
export function heatmap({ values, rows, columns, label, signed = false, told, pick }) {
  const n = rows.length, m = columns.length;
  const names = n <= 40 && m <= 40;
  const side = names ? Math.max(10, Math.min(26, Math.floor(460 / Math.max(n, m)))) : Math.max(2, Math.floor(520 / Math.max(n, m)));
  const font = Math.min(13, Math.max(9, side - 3));
  const short = (token) => { const text = visible(token); return text.length > 10 ? `${text.slice(0, 9)}…` : text; };
  const left = names ? Math.ceil(Math.max(...rows.map((one) => short(one).length)) * font * 0.62) + 8 : 4;
  const top = names ? Math.ceil(Math.max(...columns.map((one) => short(one).length)) * font * 0.62) + 8 : 4;
  const [w, h] = [left + m * side + 2, top + n * side + 2];
  const canvas = el("canvas", { class: "heat", tabindex: "0", role: "img", "aria-label": `${label}. Arrow keys move over the cells; the same numbers are in the table below.`, vars: { "max-width": `${w}px` } });
  const line = el("p", { class: "cell", role: "status", text: "Point at a cell, or move over the map with the arrow keys." });
  const most = Math.max(1e-9, ...values.flat().map(Math.abs));
  let at = null;

  function draw() {
    const scale = Math.max(1, window.devicePixelRatio || 1);
    canvas.width = w * scale;
    canvas.height = h * scale;
    const c = canvas.getContext("2d");
    c.scale(scale, scale);
    const ink = getComputedStyle(document.body).color;
    values.forEach((row, i) => row.forEach((value, j) => {
      // The square root shows weights that are small but not nothing.
      const [r, g, b] = shade(Math.sign(signed ? value : 1) * Math.sqrt(Math.abs(value) / most));
      c.fillStyle = `rgb(${r} ${g} ${b})`;
      c.fillRect(left + j * side, top + i * side, side - (side > 6 ? 1 : 0), side - (side > 6 ? 1 : 0));
    }));
    c.fillStyle = ink;
    c.font = `${font}px system-ui, sans-serif`;
    if (names) {
      c.textBaseline = "middle";
      c.textAlign = "right";
      rows.forEach((one, i) => c.fillText(short(one), left - 5, top + (i + 0.5) * side));
      c.textAlign = "left";
      columns.forEach((one, j) => {
        c.save();
        c.translate(left + (j + 0.5) * side, top - 5);
        c.rotate(-Math.PI / 2);
        c.fillText(short(one), 0, 0);
        c.restore();
      });
    }
    if (at) {
      c.strokeStyle = ink;
      c.lineWidth = 2;
      c.strokeRect(left + at[1] * side, top + at[0] * side, side - 1, side - 1);
    }
  }

  function point(i, j) {
    if (i < 0 || j < 0 || i >= n || j >= m) return;
    if (at && at[0] === i && at[1] === j) return;
    at = [i, j];
    line.textContent = told(i, j, values[i][j]);
    draw();
  }

  const cell = (event) => {
    const box = canvas.getBoundingClientRect();
    return [Math.floor(((event.clientY - box.top) * h / box.height - top) / side), Math.floor(((event.clientX - box.left) * w / box.width - left) / side)];
  };
  canvas.addEventListener("pointermove", (event) => point(...cell(event)));
  canvas.addEventListener("click", (event) => { point(...cell(event)); if (at) pick?.(...at); });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === "Enter" && at) pick?.(...at);
    if (!step) return;
    event.preventDefault();
    point(...(at ? [at[0] + step[0], at[1] + step[1]] : [0, 0]));
  });
  const again = () => (canvas.isConnected ? draw() : window.removeEventListener("recolour", again));
  window.addEventListener("recolour", again);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again, { once: true });
  draw();
  return { node: el("div", { class: "heatbox" }, canvas, line), canvas };
}
