// Orders to lanes: one question before, and one way back after.

const UNDO_FOR = 30000;

const byId = (id) => document.getElementById(id);

const ask = async (path) => {
  const answer = await fetch(`api/${path}`);
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.detail ?? `The node answered ${answer.status}`);
  return told;
};

const order = async (path, body = {}) => {
  const answer = await fetch(`api/${path}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.detail ?? `The node answered ${answer.status}`);
  return told;
};

// Says what was done. `undo` takes it back.
let saidUntil = null;
const announce = (text, undo) => {
  clearTimeout(saidUntil);
  setText(byId("said-text"), text);
  byId("said-undo").hidden = !undo;
  byId("said-undo").onclick = undo ?? null;
  byId("said").hidden = false;
  saidUntil = setTimeout(() => (byId("said").hidden = true), UNDO_FOR);
};

// Asks once. Resolves to the number in the field, or to true; to null if the answer is no. `number`
// is null if the field is to be empty. What cannot be undone needs more than one Enter.
const question = ({ title, text, yes, number, isFinal = false }) =>
  new Promise((resolve) => {
    const dialog = byId("question");
    const field = byId("question-number");
    setText(byId("question-title"), title);
    setText(byId("question-text"), text);
    setText(byId("question-yes"), yes);
    byId("question-field").hidden = number === undefined;
    field.value = number ?? "";
    let answer = null;
    const agree = () => {
      if (number !== undefined && (field.value === "" || !field.checkValidity())) {
        field.reportValidity();
        return;
      }
      answer = number === undefined ? true : field.valueAsNumber;
      dialog.close();
    };
    byId("question-yes").onclick = agree;
    byId("question-no").onclick = () => dialog.close();
    field.onkeydown = (event) => {
      if (event.key !== "Enter") return;
      // It would press the button that has the focus once the dialog is closed.
      event.preventDefault();
      agree();
    };
    dialog.addEventListener("close", () => resolve(answer), { once: true });
    dialog.showModal();
    const first = isFinal ? byId("question-no") : byId("question-yes");
    (number === undefined ? first : field).focus();
  });

// An Enter that is still held from the button before is no answer.
byId("question").addEventListener(
  "keydown",
  (event) => {
    if (!event.repeat || event.key !== "Enter") return;
    event.preventDefault();
    event.stopPropagation();
  },
  true,
);

const EFFECTS = {
  pause: "It publishes and receives nothing and disconnects. What its broker holds waits there; new records go by other lanes, or wait on disk.",
  drain: "It takes no new records, stays connected, and delivers what its broker holds.",
  resume: "It takes records again.",
  restart: "It connects anew. No record is lost. A pause ends, a drain does not.",
  weight: "With the policies that read weights, it takes that many parts of the records. It counts until the next reload that changes it.",
};

// The order that brings a lane back to what it was; null if its status does not tell.
const orderOf = (lane) => {
  if (lane.state === "paused") return "pause";
  // A restart ends no drain, so the lane may drain.
  if (lane.ordered?.action === "restart") return null;
  return lane.ordered?.action === "drain" ? "drain" : "resume";
};

const tryTo = async (action) => {
  try {
    await action();
  } catch (why) {
    announce(`Not done: ${why.message}`);
  }
};

// The lanes as they are now; null if the node does not say, for then nothing can be undone.
const lanesNow = async (lane) => {
  try {
    const { lanes } = await ask("status");
    return lanes.filter((known) => !lane || known.lane === lane);
  } catch {
    return null;
  }
};

const orderWeight = async (lane) => {
  const shown = statuses.at(-1)?.lanes.find((known) => known.lane === lane)?.weight ?? null;
  const weight = await question({ title: `Weight of ${lane}`, text: EFFECTS.weight, yes: "Set", number: shown });
  if (weight === null) return;
  const before = (await lanesNow(lane))?.[0]?.weight;
  await order(`lanes/${lane}/weight`, { weight });
  const undo = () => tryTo(async () => {
    await order(`lanes/${lane}/weight`, { weight: before });
    announce(`The weight of ${lane} is ${before} again`);
  });
  announce(`The weight of ${lane} is ${weight}`, before === undefined ? undefined : undo);
};

// Brings each lane back. One that fails keeps no other from it.
const undoOrder = async (action, ways) => {
  const failures = [];
  for (const { lane, back } of ways) {
    try {
      await order(`lanes/${lane}/${back}`);
    } catch (why) {
      failures.push(`${lane}: ${why.message}`);
    }
  }
  const names = ways.map(({ lane }) => lane).join(", ");
  announce(failures.length > 0 ? `Not undone: ${action} ${failures.join("; ")}` : `Undone: ${action} ${names}`);
};

const orderLane = async (lane, action) => {
  if (action === "weight") return orderWeight(lane);
  const to = lane ?? "all lanes";
  const verb = `${action[0].toUpperCase()}${action.slice(1)} ${to}`;
  if ((await question({ title: `${verb}?`, text: EFFECTS[action], yes: verb })) === null) return;
  const before = await lanesNow(lane);
  await order(lane ? `lanes/${lane}/${action}` : `lanes/${action}`);
  const ways = (before ?? []).map((known) => ({ lane: known.lane, back: orderOf(known) }));
  // Of a restart, only the end of a pause can be taken back.
  const isRestart = action === "restart";
  const undone = ways.filter(({ back }) => (isRestart ? back === "pause" : back !== null));
  const namesOf = (some) => some.map((way) => way.lane).join(", ");
  const unknown = isRestart ? "" : namesOf(ways.filter(({ back }) => back === null));
  const ended = isRestart && undone.length > 0 ? `; no longer paused: ${namesOf(undone)}` : "";
  const left = unknown === "" ? "" : `; no Undo for ${unknown}: restarted before, and may have drained`;
  announce(`Done: ${action} ${to}${ended}${left}`, undone.length > 0 ? () => undoOrder(action, undone) : undefined);
};

for (const button of all("[data-order]")) {
  button.addEventListener("click", () => tryTo(() => orderLane(button.dataset.lane, button.dataset.order)));
}
byId("said-close").addEventListener("click", () => (byId("said").hidden = true));
