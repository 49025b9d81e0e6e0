// The last statuses of this run of the node, and what follows from two of them. Their number is
// bounded, so a page that stays open does not grow.

const KEPT = 60;
// Over how many seconds a rate and a trend are measured.
const RATE_OVER = 3;
const TREND_OVER = 20;
// A forecast needs as many seconds.
const TREND_FROM = 10;
// What was before a longer gap, as of a hidden tab, says nothing about now.
const GAP_MAX = 5;

let statuses = [];

const remember = (status) => {
  const last = statuses.at(-1);
  if (last && status.uptime_s === last.uptime_s) return;
  // A node that was started again counts from zero.
  const gap = last ? status.uptime_s - last.uptime_s : 0;
  if (gap < 0 || gap > GAP_MAX) forget();
  statuses.push(status);
  if (statuses.length > KEPT) statuses.shift();
};

const forget = () => {
  statuses = [];
};

// The value at a JSON pointer.
const at = (status, pointer) =>
  pointer
    .split("/")
    .slice(1)
    .reduce((value, key) => value?.[key.replaceAll("~1", "/").replaceAll("~0", "~")], status);

// The value at a pointer, or the sum of several. A pointer behind a minus is taken away.
const valueAt = (status, pointers) => {
  const parts = pointers.split(" ");
  if (parts.length === 1) return at(status, pointers);
  return parts.reduce((sum, part) => {
    const value = at(status, part.replace("-", "")) ?? 0;
    return part.startsWith("-") ? sum - value : sum + value;
  }, 0);
};

// How fast a value changes, by the second; null if fewer than `least` seconds are known.
const slope = (pointers, over, least) => {
  const last = statuses.at(-1);
  const first = statuses.findLast((status) => last.uptime_s - status.uptime_s >= over) ?? statuses[0];
  const seconds = last ? last.uptime_s - first.uptime_s : 0;
  if (seconds < least) return null;
  return (valueAt(last, pointers) - valueAt(first, pointers)) / seconds;
};

const rate = (pointers) => {
  const found = slope(pointers, RATE_OVER, 0.5);
  // Counters that are not read at the same moment may seem to go back.
  return found === null ? null : Math.max(0, found);
};

// How long until a number of records is gone.
const trend = (pointers) => {
  const now = valueAt(statuses.at(-1), pointers);
  const found = slope(pointers, TREND_OVER, TREND_FROM);
  if (now === 0) return "empty";
  if (found === null) return NONE;
  // Some are always on their way.
  const noise = pointers.includes("in_flight") ? Math.max(5, now / 20) : 1;
  if (Math.abs(found) * TREND_OVER < noise) return "steady";
  return found > 0 ? `growing, ${rateText(found)}` : `empty in ${time(now / -found)}`;
};

