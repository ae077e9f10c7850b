// The list: search, filters, order; only the rows in sight are in the page.
"use strict";

const ROW = 54; // height of a row in pixels, as in style.css
const MOST_RARE = -7; // exponents of ten between which frequency is filtered
let found = []; // numbers of the features that fit, in order
let cursor = 0; // place in `found`
let opened = null; // number of the feature that is open

const ORDERS = { best: "best match", number: "number", frequency: "frequency", max_activation: "maximum", label: "label" };
const filter = { subset: "", label: "", dead: false, least: MOST_RARE, most: 0, scores: {} };

// How well features fit a query: 4 by number, 3 if the label begins so, 2 if a word of it does,
// 1 if a word of another text does, 0 if none.
function fitness(query) {
  const words = query.toLowerCase().trim();
  if (!words) return () => 1;
  const number = /^#?\d+$/.test(words) ? Number(words.replace("#", "")) : null;
  const at = placeOf(words);
  return (i) => {
    if (i === number) return 4;
    const inLabel = at(index.label[i].toLowerCase());
    return inLabel === 0 ? 3 : inLabel > 0 ? 2 : Number(at(searched[i] ?? "") >= 0);
  };
}

// Where a text has some words, -1 if nowhere: "king" is in "Kings", and not in "looking". Anywhere,
// where a script has no spaces.
function placeOf(words) {
  if (!/^[\p{sc=Latin}\p{sc=Greek}\p{sc=Cyrillic}\d]/u.test(words)) return (text) => text.indexOf(words);
  const begun = new RegExp(`(?<![\\p{L}\\p{M}\\d])${words.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")}`, "u");
  return (text) => (text.includes(words) ? text.search(begun) : -1);
}

function search() {
  const query = byId("query").value, fit = fitness(query), fits = new Map();
  const shown = byId("shown").value;
  const chosen = shown ? index.shown[shown] : index.label.keys();
  const low = filter.least > MOST_RARE ? 10 ** filter.least : 0, high = filter.most < 0 ? 10 ** filter.most : 1;
  const subset = index.subsets.indexOf(filter.subset);
  const scores = Object.entries(filter.scores).filter(([, least]) => least !== null);
  found = [...chosen].filter((i) =>
    (filter.dead || isAlive(i)) && index.frequency[i] >= low && index.frequency[i] <= high &&
    (subset < 0 || index.subset[i] === subset) &&
    (!filter.label || (filter.label === "with") === (index.label[i] !== "")) &&
    scores.every(([name, least]) => index[name][i] !== null && index[name][i] >= least) && fits.set(i, fit(i)).get(i));
  order(query, fits);
  cursor = Math.max(0, found.indexOf(opened));
  byId("count").textContent = `${withCommas(found.length)} of ${withCommas(index.label.length)} features`;
  byId("list").scrollTop = 0;
  showRows();
  drawMap();
}

function order(query, fits) {
  const by = byId("order").value, way = byId("turn").textContent === "↓" ? -1 : 1;
  if (by === "label") {
    const collator = new Intl.Collator("en");
    found.sort((a, b) => way * collator.compare(index.label[a], index.label[b]));
  } else if (by === "best") {
    if (query) found.sort((a, b) => fits.get(b) - fits.get(a) || index.frequency[b] - index.frequency[a]);
  } else if (by === "number") found.sort((a, b) => way * (a - b));
  else found.sort((a, b) => way * ((index[by][a] ?? -Infinity) - (index[by][b] ?? -Infinity)));
}

function showRows() {
  const list = byId("list"), rows = byId("rows");
  rows.style.height = `${found.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const last = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const shown = [];
  for (let place = first; place < last; place++) {
    const i = found[place];
    const row = make("a", { href: `#feature=${i}`, tabindex: -1 },
      make("span", { class: "dot" }), make("b", {}, visible(labelOf(i))),
      make("span", { class: "soft" }, `#${i} · ${describe(i)}`));
    row.style.top = `${place * ROW}px`;
    row.querySelector(".dot").style.background = colourOf(i);
    row.classList.toggle("cursor", place === cursor);
    if (i === opened) row.setAttribute("aria-current", "true");
    shown.push(row);
  }
  rows.replaceChildren(...shown);
}

