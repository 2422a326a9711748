// The server's addresses: plain calls, streams of events, and one form for answers of either kind.

import { asked as keyed, held, known } from "./key.js";

export class Refused extends Error {
  constructor(status, body) {
    super(body?.error?.message ? body.error.message : `the server answered ${status}`);
    this.status = status;
    this.param = body?.error?.param ?? null;
  }
}

async function send(path, body, signal, key = known()) {
  const headers = { ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const options = body === undefined ? { headers, signal } : { method: "POST", headers, body: JSON.stringify(body), signal };
  const reply = await fetch(path, options).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached; is it still running?");
  });
  if (reply.status === 401) {
    const other = await keyed(key);
    if (other) return send(path, body, signal, other);
  }
  if (reply.ok && key) held(key);
  if (!reply.ok) throw new Refused(reply.status, await reply.json().catch(() => null));
  return reply;
}

export const call = async (path, body, signal) => (await send(path, body, signal)).json();

/** The events of a stream, as objects. Throws Refused for an error that comes inside it. */
export async function* stream(path, body, signal) {
  const reply = await send(path, body, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const lines = held.split("\n\n");
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Refused(500, event);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The request for an answer: `prefix` is what the answer already begins with. */
export function asked({ model, plain, messages, prefix, options }) {
  const { top, ...rest } = options;
  const body = { model, stream: true, stream_options: { include_usage: true }, ...rest };
  if (plain) {
    const prompt = messages.map((message) => message.content).join("\n") + (prefix || "");
    return ["/v1/completions", { ...body, prompt, ...(top === null ? {} : { logprobs: top }) }];
  }
  const turns = prefix ? [...messages, { role: "assistant", content: prefix }] : messages;
  const more = { ...(prefix ? { continue_final_message: true } : {}), ...(top === null ? {} : { logprobs: true, top_logprobs: top }) };
  return ["/v1/chat/completions", { ...body, messages: turns, ...more }];
}

/** The pieces of an answer as they come: {text, tokens: [{token, p, top: [{token, p}]}], finish, usage}. */
export async function* answer(request, signal) {
  const [path, body] = asked(request);
  for await (const event of stream(path, body, signal)) {
    const choice = event.choices[0];
    yield {
      text: (choice?.delta ? choice.delta.content : choice?.text) ?? "",
      tokens: choice?.logprobs ? (choice.delta ? chatTokens(choice.logprobs) : plainTokens(choice.logprobs)) : [],
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    };
  }
}

const chatTokens = (told) => told.content.map((one) => ({
  token: one.token, bytes: one.bytes, p: Math.exp(one.logprob),
  top: one.top_logprobs.map((other) => ({ token: other.token, bytes: other.bytes, p: Math.exp(other.logprob) })),
}));

const plainTokens = (told) => told.tokens.map((token, i) => ({
  token, bytes: null, p: Math.exp(told.token_logprobs[i]),
  top: Object.entries(told.top_logprobs?.[i] ?? {}).map(([other, logprob]) => ({ token: other, bytes: null, p: Math.exp(logprob) })).sort((a, b) => b.p - a.p),
}));

/** The text of the first tokens and one more; null where it would end inside a character. */
export function joined(tokens, last) {
  const all = [...tokens, last];
  if (all.some((one) => one.bytes === null)) return all.some((one) => one.token.includes("\ufffd")) ? null : all.map((one) => one.token).join("");
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(all.flatMap((one) => one.bytes)));
  } catch {
    return null;
  }
}
