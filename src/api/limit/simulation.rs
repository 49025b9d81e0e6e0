//! Simulated servers, and clients that always have more to POST. Each server has a best rate that
//! is known.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
};

use proptest::prelude::*;

use super::*;

/// The time-out of a POST.
const TIMEOUT: Duration = Duration::from_secs(6);
const SEEDS: u32 = 4;
/// The share of the best rate that a client must get.
const SHARE_MIN: f64 = 0.95;

/// The conduct of a server at a POST: the time that it takes, and its end.
type Server = Box<dyn FnMut(&mut World) -> (Duration, PostResult)>;

struct World {
    now: Duration,
    in_flight: u32,
    random: fastrand::Rng,
}

impl World {
    /// `ms`, and up to `spread` of it more or less.
    fn about(&mut self, ms: f64, spread: f64) -> Duration {
        let factor = 1.0 + spread * (2.0 * self.random.f64() - 1.0);
        Duration::from_secs_f64(ms * factor / 1000.0)
    }
}

const TAKEN: PostResult = PostResult::Settled(1);
const HANGS: (Duration, PostResult) = (TIMEOUT, PostResult::TimedOut);

/// One of `workers` takes a POST after the other.
struct Workers(BinaryHeap<Reverse<Duration>>);

impl Workers {
    fn new(workers: usize) -> Self {
        Self(vec![Reverse(Duration::ZERO); workers].into())
    }

    fn take(&mut self, now: Duration, work: Duration) -> (Duration, PostResult) {
        let free = self.0.pop().map_or(now, |Reverse(free)| free.max(now));
        let end = free + work;
        self.0.push(Reverse(end));
        (end.saturating_sub(now), TAKEN)
    }
}

/// Answers whatever comes in `ms`, or `spread` of it more or less.
fn free(ms: f64, spread: f64) -> Server {
    Box::new(move |world| (world.about(ms, spread), TAKEN))
}

/// Has `workers`, which need 5 ms each.
fn knee(workers: usize) -> Server {
    let mut all = Workers::new(workers);
    Box::new(move |world| {
        let work = world.about(5.0, 0.2);
        all.take(world.now, work)
    })
}

/// Needs 5 ms; with more than `knee` in flight, so much longer that its rate falls.
fn suffers_above(knee: u32) -> Server {
    Box::new(move |world| {
        let over = (f64::from(world.in_flight) / f64::from(knee)).max(1.0);
        (world.about(5.0 * over.powf(1.3), 0.2), TAKEN)
    })
}

/// Half of the POSTs need 5 ms, half of them 100 ms.
fn bimodal(workers: usize) -> Server {
    let mut all = Workers::new(workers);
    Box::new(move |world| {
        let ms = if world.random.bool() { 5.0 } else { 100.0 };
        let work = world.about(ms, 0.0);
        all.take(world.now, work)
    })
}

/// 200 ms away over a link that carries 100 POSTs a second.
fn slow_link() -> Server {
    let mut link = Workers::new(1);
    Box::new(move |world| {
        let (sent, result) = link.take(world.now, Duration::from_millis(10));
        (sent + world.about(190.0, 0.1), result)
    })
}

/// Takes 1,000 POSTs a second in 5 ms, and answers the others 429.
fn rate_limited() -> Server {
    let mut taken = VecDeque::from([Duration::ZERO; 50]);
    Box::new(move |world| {
        if world.now < taken[0] + Duration::from_millis(50) {
            return (world.about(1.0, 0.0), PostResult::Overloaded);
        }
        taken.pop_front();
        taken.push_back(world.now);
        (world.about(5.0, 0.2), TAKEN)
    })
}

/// Takes `most` POSTs at a time, and ends any other so.
fn refuses_above(most: usize, other: (Duration, PostResult)) -> Server {
    let mut ends = BinaryHeap::new();
    Box::new(move |world| {
        while ends.peek().is_some_and(|Reverse(end)| *end <= world.now) {
            ends.pop();
        }
        if ends.len() >= most {
            return other;
        }
        let took = world.about(5.0, 0.2);
        ends.push(Reverse(world.now + took));
        (took, TAKEN)
    })
}

/// One in ten POSTs ends so: its record is bad.
fn with_bad_records(result: PostResult) -> Server {
    Box::new(move |world| {
        let is_bad = world.random.f64() < 0.1;
        let took = world.about(5.0, 0.2);
        (took, if is_bad { result } else { TAKEN })
    })
}

