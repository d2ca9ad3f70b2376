// Line charts as SVG.

import { h, number } from "./dom.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const WIDTH = 480;
const HEIGHT = 180;
const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 20;

function svg(tag, attributes, text) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Round steps that divide a range into about four. */
function ticks(low, high) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/**
 * A chart: `element`, and `update(series)` with series of {name, points: [[x, y], …]}. A y of null is a gap.
 * `xText`, `yText` write values; `fromZero` starts the y axis at 0.
 */
export function lineChart({ title, xText = number, yText = number, fromZero = true }) {
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  const caption = h("figcaption");
  const element = h("figure", {}, caption, picture);
  let current = [];
  let scale = null;
  let cursor = null;

  function update(series) {
    current = series;
    const points = series.flatMap((one) => one.points).filter(([, y]) => y !== null);
    if (!points.length) {
      const text = svg("text", { x: WIDTH / 2, y: HEIGHT / 2, class: "axis", "text-anchor": "middle" }, "nothing yet");
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
    const toX = (x) => LEFT + ((x - left) / (right - left)) * (WIDTH - LEFT - RIGHT);
    const toY = (y) => HEIGHT - BOTTOM - ((y - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    scale = { left, right, toX };
    const children = [];
    for (const y of ticks(low, high)) {
      children.push(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: toY(y), y2: toY(y), class: "gridline" }));
      children.push(svg("text", { x: LEFT - 6, y: toY(y) + 4, class: "axis", "text-anchor": "end" }, yText(y)));
    }
    for (const [x, anchor] of [[left, "start"], [right, "end"]]) {
      children.push(svg("text", { x: toX(x), y: HEIGHT - 5, class: "axis", "text-anchor": anchor }, xText(x)));
    }
    series.forEach((one, index) => {
      let path = "";
      let pen = "M";
      let alone = true;
      for (const [x, y] of one.points) {
        if (y === null) {
          pen = "M";
          continue;
        }
        path += `${pen}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`;
        alone = pen === "M";
        pen = "L";
      }
      if (alone && path) path += "h2";
      children.push(svg("path", { d: path, class: `plot s${(index % 4) + 1}` }));
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
    const inside = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
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
  update([]);
  return { element, update };
}
