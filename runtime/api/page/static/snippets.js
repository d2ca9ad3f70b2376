// A request as a command and as a program.

import { baseUrl, hasKey } from "./api.js";

/** A curl command for a POST of `body` to `path`. The key is taken from EFT_API_KEY, never written out. */
export function asCurl(path, body) {
  const quoted = JSON.stringify(body, null, 1).replaceAll("'", String.raw`'\''`);
  const auth = hasKey() ? ` -H "Authorization: Bearer $EFT_API_KEY"` : "";
  return `curl -N '${baseUrl()}/${path}' -H 'Content-Type: application/json'${auth} -d '${quoted}'`;
}

const OPENAI = new Set([
  "model", "messages", "prompt", "stream", "stream_options", "temperature", "top_p", "max_tokens", "seed", "stop", "logprobs", "top_logprobs",
  "response_format", "tools", "tool_choice",
]); // prettier-ignore

/** A Python program with the `openai` client. Fields that it does not know go into `extra_body`. */
export function asPython(path, body) {
  const known = Object.entries(body).filter(([name, value]) => OPENAI.has(name) && value !== undefined);
  const extra = Object.fromEntries(Object.entries(body).filter(([name, value]) => !OPENAI.has(name) && value !== undefined));
  const given = known.map(([name, value]) => `    ${name}=${python(value, 1)},`);
  if (Object.keys(extra).length) given.push(`    extra_body=${python(extra, 1)},`);
  const chat = path.endsWith("chat/completions");
  const key = hasKey() ? 'os.environ["EFT_API_KEY"]' : '"none"';
  return [
    ...(hasKey() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${baseUrl()}/v1", api_key=${key})`,
    `stream = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...given,
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    `        print(${chat ? 'choice.delta.content or ""' : "choice.text"}, end="", flush=True)`,
    "",
  ].join("\n");
}

/** A value of JSON as Python writes it, indented by `depth`. */
function python(value, depth) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const list = Array.isArray(value);
  const parts = list
    ? value.map((one) => python(one, depth + 1))
    : Object.entries(value).filter(([, one]) => one !== undefined).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, depth + 1)}`);
  const [open, close] = list ? ["[", "]"] : ["{", "}"];
  const line = `${open}${parts.join(", ")}${close}`;
  if (line.length < 90 && !line.includes("\n")) return line;
  const indent = "    ".repeat(depth);
  return `${open}\n${parts.map((part) => `${indent}    ${part},\n`).join("")}${indent}${close}`;
}
