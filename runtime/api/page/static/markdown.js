// Answers in the Markdown that models write: code, headings and bold text become elements, all else stays as it is. Nothing
// is parsed as HTML.

import { announce, button, copied, h } from "./dom.js";

const FENCE = /^ {0,3}(?:```|~~~)/;
const INLINE = /(`[^`\n]+`|\*\*(?! )[^*\n]+(?<! )\*\*)/;

function inline(line) {
  return line.split(INLINE).map((part) => {
    if (INLINE.test(part)) return part[0] === "`" ? h("code", {}, part.slice(1, -1)) : h("strong", {}, part.slice(2, -2));
    return part;
  });
}

function lineOf(line) {
  const heading = /^#{1,6} +(.+)$/.exec(line);
  return heading ? [h("strong", {}, ...inline(heading[1]))] : inline(line);
}

function block(lines) {
  const code = lines.join("\n");
  const copy = button("Copy", () => copied(copy, code).catch((error) => announce(error.message)), {
    class: "small",
    "aria-label": "Copy the code",
  });
  return h("div", { class: "code-block" }, h("pre", { tabindex: 0, role: "region", "aria-label": "Code" }, h("code", {}, code)), copy);
}

/** Elements and texts of an answer, or of its beginning. */
export function formatted(text) {
  const found = [];
  let code = null;
  for (const line of text.split("\n")) {
    if (FENCE.test(line)) {
      if (code) found.push(block(code));
      else if (found.at(-1) === "\n") found.pop();
      code = code ? null : [];
    } else if (code) code.push(line);
    else found.push(...lineOf(line), "\n");
  }
  if (code) found.push(block(code));
  else if (found.at(-1) === "\n") found.pop();
  return found.filter((part) => part !== "");
}
