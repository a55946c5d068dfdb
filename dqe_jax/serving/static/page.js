"use strict";
// The page: a conversation is a list of turns, each a reference, a text, weights and rejections.
const at = (id) => document.getElementById(id);
const KEPT = "dqe-conversation";
const PAUSE = 200; // milliseconds without a move before a slider searches

let about = null;
let conversation = "";
let turns = [];
let filter = {};
let shown = [];
let used = {}; // attribute weights of the last answer
let running = null; // aborts the search before
let failed = null; // what "Try again" does
let timer = 0;

const now = () => turns[turns.length - 1];
const key = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (x) => x.toString(16).padStart(2, "0")).join("");
const urlOf = (reference) =>
  reference.upload ? `/uploads/${reference.upload}` : `/images/${reference.id.split("/").map(encodeURIComponent).join("/")}`;
const nameOf = (reference) => (reference.upload ? "your photo" : reference.id);
const bare = (reference) => (reference.upload ? { upload: reference.upload } : { id: reference.id });

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

class Refusal extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

// ---------------------------------------------------------------- the server

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer. Is it still running?");
  }
  if (answer.status === 204) return null;
  let content = null;
  try {
    content = await answer.json();
  } catch {
    content = null;
  }
  if (!answer.ok) {
    const sentence = content && content.error ? content.error : `The server answered with status ${answer.status}.`;
    throw new Refusal(answer.status, sentence);
  }
  return content;
}

const post = (path, content, signal) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content), signal });

function tell(error, again = null) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    at("token-form").hidden = false;
    at("main").hidden = true;
    at("token").focus();
    return;
  }
  failed = again;
  at("again").hidden = again === null;
  at("trouble-text").textContent = error.message[0].toUpperCase() + error.message.slice(1);
  at("trouble").hidden = false;
}

const quiet = () => {
  at("trouble").hidden = true;
};

// ---------------------------------------------------------------- the conversation

function keep() {
  const held = JSON.stringify({ conversation, turns, filter });
  try {
    sessionStorage.setItem(KEPT, held);
  } catch {
    // a browser that keeps nothing
  }
}

function begin(reference) {
  conversation = key();
  turns = [{ reference, text: "", weights: {}, rejected: [], picked: [] }];
  at("text").value = "";
  search();
  at("text").focus();
}

function goOn(id) {
  turns.push({ reference: { id }, text: "", weights: { ...now().weights }, rejected: [], picked: [] });
  at("text").value = "";
  search();
  at("text").focus();
}

function stepBack(place) {
  turns = turns.slice(0, place + 1);
  at("text").value = now().text;
  search();
  at("found").focus();
}

function requestOf() {
  const own = now();
  const earlier = turns
    .slice(0, -1)
    .filter((turn) => turn.text.trim())
    .slice(-8)
    .map((turn) => ({ references: [bare(turn.reference)], text: turn.text }));
  const rejected = [...new Set(turns.flatMap((turn) => turn.rejected))].slice(-100);
  return { references: [bare(own.reference)], text: own.text, weights: own.weights, filter, rejected, earlier };
}

async function search() {
  if (running) running.abort();
  clearTimeout(timer);
  if (!turns.length) {
    show();
    return;
  }
  const own = (running = new AbortController());
  document.body.classList.add("busy");
  at("status").textContent = "Searching…";
  show();
  keep();
  try {
    const answer = await post("/search", requestOf(), own.signal);
    if (own !== running) return;
    quiet();
    shown = answer.results;
    used = answer.attribute_weights;
    showAnswer(answer);
  } catch (error) {
    if (own !== running || error.name === "AbortError") return;
    at("status").textContent = "";
    if (error.status === 404 && now().reference.upload) {
      turns = [];
      show();
      keep();
      tell(error);
    } else {
      tell(error, search);
    }
  } finally {
    if (own === running) document.body.classList.remove("busy");
  }
}

