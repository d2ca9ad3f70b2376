// The server itself: machine, model, health, versions, settings and keys.

import { json } from "./api.js";
import { bytes, button, field, guarded, h, moment, number, replace } from "./dom.js";
import { watch } from "./live.js";

const HEALTH = { ready: "good", loading: "busy", draining: "busy", unhealthy: "bad" };

export function systemView() {
  let settings = [];
  let stop = null;
  const trouble = h("p", { class: "error", role: "alert" });
  const refresh = button("Refresh", load);
  const health = h("p", { role: "status" });
  const machine = h("dl");
  const model = h("dl");
  const moved = h("p", { class: "quiet small-text", "aria-live": "polite" });
  const versions = h("dl");
  const keys = h("tbody");
  const open = h("p", { class: "quiet small-text" });
  const settingRows = h("tbody");
  const wanted = h("input", { type: "search", placeholder: "port, kv_cache, …" });
  const changed = h("input", { type: "checkbox" });
  const element = h(
    "section",
    { "aria-labelledby": "system-title" },
    h("div", { class: "row" }, h("h2", { id: "system-title", class: "grow" }, "System"), refresh),
    trouble,
    health,
    h(
      "div",
      { class: "masonry" },
      h("div", { class: "panel" }, h("h3", {}, "Model"), model, moved),
      h("div", { class: "panel" }, h("h3", {}, "Machine"), machine),
      h("div", { class: "panel" }, h("h3", {}, "Versions"), versions),
      h("div", { class: "panel" }, h("h3", {}, "API keys"), open, table("API keys", ["Name", "May", "Limits"], keys)),
    ),
    h(
      "div",
      { class: "panel" },
      h("h3", {}, "Settings"),
      h("div", { class: "row end" }, field("Find a setting", wanted, { class: "grow" }), h("label", { class: "inline" }, changed, "Changed ones only")),
      table("Settings", ["Setting", "Value", "From", "What it does"], settingRows),
    ),
  );
  wanted.addEventListener("input", listSettings);
  changed.addEventListener("change", listSettings);

  function table(label, headings, body) {
    const head = h("thead", {}, h("tr", {}, headings.map((text) => h("th", { scope: "col" }, text))));
    return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, h("table", {}, head, body));
  }

  const list = (facts) =>
    Object.entries(facts).filter(([, text]) => text !== null && text !== "").flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]);

  async function load() {
    await guarded(refresh, trouble, async () => show(await json("admin/system")));
  }

  function show(found) {
    const { state, process } = found;
    replace(health, h("span", { class: `chip ${HEALTH[found.health]}` }, found.health), ` Eft ${found.version}, since ${moment(process.started)}`);
    if (state.problem) health.append(h("span", { class: "error" }, ` ${state.problem}`));
    replace(model, found.model ? list(modelFacts(found.model)) : "The model is loading.");
    replace(machine, list(machineFacts(found)));
    replace(versions, list(found.versions));
    open.textContent = found.asks_for_keys ? "Requests need a key." : "Requests need no key.";
    replace(keys, found.keys.map(keyRow));
    settings = found.settings;
    listSettings();
  }

  /** The last move of the server to another model, or the one under way. */
  function showSwap(swap) {
    const text = swap ? swapText(swap) : "";
    if (moved.textContent === text) return;
    moved.textContent = text;
    moved.classList.toggle("error", swap?.status === "failed");
    if (swap?.finished_at) load();
  }

  function swapText({ model: to, previous: from, mode, status, finished_at: end, error, aborted, unfit_adapters: unfit }) {
    if (status === "failed") return `The move to ${to} failed: ${error.message}`;
    if (status === "loading") return `Moving to ${to}: it is loading${mode === "beside" ? ` while ${from} answers` : ""}.`;
    if (status === "draining") return `Moving to ${to}: requests end on ${from}.`;
    const lost = aborted ? ` ${number(aborted)} sequences were aborted.` : "";
    return `Moved from ${from} to ${to}, ${moment(end)}.${lost}${unfit.length ? ` Not for this model: ${unfit.join(", ")}.` : ""}`;
  }

  const modelFacts = (one) => ({
    Name: one.name,
    Context: `${one.max_model_len.toLocaleString("en")} tokens`,
    Weights: one.quantization === "none" ? "not quantised" : one.quantization,
    Kernels: one.kernels ?? "in the ranks' processes",
    "KV cache": `${one.kv_blocks.toLocaleString("en")} blocks of ${one.kv_block_size} tokens`,
  });

  const machineFacts = ({ machine: one, gpus, process, state }) => ({
    System: one.system,
    Processor: one.processor,
    Cores: one.cores === one.all_cores ? one.cores : `${one.cores} of ${one.all_cores}`,
    "Instruction sets": one.instruction_sets.join(", "),
    Memory: `${bytes(one.memory_available)} free of ${bytes(one.memory_total)}`,
    "Limit of the container": one.memory_limit === null ? null : bytes(one.memory_limit),
    GPUs: gpus.map((gpu) => `${gpu.name}, ${bytes(gpu.memory)}`).join("; ") || "none",
    "This process": `${bytes(process.memory)}, ${process.threads} threads, id ${process.pid}`,
    State: state.free === null ? state.directory : `${state.directory}, ${bytes(state.free)} free`,
  });

  function keyRow(key) {
    const limits = Object.entries(key.limits).map(([name, value]) => `${name.replaceAll("_", " ")} ${number(value)}`);
    return h("tr", {}, h("th", { scope: "row", class: "code" }, key.name), h("td", {}, key.scopes.join(", ")), h("td", {}, limits.join(", ")));
  }

  function listSettings() {
    const words = wanted.value.trim().toLowerCase().split(/\s+/);
    const shown = settings.filter(
      (one) => (!changed.checked || one.origin !== "default") && words.every((word) => `${one.key} ${one.doc}`.toLowerCase().includes(word)),
    );
    replace(
      settingRows,
      shown.map((one) =>
        h(
          "tr",
          {},
          h("th", { scope: "row", class: "code" }, one.key),
          h("td", { class: "wrap code" }, one.value || "–"),
          h("td", { class: "number" }, one.origin === "default" ? h("span", { class: "quiet" }, "default") : one.origin),
          h("td", { class: "wrap small-text" }, one.doc),
        ),
      ),
    );
  }

  function entered() {
    stop?.();
    stop = watch({ status: ({ swap }) => showSwap(swap), swap: showSwap });
    load();
  }

  return { element, entered, left: () => stop?.() };
}
