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

// Asks once. Resolves to the number in the field, or to true; to null if the answer is no.
const question = ({ title, text, yes, number }) =>
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
    (number === undefined ? byId("question-yes") : field).focus();
  });

const EFFECTS = {
  pause: "It publishes and receives nothing and disconnects. What its broker holds waits there; new records go by other lanes, or wait on disk.",
  drain: "It takes no new records, stays connected, and delivers what its broker holds.",
  resume: "It takes records again.",
  restart: "It connects anew. No record is lost.",
  weight: "With the policies that read weights, it takes that many parts of the records. It counts until the next reload that changes it.",
};

// The order that brings a lane back to what it is now.
const orderOf = (lane) => {
  if (lane.state === "paused") return "pause";
  return lane.ordered?.action === "drain" ? "drain" : "resume";
};

const tryTo = async (action) => {
  try {
    await action();
  } catch (why) {
    announce(`Not done: ${why.message}`);
  }
};

const orderLane = async (lane, action) => {
  const before = statuses.at(-1)?.lanes.filter((known) => !lane || known.lane === lane) ?? [];
  const to = lane ?? "all lanes";
  const verb = action[0].toUpperCase() + action.slice(1);
  const number = action === "weight" ? (before[0]?.weight ?? 1) : undefined;
  const title = action === "weight" ? `Weight of ${to}` : `${verb} ${to}?`;
  const yes = action === "weight" ? "Set" : `${verb} ${to}`;
  const answer = await question({ title, text: EFFECTS[action], yes, number });
  if (answer === null) return;
  if (action === "weight") {
    await order(`lanes/${lane}/weight`, { weight: answer });
    const undo = () => tryTo(async () => {
      await order(`lanes/${lane}/weight`, { weight: number });
      announce(`The weight of ${lane} is ${number} again`);
    });
    announce(`The weight of ${lane} is ${answer}`, undo);
    return;
  }
  await order(lane ? `lanes/${lane}/${action}` : `lanes/${action}`);
  const undo = () => tryTo(async () => {
    for (const known of before) await order(`lanes/${known.lane}/${orderOf(known)}`);
    announce(`Undone: ${action} ${to}`);
  });
  announce(`Done: ${action} ${to}`, action === "restart" ? undefined : undo);
};

for (const button of all("[data-order]")) {
  button.addEventListener("click", () => tryTo(() => orderLane(button.dataset.lane, button.dataset.order)));
}
byId("said-close").addEventListener("click", () => (byId("said").hidden = true));
