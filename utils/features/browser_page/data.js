// What is known of the features, how more of it is loaded, and how text gets into the page.
"use strict";

let index = null; // columns of all features, from data/index.js
let searched = []; // texts searched beside labels, in lower case, once data/search.js is there
const waiting = new Map(); // name of a file of data -> promise of its content
const arrivals = new Map(); // name -> what to call with it

const byId = (id) => document.getElementById(id);

// Called by the files of data/: pages from the file system may load scripts, but not fetch.
function receive(name, content) {
  if (name === "index") start(content);
  else arrivals.get(name)(content);
}

// The content of a file of data/, loaded once.
function load(name) {
  if (!waiting.has(name)) {
    waiting.set(name, new Promise((resolve, reject) => {
      const script = make("script", { src: `data/${name}.js` });
      arrivals.set(name, resolve);
      script.onerror = () => { waiting.delete(name); reject(new Error(`data/${name}.js is missing`)); };
      script.onload = () => script.remove();
      document.head.append(script);
    }));
  }
  return waiting.get(name);
}

async function loadDetails(feature) {
  const file = Math.floor(feature / index.per_file);
  return (await load(String(file).padStart(5, "0")))[feature % index.per_file];
}

// An element with attributes and children. Strings become text nodes: no text is read as HTML.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "text", "line", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const withCommas = (n) => Math.round(n).toLocaleString("en");
const inWords = (name) => name.replaceAll("_", " ");
const isAlive = (i) => index.frequency[i] > 0;
const labelOf = (i) => index.label[i] || "no label";

function frequencyOf(share) {
  return share < 0.1 ? `1 in ${withCommas(1 / share)} tokens` : `${(100 * share).toPrecision(2)}% of tokens`;
}

// Text with line breaks and other control characters made visible, and spaces too if asked for.
function visible(text, spaces = false) {
  const parts = document.createDocumentFragment();
  for (const part of text.split(spaces ? /([\x00-\x20\x7f])/ : /([\x00-\x1f\x7f])/)) {
    if (part === "\r" || part === "") continue;
    const sign = { "\n": "↵", "\t": "⇥", " ": "␣", "\x7f": "␡" }[part] ?? String.fromCharCode(0x2400 + part.charCodeAt(0));
    const isSign = part.length === 1 && (part < " " || part === "\x7f" || (spaces && part === " "));
    parts.append(isSign ? make("i", {}, sign) : part);
  }
  return parts;
}
