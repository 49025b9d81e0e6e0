//! Supervision where time is the subject: the clock is simulated, and jumps to the next timer
//! whenever all actors wait.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use actix::{Actor, ActorContext as _, Addr, AsyncContext as _, Context, Handler, ResponseFuture};
use tokio::time::{Instant, sleep};
use waypost::{
    actors::{
        Drain, Ping, Supervised,
        slot::Slot,
        supervisor::{
            Action, BACKOFF_CAP, BACKOFF_FIRST, CRASHES_MAX, ChildId, CommandOutcome, DRAIN_MAX,
            Exit, HEALTHY, HEARTBEAT, LaneCommand, MISSES_MAX, START_MAX, Snapshot, State,
            Supervisor, SupervisorHandle, Thread, View, factory,
        },
    },
    config::Policy,
    lane_id::LaneId,
};

use crate::support::{eventually, live_lanes};

/// The behaviour of one run of a [`Probe`].
#[derive(Clone, Copy)]
enum Conduct {
    FailAtOnce,
    PanicAtOnce,
    /// Is up for so long, then fails.
    LiveFor(Duration),
    LivesOn,
    /// Is up, and answers no heartbeat.
    Freezes,
    /// Is up, and says that it makes no progress.
    Stuck,
    /// Is up, and never finishes.
    Lingers,
}

struct Probe {
    conduct: Conduct,
    supervisor: SupervisorHandle,
}

impl Actor for Probe {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        match self.conduct {
            Conduct::FailAtOnce => {
                self.supervisor.set_exit(Exit::Failed("broker away".into()));
                ctx.stop();
            }
            Conduct::PanicAtOnce => panic!("planted"),
            Conduct::LiveFor(time) => {
                self.supervisor.ready(None);
                ctx.run_later(time, |probe, ctx| {
                    probe
                        .supervisor
                        .set_exit(Exit::Failed("connection lost".into()));
                    ctx.stop();
                });
            }
            Conduct::LivesOn | Conduct::Freezes | Conduct::Stuck | Conduct::Lingers => {
                self.supervisor.ready(None);
            }
        }
    }
}

impl Supervised for Probe {
    const MAILBOX: usize = 16;
}

impl Handler<Ping> for Probe {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        match self.conduct {
            Conduct::Freezes => Box::pin(std::future::pending()),
            Conduct::Stuck => Box::pin(async { Err("backlog 412, no delivery".into()) }),
            _ => Box::pin(async { Ok(()) }),
        }
    }
}

impl Handler<Drain> for Probe {
    type Result = ();

    fn handle(&mut self, _: Drain, ctx: &mut Self::Context) {
        if !matches!(self.conduct, Conduct::Lingers) {
            self.supervisor.set_exit(Exit::Stopped);
            ctx.stop();
        }
    }
}

const PROBE: ChildId = ChildId::Lane(LaneId::Nats);
const NEIGHBOUR: ChildId = ChildId::Lane(LaneId::Grpc);

/// The times at which a child was started.
type Starts = Arc<Mutex<Vec<Instant>>>;

/// A supervisor over one probe, whose n-th life behaves as `conduct(n)` says, and a healthy
/// neighbour.
fn supervise(
    conduct: impl Fn(usize) -> Conduct + Send + Sync + 'static,
) -> (Addr<Supervisor>, Starts) {
    let starts = Starts::default();
    let kept = Arc::clone(&starts);
    let probe = factory(Slot::default(), move |supervisor| {
        let mut starts = kept.lock().unwrap();
        starts.push(Instant::now());
        Probe {
            conduct: conduct(starts.len() - 1),
            supervisor,
        }
    });
    let neighbour = factory(Slot::default(), |supervisor| Probe {
        conduct: Conduct::LivesOn,
        supervisor,
    });
    let children = vec![
        (PROBE, Thread::Current, probe),
        (NEIGHBOUR, Thread::Current, neighbour),
    ];
    (
        Supervisor::start(&live_lanes(Policy::RoundRobin), children),
        starts,
    )
}

async fn view(supervisor: &Addr<Supervisor>, child: ChildId) -> View {
    let views = supervisor.send(Snapshot).await.unwrap();
    views.into_iter().find(|view| view.child == child).unwrap()
}

