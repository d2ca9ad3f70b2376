// The state of the server over one stream, which the views that are shown share: its numbers, jobs, adapters and
// moves to other models.

import { events, request } from "./api.js";

const RETRY_MS = 3000;
const MAX_RETRY_MS = 30_000;
const LINGER_MS = 1000; // after the last view has left: the next one mostly comes at once
const HIDDEN_MS = 30_000; // a browser has six connections to a server, for all of its tabs together

const watchers = new Set();
let state = null;
let following = null;
let leaving = 0;

/**
 * Call `watcher.status(state)` with the whole state now and after each new connection, `watcher.sample`, `watcher.jobs`,
 * `watcher.adapters` and `watcher.swap` with what is new, and `watcher.trouble` with the error's text, or "". Returns what ends it.
 */
export function watch(watcher) {
  clearTimeout(leaving);
  watchers.add(watcher);
  if (!following) follow();
  else if (state) watcher.status?.(state);
  return () => {
    watchers.delete(watcher);
    clearTimeout(leaving);
    leaving = setTimeout(() => watchers.size || stop(), LINGER_MS);
  };
}

/** Connect anew, with the key of now. */
export function reconnect() {
  stop();
  if (watchers.size) follow();
}

// A page that is left may be kept for going back, with its connection.
window.addEventListener("pagehide", stop);
window.addEventListener("pageshow", () => !following && watchers.size && follow());
document.addEventListener("visibilitychange", () => {
  clearTimeout(leaving);
  if (document.hidden) leaving = setTimeout(stop, HIDDEN_MS);
  else if (!watchers.size) stop();
  else if (!following) follow();
});

function stop() {
  following?.abort();
  following = null;
  state = null;
}

function tell(name, data) {
  for (const watcher of [...watchers]) watcher[name]?.(data);
}

function take(name, data) {
  if (name === "status") state = data;
  else state[name] = data;
  tell(name, data);
}

async function follow() {
  const mine = (following = new AbortController());
  let pause = RETRY_MS;
  while (!mine.signal.aborted) {
    try {
      const response = await request("admin/status", { headers: { Accept: "text/event-stream" }, signal: mine.signal });
      tell("trouble", "");
      for await (const { event, data } of events(response)) {
        if (mine.signal.aborted) return;
        pause = RETRY_MS;
        take(event, JSON.parse(data));
      }
    } catch (error) {
      if (mine.signal.aborted) return;
      tell("trouble", error.message);
      if (error.status === 401 || error.status === 403) {
        if (following === mine) following = null;
        return;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(2 * pause, MAX_RETRY_MS);
  }
}
