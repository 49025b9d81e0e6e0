// Dead letters and parked records: a query, a plan with its count, and a run that can be cancelled.

// Letters on the page. The plan counts, and the run takes, all that match.
const LETTERS_SHOWN = 200;
// With no more than these, the page shows them unasked, and again when their number has changed.
const UNASKED_MAX = 10000;
const UNASKED_EVERY = 10000;
// Records of one order, so that a run can tell where it is.
const RUN_STEP = 500;

const letterList = byId("letter-list");
// The query on the page, as a filter of the node; null if the form says another one by now.
let plan = null;
// Counts the queries and the changes of the form, to tell an answer that comes too late.
let queryNumber = 0;
// One run at a time, and no other query meanwhile.
let isRunning = false;
// Somebody has used the form. Until then the page asks by itself.
let isUsed = false;
let unasked = { count: 0, at: -Infinity };
let isCancelled = false;

// A word that a shell takes as it is.
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// The URL of a letter's API; undefined if the node does not say, or does not know that API.
const urlOf = (name) => {
  const status = statuses.at(-1);
  const isOnly = name === "default" && Object.keys(status?.apis ?? {}).length === 0;
  return (isOnly ? status?.api.url : status?.apis[name]?.url) || undefined;
};

const curlOf = ({ id, record }, url) =>
  `curl ${quoted(url)} -H 'Content-Type: application/json' -H ${quoted(`Idempotency-Key: ${id}`)} --data-binary ${quoted(record)}`;

// The button that copies a letter's curl line. Where a page may not copy, it shows the line.
const curlButton = (letter, url) => {
  const line = curlOf(letter, url);
  const copies = navigator.clipboard !== undefined;
  const button = element("button", copies ? "Copy as curl" : "Show as curl");
  button.type = "button";
  button.addEventListener("click", () => tryTo(async () => {
    if (!copies) {
      button.replaceWith(element("pre", line));
      return;
    }
    await navigator.clipboard.writeText(line);
    announce("The curl line is copied");
  }));
  return button;
};

// The button that shows the way of a letter.
const wayButton = ({ id }) => {
  const button = element("button", "Its way");
  button.type = "button";
  button.addEventListener("click", () => {
    byId("find-id").value = id;
    byId("find").requestSubmit();
    byId("find-id").focus();
  });
  return button;
};

const titled = (title, ...parts) => {
  const made = document.createElement("div");
  made.append(element("h3", title), ...parts);
  return made;
};

// The record, its attempts and the API's answer side by side.
const letterDetails = (letter) => {
  const made = element("div", "", "letter");
  const status = letter.status ?? "no answer";
  const dates = [
    `accepted ${letter.accepted_ms ? clock(letter.accepted_ms) : NONE}`,
    letter.dead_ms ? `dead ${clock(letter.dead_ms)}` : "",
    letter.next_try_ms ? `next try ${clock(letter.next_try_ms)}` : "",
    `POSTs: ${letter.attempts}, ${letter.given_up ? "given up" : "not given up"}`,
  ];
  const facts = document.createElement("ul");
  facts.append(...dates.filter(Boolean).map((date) => element("li", date)));
  const url = urlOf(letter.api);
  made.append(
    // As it came: a number that JavaScript reads and writes again may be another one.
    titled("Record", element("pre", letter.record), ...(url ? [curlButton(letter, url)] : [])),
    titled("Attempts", facts, wayButton(letter)),
    titled(`Answer of the API: ${status}`, element("pre", letter.answer || NONE)),
  );
  return made;
};

// When it died; of a parked record, how long it waits, and its next try.
const letterTime = ({ accepted_ms, dead_ms, next_try_ms }, now) => {
  if (!next_try_ms) return dead_ms ? clock(dead_ms) : NONE;
  const waits = accepted_ms ? `${time((now - accepted_ms) / 1000)}, ` : "";
  return `${waits}next try ${new Date(next_try_ms).toLocaleTimeString()}`;
};

const letterItem = (letter, parked, now) => {
  const item = document.createElement("li");
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  const texts = [letter.id, letter.lane || NONE, String(letter.status ?? "no answer"), letterTime(letter, now)];
  summary.append(...texts.map((text) => element("span", text)), element("span", letter.answer, "answer"));
  details.append(summary);
  // Its record is asked for when somebody wants to see it.
  details.addEventListener("toggle", () => tryTo(async () => {
    if (!details.open || details.children.length > 1) return;
    const told = await ask(`dead?parked=${parked}&limit=1&id=${encodeURIComponent(letter.id)}`);
    const [whole] = told.dead ?? told.parked;
    details.append(whole ? letterDetails(whole) : element("p", "It is not there any more."));
  }));
  item.append(details);
  return item;
};

const readQuery = () => {
  const fields = Object.fromEntries(new FormData(byId("query")));
  const filter = {};
  if (fields.lane) filter.lane = fields.lane;
  if (fields.text) filter.text = fields.text;
  if (fields.status) filter.status = Number(fields.status);
  if (fields.given_up) filter.given_up = fields.given_up === "true";
  if (fields.since_ms) filter.since_ms = new Date(fields.since_ms).getTime();
  return { parked: fields.parked === "true", api: fields.api || undefined, filter };
};

const canRun = (can) => {
  for (const id of ["replay", "drop"]) if (byId(id)) byId(id).disabled = !can;
};

