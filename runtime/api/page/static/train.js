// A recipe and its data: examples, the editor, the server's dry run while one types, the plan, and the start.

import { json, request } from "./api.js";
import { completion } from "./complete.js";
import { announce, bytes, button, field, guarded, h, number, replace, seconds, table } from "./dom.js";
import { jobsPanel } from "./jobs.js";

const CHECK_AFTER_MS = 500;
const MAX_EDITED = 2_000_000;
const EXAMPLES = {
  own: ["Your own rows", "page/own.yaml", []],
  tickets: ["Example: tickets", "page/examples/tickets.yaml", ["data/tickets.jsonl", "data/tickets-test.jsonl"]],
  newts: ["Example: newts", "page/examples/newts.yaml", ["data/newts.jsonl"]],
  starter: ["Recipe with all usual keys", "page/examples/starter.yaml", []],
};
const BASES = { jobs: "measured by jobs on this machine", trial: "estimated from two steps that were tried" };
const OWN_FILE = "train.jsonl";
const ROWS_HINT = '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}';

export function trainView(app) {
  const files = new Map();
  let edited = OWN_FILE;
  let timer = 0;
  let checking = null;
  let awaited = null; // the example that is on its way: it does not replace what is typed or chosen meanwhile

  const jobs = jobsPanel(app);
  const trouble = h("p", { class: "error", role: "alert" });
  const example = h(
    "select",
    { onchange: () => load(example.value) },
    Object.entries(EXAMPLES).map(([value, [text]]) => h("option", { value }, text)),
  );
  const fileList = h("ul", { class: "files" });
  const rows = h("textarea", { rows: 8, class: "code", spellcheck: "false", placeholder: ROWS_HINT });
  const rowsLabel = h("label", { for: "rows" });
  rows.id = "rows";
  const upload = h("input", { type: "file", multiple: true, accept: ".jsonl,.json,.csv,.parquet" });
  const gutter = h("div", { class: "gutter code", "aria-hidden": "true" });
  const recipe = h("textarea", { class: "code", spellcheck: "false", autocapitalize: "off", "aria-describedby": "problems" });
  recipe.id = "recipe";
  const offers = completion(recipe);
  const state = h("span", { class: "chip" }, "not checked");
  const problems = h("ul", { class: "problems", id: "problems", "aria-live": "polite" });
  const plan = h("div", { class: "panel", hidden: true });
  const start = button("Start training", submit, { class: "primary", disabled: true });
  const inShort = h("span", { class: "quiet small-text" });

  const element = h(
    "section",
    { "aria-labelledby": "train-title" },
    h("h2", { id: "train-title" }, "Train"),
    trouble,
    h(
      "div",
      { class: "columns" },
      h(
        "div",
        { class: "panel column" },
        field("Start from", example),
        h("h3", {}, "Data"),
        fileList,
        h("div", {}, rowsLabel, rows),
        field("Add files (JSONL, JSON, CSV, Parquet)", upload),
      ),
      h(
        "div",
        { class: "panel column" },
        h("div", { class: "row" }, h("h3", { class: "grow" }, h("label", { for: "recipe" }, "Recipe")), state),
        h("div", { class: "editor" }, gutter, recipe),
        offers,
        problems,
        h("div", { class: "row" }, start, inShort),
      ),
    ),
    plan,
    jobs.element,
  );

  for (const input of [recipe, rows, upload]) input.addEventListener("input", () => (awaited = null));
  recipe.addEventListener("input", changed);
  recipe.addEventListener("scroll", () => (gutter.scrollTop = recipe.scrollTop));
  rows.addEventListener("input", () => {
    if (rows.value) files.set(edited, rows.value);
    else files.delete(edited);
    listFiles();
    changed();
  });
  upload.addEventListener("change", () => {
    for (const file of upload.files) files.set(nameFor(file.name), file);
    upload.value = "";
    listFiles();
    changed();
  });

  /** The recipe's path that ends in this name, where there is one: a file is sent under the name that it has there. */
  function nameFor(name) {
    const paths = [...recipe.value.matchAll(/path:\s*(\S+)/g)].map((match) => match[1]);
    return paths.find((path) => path === name || path.endsWith(`/${name}`)) ?? name;
  }

  async function load(which) {
    awaited = which;
    await guarded(null, trouble, async () => {
      const [, path, data] = EXAMPLES[which];
      const texts = await Promise.all([path, ...data.map((name) => `page/examples/${name}`)].map(textOf));
      if (awaited !== which) return;
      files.clear();
      data.forEach((name, index) => files.set(name, texts[index + 1]));
      recipe.value = texts[0];
      editFile(data[0] ?? OWN_FILE);
      if (data.length) changed();
      else waitForRows();
    });
  }

  async function textOf(path) {
    const response = await fetch(path);
    if (!response.ok) throw new Error(`${path}: ${response.status}`);
    return response.text();
  }

  function editFile(name) {
    edited = name;
    const content = files.get(name) ?? "";
    rows.value = typeof content === "string" ? content : "";
    rowsLabel.textContent = `Rows of ${name}, one JSON object a line`;
    listFiles();
  }

  async function editUpload(name) {
    const content = files.get(name);
    if (typeof content !== "string") files.set(name, await content.text());
    editFile(name);
  }

  function listFiles() {
    const items = [...files].map(([name, content]) => {
      const size = typeof content === "string" ? new Blob([content]).size : content.size;
      const remove = () => {
        files.delete(name);
        if (name === edited) rows.value = "";
        listFiles();
        changed();
      };
      return h(
        "li",
        {},
        h("span", { class: "code" }, name),
        ` (${bytes(size)}) `,
        size < MAX_EDITED && !name.endsWith(".parquet") && button("Edit", () => editUpload(name), { class: "link", "aria-label": `Edit ${name}` }),
        " ",
        button("Remove", remove, { class: "link", "aria-label": `Remove ${name}` }),
      );
    });
    replace(fileList, items.length ? items : h("li", { class: "quiet" }, "No files yet: paste rows below, or add files."));
  }

  /** A recipe for rows that are not there yet is not worth a check. */
  function waitForRows() {
    clearTimeout(timer);
    checking?.abort();
    start.disabled = true;
    plan.hidden = true;
    problems.replaceChildren();
    state.className = "chip";
    state.textContent = "waits for rows";
    inShort.textContent = "Paste rows or add a file first.";
    numberLines(new Set());
  }

  function changed() {
    start.disabled = true;
    state.className = "chip";
    state.textContent = "checking…";
    inShort.textContent = "";
    numberLines(new Set());
    clearTimeout(timer);
    checking?.abort();
    timer = setTimeout(check, CHECK_AFTER_MS);
  }

  function numberLines(wrong) {
    const count = recipe.value.split("\n").length;
    replace(gutter, Array.from({ length: count }, (_, index) => h("div", { class: wrong.has(index + 1) ? "wrong" : "" }, index + 1)));
    gutter.scrollTop = recipe.scrollTop;
  }

  function form() {
    const made = new FormData();
    made.append("recipe", new Blob([recipe.value], { type: "application/yaml" }), "recipe.yaml");
    for (const [name, content] of files) made.append(name, new Blob([content]), name.split("/").at(-1));
    return made;
  }

  async function check() {
    const mine = (checking = new AbortController());
    try {
      const found = await json("admin/train?dry_run=1", { body: form(), signal: mine.signal });
      if (mine !== checking) return;
      recipe.setAttribute("aria-invalid", "false");
      problems.replaceChildren();
      state.className = "chip good";
      state.textContent = "valid";
      start.disabled = false;
      showPlan(found);
    } catch (error) {
      if (error.name === "AbortError" || mine !== checking) return;
      recipe.setAttribute("aria-invalid", "true");
      state.className = "chip bad";
      state.textContent = "not valid";
      plan.hidden = true;
      showProblems(error.message);
    }
  }

  /** Every line of the message that names a line of the recipe leads there. */
  function showProblems(message) {
    const found = message.split("\n").map((text) => [text, Number(/^[^:]*\bline (\d+):/.exec(text)?.[1] ?? 0)]);
    numberLines(new Set(found.map(([, line]) => line)));
    const listed = found.filter(([text]) => !/^The recipe has \d+ problems:$/.test(text));
    replace(
      problems,
      listed.map(([text, line]) => h("li", {}, line ? button(text, () => goTo(line), { class: "link error" }) : h("span", { class: "error" }, text))),
    );
  }

  function goTo(line) {
    const lines = recipe.value.split("\n");
    const begin = lines.slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
    recipe.focus();
    recipe.setSelectionRange(begin, begin + lines[line - 1].length);
    recipe.scrollTop = (line - 5) * parseFloat(getComputedStyle(recipe).lineHeight);
  }

  function showPlan({ total_steps: steps, summary }) {
    const { train, test, schedule, estimate } = summary;
    const left = Object.entries(train.counts)
      .filter(([name, count]) => typeof count === "number" && count && !["rows", "used"].includes(name))
      .map(([name, count]) => `, ${count} ${name.replace("_", " ")}`)
      .join("");
    const facts = {
      "Training examples": `${train.examples}${left}; ${number(train.tokens)} tokens, ${number(train.trained_tokens)} of them trained on; longest ${train.longest}`,
      "Held-out examples": test.examples || "none",
      Steps: `${steps} (${schedule.steps_per_epoch} an epoch), ${summary.effective_batch} examples each`,
      Adapts: `${number(summary.trained_parameters)} parameters`,
      Memory: `about ${bytes(summary.memory_bytes)} beside the base model`,
      Time: estimate.seconds === null ? "not known before the first steps" : `about ${seconds(estimate.seconds)}, undisturbed${estimate.basis in BASES ? ` (${BASES[estimate.basis]})` : ""}`,
    };
    const notes = [...summary.warnings, ...summary.notes.filter((note) => !summary.warnings.includes(note))];
    const time = estimate.seconds === null ? "" : `, about ${seconds(estimate.seconds)}`;
    inShort.textContent = `${steps} steps over ${train.examples} examples${time}. What is trained on is shown below.`;
    replace(
      plan,
      h("h3", {}, "The plan"),
      h("dl", {}, Object.entries(facts).map(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]).flat()),
      notes.length && h("ul", { class: "problems" }, notes.map((note) => h("li", {}, note))),
      h("h3", {}, "What is trained on"),
      h("p", { class: "quiet small-text" }, "The first examples as the model sees them; the ", h("mark", {}, "marked"), " tokens are what it learns to write."),
      h(
        "div",
        { class: "grid" },
        summary.previews.map((pieces) =>
          h("div", { class: "example code", tabindex: 0, role: "region", "aria-label": "Example" }, pieces.map((piece) => (piece.trained ? h("mark", {}, piece.text) : piece.text))),
        ),
      ),
      h("h3", {}, "Examples"),
      train.examples > summary.listed.length && h("p", { class: "quiet small-text" }, `The first ${summary.listed.length} of ${train.examples}.`),
      table(
        "Examples",
        ["No.", "Tokens", "Trained on", "Asks", "Learns"],
        summary.listed.map((one, index) => [index + 1, one.tokens, one.trained_tokens, one.asks, one.learns]),
      ),
    );
    plan.hidden = false;
  }

  async function submit() {
    await guarded(start, trouble, async () => {
      const job = await json("admin/train", { body: form() });
      announce("The job was started.");
      await jobs.choose(job.id);
      jobs.element.scrollIntoView({ block: "start" });
    });
  }

  /** Start from a job's recipe and the files that came with it. */
  async function clone(job) {
    awaited = null;
    await guarded(null, trouble, async () => {
      const path = (rest) => `admin/jobs/${job.id}/${rest}`;
      const text = await (await request(path("recipe"))).text();
      const sent = await Promise.all(
        job.files.map(async ({ name }) => {
          const response = await request(path(`files/${name.split("/").map(encodeURIComponent).join("/")}`));
          return [name, await response.blob()];
        }),
      );
      files.clear();
      for (const [name, content] of sent) files.set(name, content);
      recipe.value = text;
      const [first] = sent.find(([name, content]) => content.size < MAX_EDITED && !name.endsWith(".parquet")) ?? [];
      if (first === undefined) editFile(OWN_FILE);
      else await editUpload(first);
      changed();
      element.scrollIntoView({ block: "start" });
      recipe.focus();
      announce("The recipe and its data are in the editor.");
    });
  }

  load("own");
  return { element, entered: jobs.entered, left: jobs.left, clone, showJob: jobs.choose };
}
