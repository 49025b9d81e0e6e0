// The changes as they come.

const changeList = document.querySelector("#changes");
const CHANGES_SHOWN = 100;

// A change in words.
const told = ({ what, at_ms, lane, url, actor, retry_in_s, ...members }) => {
  const about = [what, lane ?? url ?? actor].filter(Boolean).join(" ");
  const parts = Object.entries(members).filter(([, value]) => value !== null && value !== false);
  const words = parts.map(([name, value]) => {
    if (typeof value === "number") value = Number(value.toFixed(1));
    return value === true ? name : `${name.replaceAll("_", " ")} ${value}`;
  });
  if (typeof retry_in_s === "number") words.push(`next try in ${time(retry_in_s)}`);
  return `${about}: ${words.join(", ")}`;
};

// The parts of a status that a change is about.
const changedParts = (status, { what, lane, url }) => {
  if (what === "lane") return status.lanes.filter((known) => known.lane === lane);
  if (what === "api") return [status.api, ...Object.values(status.apis)].filter((known) => known.url === url);
  return [];
};

const addChange = (change) => {
  if (changeList.dataset.begun === undefined) changeList.replaceChildren();
  changeList.dataset.begun = "";
  const item = document.createElement("li");
  const when = element("time", new Date(change.at_ms).toLocaleTimeString());
  when.dateTime = new Date(change.at_ms).toISOString();
  item.append(when, element("span", told(change)));
  changeList.prepend(item);
  while (changeList.children.length > CHANGES_SHOWN) changeList.lastChild.remove();
  // A state is on the page at once, and not with the next status.
  const status = statuses.at(-1);
  if (!status) return;
  const { state, last_error, retry_in_s, draining } = change;
  for (const part of changedParts(status, change)) Object.assign(part, { state, last_error, retry_in_s, draining });
  paintValues(status);
};