async function give(file) {
  quiet();
  if (file.size > about.upload_bytes) {
    const most = Math.floor(about.upload_bytes / 1e6);
    tell(new Refusal(413, `The file ${file.name} has ${(file.size / 1e6).toFixed(1)} MB: give one of at most ${most} MB.`));
    return;
  }
  if (file.type && !file.type.startsWith("image/")) {
    tell(new Refusal(415, `The file ${file.name} is no image: give a JPEG, PNG or WebP image.`));
    return;
  }
  at("status").textContent = "Sending the photo…";
  try {
    const type = file.type || "application/octet-stream";
    const taken = await call("/uploads", { method: "POST", headers: { "Content-Type": type }, body: file });
    begin({ upload: taken.upload });
  } catch (error) {
    at("status").textContent = "";
    tell(error, error.status === 0 || error.status === 503 ? () => give(file) : null);
  }
}

async function judge(id, kind) {
  const own = now();
  const line = {
    kind,
    image: id,
    conversation,
    turn: turns.length - 1,
    references: [bare(own.reference)],
    text: own.text,
    shown: shown.map((one) => one.id),
  };
  try {
    await post("/feedback", line);
    return true;
  } catch (error) {
    tell(error, () => judge(id, kind));
    return false;
  }
}

async function pick(id) {
  const own = now();
  const was = own.picked.includes(id);
  own.picked = was ? own.picked.filter((other) => other !== id) : [...own.picked, id];
  showResults();
  keep();
  const button = document.querySelector(`[data-pick="${CSS.escape(id)}"]`);
  if (button) button.focus();
  if (await judge(id, was ? "withdraw" : "pick")) {
    at("status").textContent = was ? `Taken back: ${id}.` : `Noted: ${id} is what you meant.`;
  }
}

async function reject(id) {
  const own = now();
  own.rejected.push(id);
  own.picked = own.picked.filter((other) => other !== id);
  judge(id, "reject");
  await search();
  at("found").focus();
}

async function undo() {
  const back = now().rejected;
  now().rejected = [];
  for (const id of back) judge(id, "withdraw");
  await search();
  at("found").focus();
}

// ---------------------------------------------------------------- what is shown

function show() {
  const own = now();
  const started = Boolean(own);
  at("reference").hidden = !started;
  at("ask").hidden = !started;
  at("new").hidden = !started;
  at("empty").hidden = started;
  at("filters").hidden = !started || !about.columns.length;
  if (!started) {
    at("weights").hidden = true;
    at("results").replaceChildren();
    at("warnings").replaceChildren();
    at("status").textContent = "";
  }
  if (started) {
    at("reference-image").src = urlOf(own.reference);
    at("reference-image").alt = `Reference: ${nameOf(own.reference)}`;
    at("reference-name").textContent = nameOf(own.reference);
  }
  const count = own ? own.rejected.length : 0;
  at("rejections").hidden = !count;
  at("rejected-text").textContent = count === 1 ? "1 image is not what you mean." : `${count} images are not what you mean.`;
  showTrail();
}

function showTrail() {
  at("trail-nav").hidden = turns.length < 2;
  const parts = turns.map((turn, place) => {
    const last = place === turns.length - 1;
    const label = turn.text.trim() || (last ? "now" : "similar images");
    const button = make("button", { type: "button", onclick: () => stepBack(place) });
    button.setAttribute("aria-label", `Step ${place + 1}: ${nameOf(turn.reference)}, ${label}`);
    if (last) button.setAttribute("aria-current", "step");
    button.append(make("img", { src: urlOf(turn.reference), alt: "" }), make("span", {}, label));
    return make("li", {}, button);
  });
  at("trail").replaceChildren(...parts);
}

function showAnswer(answer) {
  const notes = answer.warnings.map((said) => make("li", {}, said[0].toUpperCase() + said.slice(1) + "."));
  at("warnings").replaceChildren(...notes);
  showWeights();
  showResults();
  const count = answer.results.length;
  const seconds = answer.seconds < 0.01 ? "less than 0.01" : answer.seconds.toFixed(2);
  if (count) at("status").textContent = `${count} of ${about.images} images, best first, in ${seconds} s.`;
  else if (Object.keys(filter).length) at("status").textContent = "No image passes the filters: clear them, or ask for less.";
  else at("status").textContent = "Nothing is left to show: take rejections back, or start anew.";
}

