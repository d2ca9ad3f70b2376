// The public API: requests with the key, errors as exceptions, server-sent events.

const ROOT = new URL(".", document.baseURI);
const KEPT = "It is kept in the memory of this page only, and gone when the page is closed.";
let key = "";
let asking = null;

export const baseUrl = () => ROOT.href.replace(/\/$/, "");
export const hasKey = () => key !== "";

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.param = error.param;
  }
}

/** Ask for the key, once at a time. True when one was given. It is kept in this variable only. */
export function askForKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key-input");
    document.getElementById("key-reason").textContent = `${reason ?? ""} ${KEPT}`;
    input.value = "";
    dialog.returnValue = "cancel";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "ok" && input.value.trim() !== "";
      if (given) key = input.value.trim();
      input.value = "";
      asking = null;
      resolve(given);
    }, { once: true });
  });
  return asking;
}

async function send(path, options) {
  const headers = new Headers(options.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let body = options.body;
  if (options.json !== undefined) {
    body = JSON.stringify(options.json);
    headers.set("Content-Type", "application/json");
  }
  const { method = body === undefined ? "GET" : "POST", signal } = options;
  return fetch(new URL(path, ROOT), { method, headers, body, signal, cache: "no-store" });
}

/** The response to a request; an `ApiError` for a status of 400 or above. A 401 asks for the key, and tries again. */
export async function request(path, options = {}) {
  const sent = key;
  let response = await send(path, options);
  if (response.status === 401 && (key !== sent || (await askForKey((await errorOf(response.clone())).message)))) {
    response = await send(path, options);
  }
  if (!response.ok) throw new ApiError(response.status, await errorOf(response));
  return response;
}

async function errorOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error;
  } catch {
    return { message: `${response.status} ${response.statusText}: ${text.slice(0, 200)}` };
  }
}

export const json = async (path, options) => (await request(path, options)).json();

/** The events of a response, as {event, id, data}: `data` is text. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const found = { event: "message", data: "" };
        for (const line of block.split("\n")) {
          const at = line.indexOf(": ");
          if (at > 0) found[line.slice(0, at)] = line.slice(at + 2);
        }
        if (found.data) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Names of the models that can be requested, with their cards. */
export const models = async () => (await json("v1/models")).data;