/// The name, the bound of the limit, the best rate, and the server.
type Case = (&'static str, usize, f64, fn() -> Server);

fn table() -> Vec<Case> {
    const BUSY: (Duration, PostResult) = (Duration::from_millis(1), PostResult::Overloaded);
    vec![
        ("constant", 64, 12_800.0, || free(5.0, 0.0)),
        ("jittery", 64, 12_800.0, || free(5.0, 0.9)),
        ("jittery, a high bound", 256, 51_200.0, || free(5.0, 0.9)),
        ("far away", 64, 320.0, || free(200.0, 0.1)),
        ("a slow link", 64, 100.0, slow_link),
        ("a knee at 1", 64, 200.0, || knee(1)),
        ("a knee at 4", 64, 800.0, || knee(4)),
        ("a knee at 27", 64, 5_400.0, || knee(27)),
        ("a knee at 32", 64, 6_400.0, || knee(32)),
        ("a knee at 115", 1024, 23_000.0, || knee(115)),
        ("a knee at 256", 1024, 51_200.0, || knee(256)),
        ("suffers above 32", 64, 6_400.0, || suffers_above(32)),
        ("suffers above 256", 1024, 51_200.0, || suffers_above(256)),
        ("429 above 1,000/s", 64, 1_000.0, rate_limited),
        ("503 above 16", 64, 3_200.0, || refuses_above(16, BUSY)),
        ("hangs above 16", 64, 3_200.0, || refuses_above(16, HANGS)),
        ("bimodal", 64, 1_219.0, || bimodal(64)),
        ("bimodal, a knee at 32", 64, 609.5, || bimodal(32)),
        ("bad records, 500", 64, 11_520.0, || {
            with_bad_records(PostResult::Failed)
        }),
        ("bad records, 503", 64, 11_520.0, || {
            with_bad_records(PostResult::Overloaded)
        }),
    ]
}

/// A node: its limit, and the ends of its POSTs.
struct SimulatedNode {
    limit: AdaptiveLimit,
    in_flight: usize,
    taken: Vec<Duration>,
    limits: Vec<usize>,
}

impl SimulatedNode {
    /// The records that the API took in a second.
    fn rate(&self, from_s: f64, to_s: f64) -> f64 {
        let [from, to] = [from_s, to_s].map(Duration::from_secs_f64);
        let taken = self.taken.iter();
        let taken = taken.filter(|at| from <= **at && **at < to).count();
        f64::from(u32::try_from(taken).unwrap()) / (to_s - from_s)
    }
}

/// So many nodes that each have a backlog, for some seconds.
fn run<const NODES: usize>(
    mut server: Server,
    max: usize,
    for_s: f64,
    seed: u64,
) -> [SimulatedNode; NODES] {
    let zero = Instant::now();
    let mut world = World {
        now: Duration::ZERO,
        in_flight: 0,
        random: fastrand::Rng::with_seed(seed),
    };
    let mut nodes = std::array::from_fn(|_| SimulatedNode {
        limit: AdaptiveLimit::new(max, zero),
        in_flight: 0,
        taken: Vec::new(),
        limits: Vec::new(),
    });
    let mut posts = BinaryHeap::new();
    let mut number = 0_u64;
    while world.now.as_secs_f64() < for_s {
        for place in 0.. {
            // The nodes take turns.
            let at = place % NODES;
            let node = &mut nodes[at];
            if node.in_flight >= node.limit.get() {
                if nodes.iter().all(|node| node.in_flight >= node.limit.get()) {
                    break;
                }
                continue;
            }
            node.in_flight += 1;
            world.in_flight += 1;
            let is_last = node.in_flight == node.limit.get();
            node.limit.begin(zero + world.now, is_last);
            let (took, result) = match server(&mut world) {
                (took, result) if took < TIMEOUT => (took, result),
                _ => HANGS,
            };
            number += 1;
            posts.push(Reverse((world.now + took, number, at, world.now, result)));
        }
        let Some(Reverse((ends, _, at, began, result))) = posts.pop() else {
            break;
        };
        world.now = ends;
        world.in_flight -= 1;
        let node = &mut nodes[at];
        node.in_flight -= 1;
        node.limit.end(zero + began, zero + ends, Some(result));
        if node.limits.last() != Some(&node.limit.get()) {
            node.limits.push(node.limit.get());
        }
        if let PostResult::Settled(_) = result {
            node.taken.push(ends);
        }
    }
    nodes
}

/// From second 6 on the server holds all POSTs for 5 seconds.
fn stalled(mut server: Server) -> Server {
    let [from, to] = [6, 11].map(Duration::from_secs);
    Box::new(move |world| {
        let (took, result) = server(world);
        let ends = world.now + took;
        let is_held = ends >= from && world.now < to;
        let held = if is_held {
            to.saturating_sub(world.now)
        } else {
            Duration::ZERO
        };
        (held + took, result)
    })
}

/// From second 6 on the server takes nothing for 5 seconds; the last POST of that times out in
/// second 17.
fn hung(mut server: Server) -> Server {
    let outage = Duration::from_secs(6)..Duration::from_secs(11);
    Box::new(move |world| {
        let answer = server(world);
        if outage.contains(&world.now) {
            HANGS
        } else {
            answer
        }
    })
}

/// Runs each server of the table as `change` makes it. A client must get the best rate between the
/// two times: on average over the seeds, because what POSTs take is drawn.
fn all_get_the_best_rate(change: fn(Server) -> Server, from_s: f64, to_s: f64) {
    for (name, max, best, server) in table() {
        // With many POSTs, little is left to chance.
        let seeds = if best > 10_000.0 { 1 } else { SEEDS };
        let shares = (0..seeds).map(|seed| {
            let [node] = run(change(server()), max, to_s, seed.into());
            let share = node.rate(from_s, to_s) / best;
            assert!(share >= SHARE_MIN - 0.05, "{name}, seed {seed}: {share:.3}");
            share
        });
        let mean = shares.sum::<f64>() / f64::from(seeds);
        assert!(mean >= SHARE_MIN, "{name}: {mean:.3}");
    }
}

#[test]
fn a_client_gets_the_best_rate_within_five_seconds() {
    all_get_the_best_rate(|server| server, 5.0, 11.0);
}

#[test]
fn a_client_gets_the_best_rate_within_two_seconds_after_a_stall() {
    all_get_the_best_rate(stalled, 13.0, 17.0);
}

#[test]
fn a_client_gets_the_best_rate_within_two_seconds_after_time_outs() {
    all_get_the_best_rate(hung, 19.0, 23.0);
}

#[test]
fn a_limit_finds_the_knee() {
    for workers in [4, 32, 256] {
        let [node] = run(knee(workers), 1024, 10.0, 1);
        let found = f64::from(node.limit.limit) / f64::from(u32::try_from(workers).unwrap());
        assert!((0.9..1.5).contains(&found), "{workers}: {found}");
    }
}

#[test]
fn steady_time_outs_lower_the_limit_to_one_within_three_windows() {
    for (max, steps) in [(1, &[1][..]), (64, &[64, 4, 1]), (4096, &[64, 4, 1])] {
        let [node] = run(Box::new(|_| HANGS), max, 20.0, 1);
        assert_eq!(node.limits, steps, "{max}");
    }
    // From any limit.
    let now = Instant::now();
    let mut limit = AdaptiveLimit::new(4096, now);
    limit.limit = 4096;
    for _ in 0..3 {
        limit.fall(now);
    }
    assert_eq!(limit.get(), 1);
}

#[test]
fn the_time_outs_of_one_outage_lower_the_limit_once() {
    let start = Instant::now();
    let mut limit = AdaptiveLimit::new(64, start);
    let begins: Vec<_> = (0..64)
        .map(|post| start + Duration::from_millis(10) * post)
        .collect();
    for began in &begins {
        limit.begin(*began, false);
    }
    for began in begins {
        limit.end(began, began + TIMEOUT, Some(PostResult::TimedOut));
    }
    assert_eq!(limit.get(), 4);
}

#[test]
fn time_outs_of_some_records_leave_the_limit() {
    let start = Instant::now();
    let mut limit = AdaptiveLimit::new(64, start);
    for _ in 0..40 {
        limit.begin(start, false);
    }
    let mut now = start;
    while now < start + TIMEOUT {
        limit.begin(now, false);
        let began = now;
        now += Duration::from_millis(5);
        limit.end(began, now, Some(TAKEN));
    }
    // All at once, and more than the others of the window.
    for _ in 0..40 {
        now += Duration::from_millis(1);
        limit.end(start, now, Some(PostResult::TimedOut));
    }
    assert_eq!(limit.get(), 64);
}

#[test]
fn two_nodes_share_an_api() {
    for (workers, max) in [(4, 64), (32, 64), (256, 1024)] {
        for seed in 0..SEEDS {
            let nodes: [SimulatedNode; 2] = run(knee(workers), max, 25.0, seed.into());
            let [one, other] = nodes.map(|node| node.rate(5.0, 25.0));
            let share = one / (one + other);
            assert!(
                (0.4..=0.6).contains(&share),
                "{workers}, seed {seed}: {share:.3}"
            );
            let best = f64::from(u32::try_from(workers).unwrap()) * 200.0;
            assert!(one + other >= SHARE_MIN * best, "{workers}, seed {seed}");
        }
    }
}

#[test]
fn a_limit_that_does_not_bind_stays() {
    let start = Instant::now();
    let mut limit = AdaptiveLimit::new(1024, start);
    for post in 0..10_000 {
        let began = start + Duration::from_millis(post);
        limit.begin(began, false);
        limit.end(began, began + Duration::from_micros(900), Some(TAKEN));
    }
    assert_eq!(limit.limit, START);
}

fn results() -> impl Strategy<Value = Option<PostResult>> {
    prop_oneof![
        4 => (0_u32..1000).prop_map(|records| Some(PostResult::Settled(records))),
        1 => Just(Some(PostResult::Overloaded)),
        1 => Just(Some(PostResult::TimedOut)),
        1 => Just(Some(PostResult::Failed)),
        1 => Just(None),
    ]
}

proptest! {
    /// Whatever ends when, and whether or not the caller keeps to the limit.
    #[test]
    fn the_limit_stays_within_its_bounds(
        max in 1_usize..4096,
        posts in prop::collection::vec((0_u64..100_000, any::<bool>(), results()), 0..2000),
    ) {
        let mut now = Instant::now();
        let mut limit = AdaptiveLimit::new(max, now);
        let mut open = VecDeque::new();
        for (us, is_last, result) in posts {
            limit.begin(now, is_last);
            open.push_back(now);
            now += Duration::from_micros(us);
            if us % 3 > 0 && let Some(began) = open.pop_front() {
                limit.end(began, now, result);
            }
            prop_assert!((1..=max).contains(&limit.get()));
        }
    }
}
