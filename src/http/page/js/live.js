// Follows the node, and not while nobody looks.

const STALE_AFTER = 3000;
const RELOAD_AFTER = 5000;
const live = document.querySelector("#live");

let lastHeard = 0;
let isFollowing = false;

const layoutOf = ({ version, lanes, apis }) => {
  const names = Object.keys(apis);
  const parts = [version, ...lanes.map(({ lane }) => lane), ...(names.length > 0 ? names : ["default"])];
  return parts.join(" ");
};

const say = (state, text) => {
  live.dataset.state = state;
  setText(live, text);
};

const onStatus = (status) => {
  // A node with other lanes, or another version of the program, has another page.
  if (layoutOf(status) !== document.body.dataset.layout) {
    stream.close();
    isFollowing = false;
    // Not again and again.
    if (performance.now() > RELOAD_AFTER) location.reload();
    else say("stale", "The node has changed: load the page again");
    return;
  }
  remember(status);
  paint(status);
  followHistory(status.recent);
  showUnasked(status);
  say("live", "Live");
};

const onMissed = ({ reason }) => {
  if (reason !== "restart") return;
  forget();
  forgetHistory();
};

const HEAR = { status: onStatus, change: addChange, missed: onMissed };

const stream = sharedStream((name, data) => {
  lastHeard = performance.now();
  HEAR[name](JSON.parse(data));
});

const follow = () => {
  if (document.hidden) {
    stream.close();
    isFollowing = false;
    say("off", "Paused while the tab is hidden");
  } else if (!isFollowing) {
    lastHeard = performance.now();
    isFollowing = true;
    stream.open();
  }
};

setInterval(() => {
  const silent = performance.now() - lastHeard;
  if (!isFollowing || silent < STALE_AFTER) return;
  say("stale", `No answer for ${time(silent / 1000)}: the values are old`);
}, 500);

document.addEventListener("visibilitychange", follow);
follow();
