// One feature: statistics, histogram, tokens, neighbours, examples.
"use strict";

const N_TOP = 8; // strongest examples in sight; the others unfold
const N_BUCKETS = 5; // of random examples, between the maximum and 0

async function showFeature(i) {
  const pane = byId("feature");
  let details;
  try {
    details = await loadDetails(i);
  } catch (error) {
    pane.replaceChildren(make("p", {}, `Feature ${i} cannot be shown: ${error.message}.`));
    return;
  }
  if (i !== opened) return; // another one was opened meanwhile
  const parts = [heading(i)];
  if (details.explanation) parts.push(make("p", { class: "explanation" }, details.explanation));
  parts.push(statistics(i));
  if (isAlive(i)) parts.push(make("div", { class: "columns" }, histogram(i, details), neighbours(details)));
  parts.push(tokens("Promotes", "promoted", details.promoted), tokens("Suppresses", "suppressed", details.suppressed));
  if (isAlive(i)) parts.push(...examples(i, details.examples));
  pane.replaceChildren(...parts);
  pane.scrollTop = 0;
}

function heading(i) {
  const back = make("a", { href: "#", class: "back", "aria-label": "Back to the list" }, "‹ List");
  const head = make("div", { class: "heading" }, back, make("h2", {}, make("span", { class: "soft" }, `#${i} `), visible(labelOf(i))));
  if (index.umap_x[i] !== null) head.append(make("a", { href: `#map=${i}`, class: "button" }, "On the map"));
  return head;
}

function statistics(i) {
  if (!isAlive(i)) return make("p", { class: "soft" }, "Dead: never active on the tokens analysed.");
  const share = index.frequency[i];
  const facts = [
    ["active on", `${(100 * share).toPrecision(2)}% of tokens${share < 0.1 ? ` (1 in ${withCommas(1 / share)})` : ""}`],
    ["maximum", sized(index.max_activation[i])],
    ["mean where active", sized(index.mean_activation[i])],
    ["mostly in", `${index.subsets[index.subset[i]]} (${(100 * index.top_subset_share[i]).toFixed(0)}%)`],
    ...index.scores.filter((name) => index[name][i] !== null).map((name) => [inWords(name), `${+index[name][i].toPrecision(3)}`]),
  ];
  return make("dl", { class: "statistics" }, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function histogram(i, { histogram: counts, range }) {
  const n = counts.reduce((a, b) => a + b, 0), most = Math.max(...counts), width = range / counts.length;
  const last = counts.findLastIndex((count) => count > 0) + 1, wide = 340, high = 120, left = 4, bar = (wide - 2 * left) / last;
  const svg = make("svg", { viewBox: `0 0 ${wide} ${high + 36}`, role: "img", "aria-label": `Histogram of ${withCommas(n)} activations` });
  for (let bin = 0; bin < last; bin++) {
    const tall = counts[bin] ? Math.max(1, high * counts[bin] / most) : 0;
    const rect = make("rect", { x: left + bin * bar + 0.5, y: high - tall, width: bar - 1, height: tall });
    const hit = make("rect", { x: left + bin * bar, y: 0, width: bar, height: high, class: "hit",
      "data-tip": `${(bin * width).toPrecision(3)} to ${((bin + 1) * width).toPrecision(3)}: ${withCommas(counts[bin])} tokens` });
    rect.style.setProperty("--a", (bin + 1) / last);
    svg.append(rect, hit);
  }
  svg.append(make("line", { x1: left, x2: wide - left, y1: high + 0.5, y2: high + 0.5 }));
  const labels = [[left, "start", "0"], [wide / 2, "middle", "activation where active"], [wide - left, "end", (last * width).toPrecision(3)]];
  for (const [x, anchor, text] of labels) svg.append(make("text", { x, y: high + 15, "text-anchor": anchor }, text));
  svg.append(make("text", { x: left, y: high + 31, "text-anchor": "start" }, `n = ${withCommas(n)} tokens; the tallest bar has ${withCommas(most)}`));
  return make("div", {}, make("h3", {}, "How strongly"), svg);
}

function neighbours(details) {
  const links = details.neighbours.map((i, rank) => {
    const bar = make("span", { class: "bar" });
    bar.style.setProperty("--a", Math.max(0, details.cosines[rank]));
    return make("a", { href: `#feature=${i}` }, make("span", { class: "soft" }, details.cosines[rank].toFixed(2)), bar,
      make("span", { class: "name" }, visible(labelOf(i))), make("span", { class: "soft" }, `#${i}`));
  });
  return make("div", {}, make("h3", {}, "Neighbours, by cosine of the directions they write"), make("div", { class: "neighbours" }, ...links));
}

function tokens(title, kind, texts) {
  const chips = texts.map((text) => make("li", {}, visible(text, true)));
  return make("div", { class: "tokens" }, make("h3", {}, title), make("ul", { class: kind }, ...chips));
}

function examples(i, all) {
  const top = all.filter(({ bucket }) => bucket === 0), maximum = index.max_activation[i];
  const parts = [make("h3", {}, "Strongest examples ", make("span", { class: "key soft" }, "zero to the maximum")), lines(top.slice(0, N_TOP), maximum)];
  if (top.length > N_TOP) parts.push(make("details", {}, make("summary", {}, `${top.length - N_TOP} more`), lines(top.slice(N_TOP), maximum)));
  for (let bucket = 1; bucket <= N_BUCKETS; bucket++) {
    const some = all.filter((example) => example.bucket === bucket), step = 100 / N_BUCKETS;
    if (!some.length) continue;
    const high = 100 - (bucket - 1) * step;
    parts.push(make("h3", {}, `Random examples at ${high - step} to ${high}% of the maximum`), lines(some, maximum));
  }
  return parts;
}

function lines(some, maximum) {
  return make("ul", { class: "examples" }, ...some.map((example) =>
    make("li", {}, make("span", { class: "text", dir: "auto" }, ...example.runs.map((run, place) => marked(run, maximum, place === 0))),
      make("span", { class: "source soft" }, make("b", {}, sized(example.peak)), " ", example.source))));
}

function marked(run, maximum, first) {
  if (typeof run === "string") return visible(first ? run.trimStart() : run);
  const [text, activation, isPeak] = run, word = text.trimStart() || text;
  const mark = make("mark", { "data-tip": `activation ${activation}` }, visible(word));
  mark.style.setProperty("--a", Math.min(1, Math.max(0, activation / maximum)));
  if (isPeak) mark.classList.add("peak");
  const whole = document.createDocumentFragment(); // the space before a word stays out of its box
  if (!first) whole.append(text.slice(0, text.length - word.length));
  whole.append(mark);
  return whole;
}

/** An activation with two decimals, or three digits where these would be zeros. */
function sized(value) {
  return value && value < 0.1 ? `${+value.toPrecision(3)}` : value.toFixed(2);
}
