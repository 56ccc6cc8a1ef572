// The API and its tokens: requests, streams, and how a token is shown.

const MOST_SURPRISING = 7; // nats, at which the shade is strongest: a probability of 0.1 %

/** Send a request; return the response. Throws an Error whose message is a sentence for people. */
export async function send(path, body, signal) {
  let response;
  try {
    const options = body === undefined ? {} : {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    };
    response = await fetch(path, { ...options, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let said = null;
  try { said = (await response.json()).error; } catch { /* not from this server */ }
  throw new Error(sentence(said?.message ?? `the server answered ${response.status}`));
}

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.?!]$/.test(whole) ? whole : `${whole}.`;
}

/** Yield the events of a streamed answer. Throws an Error for one that says what failed. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the text did.");
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Error(sentence(event.error.message));
      yield event;
    }
  }
}

// ---- tokens ------------------------------------------------------------------------------------------------------

const encoder = new TextEncoder();

function bytesOf(name) {
  if (!name.startsWith("bytes:")) return [...encoder.encode(name)];
  return [...name.matchAll(/\\x([0-9a-f]{2})/g)].map((found) => parseInt(found[1], 16));
}

/** Return the tokens of a completion's logprobs as {bytes, logprob, top: [[name, logprob]]}. */
export function completionTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((name, index) => ({
    bytes: bytesOf(name),
    logprob: logprobs.token_logprobs[index],
    top: Object.entries(logprobs.top_logprobs[index] ?? {}),
  }));
}

/** Return the tokens of a chat completion's logprobs, in the same form. */
export function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map((token) => ({
    bytes: token.bytes,
    logprob: token.logprob,
    top: token.top_logprobs.map((other) => [other.token, other.logprob]),
  }));
}

/** Shows tokens in an element as they come. Tokens that are parts of one character share a place. */
export class TokenView {
  constructor(element) {
    this.element = element;
    this.tokens = [];
    this.pending = null; // tokens whose last character is not complete
  }

  add(tokens) {
    for (const token of tokens) {
      this.tokens.push(token);
      const parts = [...(this.pending ?? []), token];
      const bytes = new Uint8Array(parts.flatMap((part) => part.bytes));
      let text = null;
      try { text = new TextDecoder("utf-8", { fatal: true }).decode(bytes); } catch { /* not yet, or never */ }
      this.pending = text === null && parts.length < 4 ? parts : null;
      if (this.pending === null) this.show(parts, text ?? new TextDecoder().decode(bytes));
    }
  }

  end() {
    if (this.pending === null) return;
    const bytes = new Uint8Array(this.pending.flatMap((part) => part.bytes));
    this.show(this.pending, new TextDecoder().decode(bytes));
    this.pending = null;
  }

  show(parts, text) {
    const place = document.createElement("span");
    const scored = parts.filter((part) => part.logprob !== null);
    place.className = /^<\|.*\|>$/.test(text) ? "token special" : "token";
    if (text.includes("\n")) place.classList.add("newline"); // else there is nothing to point at
    place.textContent = text;
    place.tabIndex = this.element.querySelector(".token") ? -1 : 0;
    if (scored.length) {
      const logprob = scored.reduce((sum, part) => sum + part.logprob, 0);
      place.style.setProperty("--surprise", Math.min(1, -logprob / MOST_SURPRISING).toFixed(3));
    }
    place.says = { text, parts };
    this.element.append(place);
  }
}

/** Return a row with a name, a bar and a number. */
export function bar(name, share, value, chosen = false) {
  const row = document.createElement("div");
  row.className = chosen ? "bar chosen" : "bar";
  const code = document.createElement("code");
  code.textContent = name;
  const line = document.createElement("span");
  line.className = "line";
  const fill = document.createElement("span");
  fill.style.setProperty("--share", Math.max(0, Math.min(1, share)));
  line.append(fill);
  const number = document.createElement("span");
  number.className = "value";
  number.textContent = value;
  row.append(code, line, number);
  return row;
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;

/** Fill the tip with what the model thought in the place of a token. */
export function fillTip(tip, { text, parts }) {
  tip.replaceChildren();
  for (const part of parts) {
    const name = new TextDecoder().decode(new Uint8Array(part.bytes));
    const line = document.createElement("p");
    if (part.logprob === null) {
      line.textContent = `${JSON.stringify(text)} comes first: the model has no opinion of it.`;
      tip.append(line);
      continue;
    }
    line.textContent = `probability ${percent(Math.exp(part.logprob))}, loss ${(-part.logprob).toFixed(3)}`;
    tip.append(line);
    const rows = part.top.some(([other]) => other === name) ? part.top : [...part.top, [name, part.logprob]];
    for (const [other, logprob] of rows) {
      const share = Math.exp(logprob);
      tip.append(bar(JSON.stringify(other), share, percent(share), other === name));
    }
  }
}