fn gaps(starts: &Starts) -> Vec<Duration> {
    starts
        .lock()
        .unwrap()
        .windows(2)
        .map(|pair| pair[1] - pair[0])
        .collect()
}

/// Timers are exact to a millisecond.
const TICK: Duration = Duration::from_millis(2);

#[actix_rt::test]
async fn a_failing_actor_is_tried_for_ever_with_a_growing_capped_and_jittered_back_off() {
    tokio::time::pause();
    let (supervisor, starts) = supervise(|_| Conduct::FailAtOnce);
    sleep(Duration::from_mins(5)).await;
    let gaps = gaps(&starts);
    for (failures, gap) in gaps.iter().enumerate() {
        let ceiling = BACKOFF_FIRST
            .saturating_mul(2u32.saturating_pow(u32::try_from(failures).unwrap()))
            .min(BACKOFF_CAP);
        assert!(
            *gap <= ceiling + TICK,
            "gap {failures} is {gap:?}, over {ceiling:?}"
        );
    }
    // Full jitter: half the cap on average.
    assert!(
        (300..1500).contains(&gaps.len()),
        "{} restarts in five minutes",
        gaps.len()
    );
    let distinct = gaps.iter().collect::<std::collections::HashSet<_>>().len();
    assert!(
        distinct > gaps.len() / 4,
        "only {distinct} different delays"
    );
    let view = view(&supervisor, PROBE).await;
    assert_eq!(view.last_error.as_deref(), Some("broker away"));
    assert!(view.attempts >= 300, "{} attempts", view.attempts);
    assert_eq!(view.restarts, 0, "it was never up");
}

/// The lines that are logged on this thread, while the guard lives.
fn captured() -> (Arc<Mutex<Vec<u8>>>, tracing::subscriber::DefaultGuard) {
    let log = Arc::<Mutex<Vec<u8>>>::default();
    let kept = Arc::clone(&log);
    let lines = tracing_subscriber::fmt()
        .with_writer(move || Lines(Arc::clone(&kept)))
        .with_ansi(false)
        .without_time()
        .finish();
    (log, tracing::subscriber::set_default(lines))
}

struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn told(log: &Mutex<Vec<u8>>) -> Vec<String> {
    let text = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    let lines = text.lines().filter(|line| line.contains("lane=nats"));
    lines.map(str::to_owned).collect()
}

#[actix_rt::test]
async fn an_outage_is_told_once_then_each_minute_and_counts_from_its_beginning() {
    tokio::time::pause();
    let (log, _guard) = captured();
    let away_until = Instant::now() + Duration::from_secs(30 + 190);
    let (supervisor, _starts) = supervise(move |life| match life {
        0 => Conduct::LiveFor(Duration::from_secs(30)),
        _ if Instant::now() < away_until => Conduct::FailAtOnce,
        _ => Conduct::LivesOn,
    });
    sleep(Duration::from_secs(30 + 180)).await;
    let away = view(&supervisor, PROBE).await;
    assert!(
        away.since.elapsed() >= Duration::from_secs(179),
        "{:?}",
        away.since.elapsed()
    );
    assert_eq!(away.restarts, 1, "the one that was up");
    assert!(away.attempts > 100, "{} attempts", away.attempts);
    sleep(Duration::from_secs(20)).await;
    let up = view(&supervisor, PROBE).await;
    assert!(
        up.state == State::Up && up.since.elapsed() <= Duration::from_secs(10),
        "{up:?}"
    );
    let told = told(&log);
    let of = |text: &str| told.iter().filter(|line| line.contains(text)).count();
    assert_eq!(
        (of("lane is away"), of("lane is still away")),
        (1, 3),
        "{told:#?}"
    );
    assert_eq!((of("lane is up again"), told.len()), (1, 6), "{told:#?}");
    assert!(
        told[1].contains("WARN") && told[1].contains("connection lost"),
        "{told:#?}"
    );
    assert!(
        told[2].contains("away_s=60.") && told[2].contains("broker away"),
        "{told:#?}"
    );
    assert!(
        told[5].contains("INFO") && told[5].contains("away_s=19"),
        "{told:#?}"
    );
}

