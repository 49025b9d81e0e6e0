// Follows the node: one stream of events, and none while nobody looks.

const STALE_AFTER = 3000;
const AGAIN_AFTER = 1000;
const RELOAD_AFTER = 5000;
const live = document.querySelector("#live");

let source = null;
let again = null;
let lastId = null;
let lastHeard = 0;

const layoutOf = ({ version, lanes, apis }) => {
  const names = Object.keys(apis);
  const parts = [version, ...lanes.map(({ lane }) => lane), ...(names.length > 0 ? names : ["default"])];
  return parts.join(" ");
};

const say = (state, text) => {
  live.dataset.state = state;
  setText(live, text);
};

const heard = (event) => {
  lastHeard = performance.now();
  if (event.lastEventId) lastId = event.lastEventId;
};

const onStatus = (event) => {
  heard(event);
  const status = JSON.parse(event.data);
  // A node with other lanes, or another version of the program, has another page.
  if (layoutOf(status) !== document.body.dataset.layout) {
    close();
    // Not again and again.
    if (performance.now() > RELOAD_AFTER) location.reload();
    else say("stale", "The node has changed: load the page again");
    return;
  }
  remember(status);
  paint(status);
  say("live", "Live");
};

const onChange = (event) => {
  heard(event);
  addChange(JSON.parse(event.data));
};

const onMissed = (event) => {
  const { reason } = JSON.parse(event.data);
  if (reason === "restart") forget();
};

const close = () => {
  clearTimeout(again);
  source?.close();
  source = null;
};

const open = () => {
  close();
  const from = lastId === null ? "" : `?after=${encodeURIComponent(lastId)}`;
  source = new EventSource(`api/events${from}`);
  source.addEventListener("status", onStatus);
  source.addEventListener("change", onChange);
  source.addEventListener("missed", onMissed);
  source.addEventListener("error", () => {
    // A browser comes back by itself unless it got an answer that is no stream.
    if (source?.readyState === EventSource.CLOSED) again = setTimeout(open, AGAIN_AFTER);
  });
};

const follow = () => {
  if (document.hidden) {
    close();
    say("off", "Paused while the tab is hidden");
  } else if (source === null) {
    lastHeard = performance.now();
    open();
  }
};

setInterval(() => {
  const silent = performance.now() - lastHeard;
  if (source === null || silent < STALE_AFTER) return;
  say("stale", `No answer for ${time(silent / 1000)}: the values are old`);
}, 500);

document.addEventListener("visibilitychange", follow);
follow();
