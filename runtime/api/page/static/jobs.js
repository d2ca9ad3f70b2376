// Training jobs: the list, and one of them live.

import { events, json, request } from "./api.js";
import { lineChart } from "./chart.js";
import { button, confirmed, guarded, h, moment, number, replace, seconds } from "./dom.js";
import { watch } from "./live.js";

const RETRY_MS = 2000;
const MAX_LOG_LINES = 500;
const ENDED = ["succeeded", "failed", "cancelled"];
const stepText = (step) => `step ${step}`;

/** Add a point. A job that goes on from a checkpoint takes steps again: those of before go. */
function extend(points, step, value) {
  while (points.length && points.at(-1)[0] >= step) points.pop();
  points.push([step, value]);
}

export function jobsPanel(app) {
  let chosen = null;
  let following = null;
  let stop = null;
  const overlaid = new Map();
  const curves = { loss: [], eval: [], rate: [] };

  const trouble = h("p", { class: "error", role: "alert" });
  const rows = h("tbody");
  const empty = h("p", { class: "panel empty quiet" }, "No jobs yet. One that is started here, by the command line or over the API is shown with its curves and its log.");
  const loss = lineChart({ title: "Loss", xText: stepText, fromZero: false, group: "job" });
  const rate = lineChart({ title: "Learning rate", xText: stepText, group: "job" });
  const title = h("h3", {});
  const state = h("p", { role: "status" });
  const bar = h("progress", { max: 1, "aria-label": "Progress" });
  const actions = h("div", { class: "row" });
  const checkpoints = h("details", { hidden: true });
  const log = h("pre", { class: "log", tabindex: 0, role: "log", "aria-label": "Log of the job" });
  const detail = h(
    "div",
    { class: "panel", hidden: true },
    title,
    state,
    bar,
    actions,
    checkpoints,
    h("div", { class: "grid" }, loss.element, rate.element),
    h("h3", {}, "Log"),
    log,
  );
  const listed = h(
    "div",
    { class: "panel scroll", hidden: true, tabindex: 0, role: "region", "aria-labelledby": "jobs-title" },
    h("table", {}, h("thead", {}, h("tr", {}, ["Job", "State", "Step", "Loss", "Made", "Compare"].map((text) => h("th", { scope: "col" }, text)))), rows),
  );
  const element = h(
    "section",
    { "aria-labelledby": "jobs-title" },
    h("h2", { id: "jobs-title" }, "Jobs"),
    trouble,
    empty,
    listed,
    detail,
  );

  function chip(job) {
    const kind = { succeeded: "good", failed: "bad", cancelled: "", paused: "", queued: "" }[job.status] ?? "busy";
    return h("span", { class: `chip ${kind}` }, job.wanted ? `${job.status}, ${job.wanted} asked for` : job.status);
  }

  function row(job) {
    const compare = h("input", { type: "checkbox", checked: overlaid.has(job.id), "aria-label": `Show the loss of ${nameOf(job)} too` });
    compare.addEventListener("change", () => overlay(job, compare.checked));
    return h(
      "tr",
      { "aria-selected": String(job.id === chosen) },
      h("th", { scope: "row" }, button(nameOf(job), () => choose(job.id), { class: "link" })),
      h("td", {}, chip(job)),
      h("td", { class: "number" }, job.total_steps ? `${job.step} of ${job.total_steps}` : "–"),
      h("td", {}, number(job.loss)),
      h("td", {}, moment(job.created_at)),
      h("td", {}, compare),
    );
  }

  const nameOf = (job) => job.name ?? job.id;

  async function list() {
    try {
      showList(await json("admin/jobs?limit=50"));
      trouble.textContent = "";
    } catch (error) {
      trouble.textContent = error.message;
    }
  }

  function showList({ data }) {
    empty.hidden = data.length > 0;
    listed.hidden = !data.length;
    // Not while a control in it has the focus: the focus would be lost.
    if (!rows.contains(document.activeElement)) replace(rows, data.map(row));
  }

  async function overlay(job, wanted) {
    if (wanted) {
      const { data } = await json(`admin/jobs/${job.id}/metrics`);
      const points = [];
      for (const one of data) if (one.type !== "eval") extend(points, one.step, one.loss);
      overlaid.set(job.id, { name: nameOf(job), points });
    } else overlaid.delete(job.id);
    if (!chosen) await choose(job.id);
    draw();
  }

  function draw() {
    const series = [{ name: "training", points: curves.loss }];
    if (curves.eval.length) series.push({ name: "held out", points: curves.eval });
    for (const [id, one] of overlaid) if (id !== chosen) series.push(one);
    loss.update(series);
    rate.update([{ name: "rate", points: curves.rate }]);
  }

  // A page that is left may be kept for going back, with its connection.
  window.addEventListener("pagehide", () => following?.abort());
  window.addEventListener("pageshow", (event) => event.persisted && chosen && choose(chosen));

  async function choose(id) {
    chosen = id;
    curves.loss = [];
    curves.eval = [];
    curves.rate = [];
    log.textContent = "";
    detail.hidden = false;
    draw();
    following?.abort();
    following = new AbortController();
    await Promise.all([list(), show()]);
    follow(id, following.signal);
  }

  /** The chosen job's state, and what can be done with it. */
  async function show() {
    const id = chosen;
    const job = await json(`admin/jobs/${id}`);
    if (id !== chosen) return job;
    replace(title, nameOf(job), h("span", { class: "code quiet" }, ` ${job.id}`));
    const left = job.estimated_finish ? `, done in about ${seconds(Math.max(0, job.estimated_finish - Date.now() / 1000))}` : "";
    const done = job.rows_read ? `${job.rows_read} rows read` : `step ${job.step} of ${job.total_steps ?? "?"}${left}`;
    replace(state, chip(job), ` ${done}`);
    if (job.status === "succeeded" && !job.adapter) state.append(" and not published: the log says why");
    if (job.error) state.append(h("span", { class: "error" }, ` ${job.error.message}`));
    bar.value = job.total_steps ? job.step / job.total_steps : 0;
    showActions(job);
    return job;
  }

  function showActions(job) {
    const post = (text, action, props) => {
      const made = button(text, () => change(made, `admin/jobs/${job.id}/${action}`, "POST"), props);
      return made;
    };
    const remove = button("Delete", async () => {
      if (await confirmed("Delete this job?", "Its log and its checkpoints are deleted; the adapter stays.")) {
        await change(remove, `admin/jobs/${job.id}`, "DELETE");
      }
    });
    replace(
      actions,
      job.adapter && button(`Chat with ${job.adapter}`, () => app.chatWith(job.adapter), { class: "primary" }),
      !ENDED.includes(job.status) && ["queued", "running"].includes(job.status) && post("Pause", "pause"),
      (job.resumable ?? job.status === "paused") && post("Resume", "resume"), // older servers say nothing of it
      !ENDED.includes(job.status) && post("Cancel", "cancel", { class: "danger" }),
      button("Clone", () => app.clone(job)),
      ENDED.includes(job.status) && remove,
    );
    showCheckpoints(job);
  }

  /** Checkpoints; those of a job that runs can be chatted with. */
  function showCheckpoints(job) {
    const answers = job.status === "running" && job.name;
    const one = ({ step, best }) => {
      const label = `step ${step}${best ? ", the best" : ""}`;
      const name = `${job.name}:ckpt-step-${step}`;
      return h("li", {}, answers ? button(`Chat with ${label}`, () => app.chatWith(name), { class: "link" }) : label);
    };
    checkpoints.hidden = !job.checkpoints.length;
    replace(checkpoints, h("summary", {}, `Checkpoints (${job.checkpoints.length})`), h("ul", { class: "problems" }, job.checkpoints.map(one)));
  }

  async function change(source, path, method) {
    await guarded(source, trouble, async () => {
      await request(path, { method });
      if (method === "DELETE") {
        following?.abort();
        overlaid.delete(chosen);
        chosen = null;
        detail.hidden = true;
      } else if (!following) await choose(chosen); // it had ended, and goes on
      else await show();
      await list();
    });
  }

  function take(event) {
    const { data } = event;
    if (event.type === "metrics") {
      if ("learning_rate" in data) {
        extend(curves.loss, data.step, data.loss);
        extend(curves.rate, data.step, data.learning_rate);
      } else extend(curves.eval, data.step, data.loss);
      return;
    }
    log.append(`${moment(event.created_at)}  ${event.message}\n`);
    while (log.childNodes.length > MAX_LOG_LINES) log.firstChild.remove();
    log.scrollTop = log.scrollHeight;
  }

  async function follow(id, signal) {
    let after = 0;
    let drawn = 0;
    while (!signal.aborted) {
      try {
        const response = await request(`admin/jobs/${id}/events?after=${after}`, { headers: { Accept: "text/event-stream" }, signal });
        for await (const { id: number, data } of events(response)) {
          if (data === "[DONE]") {
            if (following?.signal === signal) following = null;
            draw();
            await Promise.all([show(), list()]);
            return;
          }
          after = Number(number);
          take(JSON.parse(data));
          if (drawn) continue;
          drawn = setTimeout(() => {
            drawn = 0;
            if (id === chosen) {
              draw();
              show().catch(() => {});
            }
          }, 250);
        }
      } catch (error) {
        if (signal.aborted) return;
        trouble.textContent = error.message;
        if (error.status) return;
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  /** All jobs, once connected; the one at work is shown where none was chosen. */
  function status({ jobs }) {
    if (!jobs) return;
    showList(jobs);
    const running = jobs.data.find((job) => !ENDED.includes(job.status));
    if (!chosen && running) choose(running.id).catch((error) => (trouble.textContent = error.message));
  }

  function entered() {
    stop?.();
    stop = watch({ status, jobs: showList, trouble: (text) => (trouble.textContent = text) });
  }

  return { element, choose, entered, left: () => stop?.() };
}