#[actix_rt::test]
async fn a_lane_that_comes_and_goes_is_told_once_a_minute() {
    tokio::time::pause();
    let (log, _guard) = captured();
    let (supervisor, starts) = supervise(|_| Conduct::LiveFor(Duration::from_millis(10)));
    sleep(Duration::from_secs(150)).await;
    let flaps = starts.lock().unwrap().len();
    let told = told(&log);
    assert!(flaps > 100 && told.len() <= 7, "{flaps}: {told:#?}");
    assert!(view(&supervisor, PROBE).await.restarts >= flaps as u64 - 1);
}

#[actix_rt::test]
async fn each_outage_of_a_lane_that_was_settled_is_told() {
    tokio::time::pause();
    let (log, _guard) = captured();
    let (_supervisor, _starts) = supervise(|_| Conduct::LiveFor(Duration::from_secs(15)));
    sleep(Duration::from_secs(55)).await;
    let told = told(&log);
    let away = told.iter().filter(|line| line.contains("lane is away"));
    assert_eq!(away.count(), 3, "{told:#?}");
}

#[actix_rt::test]
async fn the_back_off_starts_anew_after_a_healthy_minute() {
    tokio::time::pause();
    let (_supervisor, starts) = supervise(|life| match life {
        0..20 => Conduct::FailAtOnce,
        20 => Conduct::LiveFor(HEALTHY + Duration::from_secs(1)),
        _ => Conduct::LivesOn,
    });
    sleep(Duration::from_mins(3)).await;
    let gaps = gaps(&starts);
    assert_eq!(gaps.len(), 21);
    let after_health = gaps[20].saturating_sub(HEALTHY + Duration::from_secs(1));
    assert!(after_health <= BACKOFF_FIRST + TICK, "{after_health:?}");
}

#[actix_rt::test]
async fn five_panics_within_a_minute_take_the_actor_down_and_no_other() {
    tokio::time::pause();
    let (supervisor, starts) = supervise(|_| Conduct::PanicAtOnce);
    sleep(Duration::from_mins(10)).await;
    assert_eq!(starts.lock().unwrap().len(), CRASHES_MAX);
    let probe = view(&supervisor, PROBE).await;
    assert_eq!(probe.state, State::Down);
    assert_eq!(probe.last_error.as_deref(), Some("panicked: planted"));
    let neighbour = view(&supervisor, NEIGHBOUR).await;
    assert_eq!((neighbour.state, neighbour.restarts), (State::Up, 0));
    // An operator may give it another chance.
    let (lane, action) = (LaneId::Nats, Action::Resume);
    let sent = supervisor.send(LaneCommand { lane, action });
    assert_eq!(sent.await.unwrap(), CommandOutcome::Done);
    sleep(Duration::from_secs(1)).await;
    assert!(starts.lock().unwrap().len() > CRASHES_MAX);
}

#[actix_rt::test]
async fn panics_that_are_far_apart_are_forgiven() {
    tokio::time::pause();
    let (supervisor, starts) = supervise(|life| {
        if life % 2 == 0 {
            Conduct::PanicAtOnce
        } else {
            Conduct::LiveFor(HEALTHY)
        }
    });
    sleep(Duration::from_mins(30)).await;
    assert_ne!(view(&supervisor, PROBE).await.state, State::Down);
    assert!(starts.lock().unwrap().len() > 40);
}

#[actix_rt::test]
async fn an_actor_that_misses_its_heartbeats_is_restarted_and_the_reason_is_told() {
    tokio::time::pause();
    let (supervisor, starts) = supervise(|life| {
        if life == 0 {
            Conduct::Freezes
        } else {
            Conduct::LivesOn
        }
    });
    sleep((u32::from(MISSES_MAX) + 2) * HEARTBEAT).await;
    assert_eq!(starts.lock().unwrap().len(), 2);
    let probe = view(&supervisor, PROBE).await;
    assert_eq!((probe.state, probe.restarts), (State::Up, 1));
    assert_eq!(
        probe.last_error.as_deref(),
        Some("missed 2 heartbeats of 3s")
    );
    assert_eq!(view(&supervisor, NEIGHBOUR).await.restarts, 0);
}

