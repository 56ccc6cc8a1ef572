// The page: modes, settings that stay, and the tip of a token.

import { TokenView, bar, chatTokens, completionTokens, events, fillTip, percent, send } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const KEPT = ["max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop_text", "system"];
const STORE = "gptcore";

// Each mode: its route, what its button and its text field are called, and the function that runs it
const MODES = {
  complete: { title: "Complete", route: "/v1/completions", run: "Continue", field: "Prompt", go: complete },
  chat: { title: "Chat", route: "/v1/chat/completions", run: "Send", field: "Message", go: chat },
  score: { title: "Score a text", route: "/v1/completions", run: "Score", field: "Text", go: score },
  classify: { title: "Classify", route: "/v1/classify", run: "Classify", field: "Text", go: classify },
  entities: { title: "Entities", route: "/v1/entities", run: "Find", field: "Text", go: entities },
  answer: { title: "Answer", route: "/v1/answer", run: "Answer", field: "Text with the answer", go: answer },
};

let models = [];
let mode = null;
let messages = []; // of the chat
let running = null; // AbortController
let last = null; // what Export JSON writes
let view = null;

// ---- settings that stay ------------------------------------------------------------------------------------------

function load() {
  try { return JSON.parse(localStorage.getItem(STORE)) ?? {}; } catch { return {}; }
}

function save() {
  const kept = Object.fromEntries(KEPT.map((id) => [id, $(id).value]));
  const state = { ...kept, prompt: $("prompt").value, question: $("question").value, mode, model: $("model").value,
                  open: $("settings").open };
  try { localStorage.setItem(STORE, JSON.stringify(state)); } catch { /* not allowed: settings last as long as the page */ }
}

function sampling() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const stop = $("stop_text").value.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
  return {
    model: $("model").value, max_tokens: number("max_tokens"), temperature: number("temperature"),
    top_k: number("top_k"), top_p: number("top_p"), repetition_penalty: number("repetition_penalty"),
    seed: number("seed"), stop: stop === "" ? undefined : stop,
  };
}

// ---- modes -------------------------------------------------------------------------------------------------------

function choose(name) {
  mode = name;
  const chosen = MODES[name];
  for (const tab of $("modes").children) {
    tab.setAttribute("aria-selected", String(tab.dataset.mode === name));
    tab.tabIndex = tab.dataset.mode === name ? 0 : -1;
  }
  $("run").textContent = chosen.run;
  $("prompt-label").textContent = chosen.field;
  $("question-field").hidden = name !== "answer";
  $("talk").hidden = name !== "chat";
  $("system-field").hidden = name !== "chat";
  $("settings").hidden = !["complete", "chat"].includes(name);
  reset();
}

function reset() {
  $("output").replaceChildren();
  $("numbers").textContent = "";
  $("legend").hidden = true;
  $("export").disabled = true;
  hideTip();
  fail(null);
}

function offer() {
  const routes = models.find((model) => model.id === $("model").value)?.routes ?? [];
  const names = Object.keys(MODES).filter((name) => routes.includes(MODES[name].route));
  $("modes").replaceChildren(...names.map((name) => {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.role = "tab";
    tab.dataset.mode = name;
    tab.textContent = MODES[name].title;
    tab.addEventListener("click", () => { stop(); choose(name); save(); });
    return tab;
  }));
  choose(names.includes(mode) ? mode : names[0]);
}

function fail(error) {
  $("error").hidden = error === null;
  $("error").textContent = error === null ? "" : error.message;
}

async function run() {
  if (running !== null) return;
  reset();
  save();
  running = new AbortController();
  $("run").disabled = true;
  $("stop").hidden = false;
  const text = $("prompt").value;
  last = { mode, model: $("model").value, at: new Date().toISOString(), text };
  try {
    await MODES[mode].go(text, running.signal);
  } catch (error) {
    if (error.name === "AbortError") $("numbers").textContent += " (stopped)";
    else fail(error);
  }
  view?.end();
  running = null;
  $("run").disabled = false;
  $("stop").hidden = true;
  $("export").disabled = false;
}