// What a row says of a feature: how often it fires, or what the list is ordered by.
function describe(i) {
  const by = byId("order").value;
  const often = isAlive(i) ? frequencyOf(index.frequency[i]) : "never active";
  return ["max_activation", ...index.scores].includes(by) ? `${ORDERS[by]} ${index[by][i] ?? "unknown"} · ${often}` : often;
}

function moveCursor(step) {
  const list = byId("list");
  cursor = Math.min(Math.max(cursor + step, 0), found.length - 1);
  const top = cursor * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  showRows();
}

function makeFilters() {
  for (const name of index.scores) ORDERS[name] = inWords(name);
  const { selected, random } = index.shown;
  addOptions(byId("shown"), { "": "all features", selected: `${selected.length} that stand out`, random: `${random.length} drawn at random` });
  addOptions(byId("order"), ORDERS);
  const rows = byId("filter-rows");
  rows.append(
    slider("Fires at least on", "least", MOST_RARE, 0, 0.1, MOST_RARE, frequencyLimit),
    slider("Fires at most on", "most", MOST_RARE, 0, 0.1, 0, frequencyLimit),
    picker("Mostly in", "subset", { "": "any text", ...Object.fromEntries(index.subsets.map((name) => [name, name])) }),
    picker("Label", "label", { "": "with or without", with: "with a label", without: "without" }));
  for (const name of index.scores) rows.append(scoreSlider(name));
  const box = make("input", { type: "checkbox", id: "dead" });
  box.onchange = () => { filter.dead = box.checked; changed(); };
  rows.append(make("label", { class: "check" }, box, "dead features too"));
}

const frequencyLimit = (x) => x <= MOST_RARE ? "any token" : x >= 0 ? "all tokens" : frequencyOf(10 ** x);

function addOptions(select, options) {
  for (const [value, text] of Object.entries(options)) select.append(make("option", { value }, text));
}

function picker(text, name, options) {
  const select = make("select", { id: `filter-${name}` });
  addOptions(select, options);
  select.onchange = () => { filter[name] = select.value; changed(); };
  return make("label", {}, text, select);
}

function slider(text, name, min, max, step, value, say, set = (x) => { filter[name] = x; }) {
  const input = make("input", { type: "range", min, max, step, value, id: `filter-${name}` });
  const output = make("output", {}, say(value));
  input.oninput = () => { set(Number(input.value)); output.textContent = say(Number(input.value)); changed(); };
  return make("label", {}, make("span", {}, text, " ", output), input);
}

function scoreSlider(name) {
  const values = index[name].filter((value) => value !== null);
  const min = values.reduce((a, b) => Math.min(a, b)), max = values.reduce((a, b) => Math.max(a, b));
  const step = (max - min) / 50 || 1, says = (x) => x <= min ? "anything" : x.toPrecision(3);
  return slider(`${inWords(name)} at least`, name, min, max, step, min, says,
    (x) => { filter.scores[name] = x > min ? x : null; });
}

let timer = null;
function changed() {
  const used = [filter.subset, filter.label, filter.dead, filter.least > MOST_RARE, filter.most < 0,
    ...Object.values(filter.scores).map((least) => least !== null)].filter(Boolean).length;
  byId("n-filters").textContent = used ? `(${used})` : "";
  clearTimeout(timer);
  timer = setTimeout(search, 80);
}

function setSubset(name) {
  byId("filter-subset").value = filter.subset = filter.subset === name ? "" : name;
  changed();
}

function resetFilters() {
  Object.assign(filter, { subset: "", label: "", dead: false, least: MOST_RARE, most: 0, scores: {} });
  byId("query").value = "";
  byId("filter-rows").replaceChildren();
  byId("shown").replaceChildren();
  byId("order").replaceChildren();
  byId("turn").disabled = true;
  makeFilters();
  changed();
}