/// In real time: the thread of the actor is blocked before it starts.
#[actix_rt::test]
async fn an_actor_whose_thread_is_blocked_is_started_on_another() {
    let blocked = Thread::spawn();
    let Thread::Arbiter(arbiter) = &blocked else {
        panic!("a thread")
    };
    let (unblock, wait) = std::sync::mpsc::channel::<()>();
    arbiter.spawn_fn(move || {
        // It fails once the other side is dropped.
        wait.recv().ok();
    });
    let starts = Arc::new(Mutex::new(0));
    let kept = Arc::clone(&starts);
    let slot = Slot::default();
    let probe = factory(slot.clone(), move |supervisor| {
        *kept.lock().unwrap() += 1;
        Probe {
            conduct: Conduct::LivesOn,
            supervisor,
        }
    });
    let lanes = live_lanes(Policy::RoundRobin);
    let supervisor = Supervisor::start(&lanes, vec![(PROBE, blocked.clone(), probe)]);
    eventually("it is up", 3 * START_MAX, async || {
        (view(&supervisor, PROBE).await.state == State::Up).then_some(())
    })
    .await;
    let probe = view(&supervisor, PROBE).await;
    assert_eq!(probe.last_error.as_deref(), Some("did not start in time"));
    // The first start has waited on that thread, and is none any more.
    drop(unblock);
    let (done, ended) = tokio::sync::oneshot::channel();
    arbiter.spawn_fn(move || {
        actix_rt::spawn(async move { done.send(()).ok() });
    });
    ended.await.expect("the thread goes on");
    assert_eq!(*starts.lock().unwrap(), 1);
    let running = slot.get().expect("it runs");
    assert_eq!(running.send(Ping).await.expect("it answers"), Ok(()));
}

/// In real time: a pause finds the actor in work that takes longer than a drain may.
#[actix_rt::test]
async fn an_actor_that_does_not_finish_in_time_keeps_its_thread() {
    let threads = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&threads);
    let probe = factory(Slot::default(), move |supervisor| {
        kept.lock().unwrap().push(std::thread::current().id());
        Probe {
            conduct: Conduct::Lingers,
            supervisor,
        }
    });
    let lanes = live_lanes(Policy::RoundRobin);
    let supervisor = Supervisor::start(&lanes, vec![(PROBE, Thread::spawn(), probe)]);
    let is = async |state| {
        eventually("the state", 3 * DRAIN_MAX, async || {
            (view(&supervisor, PROBE).await.state == state).then_some(())
        })
        .await;
    };
    let order = async |action| {
        let lane = LaneId::Nats;
        supervisor.send(LaneCommand { lane, action }).await.unwrap();
    };
    is(State::Up).await;
    order(Action::Restart).await;
    eventually("it has started again", 3 * DRAIN_MAX, async || {
        (threads.lock().unwrap().len() == 2).then_some(())
    })
    .await;
    is(State::Up).await;
    let probe = view(&supervisor, PROBE).await;
    assert_eq!(probe.last_error.as_deref(), Some("did not finish in time"));
    let threads = threads.lock().unwrap();
    assert_eq!(threads[0], threads[1]);
}

/// In real time: the thread is blocked when an operator orders a restart.
#[actix_rt::test]
async fn a_restart_of_an_actor_whose_thread_is_blocked_is_on_another() {
    let blocked = Thread::spawn();
    let Thread::Arbiter(arbiter) = &blocked else {
        panic!("a thread")
    };
    let threads = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&threads);
    let probe = factory(Slot::default(), move |supervisor| {
        kept.lock().unwrap().push(std::thread::current().id());
        Probe {
            conduct: Conduct::LivesOn,
            supervisor,
        }
    });
    let lanes = live_lanes(Policy::RoundRobin);
    let supervisor = Supervisor::start(&lanes, vec![(PROBE, blocked.clone(), probe)]);
    let is_up = async || (view(&supervisor, PROBE).await.state == State::Up).then_some(());
    eventually("it is up", START_MAX, is_up).await;
    let (_unblock, wait) = std::sync::mpsc::channel::<()>();
    arbiter.spawn_fn(move || {
        // It fails once the other side is dropped.
        wait.recv().ok();
    });
    let lane = LaneId::Nats;
    let action = Action::Restart;
    supervisor.send(LaneCommand { lane, action }).await.unwrap();
    eventually("it is up again", 3 * START_MAX, async || {
        is_up()
            .await
            .filter(|()| threads.lock().unwrap().len() == 2)
    })
    .await;
    let probe = view(&supervisor, PROBE).await;
    assert_eq!(probe.last_error.as_deref(), Some("did not finish in time"));
    assert_eq!(probe.restarts, 1);
}

