// The way of one record, by its id.

const found = byId("found");

const row = (cells, name) => {
  const made = document.createElement("tr");
  made.append(...cells.map((cell) => element(name, cell)));
  return made;
};

const table = (titles, rows) => {
  const made = document.createElement("table");
  const head = made.createTHead();
  head.append(row(titles, "th"));
  made.createTBody().append(...rows.map((cells) => row(cells, "td")));
  return made;
};

const clock = (ms) => new Date(ms).toLocaleString();

// The choices of the router, one for each try.
const choicesTable = (choices) =>
  table(
    ["when", "rule", "policy", "lane", "why", "next best", "API", "scores"],
    choices.map(({ at_ms, rule, when, policy, lane, reason, runner_up, api, lanes }) => [
      clock(at_ms),
      when ? `${rule}: ${when}` : rule,
      policy,
      lane ?? "none: the disk took it",
      reason,
      runner_up ?? NONE,
      api,
      lanes.map(({ lane: name, score }) => `${name} ${format(score, "score")}`).join(", ") || NONE,
    ]),
  );

const STEPS = {
  accepted: "accepted",
  confirmed: "confirmed: its client has a receipt",
  spooled: "on disk: its client has a receipt",
  posted: "POSTed",
  delivered: "delivered: the API has it",
  parked: "parked until its next try",
  dead: "a dead letter",
};

// To the thousandth of a second.
const moment = (ms) => `${new Date(ms).toLocaleTimeString()}.${String(Math.floor(ms % 1000)).padStart(3, "0")}`;

// The steps of the record, each with the time since the first.
const stepsTable = (steps) =>
  table(
    ["when", "after", "step", "lane", "took", "answer"],
    steps.map(({ at_ms, what, lane, took_ms, status }) => [
      moment(at_ms),
      `${short(at_ms - steps[0].at_ms)} ms`,
      STEPS[what],
      lane ?? NONE,
      took_ms === null ? NONE : format(took_ms, "ms"),
      what === "posted" ? String(status ?? "none") : NONE,
    ]),
  );

const findRecord = async (id) => {
  // What passes is not to come in its place.
  passing?.close();
  passing = null;
  const parts = [];
  try {
    const { choices, steps } = await ask(`explain?id=${encodeURIComponent(id)}`);
    if (steps.length > 0) parts.push(element("h3", "Its way"), stepsTable(steps));
    if (choices.length > 0) parts.push(element("h3", "Why it took it"), choicesTable(choices));
  } catch (why) {
    parts.push(element("p", why.message));
  }
  for (const parked of [false, true]) {
    const told = await ask(`dead?parked=${parked}&limit=10&id=${encodeURIComponent(id)}`);
    const letters = told[parked ? "parked" : "dead"];
    if (letters.length === 0) continue;
    parts.push(element("h3", parked ? "It is parked" : "It is a dead letter"), ...letters.map(letterDetails));
  }
  found.replaceChildren(...parts);
};

const showWay = (id) => {
  byId("find-id").value = id;
  tryTo(() => findRecord(id));
};

byId("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = byId("find-id").value.trim();
  if (id !== "") showWay(id);
});

// The next records that pass: so many, or for so long. Their stream is open no longer than that.
const NEXT_SHOWN = 12;
const NEXT_WITHIN = 5000;
let passing = null;

// The button that shows the way of the record of that id.
const idButton = (id) => {
  const button = element("button", id);
  button.type = "button";
  button.addEventListener("click", () => showWay(id));
  return button;
};

const showNext = () => {
  passing?.close();
  const records = [];
  const source = new EventSource("api/tap");
  passing = source;
  const rows = table(["record", "when", "lane", "answer", "as POSTed"], []);
  const end = () => {
    source.close();
    clearTimeout(late);
  };
  const late = setTimeout(() => {
    end();
    if (records.length === 0 && source === passing) found.replaceChildren(element("p", `No record has passed within ${time(NEXT_WITHIN / 1000)}.`));
  }, NEXT_WITHIN);
  found.replaceChildren(element("p", "Waits for the next records."));
  source.addEventListener("error", () => {
    end();
    if (records.length === 0 && source === passing) found.replaceChildren(element("p", "The node shows no records: it is away, or shows them to too many others."));
  });
  source.addEventListener("record", ({ data }) => {
    const { id, at_ms, lane, status } = JSON.parse(data);
    // As it was sent: a number that JavaScript reads and writes again may be another one.
    const [, record] = data.split(/,"record":(.*)}$/);
    if (source !== passing || records.length === NEXT_SHOWN) return;
    if (records.length === 0) found.replaceChildren(rows);
    records.push(id);
    const shown = row(["", moment(at_ms), lane, String(status), record.slice(0, 200)], "td");
    shown.firstChild.append(idButton(id));
    rows.tBodies[0].append(shown);
    if (records.length === NEXT_SHOWN) end();
  });
};
byId("find-next").addEventListener("click", showNext);
