// The last requests: names, numbers and times.

import { json } from "./api.js";
import { button, clock, guarded, h, replace, seconds } from "./dom.js";

export function requestsView() {
  const trouble = h("p", { class: "error", role: "alert" });
  const rows = h("tbody");
  const refresh = button("Refresh", load);
  const headings = ["Time", "Request", "Status", "Duration", "Tokens", "Key", "Id"];
  const element = h(
    "section",
    { "aria-labelledby": "requests-title" },
    h("div", { class: "row" }, h("h2", { id: "requests-title", class: "grow" }, "Requests"), refresh),
    h("p", { class: "quiet" }, "The last 300 that have ended, without their texts."),
    trouble,
    h(
      "div",
      { class: "panel scroll", tabindex: 0, role: "region", "aria-labelledby": "requests-title" },
      h("table", {}, h("thead", {}, h("tr", {}, headings.map((text) => h("th", { scope: "col" }, text)))), rows),
    ),
  );

  async function load() {
    await guarded(refresh, trouble, async () => {
      const { data } = await json("admin/requests");
      replace(rows, data.map(row));
    });
  }

  function row(one) {
    const { prompt_tokens: prompt, completion_tokens: completion, error_code: code } = one.details;
    const status = h("span", { class: `chip ${one.status < 400 ? "good" : "bad"}` }, code ? `${one.status} ${code}` : one.status);
    return h(
      "tr",
      {},
      h("td", {}, clock(one.time)),
      h("td", { class: "wrap code" }, `${one.method} ${one.handler}`),
      h("td", {}, status),
      h("td", {}, seconds(one.milliseconds / 1000)),
      h("td", {}, prompt === undefined ? "" : `${prompt} → ${completion ?? 0}`),
      h("td", {}, one.key),
      h("td", { class: "wrap code" }, one.id),
    );
  }

  return { element, entered: load };
}