function stop() {
  running?.abort();
}

function show(element) {
  view = new TokenView(element);
  $("legend").hidden = false;
  return view;
}

/** Read a stream into a view; count tokens and time. */
async function follow(path, body, signal, target, tokensOf, textOf) {
  const started = performance.now();
  let first = null;
  let text = "";
  last = { ...last, request: body, tokens: target.tokens };
  for await (const event of events(await send(path, { ...body, stream: true }, signal))) {
    const choice = event.choices[0];
    if (choice === undefined) continue;
    const tokens = tokensOf(choice.logprobs);
    if (tokens.length && first === null) first = performance.now() - started;
    target.add(tokens);
    text += textOf(choice);
    const seconds = (performance.now() - started) / 1000;
    const count = target.tokens.length;
    const rate = count > 1 ? `, ${((count - 1) / (seconds - first / 1000)).toFixed(1)} tokens/s` : "";
    if (count) $("numbers").textContent = `${count} tokens${rate}, first after ${Math.round(first)} ms`;
    last = { ...last, answer: text, finish_reason: choice.finish_reason, seconds, first_token_ms: first };
  }
  return text;
}

async function complete(prompt, signal) {
  const before = document.createElement("span");
  before.className = "prompt";
  before.textContent = prompt;
  $("output").append(before);
  const body = { ...sampling(), prompt, logprobs: 5 };
  await follow("/v1/completions", body, signal, show($("output")), completionTokens, (choice) => choice.text);
}

async function chat(text, signal) {
  if (text.trim() === "") throw new Error("Write a message first.");
  const system = $("system").value;
  const asked = [...messages, { role: "user", content: text }];
  const user = turn("user", text);
  const reply = turn("assistant", "");
  reply.classList.add("tokens");
  const { max_tokens, ...rest } = sampling();
  const body = { ...rest, max_completion_tokens: max_tokens, logprobs: true, top_logprobs: 5,
                 messages: [...(system ? [{ role: "system", content: system }] : []), ...asked] };
  $("prompt").value = "";
  try {
    await follow("/v1/chat/completions", body, signal, show(reply), chatTokens, (choice) => choice.delta.content ?? "");
  } catch (error) {
    if (error.name !== "AbortError") {
      user.remove();
      reply.remove();
      $("prompt").value = text;
    }
    throw error;
  } finally {
    if (reply.isConnected) messages = [...asked, { role: "assistant", content: last.answer ?? "" }];
  }
}

function turn(role, text) {
  const element = document.createElement("div");
  element.className = `turn ${role}`;
  element.textContent = text;
  $("talk").append(element);
  return element;
}

async function score(text, signal) {
  if (text === "") throw new Error("Paste a text first.");
  const body = { model: $("model").value, prompt: text, echo: true, max_tokens: 0, logprobs: 5 };
  const answer = await (await send("/v1/completions", body, signal)).json();
  const tokens = completionTokens(answer.choices[0].logprobs);
  show($("output")).add(tokens);
  const scored = tokens.filter((token) => token.logprob !== null);
  const sum = scored.reduce((total, token) => total - token.logprob, 0);
  const loss = sum / scored.length;
  const bytes = scored.reduce((total, token) => total + token.bytes.length, 0);
  $("numbers").textContent = scored.length === 0
    ? "One token: nothing comes before it, so nothing is predicted."
    : `${scored.length} tokens predicted, loss ${loss.toFixed(3)}, perplexity ${Math.exp(loss).toPrecision(4)}, `
      + `${(sum / Math.LN2 / bytes).toFixed(3)} bits per byte`;
  last = { ...last, request: body, tokens, loss };
}

// ---- tasks -------------------------------------------------------------------------------------------------------

async function ask(route, body, signal) {
  const answer = await (await send(route, { model: $("model").value, ...body }, signal)).json();
  last = { ...last, request: body, answer: answer.data[0] };
  return answer.data[0];
}

