// One stream of events for all tabs of a browser: it has six connections to a node at most, and each
// stream holds one. The tab that has the lock leads: it keeps a stream, and passes on what it hears.
// Any other tab has a stream of its own only until it hears the leader.

const SHARED_NAME = "waypost-events";
const EVENTS = ["status", "change", "missed"];
const AGAIN_AFTER = 1000;
// A leader that is not heard for longer has no stream, or is gone.
const LEADER_SILENT_AFTER = 2500;

// The run of the node, and the number of the last change, in the id of an event.
const placeOf = (id) => {
  const at = id.lastIndexOf("-");
  return { run: id.slice(0, at), number: Number(id.slice(at + 1)) };
};

// Calls `deliver` with the name and the data of each event, while it is open.
const sharedStream = (deliver) => {
  // Without TLS, only a page of this machine may have a lock. Without one, each tab has its stream.
  const canShare = navigator.locks !== undefined;
  let source = null;
  let again = null;
  let lastId = null;
  let heardOwn = 0;
  let heardLeader = -Infinity;
  // While it is open: its channel, and the way to leave.
  let member = null;

  const take = ({ name, data, id }) => {
    if (id) lastId = id;
    deliver(name, data);
  };

  const closeSource = () => {
    clearTimeout(again);
    source?.close();
    source = null;
  };

  const openSource = () => {
    closeSource();
    const from = lastId === null ? "" : `?after=${encodeURIComponent(lastId)}`;
    const opened = new EventSource(`api/events${from}`);
    source = opened;
    for (const name of EVENTS) {
      opened.addEventListener(name, ({ data, lastEventId }) => onOwn({ name, data, id: lastEventId }));
    }
    opened.addEventListener("error", () => {
      // A browser comes back by itself unless it got an answer that is no stream.
      if (opened === source && opened.readyState === EventSource.CLOSED) again = setTimeout(openSource, AGAIN_AFTER);
    });
  };

  const onOwn = (event) => {
    heardOwn = performance.now();
    take(event);
    if (member?.leads) member.channel.postMessage(event);
    // All changes of the status have come before it, so nothing is missed from here on.
    else if (event.name === "status" && heardOwn - heardLeader < LEADER_SILENT_AFTER) closeSource();
  };

  // Events behind the last one that this tab has heard. Of anything else, its own stream tells.
  const isNext = ({ name, id }) => {
    if (!id || lastId === null) return false;
    const last = placeOf(lastId);
    const { run, number } = placeOf(id);
    return run === last.run && number === last.number + (name === "change" ? 1 : 0);
  };

  const onLeader = (event) => {
    heardLeader = performance.now();
    if (source !== null) return;
    if (isNext(event)) take(event);
    else openSource();
  };

  const lead = (as) =>
    new Promise((stepDown) => {
      if (as !== member) return stepDown();
      as.leads = true;
      heardOwn = performance.now();
      as.stepDown = stepDown;
      if (source === null) openSource();
    });

  const stand = (as) => {
    const request = navigator.locks.request(SHARED_NAME, { signal: as.leaving.signal }, () => lead(as));
    request.catch(() => {});
  };

  const isSilent = (since) => performance.now() - since > LEADER_SILENT_AFTER;

  setInterval(() => {
    if (member === null) return;
    if (source === null && isSilent(heardLeader)) openSource();
    // Its stream may have no connection. The next one in turn may have a stream that has.
    if (member.leads && isSilent(heardOwn)) {
      member.leads = false;
      member.stepDown();
      stand(member);
    }
  }, 500);

  const close = () => {
    closeSource();
    if (member === null) return;
    const { channel, leaving, stepDown } = member;
    member = null;
    channel.close();
    leaving.abort();
    stepDown();
  };

  const open = () => {
    close();
    openSource();
    if (!canShare) return;
    member = { channel: new BroadcastChannel(SHARED_NAME), leaving: new AbortController(), leads: false, stepDown: () => {} };
    member.channel.onmessage = ({ data }) => onLeader(data);
    stand(member);
  };

  return { open, close };
};
