// The charts: one range of the node's history, and one cursor over all of them.

const SVG = "http://www.w3.org/2000/svg";
// Each range: its intervals, and how often it is asked for. The shortest grows with each status.
const RANGES = {
  "5m": { most: 300, every: Infinity },
  "1h": { most: 360, every: 10000 },
  all: { most: 0, every: 60000 },
};
// Fewer intervals than these do not fill a chart.
const WIDE = 60;
const ASKED_AGAIN = 2000;
// More seconds that were not heard of are asked for.
const HEARD_STEPS = 3;

const charts = all("[data-chart]");
const recents = all("[data-h]");
const cursorField = byId("cursor");

let range = "5m";
// The intervals of the range that the node has told.
let series = null;
let asked = 0;
let askedAt = -Infinity;
// How many intervals before the last one the cursor is; null without a cursor.
let back = null;

const lengthOf = () => series?.node.accepted_per_s.length ?? 0;
const widthOf = () => Math.max(RANGES[range].most, lengthOf(), WIDE);

// Puts each value of an interval behind those before.
const append = (columns, one) => {
  for (const [name, value] of Object.entries(one)) {
    const known = columns[name];
    if (typeof value === "number" && Array.isArray(known)) {
      known.push(value);
      if (known.length > RANGES[range].most) known.shift();
    } else if (typeof known === "object" && known !== null) {
      append(known, value);
    }
  }
};

// A line through the values. Where no record passed, there is no time, and so no line.
const pathOf = (values, highest, isTime, { width, height }) => {
  const step = width / Math.max(widthOf() - 1, 1);
  let isDrawn = false;
  const parts = values.map((value, place) => {
    const follows = isDrawn;
    isDrawn = !isTime || value > 0;
    if (!isDrawn) return "";
    const x = width - (values.length - 1 - place) * step;
    const y = height - 1 - (value / highest) * (height - 2);
    // One point alone is a dash.
    const begin = follows ? "L" : `M${(x - step).toFixed(2)},${y.toFixed(1)}L`;
    return `${begin}${x.toFixed(2)},${y.toFixed(1)}`;
  });
  return parts.join("");
};

const paintChart = (chart) => {
  const { width, height } = chart.viewBox.baseVal;
  const name = chart.dataset.f;
  const lines = chart.dataset.chart.split(" ").map((pointer) => at(series, pointer) ?? []);
  const highest = Math.max(...lines.flat(), 0.001);
  lines.forEach((line, number) => {
    const drawn = chart.children[number] ?? chart.appendChild(document.createElementNS(SVG, "path"));
    drawn.setAttribute("d", pathOf(line, highest, name === "ms", { width, height }));
  });
  const cursor = chart.querySelector("line") ?? chart.appendChild(document.createElementNS(SVG, "line"));
  const x = width - ((back ?? 0) * width) / Math.max(widthOf() - 1, 1);
  for (const [key, place] of Object.entries({ x1: x, x2: x, y1: 0, y2: back === null ? 0 : height })) cursor.setAttribute(key, place);
  const now = lines.map((line) => format(line.at(-1), name)).join(" and ");
  const label = `${chart.dataset.name}: now ${now}, highest ${format(highest, name)} in ${time(lengthOf() * series.step_s)}`;
  const peak = chart.parentElement.querySelector("[data-peak]");
  if (peak) setText(peak, format(Math.max(...lines.flat(), 0), name));
  if (chart.getAttribute("aria-label") !== label) chart.setAttribute("aria-label", label);
};

const paintCursor = () => {
  const place = lengthOf() - 1 - (back ?? 0);
  for (const shown of recents) setText(shown, format(at(series, shown.dataset.h)?.[place], shown.dataset.f));
  const ago = (back ?? 0) * series.step_s;
  const text = back === null ? "now" : `${new Date(series.at_ms - ago * 1000).toLocaleTimeString()}, ${time(ago)} ago`;
  setText(byId("cursor-time"), text);
  cursorField.max = widthOf() - 1;
  cursorField.value = widthOf() - 1 - (back ?? 0);
  cursorField.setAttribute("aria-valuetext", text);
  document.body.dataset.cursor = back === null ? "now" : "past";
};

const paintCharts = () => {
  if (series === null) return;
  charts.forEach(paintChart);
  paintCursor();
};

const moveCursor = (to) => {
  if (to === back || series === null) return;
  back = to;
  paintCharts();
};

const askHistory = async () => {
  asked += 1;
  askedAt = performance.now();
  const number = asked;
  try {
    const told = await ask(`history?range=${range}`);
    if (number !== asked) return;
    series = told;
    paintCharts();
  } catch {
    // A status asks again.
  }
};

const forgetHistory = () => {
  series = null;
};

// The last interval, as a status tells it.
const followHistory = (recent) => {
  const since = performance.now() - askedAt;
  const steps = series === null ? Infinity : Math.round((recent.at_ms - series.at_ms) / 1000);
  if (range === "5m" && steps <= HEARD_STEPS) {
    // It was told before.
    if (steps <= 0) return;
    for (let step = 0; step < steps; step += 1) append(series, recent);
    series.at_ms = recent.at_ms;
    paintCharts();
  } else if (since > (range === "5m" || series === null ? ASKED_AGAIN : RANGES[range].every)) {
    askHistory();
  }
};

for (const button of all("[data-range]")) {
  button.addEventListener("click", () => {
    range = button.dataset.range;
    for (const other of all("[data-range]")) other.setAttribute("aria-pressed", String(other === button));
    forgetHistory();
    back = null;
    askHistory();
  });
}
for (const chart of charts) {
  chart.addEventListener("pointermove", ({ clientX }) => {
    const { left, width } = chart.getBoundingClientRect();
    const place = Math.round(((left + width - clientX) / width) * (widthOf() - 1));
    moveCursor(Math.min(Math.max(place, 0), Math.max(lengthOf() - 1, 0)));
  });
  chart.addEventListener("pointerleave", () => moveCursor(null));
}
cursorField.addEventListener("input", () => {
  const place = widthOf() - 1 - cursorField.valueAsNumber;
  moveCursor(place === 0 ? null : Math.min(place, Math.max(lengthOf() - 1, 0)));
});
cursorField.addEventListener("blur", () => moveCursor(null));
