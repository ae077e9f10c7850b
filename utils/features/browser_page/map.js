// The map: UMAP of decoder directions on a canvas. Colours: the kind of text a feature fires in.
"use strict";

const LABELS = 60; // the most that are written
// Map coordinates at the middle of the canvas, pixels a unit, and the size of the canvas in pixels.
const view = { x: 0, y: 0, scale: 1, wide: 0, high: 0 };
let mapped = []; // numbers of the features that have a place
let hovered = null, focus = null; // feature under the pointer; feature the map was asked for

const canvas = byId("canvas");
const context = canvas.getContext("2d");
const styles = getComputedStyle(document.documentElement);
const N_COLOURS = 9;
let colours = [], pale = "", other = "", ink = "", page = "";

function readColours() {
  const read = (name) => styles.getPropertyValue(name).trim();
  colours = Array.from({ length: N_COLOURS }, (_, n) => read(`--subset-${n}`));
  [pale, other, ink, page] = ["--mixed", "--other", "--ink", "--card"].map(read);
}

// Subsets are in order of size; those beyond the colours share one.
const colourOfSubset = (s) => colours[s] ?? other;

// A subset's colour if it has half of a feature's activation, else that of mixed ones.
function colourOf(i) {
  return index.top_subset_share[i] >= 0.5 ? colourOfSubset(index.subset[i]) : pale;
}

function makeMap() {
  mapped = [...index.label.keys()].filter((i) => index.umap_x[i] !== null);
  document.querySelector("[data-view=map]").hidden = !mapped.length;
  const counts = index.subsets.map((_, s) => mapped.filter((i) => index.subset[i] === s && index.top_subset_share[i] >= 0.5).length);
  const mixed = mapped.length - counts.reduce((a, b) => a + b, 0);
  const key = make("span", { class: "soft", title: "No kind of text has half of their activation" }, make("span", { class: "dot" }), `mixed ${withCommas(mixed)}`);
  key.firstChild.style.background = pale;
  byId("legend").replaceChildren(...index.subsets.map((name, s) => {
    const dot = make("span", { class: "dot" });
    dot.style.background = colourOfSubset(s);
    const button = make("button", { title: `Only features mostly in ${name}` }, dot, `${name} `, make("span", { class: "soft" }, withCommas(counts[s])));
    button.onclick = () => setSubset(name);
    return button;
  }), key);
}

function showMap(i) {
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  Object.assign(view, { wide: box.width, high: box.height });
  canvas.width = box.width * ratio;
  canvas.height = box.height * ratio;
  if (i !== null && i !== focus) Object.assign(view, { x: index.umap_x[i], y: index.umap_y[i], scale: 6 * wholeMap().scale });
  else if (view.scale === 1) Object.assign(view, wholeMap());
  focus = i;
  drawMap();
}