// No order goes by a query that the form does not say any more.
const forgetPlan = (text) => {
  queryNumber += 1;
  plan = null;
  canRun(false);
  if (!isRunning) setText(byId("plan"), text);
};

// A query in words.
const queryWords = ({ parked, api, filter }) => {
  const words = [
    api && `of API ${api}`,
    filter.lane && `of lane ${filter.lane}`,
    filter.given_up !== undefined && (filter.given_up ? "given up" : "refused"),
    filter.status !== undefined && `with status ${filter.status}`,
    filter.since_ms !== undefined && `since ${clock(filter.since_ms)}`,
    filter.text && `with the text “${filter.text}”`,
  ].filter(Boolean);
  const what = parked ? "parked records" : "dead letters";
  return words.length > 0 ? `${what} ${words.join(", ")}` : `all ${what}`;
};

const showLetters = async () => {
  const { parked, api, filter } = readQuery();
  const query = new URLSearchParams({ parked, records: false, limit: LETTERS_SHOWN, ...(api && { api }), ...filter });
  forgetPlan("Asking the node.");
  const number = queryNumber;
  let told;
  try {
    told = await ask(`dead?${query}`);
  } catch (why) {
    if (number !== queryNumber) return;
    forgetPlan("The node gave no answer: show it again.");
    throw why;
  }
  if (number !== queryNumber) return;
  const letters = told[parked ? "parked" : "dead"];
  // What dies after this moment is no part of the plan.
  plan = { parked, api, filter: { ...filter, until_ms: told.at_ms }, count: told.matching };
  const what = parked ? "parked records" : "dead letters";
  const shown = letters.length < told.matching ? `; the oldest ${group(letters.length)} are shown` : "";
  setText(byId("plan"), `${group(told.matching)} of ${group(told.total)} ${what} match${shown}.`);
  letterList.replaceChildren(...letters.map((letter) => letterItem(letter, parked, told.at_ms)));
  setText(byId("letter-time"), parked ? "has waited" : "dead since");
  canRun(told.matching > 0);
};

// Sends the orders of a run, and says how far it came. Cancelled, it stops after the step under way.
const runSteps = async (action, verb, what, { parked, api, filter, count }) => {
  const progress = byId("progress");
  progress.max = count;
  let done = 0;
  try {
    while (done < count && !isCancelled) {
      const limit = Math.min(RUN_STEP, count - done);
      const told = await order(`dead/${action}`, { parked, api, filter, limit });
      const step = told.replayed ?? told.dropped;
      if (step === 0) break;
      done += step;
      progress.value = done;
      setText(byId("plan"), `${group(done)} of ${what}: ${action} is running.`);
    }
    const end = isCancelled ? "cancelled after" : "done:";
    announce(`${verb} ${end} ${group(done)} of ${group(count)}`);
  } catch (why) {
    // A step without an answer may have been done all the same.
    announce(`${verb} stopped after ${group(done)} of ${group(count)}: ${why.message}; the last step may have been done`);
  }
};

// Shows what is dead, or else what is parked, until somebody asks.
const showUnasked = ({ ledger: { dead, parked } }) => {
  const count = dead > 0 ? dead : parked;
  const isRead = letterList.contains(document.activeElement) || letterList.querySelector("[open]") !== null;
  // What is parked gets older.
  const hasChanged = count !== unasked.count || dead === 0;
  const isDue = hasChanged && performance.now() - unasked.at >= UNASKED_EVERY;
  if (isUsed || isRead || !isDue || count === 0 || count > UNASKED_MAX) return;
  unasked = { count, at: performance.now() };
  byId("query").elements.parked.value = String(dead === 0);
  showLetters().catch(() => {});
};

const runPlan = async (action) => {
  if (plan === null || isRunning) return;
  isUsed = true;
  const asked = plan;
  const verb = action === "replay" ? "Replay" : "Drop";
  const what = `${group(asked.count)} ${asked.parked ? "parked records" : "dead letters"}`;
  const text = action === "replay" ? "They are sent to the API again, by any lane." : "They are removed for good. This cannot be undone.";
  const title = `${verb} ${queryWords(asked)}?`;
  isRunning = true;
  try {
    if (!(await question({ title, text: `${group(asked.count)} match. ${text}`, yes: `${verb} ${what}`, isFinal: action === "drop" }))) return;
    isCancelled = false;
    forgetPlan("");
    for (const id of ["progress", "cancel"]) byId(id).hidden = false;
    await runSteps(action, verb, what, asked);
  } finally {
    isRunning = false;
    for (const id of ["progress", "cancel"]) byId(id).hidden = true;
    byId("progress").value = 0;
  }
  // The end of the run stays said: the line of the plan tells if this fails.
  await showLetters().catch(() => {});
};

byId("query").addEventListener("submit", (event) => {
  event.preventDefault();
  isUsed = true;
  if (!isRunning) tryTo(showLetters);
});
for (const change of ["input", "change"]) {
  byId("query").addEventListener(change, () => {
    isUsed = true;
    forgetPlan("The query is another one now: show it.");
  });
}
for (const action of ["replay", "drop"]) byId(action)?.addEventListener("click", () => tryTo(() => runPlan(action)));
byId("cancel").addEventListener("click", () => (isCancelled = true));

// From letter to letter.
letterList.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step === undefined) return;
  const summaries = [...letterList.querySelectorAll("summary")];
  const next = summaries[summaries.indexOf(document.activeElement) + step];
  if (next) {
    event.preventDefault();
    next.focus();
  }
});
