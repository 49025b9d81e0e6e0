// Puts a status into the page.

const all = (selector) => [...document.querySelectorAll(selector)];

// The elements stay, only their texts change.
const values = all("[data-v]");
const rates = all("[data-r]");
const trends = all("[data-trend]");
const alarms = all("[data-some]");
const warned = all("[data-about]");

// An element whose text stays is not touched: a browser would lay it out again.
const setText = (element, text) => {
  if (element.textContent !== text) element.textContent = text;
};

const element = (name, text, className) => {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
};

// A lane that drains stays up, and is drained once it has nothing left.
const textOf = (status, { v, f, laneState }) => {
  const text = format(valueAt(status, v), f);
  const lane = laneState ? at(status, laneState) : undefined;
  if (!lane?.draining || text === "paused") return text;
  return lane.in_flight === 0 ? "drained" : "draining";
};

const paintValues = (status) => {
  for (const shown of values) {
    const text = textOf(status, shown.dataset);
    setText(shown, text);
    if ("title" in shown.dataset && shown.title !== text) shown.title = text;
    if ("colour" in shown.dataset && shown.dataset.state !== text) shown.dataset.state = text;
  }
  for (const shown of rates) setText(shown, rateText(rate(shown.dataset.r)));
  for (const shown of trends) setText(shown, trend(shown.dataset.trend));
  for (const shown of alarms) shown.dataset.is = at(status, shown.dataset.some) > 0 ? "some" : "none";
};

const warningList = document.querySelector("#list");
const warningCount = document.querySelector("#count");
const warningsBelow = document.querySelector("#more");
const title = document.title;
let paintedWarnings = null;

// The list has a fixed height. Says how many of its warnings are further down.
const countBelow = () => {
  const { bottom } = warningList.getBoundingClientRect();
  const isBelow = (item) => item.getBoundingClientRect().bottom > bottom;
  const below = [...warningList.children].filter(isBelow).length;
  setText(warningsBelow, below > 0 ? `${below} more below` : "");
};
warningList.addEventListener("scroll", countBelow);
addEventListener("resize", countBelow);
countBelow();

const paintWarnings = (status) => {
  const found = status.warnings;
  const painted = JSON.stringify(found);
  if (painted === paintedWarnings) return;
  paintedWarnings = painted;
  const items = found.map(({ level, about, what, remedy }) => {
    const item = document.createElement("li");
    item.dataset.level = level;
    const text = element("p", "");
    text.append(element("span", what, "what"), ". ", element("span", remedy, "remedy"));
    item.append(element("span", level, "level"), element("b", about), text);
    return item;
  });
  if (items.length === 0) {
    const item = element("li", "Nothing is wrong.");
    item.dataset.level = "none";
    items.push(item);
  }
  warningList.replaceChildren(...items);
  setText(warningCount, String(found.length));
  countBelow();
  const urgent = found.filter(({ level }) => level !== "notice").length;
  document.title = urgent > 0 ? `(${urgent}) ${title}` : title;
};

// The worst warning about a lane or an API is the first. A notice colours nothing.
const paintWarned = ({ warnings }) => {
  for (const shown of warned) {
    const worst = warnings.find(({ about }) => about === shown.dataset.about)?.level ?? "";
    const level = worst === "notice" ? "" : worst;
    if (shown.dataset.level !== level) shown.dataset.level = level;
  }
};

const paint = (status) => {
  paintValues(status);
  paintWarnings(status);
  paintWarned(status);
};
