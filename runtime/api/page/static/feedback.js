// Thumbs and corrections under an answer, for /v1/feedback.

import { json } from "./api.js";
import { announce, button, field, guarded, h, thumb } from "./dom.js";

const CONTEXT_ROLES = ["system", "developer", "user", "assistant", "tool"];

/**
 * Controls for one answer. `answer`: {id, model, text, messages}; `corrected(text)` is called with a correction that was
 * stored. What is sent is said before it is sent.
 */
export function feedbackRow({ id, model, text, messages }, corrected) {
  const trouble = h("span", { class: "error", role: "alert" });
  const state = h("span", { class: "quiet", role: "status" });
  const good = button(thumb(false), () => rate(good, 1), { class: "small", "aria-label": "Good answer", "aria-pressed": "false" });
  const bad = button(thumb(true), () => rate(bad, -1), { class: "small", "aria-label": "Bad answer", "aria-pressed": "false" });
  const correct = button("Correct", open, { class: "small", "aria-expanded": "false" });
  const place = h("div");
  const element = h("div", { class: "feedback" }, h("div", { class: "row" }, good, bad, correct, state, trouble), place);

  const send = (fields) => json("v1/feedback", { json: { id, model: model ?? undefined, ...fields } });

  async function rate(source, score) {
    await guarded(source, trouble, async () => {
      await send({ score });
      good.setAttribute("aria-pressed", String(score > 0));
      bad.setAttribute("aria-pressed", String(score < 0));
      state.textContent = "stored";
      announce("Your feedback was stored.");
    });
  }

  function open() {
    if (place.firstChild) return close();
    const wanted = h("textarea", { rows: 4, value: text });
    const store = button("Store", () => submit(store, wanted.value), { class: "primary small" });
    place.append(
      field("The answer as it should have been", wanted),
      h("p", { class: "quiet small-text" }, "The chat, the answer and your text are stored on the server, where its operators can read them and train on them."),
      h("div", { class: "row" }, store, button("Cancel", close, { class: "small" })),
    );
    correct.setAttribute("aria-expanded", "true");
    wanted.focus();
    return undefined;
  }

  function close() {
    place.replaceChildren();
    correct.setAttribute("aria-expanded", "false");
    correct.focus();
  }

  async function submit(source, correction) {
    await guarded(source, trouble, async () => {
      const context = messages.filter(({ role, content }) => CONTEXT_ROLES.includes(role) && typeof content === "string");
      await send({ messages: context.map(({ role, content }) => ({ role, content })), answer: text, correction });
      close();
      state.textContent = "correction stored";
      announce("Your correction was stored.");
      corrected(correction);
    });
  }

  return element;
}
