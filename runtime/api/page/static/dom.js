// Elements, numbers and times. Text is set as text, never parsed as HTML.

export const SVG = "http://www.w3.org/2000/svg";

/** An element. `props`: attributes, `on…` listeners, `class`, and DOM properties for `value`, `checked`, `disabled`. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (["value", "checked", "disabled", "hidden"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A button. */
export const button = (text, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, text);

const THUMB = "M2 10h4v11H2zM8 10l4-8c1.7 0 3 1.3 3 3l-1 4h6a2 2 0 0 1 2 2.4l-1.6 8a2 2 0 0 1-2 1.6H8z";

/** A thumb, up or down, for a button that says in words what it is. */
export function thumb(down) {
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", THUMB);
  const picture = document.createElementNS(SVG, "svg");
  for (const [name, value] of Object.entries({ viewBox: "0 0 24 24", class: down ? "icon down" : "icon", "aria-hidden": "true" })) {
    picture.setAttribute(name, value);
  }
  picture.append(path);
  return picture;
}

let labels = 0;
/** A labelled control: the label names it to screen readers. */
export function field(label, control, props = {}) {
  control.id ||= `field-${++labels}`;
  return h("div", props, h("label", { for: control.id }, label), control);
}

export const replace = (element, ...children) => element.replaceChildren(...children.flat().filter(Boolean));

/** A table in a box of its own that scrolls: headings, and rows of cells. */
export function table(label, headings, rows) {
  const cell = (content) => h("td", { class: typeof content === "number" ? "number" : "wrap" }, content);
  return h(
    "div",
    { class: "scroll bounded", tabindex: 0, role: "region", "aria-label": label },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, headings.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, rows.map(([first, ...others]) => h("tr", {}, h("th", { scope: "row" }, first), others.map(cell)))),
    ),
  );
}

/** Tell screen readers. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Copy a text to the clipboard, which the button `source` then says. Throws where the browser does not let pages do so. */
export async function copied(source, text) {
  await navigator.clipboard.writeText(text);
  announce("Copied.");
  const label = source.textContent;
  source.textContent = "Copied";
  setTimeout(() => (source.textContent = label), 1500);
}

/** Ask before something that cannot be undone. */
export function confirmed(title, text) {
  const dialog = document.getElementById("confirm-dialog");
  document.getElementById("confirm-title").textContent = title;
  document.getElementById("confirm-text").textContent = text;
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true }),
  );
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  if (value !== 0 && Math.abs(value) < 0.001) return Number(value.toPrecision(digits)).toExponential();
  return String(Number(value.toPrecision(digits)));
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${number(value * 1000)} ms`;
  if (value < 120) return `${number(value)} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${number(value / 3600)} h`;
}

export function bytes(value) {
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 1000) return `${number(value)} ${unit}`;
    value /= 1000;
  }
  return `${number(value)} GB`;
}

export const clock = (time) => new Date(time * 1000).toLocaleTimeString();
export const moment = (time) => new Date(time * 1000).toLocaleString();

/** Run `work` with the button disabled; show its error in `place`. */
export async function guarded(source, place, work) {
  if (source) source.disabled = true;
  place.textContent = "";
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") place.textContent = error.message;
  } finally {
    if (source) source.disabled = false;
  }
}
