// Elements, numbers and times. Text is set as text, never parsed as HTML.

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

let labels = 0;
/** A labelled control: the label names it to screen readers. */
export function field(label, control, props = {}) {
  control.id ||= `field-${++labels}`;
  return h("div", props, h("label", { for: control.id }, label), control);
}

export const replace = (element, ...children) => element.replaceChildren(...children.flat().filter(Boolean));

/** A table in a box of its own that scrolls: headings, and rows of cells. */
export function table(label, headings, rows) {
  const cell = (content) => h("td", { class: "wrap" }, content);
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
