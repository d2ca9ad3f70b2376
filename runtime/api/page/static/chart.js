// Line charts, drawn by uPlot (vendor/uplot). What a chart shows is written beside it too, for reading and for screen readers.

import { announce, h, number } from "./dom.js";

const { uPlot } = window;
const HEIGHT = 190;
const COLOURS = 4; // of the style sheet: --series-1 and so on
const DASH = [6, 4];
const WHOLE = [1, 2, 5].flatMap((factor) => Array.from({ length: 12 }, (_, power) => factor * 10 ** power)).sort((a, b) => a - b);
const FONT = "12px system-ui, sans-serif";
const CHARACTER = 6.5; // pixels of an axis's text, about

const hoursAndMinutes = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit" });
const toSeconds = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit", second: "2-digit" });

/** Charts that are drawn: a change of the theme changes their colours. */
const drawn = new Set();
const redraw = () => drawn.forEach((plot) => plot.redraw(false));
new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

const keyClass = (index) => `key s${(index % COLOURS) + 1}${index < COLOURS ? "" : " dashed"}`;

/** uPlot's columns: the x of all series, then a column for each, undefined where a series has no point at an x. */
function aligned(series) {
  const tables = series.map(({ points }) => [points.map(([x]) => x), points.map(([, y]) => y)]);
  return uPlot.join(tables);
}

/** "1.2 (5 values, first 3.4, lowest 1.1, highest 3.4)", for screen readers. */
function inWords(points, text) {
  const values = points.map(([, y]) => y).filter((y) => y !== null);
  if (!values.length) return "nothing yet";
  const [low, high] = values.reduce(([least, most], y) => [Math.min(least, y), Math.max(most, y)], [Infinity, -Infinity]);
  return `${text(values.at(-1))} (${values.length} values, first ${text(values[0])}, lowest ${text(low)}, highest ${text(high)})`;
}

/**
 * A chart: `element`, and `update(series)` with series of {name, points: [[x, y], …]}, x in ascending order. A y of null is a
 * gap. `yText` writes values. x is a time in seconds with `time`, else a whole number that `xText` writes. `fromZero`: the
 * y axis starts at 0. `whole`: values are whole numbers. Charts of one `group` show the values at the same x.
 */
export function lineChart({ title, yText = number, xText = number, time = false, fromZero = true, whole = false, group }) {
  const caption = h("figcaption");
  const nothing = h("p", { class: "nothing quiet" }, "nothing yet");
  const canvas = h("div", { role: "img", tabindex: 0, "aria-label": title });
  const area = h("div", { class: "plot-area" }, canvas, nothing);
  const element = h("figure", {}, caption, area);
  let current = [];
  let plot = null;
  let width = 0;

  const ink = (name) => getComputedStyle(element).getPropertyValue(name);
  const colour = (index) => {
    const key = caption.querySelector(`.s${(index % COLOURS) + 1}`);
    return key ? getComputedStyle(key).color : ink("color");
  };
  const axis = {
    stroke: () => ink("color"),
    grid: { stroke: () => ink("border-top-color"), width: 1 },
    ticks: { show: false },
    font: FONT,
  };
  const atX = time ? (x) => toSeconds.format(1000 * x) : xText;

  function options() {
    const line = (one, index) => ({
      stroke: () => colour(index),
      fill: fromZero ? () => colour(index).replace("rgb(", "rgba(").replace(")", ", 0.1)") : undefined,
      width: 2,
      dash: index < COLOURS ? undefined : DASH,
      points: { size: 5, fill: () => colour(index) },
    });
    return {
      width,
      height: HEIGHT,
      legend: { show: false },
      padding: [10, time ? 38 : 14, 0, 0], // half of the last text below the axis
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 }, sync: { key: group, scales: ["x", null] } },
      scales: { x: { time }, y: { range } },
      axes: [
        {
          ...axis,
          size: 26,
          space: time ? 100 : 60,
          grid: { show: false },
          incrs: time ? undefined : WHOLE,
          values: (_, values, __, ___, step) => values.map((x) => (!time ? number(x) : (step < 60 ? toSeconds : hoursAndMinutes).format(1000 * x))),
        },
        {
          ...axis,
          space: 34,
          incrs: whole ? WHOLE : undefined,
          values: (_, values) => values.map((y) => yText(y)),
          size: (_, values) => Math.max(34, 14 + CHARACTER * Math.max(...(values ?? []).map(({ length }) => length), 0)),
        },
      ],
      series: [{}, ...current.map(line)],
      hooks: { setCursor: [({ cursor }) => describe(cursor.idx)] },
    };
  }

  function range(_, low, high) {
    if (low === null) return [0, 1];
    const from = fromZero ? Math.min(0, low) : low;
    const to = high > from ? high : from + (Math.abs(from) || 1);
    const [bottom, top] = uPlot.rangeNum(from, to, 0.08, true);
    return [fromZero ? from : bottom, top];
  }

  function draw() {
    const data = aligned(current);
    if (plot?.series.length === data.length) {
      plot.setData(data);
      return;
    }
    destroy();
    plot = new uPlot(options(), data, canvas);
    drawn.add(plot);
  }

  function destroy() {
    drawn.delete(plot);
    plot?.destroy();
    plot = null;
  }

  function update(series) {
    current = series;
    const known = current.some(({ points }) => points.some(([, y]) => y !== null));
    nothing.hidden = known;
    describe(null);
    const words = current.map(({ name, points }) => `${name} ${inWords(points, yText)}`);
    canvas.setAttribute("aria-label", `${title}: ${known ? words.join("; ") : "nothing yet"}`);
    if (!known) destroy();
    else if (width) draw();
    if (plot) describe(plot.cursor.idx);
  }

  /** Write the values at the cursor into the caption, or the last ones. Returns them. */
  function describe(at) {
    const x = plot?.data[0][at] ?? null;
    const values = current.map(({ name, points }) => {
      const known = points.filter(([, y]) => y !== null);
      const near = x === null ? known.at(-1) : known.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a), known[0]);
      return `${name} ${near ? yText(near[1]) : "–"}`;
    });
    caption.replaceChildren(
      h("strong", {}, title, x !== null && h("span", { class: "quiet at" }, ` at ${atX(x)}`)),
      ...values.map((text, index) => h("span", { class: keyClass(index) }, h("span", {}, text))),
    );
    return x === null ? values : [atX(x), ...values];
  }

  /** Put the cursor of the group at `left` pixels; below 0: away. */
  function setCursor(left) {
    plot?.setCursor({ left, top: left < 0 ? left : 1 }, true, true);
  }

  /** Arrow keys move the cursor, and say the values that it is at. */
  function move(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity };
    if (!plot || !(event.key in steps || event.key === "Escape")) return;
    event.preventDefault();
    const last = plot.data[0].length - 1;
    if (event.key === "Escape") return setCursor(-10);
    const to = Math.min(last, Math.max(0, (plot.cursor.idx ?? last) + steps[event.key]));
    setCursor(plot.valToPos(plot.data[0][to], "x"));
    announce(describe(to).join(", "));
  }

  function resize(to) {
    if (!to || to === width) return;
    width = to;
    if (plot) plot.setSize({ width, height: HEIGHT });
    else update(current);
  }

  canvas.addEventListener("keydown", move);
  canvas.addEventListener("blur", () => setCursor(-10));
  // Not before the next frame: what is drawn now would change sizes that are being reported.
  new ResizeObserver(([{ contentRect: box }]) => requestAnimationFrame(() => resize(Math.floor(box.width)))).observe(area);
  update([]);
  return { element, update };
}
