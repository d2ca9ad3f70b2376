// Completion of a recipe's keys and values, from the JSON schema of recipes.

import { json } from "./api.js";
import { announce, h, replace } from "./dom.js";

const MOST = 8;

/** The part of the schema that a `$ref`, `anyOf` or list of items leads to. */
function resolved(schema, part) {
  if (!part) return {};
  if (part.$ref) return resolved(schema, schema.$defs[part.$ref.split("/").at(-1)]);
  if (part.items) return resolved(schema, part.items);
  const inner = (part.anyOf ?? []).map((one) => resolved(schema, one)).find((one) => one.properties || one.enum);
  return inner ? { ...part, ...inner, description: part.description } : part;
}

const indentOf = (line) => /^\s*(- )?/.exec(line)[0].length;

/** Keys of the mappings around a line, from the outside in. */
function parents(lines, at) {
  const found = [];
  let depth = indentOf(lines[at]);
  for (let above = at - 1; above >= 0 && depth > 0; above -= 1) {
    const key = /^(\s*(?:- )?)([\w./-]+):\s*(#.*)?$/.exec(lines[above]);
    if (key && key[1].replace("- ", "").length < depth && !key[1].includes("- ")) {
      found.unshift(key[2]);
      depth = key[1].length;
    }
  }
  return found;
}

function valuesOf(part) {
  if (part.enum) return part.enum.map(String);
  const kinds = [part.type, ...(part.anyOf ?? []).map((one) => one.type)];
  return kinds.includes("boolean") ? ["true", "false"] : [];
}

/** What can stand at the cursor: {from, offers: [{text, insert, about}]}. */
export function offersAt(schema, text, cursor) {
  const before = text.slice(0, cursor);
  const lines = before.split("\n");
  const line = lines.at(-1);
  const own = parents(lines, lines.length - 1);
  let place = resolved(schema, schema);
  for (const key of own) place = resolved(schema, place.properties?.[key]);
  const value = /^\s*(?:- )?([\w./-]+):\s+(\S*)$/.exec(line);
  if (value) {
    const part = resolved(schema, place.properties?.[value[1]]);
    const offers = valuesOf(part).filter((one) => one.startsWith(value[2]) && one !== value[2]);
    return { from: cursor - value[2].length, offers: offers.map((one) => ({ text: one, insert: one, about: "" })) };
  }
  const key = /^\s*(?:- )?([\w./-]+)$/.exec(line);
  if (!key || !place.properties) return { from: cursor, offers: [] };
  const wanted = key[1].toLowerCase();
  const matches = Object.entries(place.properties).filter(([name]) => name.includes(wanted) && name !== wanted);
  const rank = ([name, part]) => (name.startsWith(wanted) ? 0 : 1) + (part.description?.startsWith("Ignored") ? 2 : 0);
  matches.sort((a, b) => rank(a) - rank(b));
  return {
    from: cursor - key[1].length,
    offers: matches.map(([name, part]) => ({ text: name, insert: `${name}: `, about: part.description ?? "" })),
  };
}

/** A list under `area` that offers what can be typed there. Arrows choose, Tab or Enter takes, Escape closes. */
export function completion(area) {
  let schema = null;
  let asked = null;
  let shown = { from: 0, offers: [] };
  let chosen = -1;
  const list = h("ul", { class: "offers", role: "listbox", id: "offers", "aria-label": "Completions", hidden: true });
  area.setAttribute("aria-controls", "offers");
  area.setAttribute("aria-autocomplete", "list");

  async function update() {
    asked ??= json("admin/train/schema").then((found) => (schema = found));
    try {
      await asked;
    } catch {
      asked = null; // the key may be refused; typing works without offers
      return;
    }
    const found = area.selectionStart === area.selectionEnd ? offersAt(schema, area.value, area.selectionStart) : { offers: [] };
    shown = { ...found, offers: found.offers.slice(0, MOST) };
    chosen = -1;
    draw();
  }

  function draw() {
    list.hidden = !shown.offers.length;
    replace(
      list,
      shown.offers.map((offer, index) =>
        h(
          "li",
          { role: "option", id: `offer-${index}`, "aria-selected": String(index === chosen), onpointerdown: (event) => (event.preventDefault(), take(index)) },
          h("span", { class: "code" }, offer.text),
          offer.about && h("span", { class: "quiet small-text" }, ` ${offer.about}`),
        ),
      ),
    );
    if (chosen >= 0) area.setAttribute("aria-activedescendant", `offer-${chosen}`);
    else area.removeAttribute("aria-activedescendant");
  }

  function close() {
    shown = { from: 0, offers: [] };
    chosen = -1;
    draw();
  }

  function take(index) {
    const { insert } = shown.offers[index];
    area.setRangeText(insert, shown.from, area.selectionStart, "end");
    close();
    area.dispatchEvent(new Event("input", { bubbles: true }));
    announce(insert);
  }

  area.addEventListener("input", update);
  area.addEventListener("blur", close);
  area.addEventListener("keydown", (event) => {
    if (list.hidden) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      chosen = (chosen + step + shown.offers.length + (chosen < 0 && step < 0 ? 1 : 0)) % shown.offers.length;
      draw();
    } else if (event.key === "Tab" || (event.key === "Enter" && chosen >= 0)) take(Math.max(chosen, 0));
    else if (event.key === "Escape") close();
    else return;
    event.preventDefault();
  });
  return list;
}
