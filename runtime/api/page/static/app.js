// The views, the address's hash as the one that is shown, the key and the theme.

import { adaptersView } from "./adapters.js";
import { askForKey, json } from "./api.js";
import { chatView } from "./chat.js";
import { announce, h } from "./dom.js";
import { reconnect } from "./live.js";
import { overviewView } from "./overview.js";
import { requestsView } from "./requests.js";
import { systemView } from "./system.js";
import { trainView } from "./train.js";

const main = document.getElementById("main");
const makers = {
  chat: ["Chat", chatView],
  train: ["Train", trainView],
  adapters: ["Adapters", adaptersView],
  overview: ["Overview", overviewView],
  requests: ["Requests", requestsView],
  system: ["System", systemView],
};
const made = new Map();
const links = new Map();

/** What views may ask of each other. */
const app = {
  /** Show the chat with this model. */
  chatWith(model) {
    view("chat").use(model);
    location.hash = "chat";
  },
  /** Show the training of this job. */
  showJob(id) {
    location.hash = "train";
    view("train").showJob(id);
  },
  /** Start from this job's recipe and data. */
  clone(job) {
    location.hash = "train";
    view("train").clone(job);
  },
};

/** The view of this name, made at its first use. It stays, hidden or not, with what runs in it. */
function view(name) {
  if (!made.has(name)) {
    const one = makers[name][1](app);
    one.element.hidden = true;
    main.append(one.element);
    made.set(name, one);
  }
  return made.get(name);
}

function show() {
  const asked = location.hash.slice(1);
  if (asked === "main") return;
  const name = asked in makers ? asked : "chat";
  const shown = view(name);
  for (const [other, one] of made) {
    const was = !one.element.hidden;
    one.element.hidden = other !== name;
    if (was && other !== name) one.left?.();
  }
  for (const [other, link] of links) {
    if (other === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${makers[name][0]} – Eft`;
  announce(makers[name][0]);
  shown.entered?.();
}

async function showServed() {
  const served = document.getElementById("served");
  try {
    const [base] = (await json("v1/models")).data;
    served.textContent = base.id;
  } catch (error) {
    served.textContent = error.message;
  }
}

function changeTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

main.replaceChildren();
for (const [name, [title]] of Object.entries(makers)) {
  const link = h("a", { href: `#${name}` }, title);
  links.set(name, link);
  document.getElementById("views").append(h("li", {}, link));
}
document.getElementById("theme").addEventListener("click", changeTheme);
document.getElementById("key").addEventListener("click", async () => {
  if (await askForKey()) {
    showServed();
    reconnect();
    for (const one of made.values()) if (!one.element.hidden) one.entered?.();
  }
});
addEventListener("hashchange", show);
await showServed();
show();
