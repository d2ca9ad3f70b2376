// Line charts as SVG.

import { h, number, SVG } from "./dom.js";

const WIDTH = 480; // until the chart is shown, which says how wide it is
const HEIGHT = 180;
const LEFT = 52;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 20;

function svg(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** The round step that divides a range into about four. `whole`: at least 1. */
function stepOf(range, whole) {
  const rough = range / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  return whole ? Math.max(1, step) : step;
}

/** Points in stretches without a gap. */
function stretches(points) {
  const found = [[]];
  for (const [x, y] of points) {
    if (y !== null) found.at(-1).push([x, y]);
    else if (found.at(-1).length) found.push([]);
  }
  return found.filter((one) => one.length);
}

/**
 * A chart: `element`, and `update(series)` with series of {name, points: [[x, y], …]}. A y of null is a gap.
 * `xText`, `yText` write values; `fromZero` starts the y axis at 0; `whole`: values are whole numbers.
 */
export function lineChart({ title, xText = number, yText = number, fromZero = true, whole = false }) {
  const picture = svg("svg", { height: HEIGHT, role: "img", "aria-label": title });
  const caption = h("figcaption");
  const element = h("figure", {}, caption, picture);
  let width = WIDTH;
  let current = [];
  let scale = null;
  let cursor = null;

  function update(series) {
    current = series;
    picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const points = series.flatMap((one) => one.points).filter(([, y]) => y !== null);
    if (!points.length) {
      const text = svg("text", { x: width / 2, y: HEIGHT / 2, class: "axis", "text-anchor": "middle" }, "nothing yet");
      picture.replaceChildren(text);
      scale = null;
      describe(null);
      return;
    }
    let [left, right, low, high] = [Infinity, -Infinity, fromZero ? 0 : Infinity, -Infinity];
    for (const [x, y] of points) {
      [left, right] = [Math.min(left, x), Math.max(right, x)];
      [low, high] = [Math.min(low, y), Math.max(high, y)];
    }
    if (high === low) high = low + (Math.abs(low) || 1);
    if (right === left) right = left + 1;
    const step = stepOf(high - low, whole);
    const [first, last] = [Math.floor(low / step), Math.ceil(high / step)];
    [low, high] = [first * step, last * step];
    const toX = (x) => LEFT + ((x - left) / (right - left)) * (width - LEFT - RIGHT);
    const toY = (y) => HEIGHT - BOTTOM - ((y - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    scale = { left, right, toX };
    const children = [];
    for (let at = first; at <= last; at += 1) {
      const y = Number((at * step).toPrecision(12));
      children.push(svg("line", { x1: LEFT, x2: width - RIGHT, y1: toY(y), y2: toY(y), class: "gridline" }));
      children.push(svg("text", { x: LEFT - 8, y: toY(y) + 4, class: "axis", "text-anchor": "end" }, yText(y)));
    }
    for (const [x, anchor] of [[left, "start"], [right, "end"]]) {
      children.push(svg("text", { x: toX(x), y: HEIGHT - 4, class: "axis", "text-anchor": anchor }, xText(x)));
    }
    series.forEach((one, index) => {
      const lines = stretches(one.points).map((some) => some.map(([x, y]) => `${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`));
      const line = lines.map((some) => `M${some.join("L")}${some.length === 1 ? "h2" : ""}`).join("");
      const under = lines.filter((some) => some.length > 1).map((some) => `M${some.join("L")}V${toY(low)}H${some[0].split(" ")[0]}Z`);
      if (fromZero && under.length) children.push(svg("path", { d: under.join(""), class: `under s${(index % 4) + 1}` }));
      children.push(svg("path", { d: line, class: `plot s${(index % 4) + 1}` }));
    });
    cursor = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" });
    picture.replaceChildren(...children, cursor);
    describe(null);
  }

  /** Write the values at `x` into the caption, or the last ones. */
  function describe(x) {
    const values = current.map((one, index) => {
      const known = one.points.filter(([, y]) => y !== null);
      const near = x === null ? known.at(-1) : known.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a), known[0]);
      return [`s${(index % 4) + 1}`, `${one.name} ${near ? yText(near[1]) : "–"}`];
    });
    caption.replaceChildren(
      h("strong", {}, title),
      ...values.map(([name, text]) => h("span", { class: `key ${name}` }, h("span", {}, text))),
    );
    picture.setAttribute("aria-label", `${title}: ${values.map(([, text]) => text).join(", ")}`);
  }

  picture.addEventListener("pointermove", (event) => {
    if (!scale) return;
    const box = picture.getBoundingClientRect();
    const inside = (((event.clientX - box.left) / box.width) * width - LEFT) / (width - LEFT - RIGHT);
    const x = scale.left + Math.min(1, Math.max(0, inside)) * (scale.right - scale.left);
    cursor.setAttribute("x1", scale.toX(x));
    cursor.setAttribute("x2", scale.toX(x));
    cursor.setAttribute("visibility", "visible");
    describe(x);
  });
  picture.addEventListener("pointerleave", () => {
    cursor?.setAttribute("visibility", "hidden");
    describe(null);
  });
  new ResizeObserver(([{ contentRect: box }]) => {
    if (!box.width || Math.round(box.width) === width) return;
    width = Math.round(box.width);
    update(current);
  }).observe(element);
  update([]);
  return { element, update };
}