function wholeMap() {
  const span = (values) => values.reduce(([low, high], v) => v === null ? [low, high] : [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
  const [left, right] = span(index.umap_x), [bottom, top] = span(index.umap_y);
  const below = byId("legend").offsetHeight + 20;
  const scale = 0.94 * Math.min(view.wide / (right - left || 1), (view.high - below) / (top - bottom || 1));
  return { x: (left + right) / 2, y: (top + bottom) / 2 - below / 2 / scale, scale };
}

const place = (i) => [
  view.wide / 2 + (index.umap_x[i] - view.x) * view.scale,
  view.high / 2 - (index.umap_y[i] - view.y) * view.scale,
];

function drawMap() {
  if (byId("map").hidden || !mapped.length) return;
  const ratio = window.devicePixelRatio || 1, { wide, high } = view;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, wide, high);
  const fits = new Set(found), zoom = view.scale / wholeMap().scale;
  const seen = mapped.filter((i) => { const [x, y] = place(i); return x > -9 && x < wide + 9 && y > -9 && y < high + 9; });
  const size = Math.min(9, Math.max(1.2, 0.24 * Math.sqrt(wide * high / mapped.length)) * zoom ** 0.45);
  for (const fitting of [false, true]) {
    for (const i of seen) {
      if (fits.has(i) !== fitting) continue;
      context.globalAlpha = fitting ? 0.85 : 0.25;
      drawDot(i, fitting ? colourOf(i) : pale, size * (0.5 + 0.5 * frequencySize(i)));
    }
  }
  context.globalAlpha = 1;
  for (const i of new Set([focus, hovered].filter((i) => i !== null))) ring(i, size + 4);
  writeLabels(seen.filter((i) => fits.has(i)), wide, high);
}

const frequencySize = (i) => Math.min(1, Math.max(0, Math.log10(index.frequency[i]) / 4 + 1.25));

function drawDot(i, colour, radius) {
  const [x, y] = place(i);
  context.fillStyle = colour;
  if (radius < 1.6) { context.fillRect(x - radius, y - radius, 2 * radius, 2 * radius); return; }
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.fill();
}

function ring(i, radius) {
  const [x, y] = place(i);
  context.strokeStyle = ink;
  context.lineWidth = 2;
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.stroke();
}

// Labels of the features asked for, then of words, of those that are common enough and specific
// to a kind of text; none over another.
function writeLabels(some, wide, high) {
  const first = [hovered, focus].filter((i) => i !== null);
  const wordless = (i) => !/\p{L}{3}/u.test(index.label[i]);
  const order = some.length > 20000 ? some.slice(0, 20000) : [...some];
  const rank = new Map(order.map((i) => [i, wordless(i) + (index.frequency[i] < 5e-4) - index.top_subset_share[i]]));
  order.sort((a, b) => rank.get(a) - rank.get(b) || a - b);
  const boxes = [];
  context.font = "12px system-ui, sans-serif";
  context.lineJoin = "round";
  for (const i of [...first, ...order.slice(0, 1500)]) {
    if (boxes.length >= LABELS) break;
    const text = labelOf(i).length > 26 ? `${labelOf(i).slice(0, 25)}…` : labelOf(i);
    const [x, y] = place(i), width = context.measureText(text).width;
    const box = [x + 7, y - 8, x + 13 + width, y + 10];
    if (box[2] > wide || box[1] < 0 || box[3] > high) continue;
    if (boxes.some((b) => box[0] < b[2] + 12 && box[2] + 12 > b[0] && box[1] < b[3] + 6 && box[3] + 6 > b[1])) continue;
    boxes.push(box);
    context.lineWidth = 3.5;
    context.strokeStyle = page;
    context.strokeText(text, x + 9, y + 4);
    context.fillStyle = ink;
    context.fillText(text, x + 9, y + 4);
  }
}

function nearestTo(x, y) {
  let nearest = null, least = 14 ** 2;
  for (const i of mapped) {
    const [px, py] = place(i), far = (px - x) ** 2 + (py - y) ** 2;
    if (far < least) [nearest, least] = [i, far];
  }
  return nearest;
}

function zoomAt(factor, x = view.wide / 2, y = view.high / 2) {
  const whole = wholeMap(), scale = Math.min(200 * whole.scale, Math.max(0.5 * whole.scale, view.scale * factor));
  const dx = x - view.wide / 2, dy = y - view.high / 2;
  view.x += dx / view.scale - dx / scale;
  view.y -= dy / view.scale - dy / scale;
  view.scale = scale;
  requestAnimationFrame(drawMap);
}

function pan(dx, dy) {
  view.x -= dx / view.scale;
  view.y += dy / view.scale;
  requestAnimationFrame(drawMap);
}

const pointers = new Map(); // fingers or mouse that are down: id -> [x, y]
let moved = 0;

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
  if (pointers.size === 1) moved = 0;
});
canvas.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId), now = [event.offsetX, event.offsetY];
  if (!before) { hover(event, nearestTo(...now)); return; }
  const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
  moved += Math.abs(dx) + Math.abs(dy);
  if (pointers.size === 1) pan(dx, dy);
  else {
    const [, other] = [...pointers].find(([id]) => id !== event.pointerId), far = ([x, y]) => Math.hypot(x - other[0], y - other[1]);
    moved = 99;
    pan(dx / 2, dy / 2);
    zoomAt(far(now) / Math.max(1, far(before)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  }
  pointers.set(event.pointerId, now);
});
canvas.addEventListener("pointerup", (event) => {
  pointers.delete(event.pointerId);
  const i = nearestTo(event.offsetX, event.offsetY);
  if (moved < 6 && i !== null) location.hash = `feature=${i}`;
});
canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
canvas.addEventListener("pointerleave", (event) => hover(event, null));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomAt(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.offsetX, event.offsetY);
}, { passive: false });
canvas.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80] };
  if (steps[event.key]) pan(...steps[event.key]);
  else if ("+=".includes(event.key)) zoomAt(1.5);
  else if (event.key === "-") zoomAt(1 / 1.5);
  else return;
  event.preventDefault();
  event.stopPropagation();
});
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.onclick = () => {
    const factor = Number(button.dataset.zoom);
    if (factor) zoomAt(factor);
    else { Object.assign(view, wholeMap()); drawMap(); }
  };
}

function hover(event, i) {
  canvas.style.cursor = i === null ? "grab" : "pointer";
  if (i === null) byId("tip").hidden = true;
  else showTip(`#${i} ${labelOf(i)} · ${frequencyOf(index.frequency[i])} · ${index.subsets[index.subset[i]]}`, event.clientX, event.clientY);
  if (i !== hovered) { hovered = i; requestAnimationFrame(drawMap); }
}
