// The last requests: names, numbers, and where their time went.

import { json } from "./api.js";
import { button, clock, field, guarded, h, replace, seconds } from "./dom.js";

const PHASES = { prepare_ms: "read", queue_ms: "wait", prefill_ms: "prompt", decode_ms: "answer" };
const OTHER = "rest";

export function requestsView() {
  let entries = [];
  const trouble = h("p", { class: "error", role: "alert" });
  const rows = h("tbody");
  const empty = h("p", { class: "quiet", hidden: true }, "No request was found. ", h("a", { href: "#chat" }, "Ask something"), ", or show all requests.");
  const refresh = button("Refresh", load);
  const wanted = h("input", { type: "search", placeholder: "model, route, key, id, status" });
  const models = h("input", { type: "checkbox", checked: true, onchange: list });
  const headings = ["Time", "Request", "Status", "Duration", "Phases", "Tokens", "Model", "Key", "Id"];
  const legend = [...Object.values(PHASES), OTHER].map((name, index) => h("span", { class: `key s${index + 1}` }, h("span", {}, name)));
  const element = h(
    "section",
    { "aria-labelledby": "requests-title" },
    h("div", { class: "row end" }, h("h2", { id: "requests-title", class: "grow" }, "Requests"), field("Find", wanted, { class: "find" }), refresh),
    h(
      "div",
      { class: "row quiet" },
      h("p", { class: "grow" }, "The last 300 that have ended, without their texts."),
      h("label", { class: "inline" }, models, "Only those to models"),
    ),
    trouble,
    empty,
    h("div", { class: "row legend small-text" }, h("span", { class: "quiet" }, "Phases"), legend),
    h(
      "div",
      { class: "panel scroll", tabindex: 0, role: "region", "aria-labelledby": "requests-title" },
      h("table", {}, h("thead", {}, h("tr", {}, headings.map((text) => h("th", { scope: "col" }, text)))), rows),
    ),
  );
  wanted.addEventListener("input", list);

  async function load() {
    await guarded(refresh, trouble, async () => {
      entries = (await json("admin/requests")).data;
      list();
    });
  }

  function list() {
    const words = wanted.value.trim().toLowerCase().split(/\s+/);
    const text = (one) => [one.handler, one.method, one.status, one.key, one.id, one.details.model, one.details.error_code].join(" ").toLowerCase();
    const shown = entries.filter((one) => (!models.checked || (one.method === "POST" && one.handler.startsWith("/v1/"))) && words.every((word) => text(one).includes(word)));
    empty.hidden = shown.length > 0;
    replace(rows, shown.map(row));
  }

  function row(one) {
    const { prompt_tokens: prompt, completion_tokens: completion, error_code: code, model } = one.details;
    const status = h("span", { class: `chip ${one.status < 400 ? "good" : "bad"}` }, code ? `${one.status} ${code}` : one.status);
    return h(
      "tr",
      {},
      h("td", { class: "number" }, clock(one.time)),
      h("td", { class: "number code" }, `${one.method} ${one.handler}`),
      h("td", {}, status),
      h("td", { class: "number" }, seconds(one.milliseconds / 1000)),
      h("td", {}, waterfall(one)),
      h("td", { class: "number" }, prompt === undefined ? "" : `${prompt} → ${completion ?? 0}`),
      h("td", { class: "code" }, model ?? ""),
      h("td", {}, one.key),
      h("td", { class: "code" }, h("span", { class: "cut", title: one.id }, one.id)),
    );
  }

  /** A bar with the phases one after another, and the same in words. */
  function waterfall(one) {
    const known = Object.entries(PHASES).map(([name, label]) => [label, one.details[name] ?? 0]);
    const spent = known.reduce((sum, [, ms]) => sum + ms, 0);
    if (!spent) return "";
    const parts = [...known, [OTHER, Math.max(0, one.milliseconds - spent)]];
    const total = Math.max(spent, one.milliseconds);
    const words = parts.filter(([, ms]) => ms > 0).map(([label, ms]) => `${label} ${seconds(ms / 1000)}`).join(", ");
    const bar = h("div", { class: "waterfall", role: "img", "aria-label": words, title: words });
    parts.forEach(([, ms], index) => {
      const part = h("span", { class: `s${index + 1}` });
      part.style.flexBasis = `${(100 * ms) / total}%`;
      bar.append(part);
    });
    return bar;
  }

  return { element, entered: load };
}
