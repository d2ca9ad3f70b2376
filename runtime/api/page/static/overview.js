// Live numbers and charts, from one stream of samples.

import { json } from "./api.js";
import { lineChart } from "./chart.js";
import { clock, field, h, number, seconds } from "./dom.js";
import { watch } from "./live.js";

const MAX_SAMPLES = 1800;

export function overviewView() {
  let samples = [];
  let stop = null;
  const trouble = h("p", { class: "error", role: "alert" });
  const facts = h("p", { class: "quiet" });
  const span = h(
    "select",
    { onchange: draw },
    h("option", { value: 150 }, "5 minutes"),
    h("option", { value: 900 }, "30 minutes"),
    h("option", { value: MAX_SAMPLES }, "1 hour"),
  );
  const percent = (value) => `${number(100 * value)}%`;
  const charts = [
    ["Tokens a second", number, { generated: "generated_tokens", prompt: "prompt_tokens", trained: "trained_tokens" }],
    ["Time to the first token", seconds, { median: "first_token_p50", "95%": "first_token_p95" }],
    ["Time per token", seconds, { median: "token_p50", "95%": "token_p95" }],
    ["Sequences", number, { running: "running", waiting: "waiting" }],
    ["KV cache in use", percent, { share: "kv_cache_usage" }],
    ["Training's share of the engine", percent, { share: "training_share" }],
  ].map(([title, yText, fields]) => ({ fields, ...lineChart({ title, yText, xText: clock }) }));
  const element = h(
    "section",
    { "aria-labelledby": "overview-title" },
    h("div", { class: "row end" }, h("div", { class: "grow" }, h("h2", { id: "overview-title" }, "Overview"), facts), field("Time shown", span)),
    trouble,
    h("div", { class: "grid" }, charts.map((chart) => h("div", { class: "panel" }, chart.element))),
  );

  function draw() {
    const shown = samples.slice(-Number(span.value));
    for (const chart of charts) {
      chart.update(
        Object.entries(chart.fields).map(([name, key]) => ({ name, points: shown.map((sample) => [sample.time, sample[key]]) })),
      );
    }
  }

  /** The history, once connected: samples that come meanwhile are behind it. */
  async function status({ model, max_model_len: context, version }) {
    facts.textContent = `${model} · context of ${context.toLocaleString("en")} tokens · Eft ${version}`;
    samples = [];
    try {
      const { samples: before } = await json(`admin/overview?limit=${MAX_SAMPLES}`);
      const last = before.at(-1)?.time ?? 0;
      samples = [...before, ...samples.filter(({ time }) => time > last)];
      draw();
    } catch (error) {
      trouble.textContent = error.message;
    }
  }

  function sample(found) {
    samples = [...samples.slice(1 - MAX_SAMPLES), found];
    draw();
  }

  function entered() {
    stop?.();
    stop = watch({ status, sample, trouble: (text) => (trouble.textContent = text) });
  }

  return { element, entered, left: () => stop?.() };
}
