// Live numbers and charts, from one stream of samples.

import { json } from "./api.js";
import { lineChart } from "./chart.js";
import { field, h, number, replace, seconds } from "./dom.js";
import { watch } from "./live.js";

const MAX_SAMPLES = 1800;
const AT_WORK = ["validating_files", "queued", "running", "paused"];

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
    ["Tokens a second", number, { generated: "generated_tokens", prompt: "prompt_tokens" }],
    ["Time to the first token", seconds, { median: "first_token_p50", "95%": "first_token_p95" }],
    ["Time per token", seconds, { median: "token_p50", "95%": "token_p95" }],
    ["Sequences", number, { running: "running", waiting: "waiting" }, true],
    ["KV cache in use", percent, { share: "kv_cache_usage" }],
    ["Training's share of the engine", percent, { share: "training_share" }],
    ["Tokens of training a second", number, { trained: "trained_tokens", "riding in requests' steps": "riding_tokens" }],
  ].map(([title, yText, fields, whole]) => ({ fields, ...lineChart({ title, yText, time: true, whole, group: "overview" }) }));
  const now = h("dl", { class: "tiles" });
  let state = {};
  const element = h(
    "section",
    { "aria-labelledby": "overview-title" },
    h("div", { class: "row end" }, h("div", { class: "grow" }, h("h2", { id: "overview-title" }, "Overview"), facts), field("Time shown", span)),
    trouble,
    now,
    h("div", { class: "grid" }, charts.map((chart, index) => h("div", { class: index ? "panel" : "panel wide" }, chart.element))),
  );

  /** What the server does at this moment, in a row of numbers. */
  function showNow() {
    const last = samples.at(-1);
    const served = state.adapters?.adapters.filter((one) => one.served).length;
    const job = state.jobs?.data.find((one) => one.status === "running") ?? state.jobs?.data.find((one) => AT_WORK.includes(one.status));
    const training = job && h("a", { href: "#train" }, `${job.name ?? job.id}: ${job.total_steps ? `step ${job.step} of ${job.total_steps}` : job.status}`);
    const facts = {
      "Sequences running": last && number(last.running),
      Waiting: last && number(last.waiting),
      "Tokens a second": last && number(last.generated_tokens),
      "KV cache in use": last && percent(last.kv_cache_usage),
      "Adapters served": served,
      Training: training ?? "no job",
    };
    replace(now, Object.entries(facts).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value ?? "–"))));
  }

  function draw() {
    showNow();
    const shown = samples.slice(-Number(span.value));
    for (const chart of charts) {
      chart.update(
        Object.entries(chart.fields).map(([name, key]) => ({ name, points: shown.map((sample) => [sample.time, sample[key]]) })),
      );
    }
  }

  /** The history, once connected: samples that come meanwhile are behind it. */
  async function status(found) {
    const { model, max_model_len: context, version } = found;
    state = found;
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
    const changed = (name) => (found) => {
      state = { ...state, [name]: found };
      showNow();
    };
    stop = watch({ status, sample, jobs: changed("jobs"), adapters: changed("adapters"), trouble: (text) => (trouble.textContent = text) });
  }

  return { element, entered, left: () => stop?.() };
}
