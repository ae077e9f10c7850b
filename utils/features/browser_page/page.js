// The page as a whole: the address says what is shown; keys, tips, the overview.
"use strict";

function start(content) {
  index = content;
  const { model_name: model, layer, kind, dataset } = index.about;
  const title = `${withCommas(index.label.length)} features of ${model}, layer ${layer}`;
  document.title = byId("title").textContent = title;
  readColours();
  makeFilters();
  makeMap();
  makeOverview(`A ${kind} sparse autoencoder on the residual stream after decoder block ${layer}, looked at on ${dataset}.`);
  byId("filters").open = window.innerHeight > 1200;
  search();
  route();
  performance.mark("shown");
  setTimeout(async () => {
    searched = (await load("search")).map((text) => text.toLowerCase());
    if (byId("query").value) search();
  }, 50);
}

// #feature=397, #map, #map=397, #overview; anything else is the list.
function route() {
  const [name, number] = location.hash.slice(1).split("=");
  const i = /^\d+$/.test(number ?? "") && Number(number) < index.label.length ? Number(number) : null;
  const shown = name === "map" && mapped.length ? "map" : name === "overview" ? "overview" : "features";
  document.body.dataset.view = shown;
  document.body.classList.toggle("opened", name === "feature" && i !== null);
  for (const id of ["map", "overview"]) byId(id).hidden = shown !== id;
  for (const link of document.querySelectorAll("[data-view]:not(body)")) link.setAttribute("aria-current", link.dataset.view === shown ? "page" : "false");
  byId("tip").hidden = true;
  opened = name === "feature" ? i : null;
  if (opened !== null) {
    if (found.includes(opened)) { cursor = found.indexOf(opened); moveCursor(0); }
    showFeature(opened);
  } else if (shown === "features") showWelcome();
  if (shown === "map") showMap(i);
  showRows();
}

function showWelcome() {
  const links = (features) => make("div", { class: "links" }, ...features.map((i) =>
    make("a", { href: `#feature=${i}` }, make("span", { class: "soft" }, `${i} `), visible(labelOf(i)))));
  const figures = index.facts.filter(([name]) => ["Live features", "L0", "Variance explained", "Loss recovered"].includes(name));
  byId("feature").replaceChildren(
    make("h2", {}, "Pick a feature"),
    make("p", { class: "soft" }, "Each was learnt from what goes through the model, without being told what to look for. Search for a word, " + (mapped.length ? "wander on the map, " : "") + "or begin here."),
    make("dl", { class: "figures" }, ...figures.map(([name, value]) => make("div", {}, make("dd", {}, value.split(";")[0]), make("dt", {}, name)))),
    make("h3", {}, "Features that stand out"),
    links(index.shown.selected),
    make("h3", {}, "Drawn at random, so that nobody has to take the chosen ones' word for it"),
    links(index.shown.random));
}

function makeOverview(about) {
  const rows = index.facts.map(([name, value, meaning]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value), make("td", { class: "soft" }, meaning)));
  const figures = index.pictures.map(({ file, caption, width, height }) => {
    const image = make("img", { src: `pictures/${file}`, width, height, alt: caption, loading: "lazy" });
    const link = make("a", { href: `pictures/${file}`, title: "Full size" }, image);
    return make("figure", width >= 1500 ? { class: "wide" } : {}, link, make("figcaption", {}, caption));
  });
  byId("overview").replaceChildren(make("h2", {}, "What was analysed"), make("p", { class: "soft" }, about), make("table", {}, ...rows),
    make("h2", {}, "What was found"), make("div", { class: "figures-grid" }, ...figures));
}

function showTip(text, x, y) {
  const tip = byId("tip");
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(x + 12, window.innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${y + 22 + tip.offsetHeight > window.innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
}

document.addEventListener("pointerover", (event) => {
  const tip = event.target.closest?.("[data-tip]");
  if (tip) showTip(tip.dataset.tip, event.clientX, event.clientY);
  else if (event.target !== canvas) byId("tip").hidden = true;
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const typing = event.target.matches("input[type=search]");
  if (event.target.matches("select, input:not([type=search])") && event.key !== "Escape") return;
  const keys = {
    ArrowDown: () => moveCursor(1), ArrowUp: () => moveCursor(-1), Enter: openAtCursor, Escape: leave,
    ...(typing ? {} : {
      j: () => moveCursor(1), k: () => moveCursor(-1), "/": () => byId("query").focus(), "?": () => byId("help").showModal(),
      m: () => { location.hash = "map"; }, o: () => { location.hash = "overview"; },
    }),
  };
  const onLink = event.key === "Enter" && event.target.matches("a, button, summary");
  if (!keys[event.key] || onLink) return;
  event.preventDefault();
  keys[event.key]();
});

function openAtCursor() {
  if (!found.length) return;
  location.hash = `feature=${found[cursor]}`;
  byId("query").blur();
}

function leave() {
  if (document.activeElement === byId("query")) {
    if (byId("query").value) { byId("query").value = ""; search(); } else byId("query").blur();
  } else if (location.hash.length > 1) location.hash = "";
  else if (byId("query").value) { byId("query").value = ""; search(); }
}

byId("query").addEventListener("input", changed);
byId("shown").addEventListener("change", search);
byId("order").addEventListener("change", () => {
  byId("turn").disabled = byId("order").value === "best";
  byId("turn").textContent = ["label", "number"].includes(byId("order").value) ? "↑" : "↓";
  search();
});
byId("turn").onclick = () => { byId("turn").textContent = byId("turn").textContent === "↓" ? "↑" : "↓"; search(); };
byId("reset").onclick = resetFilters;
byId("show-help").onclick = () => byId("help").showModal();
byId("list").addEventListener("scroll", showRows, { passive: true });
document.querySelector("form[role=search]").onsubmit = (event) => event.preventDefault();
window.addEventListener("hashchange", route);
window.addEventListener("resize", () => { if (index) { showRows(); if (!byId("map").hidden) showMap(focus); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); makeMap(); showRows(); drawMap(); });