#[actix_rt::test]
async fn an_actor_that_makes_no_progress_is_restarted_and_the_reason_is_told() {
    tokio::time::pause();
    let (supervisor, starts) = supervise(|life| {
        if life == 0 {
            Conduct::Stuck
        } else {
            Conduct::LivesOn
        }
    });
    sleep(2 * HEARTBEAT).await;
    assert_eq!(starts.lock().unwrap().len(), 2);
    assert_eq!(
        view(&supervisor, PROBE).await.last_error.as_deref(),
        Some("backlog 412, no delivery")
    );
}

#[actix_rt::test]
async fn a_paused_lane_rests_until_it_is_resumed_and_a_restart_is_at_once() {
    tokio::time::pause();
    let (supervisor, starts) = supervise(|_| Conduct::LivesOn);
    let order = async |action| {
        let lane = LaneId::Nats;
        let sent = supervisor.send(LaneCommand { lane, action });
        assert_eq!(sent.await.unwrap(), CommandOutcome::Done);
    };
    sleep(Duration::from_secs(1)).await;
    order(Action::Pause).await;
    sleep(Duration::from_mins(10)).await;
    assert_eq!(view(&supervisor, PROBE).await.state, State::Paused);
    assert_eq!(starts.lock().unwrap().len(), 1);
    order(Action::Resume).await;
    sleep(Duration::from_millis(10)).await;
    assert_eq!(view(&supervisor, PROBE).await.state, State::Up);
    order(Action::Restart).await;
    sleep(Duration::from_millis(10)).await;
    assert_eq!(view(&supervisor, PROBE).await.state, State::Up);
    assert_eq!(starts.lock().unwrap().len(), 3);
    let absent = supervisor
        .send(LaneCommand {
            lane: LaneId::Pubsub,
            action: Action::Pause,
        })
        .await
        .unwrap();
    assert_eq!(absent, CommandOutcome::NoSuchLane);
}

/// Each order, after each other one: what becomes of it, and how the lane is then.
#[actix_rt::test]
async fn an_order_that_changes_nothing_is_told_as_such() {
    use Action::{Drain, Pause, Restart, Resume};
    use CommandOutcome::{Done, Unchanged};
    tokio::time::pause();
    let (supervisor, starts) = supervise(|_| Conduct::LivesOn);
    sleep(Duration::from_secs(1)).await;
    let steps = [
        (Resume, Unchanged, "up", false, 1),
        (Drain, Done, "up", true, 1),
        (Drain, Unchanged, "up", true, 1),
        (Restart, Done, "up", true, 2),
        (Pause, Done, "paused", false, 2),
        (Pause, Unchanged, "paused", false, 2),
        (Drain, Done, "up", true, 3),
        (Resume, Done, "up", false, 3),
        (Resume, Unchanged, "up", false, 3),
        (Pause, Done, "paused", false, 3),
        (Restart, Done, "up", false, 4),
        (Restart, Done, "up", false, 5),
        (Pause, Done, "paused", false, 5),
        (Resume, Done, "up", false, 6),
    ];
    for (at, (action, outcome, state, drains, started)) in steps.into_iter().enumerate() {
        let lane = LaneId::Nats;
        let sent = supervisor.send(LaneCommand { lane, action });
        assert_eq!(sent.await.unwrap(), outcome, "step {at}");
        sleep(Duration::from_millis(10)).await;
        let view = view(&supervisor, PROBE).await;
        let found = (
            view.state.name(),
            view.is_draining,
            starts.lock().unwrap().len(),
        );
        assert_eq!(found, (state, drains, started), "step {at}");
        assert_eq!(view.takes_records(), state == "up" && !drains, "step {at}");
    }
}