function facts(one) {
  const likely = one.probability === null ? "" : `, ${Math.round(100 * one.probability)}% likely`;
  const told = make("p", { className: "facts" }, make("b", {}, one.score.toFixed(3)), likely, make("br"), one.id);
  for (const [name, value] of Object.entries(one.metadata)) {
    if (value !== null) told.append(make("br"), make("span", { className: "muted" }, `${name}: ${value}`));
  }
  return told;
}

function showResults() {
  const picked = now().picked;
  const cards = shown.map((one) => {
    const look = make("button", { type: "button", className: "look", onclick: () => goOn(one.id) });
    look.setAttribute("aria-label", `Go on from ${one.id}, score ${one.score.toFixed(3)}`);
    look.title = "Go on from this image";
    look.append(make("img", { src: urlOf({ id: one.id }), alt: "", loading: "lazy" }));
    const yes = make("button", { type: "button", onclick: () => pick(one.id) }, "This one");
    yes.setAttribute("aria-pressed", String(picked.includes(one.id)));
    yes.setAttribute("aria-label", `This one: ${one.id}`);
    yes.dataset.pick = one.id;
    const no = make("button", { type: "button", onclick: () => reject(one.id) }, "Not this one");
    no.setAttribute("aria-label", `Not this one: ${one.id}`);
    const card = make("li", { className: picked.includes(one.id) ? "picked" : "" }, look, facts(one));
    card.append(make("div", { className: "say" }, yes, no));
    card.dataset.id = one.id;
    return card;
  });
  at("results").replaceChildren(...cards);
}

function showWeights() {
  const names = about.attributes;
  at("weights").hidden = !names.length || !now().text.trim();
  names.forEach((name, place) => {
    const factor = now().weights[name] ?? 1;
    const input = at(`weight-${place}`);
    if (document.activeElement !== input) input.value = String(factor);
    input.setAttribute("aria-valuetext", `${(used[name] ?? 0).toFixed(2)}, factor ${factor}`);
    at(`weight-of-${place}`).textContent = (used[name] ?? 0).toFixed(2);
  });
}

function makeSliders() {
  const rows = about.attributes.map((name, place) => {
    const input = make("input", { type: "range", id: `weight-${place}`, min: "0", max: String(about.largest_factor), step: "0.1", value: "1" });
    input.addEventListener("input", () => {
      const factor = Number(input.value);
      if (factor === 1) delete now().weights[name];
      else now().weights[name] = factor;
      clearTimeout(timer);
      timer = setTimeout(search, PAUSE);
    });
    const output = make("output", { id: `weight-of-${place}` });
    output.setAttribute("for", input.id);
    return make("div", { className: "slider" }, make("label", { htmlFor: input.id }, name), input, output);
  });
  at("sliders").replaceChildren(...rows);
}

function makeFilters() {
  const rows = about.columns.map((column, place) => {
    const id = `filter-${place}`;
    if (column.kind === "texts") {
      const select = make("select", { id });
      select.append(make("option", { value: "" }, "any"), ...column.values.map((value) => make("option", { value }, value)));
      select.addEventListener("change", () => setFilter(column.name, select.value === "" ? null : select.value));
      return make("div", {}, make("label", { htmlFor: id }, column.name), select);
    }
    const [least, most] = ["least", "most"].map((end) => {
      const input = make("input", { type: "number", id: `${id}-${end}`, step: "any" });
      input.placeholder = column[end] === null ? "" : String(column[end]);
      input.setAttribute("aria-label", `${column.name}, ${end === "least" ? "at least" : "at most"}`);
      return input;
    });
    const changed = () => {
      const read = (input) => (input.value === "" ? null : Number(input.value));
      const none = least.value === "" && most.value === "";
      setFilter(column.name, none ? null : { least: read(least), most: read(most) });
    };
    least.addEventListener("change", changed);
    most.addEventListener("change", changed);
    return make("div", {}, make("label", { htmlFor: least.id }, column.name), make("div", { className: "range" }, least, most));
  });
  at("filter-fields").replaceChildren(...rows);
}

