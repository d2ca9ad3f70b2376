// Adapters: versions, names, canaries, and what changes them.

import { json, request } from "./api.js";
import { button, confirmed, field, guarded, h, moment, number, replace, seconds, table } from "./dom.js";
import { watch } from "./live.js";

const EXPORTS = { peft: "PEFT (adapter)", merged: "Merged model", gguf: "GGUF (merged)", "gguf-lora": "GGUF (adapter)" };

export function adaptersView(app) {
  let chosen = null;
  let stop = null;
  let shown = "";
  const trouble = h("p", { class: "error", role: "alert" });
  const rows = h("tbody");
  const detail = h("div", { class: "panel", hidden: true });
  const report = h("div", { role: "status" });
  const refresh = button("Refresh", () => load());
  const empty = h(
    "div",
    { class: "panel empty", hidden: true },
    h("p", {}, "There are no adapters yet."),
    h("p", { class: "quiet" }, "An adapter is what training makes of the model: small files with versions, a name for requests, and a way back."),
    h("p", {}, h("a", { class: "button primary", href: "#train" }, "Train one")),
  );
  const listed = h(
    "div",
    { class: "panel scroll", hidden: true, tabindex: 0, role: "region", "aria-labelledby": "adapters-title" },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, ["Name", "Current version", "Aliases", "Canary", "State"].map((text) => h("th", { scope: "col" }, text)))),
      rows,
    ),
  );
  const element = h(
    "section",
    { "aria-labelledby": "adapters-title" },
    h("div", { class: "row" }, h("h2", { id: "adapters-title", class: "grow" }, "Adapters"), refresh),
    trouble,
    empty,
    listed,
    detail,
  );

  let loading = 0;

  const pathOf = (name, rest = "") => `admin/adapters/${encodeURIComponent(name)}${rest}`;

  async function load() {
    loading += 1;
    await guarded(refresh, trouble, async () => {
      const { adapters } = await json("admin/adapters");
      if (chosen && !adapters.some((one) => one.name === chosen)) chosen = null;
      const one = chosen && (await json(pathOf(chosen)));
      const refused = one && (await json("admin/jobs?status=succeeded&limit=100")).data.filter((job) => job.name === chosen && !job.adapter);
      // The list and the forms change together: what is typed after the list has changed stays.
      list(adapters);
      detail.hidden = !one;
      if (one) show(one, refused);
    });
    loading -= 1;
  }

  function list(adapters) {
    empty.hidden = adapters.length > 0;
    listed.hidden = !adapters.length;
    shown = JSON.stringify(adapters);
    replace(rows, adapters.map(row));
  }

  /** Another client, a job or another server has changed something. What is typed here stays. */
  function changed(found) {
    if (!found || loading || JSON.stringify(found.adapters) === shown) return;
    if (detail.contains(document.activeElement) && document.activeElement.matches("input, select")) list(found.adapters);
    else load();
  }

  function row(one) {
    const canary = one.canary ? `${number(100 * one.canary.weight)}% to version ${one.canary.version}` : "";
    return h(
      "tr",
      { "aria-selected": String(one.name === chosen) },
      h("th", { scope: "row" }, button(one.name, () => choose(one.name), { class: "link" })),
      h("td", {}, one.current),
      h("td", { class: "wrap" }, one.aliases.join(", ")),
      h("td", {}, canary),
      h("td", {}, h("span", { class: `chip ${one.served ? "good" : ""}` }, one.served ? "served" : "unloaded")),
    );
  }

  function choose(name) {
    chosen = name;
    return load();
  }

  /** Do something to an adapter, and show what became of it. */
  const change = (source, path, options = { method: "POST" }) =>
    guarded(source, trouble, async () => {
      await request(path, options);
    }).then(() => trouble.textContent || load());

  function show(one, refused) {
    const act = (text, work, props) => {
      const made = button(text, () => work(made), props);
      return made;
    };
    const alias = h("input", { autocomplete: "off", spellcheck: "false" });
    const others = one.versions.filter((each) => !each.current);
    const version = h("select", {}, others.map((each) => h("option", { value: each.number }, each.number)));
    const share = h("input", { type: "number", min: 0, max: 100, step: 1, value: one.canary ? 100 * one.canary.weight : 10 });
    if (one.canary) version.value = one.canary.version;
    const canary = h(
      "div",
      { class: "row end" },
      field("Version", version),
      field("Share in %", share),
      act("Set", (source) => change(source, pathOf(one.name, "/canary"), { json: { version: Number(version.value), weight: Number(share.value) / 100 } })),
    );
    const format = h("select", {}, Object.entries(EXPORTS).map(([value, text]) => h("option", { value }, text)));
    const remove = async (source) => {
      if (await confirmed(`Delete ${one.name}?`, "All its versions are deleted from the disk.")) {
        await change(source, pathOf(one.name, "?drain=1"), { method: "DELETE" });
      }
    };
    report.replaceChildren();
    replace(
      detail,
      h("h3", {}, one.name),
      h(
        "div",
        { class: "row" },
        button("Chat", () => app.chatWith(one.name), { class: "primary" }),
        act("Roll back", (source) => change(source, pathOf(one.name, "/rollback")), { disabled: one.versions.length < 2 }),
        one.served
          ? act("Unload", (source) => change(source, pathOf(one.name, "/unload")))
          : act("Load", (source) => change(source, pathOf(one.name, "/load"))),
        act("Delete", remove, { class: "danger" }),
      ),
      h("h3", {}, "Versions"),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Versions" }, versions(one, act)),
      report,
      refused.length > 0 &&
        h(
          "p",
          {},
          "Trained and not published: ",
          refused.map((job) => [button(job.id, () => gate(job.id), { class: "link code", "aria-label": `Gate of the job ${job.id}` }), " "]).flat(),
        ),
      h("h3", {}, "Aliases"),
      h(
        "div",
        { class: "row" },
        one.aliases.map((name) =>
          h("span", { class: "chip" }, name, " ", act("×", (source) => change(source, pathOf(one.name, `/alias/${encodeURIComponent(name)}`), { method: "DELETE" }), { class: "link", "aria-label": `Delete the alias ${name}` })),
        ),
      ),
      h(
        "div",
        { class: "row end" },
        field("New alias", alias),
        act("Add", (source) => change(source, pathOf(one.name, "/alias"), { json: { alias: alias.value.trim() } })),
      ),
      h("h3", {}, "Canary"),
      h("p", { class: "quiet small-text" }, "A share of the requests to the name goes to another version; 0 ends it."),
      others.length ? canary : h("p", { class: "quiet small-text" }, "It has one version only."),
      h("h3", {}, "Export"),
      h("div", { class: "row end" }, field("Format", format), act("Download", (source) => download(source, one.name, format.value))),
    );
  }

  function versions(one, act) {
    const headings = ["Version", "Made", "Rank", "From", "Measured", "Traffic", "State", ""];
    return h(
      "table",
      {},
      h("thead", {}, h("tr", {}, headings.map((text) => h("th", { scope: "col" }, text || h("span", { class: "unseen" }, "Actions"))))),
      h(
        "tbody",
        {},
        [...one.versions].reverse().map((each) => {
          const measured = Object.entries(each.metrics).filter(([name, value]) => typeof value === "number" && name !== "step");
          return h(
            "tr",
            {},
            h("th", { scope: "row" }, each.id),
            h("td", {}, moment(each.created)),
            h("td", {}, each.rank),
            h("td", { class: "wrap" }, origin(each)),
            h("td", { class: "wrap" }, measured.map(([name, value]) => `${name} ${number(value)}`).join(", ")),
            h("td", { class: "wrap" }, traffic(each.traffic)),
            h(
              "td",
              { class: "chips" },
              each.current && h("span", { class: "chip good" }, "current"),
              each.loaded && h("span", { class: "chip" }, "in memory"),
              !each.fits && h("span", { class: "chip bad" }, "other base model"),
            ),
            h(
              "td",
              {},
              h(
                "div",
                { class: "row close" },
                button("Chat", () => app.chatWith(each.id), { class: "small", "aria-label": `Chat with ${each.id}` }),
                each.job && button("Gate", () => gate(each.job), { class: "small", "aria-label": `Gate of ${each.id}` }),
                !each.current && act("Promote", (source) => change(source, pathOf(one.name, "/promote"), { json: { version: each.number } }), { class: "small", "aria-label": `Promote ${each.id}` }),
                !each.current && act("Delete", (source) => change(source, pathOf(one.name, `/versions/${each.number}?drain=1`), { method: "DELETE" }), { class: "small danger", "aria-label": `Delete ${each.id}` }),
              ),
            ),
          );
        }),
      ),
    );
  }

  /** What the recipe's condition was decided by. */
  async function gate(id) {
    await guarded(null, trouble, async () => {
      const { gate: found } = await json(`admin/jobs/${id}`);
      if (!found) {
        replace(report, h("p", { class: "quiet" }, `The job ${id} has no report of its gate.`));
        return;
      }
      const names = [...new Set(Object.keys(found.metrics).map((name) => /^(?:base|eval|train)_(.+)$/.exec(name)?.[1]).filter(Boolean))];
      replace(
        report,
        h("h3", {}, `Gate of ${id}`),
        h("p", {}, h("span", { class: `chip ${found.met ? "good" : "bad"}` }, found.met ? "met" : "not met"), " ", h("code", {}, found.condition)),
        h("p", { class: "quiet small-text" }, found.reason),
        names.length > 0 &&
          table(
            "Metrics of the gate",
            ["Metric", "Before training", "Held-out rows", "Training rows"],
            names.map((name) => [name, ...["base", "eval", "train"].map((scope) => number(found.metrics[`${scope}_${name}`]))]),
          ),
      );
    });
  }

  /** Where a version came from: its job, and what its files are. */
  function origin(version) {
    const digest = h("span", { class: "code", title: `SHA-256 ${version.sha256}` }, version.sha256.slice(0, 12));
    if (!version.job) return h("span", {}, "upload, ", digest);
    return h("span", {}, button(version.job, () => app.showJob(version.job), { class: "link code cut" }), `step ${version.step}, `, digest);
  }

  function traffic(found) {
    if (!found) return h("span", { class: "quiet" }, "not in memory");
    if (!found.requests) return "no requests";
    const first = found.first_token_p50 === null ? "" : `; first token ${seconds(found.first_token_p50)}, 95% within ${seconds(found.first_token_p95)}`;
    return `${number(found.requests)} ${found.requests === 1 ? "request" : "requests"}, ${number(found.generated_tokens)} tokens${first}`;
  }

  async function download(source, name, format) {
    await guarded(source, trouble, async () => {
      const response = await request(pathOf(name, `/export?format=${format}`));
      const named = /filename="?([^";]+)/.exec(response.headers.get("content-disposition") ?? "");
      const url = URL.createObjectURL(await response.blob());
      h("a", { href: url, download: named?.[1] ?? `${name}-${format}` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    });
  }

  function entered() {
    stop?.();
    load();
    stop = watch({ status: ({ adapters }) => changed(adapters), adapters: changed });
  }

  return { element, entered, left: () => stop?.() };
}