async function classify(text, signal) {
  const { labels } = await ask("/v1/classify", { input: text }, signal);
  const list = document.createElement("div");
  list.className = "labels";
  const most = Math.max(...labels.map(({ score }) => score));
  list.append(...labels.map(({ label, score }) => bar(label, score, percent(score), score === most)));
  $("output").append(list);
}

async function entities(text, signal) {
  const found = (await ask("/v1/entities", { input: text }, signal)).entities;
  marked(text, found.map(({ start, end, entity_group, score }) => ({ start, end, name: entity_group, score })));
  $("numbers").textContent = found.length === 1 ? "1 entity" : `${found.length} entities`;
}

async function answer(context, signal) {
  const [best] = (await ask("/v1/answer", { input: { question: $("question").value, context } }, signal)).answers;
  $("numbers").textContent = best.answer === ""
    ? `The text does not say (${percent(best.score)}).` : `${best.answer} (${percent(best.score)})`;
  marked(context, best.answer === "" ? [] : [{ ...best, name: "answer" }]);
}

/** Show a text with parts marked. Offsets count characters, as Python does, and not UTF-16 units. Parts may overlap:
 *  several tokens can belong to one character. */
function marked(text, parts) {
  const characters = [...text];
  const slice = (from, to) => document.createTextNode(characters.slice(from, to).join(""));
  let at = 0;
  for (const { start, end, name, score } of parts) {
    const mark = document.createElement("mark");
    const small = document.createElement("small");
    small.textContent = name;
    mark.title = percent(score);
    mark.append(slice(Math.max(at, start), end), small);
    $("output").append(slice(at, start), mark);
    at = Math.max(at, end);
  }
  $("output").append(slice(at));
}

// ---- the tip of a token ------------------------------------------------------------------------------------------

function showTip(place) {
  const tip = $("tip");
  fillTip(tip, place.says);
  tip.hidden = false;
  const box = place.getClientRects()[0];
  if (box === undefined) return;
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + tip.offsetHeight + 8 < window.innerHeight;
  tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + window.scrollY}px`;
}

function hideTip() {
  $("tip").hidden = true;
}

for (const kind of ["mouseover", "focusin"]) {
  $("panel").addEventListener(kind, (event) => {
    if (event.target.says) showTip(event.target);
    else hideTip();
  });
}
for (const kind of ["mouseleave", "focusout"]) $("panel").addEventListener(kind, hideTip);

$("panel").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!event.target.says || step === undefined) return;
  const places = [...event.target.parentElement.querySelectorAll(".token")];
  const next = places[places.indexOf(event.target) + step];
  if (next === undefined) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

// ---- start -------------------------------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", () => {
  stop();
  messages = [];
  $("talk").replaceChildren();
  $("prompt").value = "";
  reset();
  save();
  $("prompt").focus();
});
$("export").addEventListener("click", () => {
  const data = { ...last, tokens: last.tokens?.map(({ bytes, logprob, top }) => (
    { text: new TextDecoder().decode(new Uint8Array(bytes)), bytes, logprob, top })) };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  link.download = `gptcore-${mode}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
$("modes").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const tabs = [...$("modes").children];
  const next = tabs[tabs.indexOf(document.activeElement) + step];
  if (next !== undefined) { next.click(); next.focus(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
  if (event.key === "Escape") { stop(); hideTip(); }
});
for (const id of [...KEPT, "prompt", "question"]) $(id).addEventListener("input", save);
$("settings").addEventListener("toggle", save);
$("model").addEventListener("change", () => { stop(); offer(); save(); });

try {
  const kept = load();
  for (const id of [...KEPT, "prompt", "question"]) if (typeof kept[id] === "string") $(id).value = kept[id];
  $("settings").open = kept.open === true;
  mode = kept.mode ?? null;
  models = (await (await send("/v1/models")).json()).data;
  $("model").replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === kept.model)));
  offer();
} catch (error) {
  fail(error);
}
