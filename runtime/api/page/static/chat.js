// Chats with one or two models on the same prompt.

import { events, json, models, request } from "./api.js";
import { announce, button, copied, field, h, number, replace, seconds } from "./dom.js";
import { feedbackRow } from "./feedback.js";
import { formatted } from "./markdown.js";
import { asCurl, asPython } from "./snippets.js";

const TOP_LOGPROBS = 5;
const TO_TRY = ["Why is the sky blue?", "Write a short poem about a newt.", "Give me three names for a cat."];
const SCHEMA_HINT = '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}';
const TOOL_CHOICES = { auto: "When the model wants", required: "Always", none: "Never" };
const TOOLS_HINT = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]';

export function chatView() {
  const names = h("datalist", { id: "models" });
  const cards = new Map();
  const columns = [];
  let base = "";
  let running = null;

  const system = h("textarea", { rows: 2, placeholder: "None" });
  const parameters = {
    temperature: h("input", { type: "number", min: 0, max: 2, step: 0.1, placeholder: "model's" }),
    top_p: h("input", { type: "number", min: 0, max: 1, step: 0.05, placeholder: "model's" }),
    top_k: h("input", { type: "number", min: 0, step: 1, placeholder: "model's" }),
    max_tokens: h("input", { type: "number", min: 1, step: 1, value: "256" }),
    seed: h("input", { type: "number", step: 1, placeholder: "random" }),
  };
  const labels = { temperature: "Temperature", top_p: "Top p", top_k: "Top k", max_tokens: "Most tokens", seed: "Seed" };
  const stops = h("input", { placeholder: "None" });
  const probabilities = h("input", { type: "checkbox" });
  const prompt = h("textarea", { rows: 3, placeholder: "Ask something. Enter sends, Shift+Enter makes a new line." });
  const sendButton = button("Send", () => (running ? running.abort() : submit()), { class: "primary" });
  const again = button("Regenerate", () => regenerate(), { disabled: true });
  const clear = button("New chat", () => reset());
  const curl = button("Copy as curl", () => copy(curl, asCurl));
  const python = button("Copy as Python", () => copy(python, asPython));
  const schema = h("textarea", { rows: 4, class: "code", spellcheck: "false", placeholder: SCHEMA_HINT });
  const toolChoice = h("select", {}, Object.entries(TOOL_CHOICES).map(([value, text]) => h("option", { value }, text)));
  const tools = h("textarea", { rows: 4, class: "code", spellcheck: "false", placeholder: TOOLS_HINT });
  const second = h("input", { type: "checkbox", onchange: () => setColumns(second.checked ? 2 : 1) });
  const trouble = h("p", { class: "error", role: "alert" });
  const area = h("div", { class: "columns" });

  const element = h(
    "section",
    { class: "chat", "aria-labelledby": "chat-title" },
    h("h2", { id: "chat-title", class: "unseen" }, "Chat"),
    names,
    area,
    h(
      "form",
      { class: "panel composer", onsubmit: (event) => event.preventDefault() },
      field("Message", prompt),
      h(
        "div",
        { class: "row" },
        sendButton,
        again,
        clear,
        curl,
        python,
        h("label", { class: "inline" }, second, "Compare two models"),
      ),
      trouble,
      h(
        "details",
        {},
        h("summary", {}, "System prompt and parameters"),
        field("System prompt", system),
        h(
          "div",
          { class: "fields" },
          Object.entries(parameters).map(([name, input]) => field(labels[name], input)),
          field("Stop at", stops),
        ),
        h("label", { class: "inline" }, probabilities, "Show the probability of each token"),
        h("div", { class: "columns" }, field("JSON schema of the answer", schema, { class: "column" }), field("Tools, as a JSON list", tools, { class: "column" })),
        h("div", { class: "fields" }, field("Call tools", toolChoice, { class: "narrow" })),
      ),
    ),
  );

  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running) submit();
    }
  });

  function makeColumn(number) {
    const model = h("input", { list: "models", autocomplete: "off", spellcheck: "false", placeholder: base });
    const hint = h("div", { class: "hint empty" });
    model.addEventListener("input", showHints);
    const transcript = h("div", { class: "transcript", role: "log", tabindex: 0, "aria-label": `Conversation ${number}` });
    const box = h(
      "div",
      { class: "panel column" },
      field(number === 1 ? "Model" : "Second model", model),
      transcript,
      hint,
    );
    return { model, transcript, hint, element: box, messages: [] };
  }

  function setColumns(count) {
    while (columns.length < count) {
      const column = makeColumn(columns.length + 1);
      if (columns.length) {
        column.messages = columns[0].messages.filter((message) => message.role === "user").map((message) => ({ ...message }));
        column.messages.forEach((message) => column.transcript.append(bubble(message)));
      }
      columns.push(column);
    }
    columns.length = count;
    showHints();
    replace(area, columns.map((column) => column.element));
  }

  /** What an empty chat says: prompts to try, for the base model. */
  function showHints() {
    for (const { model, hint } of columns) {
      const name = model.value.trim();
      if (name && name !== base) {
        replace(hint, h("p", {}, `Ask ${name} something like the rows that it was trained on.`));
        continue;
      }
      const ask = (text) => button(text, () => ((prompt.value = text), running || submit()));
      replace(hint, h("p", {}, base ? `Ask ${base} something, or try:` : "Ask something."), base && h("div", { class: "row" }, TO_TRY.map(ask)));
    }
  }

  function bubble(message) {
    const text = h("div", { class: "text" }, message.content);
    const box = h("div", { class: `message ${message.role}` }, text);
    if (message.role === "user") {
      box.append(h("footer", {}, button("Edit", () => edit(message.number), { class: "link" })));
    }
    return box;
  }

  /** Take a message back into the composer, and what came after it away. */
  function edit(number) {
    if (running) return;
    for (const column of columns) {
      const at = column.messages.findIndex((message) => message.number === number);
      if (at < 0) continue;
      prompt.value = column.messages[at].content;
      column.messages.length = at;
      while (column.transcript.children.length > at) column.transcript.lastChild.remove();
    }
    again.disabled = true;
    prompt.focus();
  }

  function reset() {
    running?.abort();
    for (const column of columns) {
      column.messages = [];
      column.transcript.replaceChildren();
    }
    again.disabled = true;
    prompt.focus();
  }

  let count = 0;
  async function submit() {
    const content = prompt.value;
    if (!content.trim()) return;
    prompt.value = "";
    count += 1;
    for (const column of columns) {
      const message = { role: "user", content, number: count };
      column.messages.push(message);
      column.transcript.append(bubble(message));
    }
    await answer();
  }

  async function regenerate() {
    for (const column of columns) {
      if (column.messages.at(-1)?.role === "assistant") {
        column.messages.pop();
        column.transcript.lastChild.remove();
      }
    }
    await answer();
  }

  async function answer(asked = columns) {
    running = new AbortController();
    sendButton.textContent = "Stop";
    again.disabled = true;
    trouble.textContent = "";
    await Promise.all(asked.map((column) => stream(column, running.signal)));
    running = null;
    sendButton.textContent = "Send";
    again.disabled = false;
    announce("The answer is complete.");
  }

  function given() {
    const found = {};
    for (const [name, input] of Object.entries(parameters)) if (input.value !== "") found[name] = Number(input.value);
    if (stops.value) found.stop = [stops.value];
    return found;
  }

  /** What a text area holds as JSON; undefined where it is empty. */
  function parsed(area, what) {
    if (!area.value.trim()) return undefined;
    try {
      return JSON.parse(area.value);
    } catch (error) {
      throw new Error(`${what}: ${error.message}`, { cause: error });
    }
  }

  /** Fields of a chat for the answer's schema and the tools. */
  function forms() {
    const [shape, functions] = [parsed(schema, "JSON schema"), parsed(tools, "Tools")];
    const found = {};
    if (shape !== undefined) found.response_format = { type: "json_schema", json_schema: { name: "answer", schema: shape } };
    if (functions !== undefined) Object.assign(found, { tools: functions, tool_choice: toolChoice.value });
    return found;
  }

  /** Messages as the API takes them. */
  const plain = (messages) =>
    messages.filter((message) => !message.failed).map(({ role, content, tool_calls, tool_call_id }) => ({ role, content, tool_calls, tool_call_id }));

  /** The path and the body of a column's request. Adapters trained on texts are asked as texts, in their format. */
  async function requestOf(column) {
    const model = column.model.value.trim() || base || undefined; // without one, the server takes its base model
    const body = { model, stream: true, stream_options: { include_usage: true }, ...given() };
    const format = (cards.get(model) ?? cards.get(model?.split("@")[0]))?.prompt_format;
    if (format && format !== "chat") {
      const last = column.messages.findLast((message) => message.role === "user")?.content ?? "";
      if (probabilities.checked) body.logprobs = TOP_LOGPROBS;
      return ["v1/completions", { ...body, prompt: await asText(model, last) }];
    }
    if (probabilities.checked) Object.assign(body, { logprobs: true, top_logprobs: TOP_LOGPROBS });
    Object.assign(body, forms());
    const messages = plain(column.messages);
    if (system.value.trim()) messages.unshift({ role: "system", content: system.value });
    return ["v1/chat/completions", { ...body, messages }];
  }

  /** The text in the adapter's template, where the key may read that; else as it is. */
  async function asText(model, text) {
    try {
      const [name, version] = model.split("@");
      const { versions } = await json(`admin/adapters/${encodeURIComponent(name)}`);
      const found = versions.find((one) => (version ? String(one.number) === version : one.current));
      return (found.prompt.template ?? "{prompt}").replace(/\{(instruction|prompt)\}/, () => text);
    } catch {
      return text;
    }
  }

  async function stream(column, signal) {
    const text = h("div", { class: "text" });
    const footer = h("footer", {}, "…");
    const box = h("div", { class: "message assistant" }, text, footer);
    column.transcript.append(box);
    const began = performance.now();
    const message = { role: "assistant", content: "", failed: false };
    let [first, usage, reason, thoughts, id, version, sent] = [null, null, null, null, null, null, []];
    const calls = [];
    let frame = 0;
    /** Show the answer so far: once a frame, since all of it is made anew. */
    const show = () => {
      cancelAnimationFrame(frame);
      frame = 0;
      text.replaceChildren(...formatted(message.content));
      column.transcript.scrollTop = column.transcript.scrollHeight;
    };
    try {
      const [path, body] = await requestOf(column);
      sent = body.messages ?? [{ role: "user", content: body.prompt }];
      const response = await request(path, { json: body, signal });
      version = response.headers.get("x-eft-adapter-version");
      for await (const { data } of events(response)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        id ??= chunk.id;
        const choice = chunk.choices[0];
        if (!choice) continue;
        reason = choice.finish_reason ?? reason;
        const piece = choice.delta?.content ?? choice.text ?? "";
        const thought = choice.delta?.reasoning_content ?? "";
        if (thought) {
          thoughts ??= box.insertBefore(h("div", { class: "thoughts" }), text);
          thoughts.append(thought);
        }
        for (const part of choice.delta?.tool_calls ?? []) takeCall(calls, part);
        if (calls.length) showCalls(box, calls);
        if (piece || thought || calls.length) first ??= performance.now() - began;
        message.content += piece;
        if (choice.logprobs && probabilities.checked) text.append(...tokens(choice.logprobs));
        else if (piece) frame ||= requestAnimationFrame(show);
        column.transcript.scrollTop = column.transcript.scrollHeight;
      }
      footer.textContent = summary(usage, first, performance.now() - began, reason, version);
    } catch (error) {
      message.failed = message.content === "";
      footer.textContent = error.name === "AbortError" ? "stopped" : "";
      if (error.name !== "AbortError") box.append(h("p", { class: "error", role: "alert" }, error.message));
    }
    if (frame) show();
    if (calls.length) message.tool_calls = calls;
    column.messages.push(message);
    if (calls.length) answerCalls(column, box, calls);
    if (id !== null && message.content) {
      box.append(
        feedbackRow({ id, model: version, text: message.content, messages: sent }, (correction) => {
          message.content = correction;
          text.replaceChildren(...formatted(correction));
        }),
      );
    }
    column.transcript.scrollTop = column.transcript.scrollHeight;
  }

  /** Add a piece of a tool call to the calls so far. */
  function takeCall(calls, { index, id, function: piece }) {
    calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
    calls[index].function.name += piece?.name ?? "";
    calls[index].function.arguments += piece?.arguments ?? "";
  }

  function showCalls(box, calls) {
    const shown = calls.map((call) => h("div", { class: "code" }, `${call.function.name}(${call.function.arguments})`));
    const old = box.querySelector(".calls");
    const place = h("div", { class: "calls" }, shown);
    if (old) old.replaceWith(place);
    else box.insertBefore(place, box.querySelector("footer"));
  }

  /** A form for what the tools gave; sending it continues the chat. */
  function answerCalls(column, box, calls) {
    const results = calls.map((call) => h("input", { autocomplete: "off" }));
    const send = button("Send results", async () => {
      if (running) return;
      send.disabled = true;
      calls.forEach((call, index) => {
        const message = { role: "tool", tool_call_id: call.id, content: results[index].value };
        column.messages.push(message);
        column.transcript.append(bubble(message));
      });
      await answer([column]);
    });
    box.append(h("div", { class: "row end" }, calls.map((call, index) => field(`Result of ${call.function.name}`, results[index], { class: "grow" })), send));
  }

  function summary(usage, first, all, reason, version) {
    const parts = [];
    if (version) parts.push(version);
    if (usage) {
      parts.push(`${usage.completion_tokens} tokens`);
      const decode = (all - first) / 1000;
      if (usage.completion_tokens > 1 && decode > 0) parts.push(`${number((usage.completion_tokens - 1) / decode)} a second`);
    }
    if (first !== null) parts.push(`first after ${seconds(first / 1000)}`);
    if (reason && reason !== "stop") parts.push(`ended by ${reason}`);
    return parts.join(" · ");
  }

  /** Tokens with their probability: in the underline, and in words on hover. */
  function tokens(logprobs) {
    const list = logprobs.content ?? logprobs.tokens.map((token, index) => ({
      token,
      logprob: logprobs.token_logprobs[index],
      top_logprobs: Object.entries(logprobs.top_logprobs?.[index] ?? {}).map(([other, logprob]) => ({ token: other, logprob })),
    }));
    return list.map(({ token, logprob, top_logprobs: top }) => {
      const percent = (value) => `${number(100 * Math.exp(value))}%`;
      const title = [percent(logprob), ...top.map((one) => `${JSON.stringify(one.token)} ${percent(one.logprob)}`)].join("\n");
      const span = h("span", { class: "token", title }, token);
      span.style.setProperty("--doubt", `${Math.round(100 * (1 - Math.exp(logprob)))}%`);
      return span;
    });
  }

  async function copy(source, write) {
    trouble.textContent = "";
    let text;
    try {
      const [path, body] = await requestOf(columns[0]);
      if (body.messages && !body.messages.some((message) => message.role === "user")) {
        body.messages.push({ role: "user", content: prompt.value || "Hello" });
      }
      text = write(path, body);
      await copied(source, text);
    } catch (error) {
      trouble.textContent = text ?? error.message;
    }
  }

  async function entered() {
    try {
      const found = await models();
      base = found[0].id;
      cards.clear();
      found.forEach((card) => cards.set(card.id, card));
      replace(names, found.map((card) => h("option", { value: card.id })));
      columns.forEach((column) => (column.model.placeholder = base));
      showHints();
      trouble.textContent = "";
    } catch (error) {
      trouble.textContent = error.message;
    }
  }

  setColumns(1);
  return {
    element,
    entered,
    use(model) {
      columns[0].model.value = model;
      showHints();
      reset();
    },
  };
}
