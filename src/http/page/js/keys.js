// Keys for those who use no mouse. None while somebody writes.

const KEYS = {
  "/": () => byId("find-id").focus(),
  w: () => byId("list").focus(),
  d: () => byId("query").querySelector("select").focus(),
  c: () => byId("cursor").focus(),
  "?": () => byId("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  const isWriting = event.target.closest("input, select, textarea, dialog") !== null;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && isWriting) event.target.blur();
  const act = isWriting ? undefined : KEYS[event.key];
  if (act) {
    event.preventDefault();
    act();
  }
});
byId("help-close").addEventListener("click", () => byId("help").close());
document.body.dataset.scripts = "on";