function setFilter(name, condition) {
  if (condition === null) delete filter[name];
  else filter[name] = condition;
  search();
}

function fillFilters() {
  about.columns.forEach((column, place) => {
    const held = filter[column.name];
    if (column.kind === "texts") at(`filter-${place}`).value = typeof held === "string" ? held : "";
    else for (const end of ["least", "most"]) at(`filter-${place}-${end}`).value = held?.[end] ?? "";
  });
}

async function showSamples() {
  const many = 12;
  const first = Math.floor(Math.random() * Math.max(1, about.images - many));
  const listing = await call(`/images?first=${first}&count=${many}`);
  const samples = listing.images.map((id) => {
    const button = make("button", { type: "button", className: "look", onclick: () => begin({ id }) });
    button.setAttribute("aria-label", `Start from ${id}`);
    button.append(make("img", { src: urlOf({ id }), alt: "", loading: "lazy" }));
    return make("li", {}, button);
  });
  at("samples").replaceChildren(...samples);
}

// ---------------------------------------------------------------- start

function restore() {
  try {
    const held = JSON.parse(sessionStorage.getItem(KEPT) || "null");
    if (!held || !Array.isArray(held.turns)) return;
    const known = new Set(about.columns.map((column) => column.name));
    const names = new Set(about.attributes);
    for (const turn of held.turns) {
      for (const name of Object.keys(turn.weights)) if (!names.has(name)) delete turn.weights[name];
    }
    conversation = held.conversation;
    turns = held.turns;
    filter = Object.fromEntries(Object.entries(held.filter).filter(([name]) => known.has(name)));
    if (turns.length) at("text").value = now().text;
  } catch {
    turns = [];
  }
}

async function start() {
  try {
    const secret = new URLSearchParams(location.hash.slice(1)).get("token");
    if (secret) {
      history.replaceState(null, "", location.pathname);
      await call("/session", { method: "POST", headers: { Authorization: `Bearer ${secret}` } });
    }
    about = await call("/about");
  } catch (error) {
    tell(error, start);
    document.documentElement.dataset.ready = "no";
    return;
  }
  quiet();
  at("token-form").hidden = true;
  at("about").textContent = `${about.images.toLocaleString("en")} images. Show a photo, say what should be different, and go on from what you find.`;
  at("demo").hidden = !about.demo;
  at("demo").textContent = about.demo;
  at("logs").textContent = about.logs
    ? "What you pick and reject is kept in a log on the server, with the photos that you gave for it."
    : "Nothing that you do here is kept.";
  at("empty-text").textContent = "Nothing is searched yet. Give a photo of your own, or start from one of these:";
  at("main").hidden = false;
  makeSliders();
  makeFilters();
  restore();
  fillFilters();
  try {
    await showSamples();
  } catch (error) {
    tell(error, start);
  }
  await search();
  document.documentElement.dataset.ready = "yes";
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  now().text = at("text").value;
  search();
});
at("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await call("/session", { method: "POST", headers: { Authorization: `Bearer ${at("token").value}` } });
    at("token").value = "";
    await start();
  } catch (error) {
    at("trouble-text").textContent = error.message;
    at("again").hidden = true;
    at("trouble").hidden = false;
  }
});
at("pick-file").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  at("file").value = "";
  if (file) give(file);
});
at("reset").addEventListener("click", () => {
  now().weights = {};
  search();
});
at("clear").addEventListener("click", () => {
  filter = {};
  fillFilters();
  search();
});
at("new").addEventListener("click", () => {
  turns = [];
  shown = [];
  search();
  keep();
  at("pick-file").focus();
});
at("undo").addEventListener("click", undo);
at("dismiss").addEventListener("click", quiet);
at("again").addEventListener("click", () => {
  quiet();
  if (failed) failed();
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData ? event.clipboardData.files : [];
  if (file && about) {
    event.preventDefault();
    give(file);
  }
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "drop" || !event.relatedTarget) document.body.classList.remove("over");
  });
}
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer ? event.dataTransfer.files : [];
  if (file && about) give(file);
});

start();
