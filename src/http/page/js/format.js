// The values of a status as text, by the rules of `format.rs`.

const NONE = "–";

const group = (number) => {
  const plain = Math.abs(number).toFixed(0).replace(/\B(?=(\d{3})+$)/g, ",");
  return number < 0 && plain !== "0" ? `-${plain}` : plain;
};

const short = (number) => {
  if (number < 9.995) return number.toFixed(2);
  return number < 99.95 ? number.toFixed(1) : group(number);
};

const time = (seconds) => {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 99.5) return `${group(seconds)} s`;
  if (seconds < 5400) return `${group(seconds / 60)} min`;
  if (seconds < 172800) return `${group(seconds / 3600)} h`;
  return `${group(seconds / 86400)} d`;
};

const bytes = (size) => {
  const units = ["B", "KiB", "MiB", "GiB"];
  let at = 0;
  for (; size >= 1024 && at < units.length - 1; at += 1) size /= 1024;
  return `${size.toFixed(at === 0 ? 0 : 1)} ${units[at]}`;
};

const rateText = (rate) => {
  if (rate === null) return `${NONE}/s`;
  return `${rate > 0 && rate < 9.95 ? rate.toFixed(1) : group(rate)}/s`;
};

const NUMBERS = {
  text: group,
  count: group,
  time,
  ms: (number) => (number === 0 ? NONE : `${short(number)} ms`),
  percent: (number) => `${(number * 100).toFixed(0)} %`,
  bytes,
  score: short,
  rate: rateText,
};

const format = (value, name) => {
  if (typeof value === "number") return NUMBERS[name](value);
  if (typeof value === "boolean" && name === "text") return value ? "yes" : "no";
  return typeof value === "string" && value !== "" && name === "text" ? value : NONE;
};
