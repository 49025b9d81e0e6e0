//! The load: numbered records, posted by the engine of `waypost load`.

use std::{cell::RefCell, fs, path::Path, rc::Rc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;
use waypost::load::{Load, Plan, Target, records};

use super::api::{NUMBER, now_us};

/// Posts records `first` to `first + count`. Prints the result as JSON, and leaves in `times` when each was due, or was begun, in
/// µs since the Unix epoch.
pub async fn run(host: &str, users: usize, first: usize, count: usize, rate: Option<f64>, times: &Path) {
    let traffic = records(include_str!("../../traffic.json")).expect("traffic.json holds records");
    let numbered = |number: usize| {
        let rest = traffic[number % traffic.len()].strip_prefix(b"{").expect("an object");
        Bytes::from([NUMBER, format!("{number},").as_bytes(), rest].concat())
    };
    let (now, at_us) = (Instant::now(), now_us());
    let since = Rc::new(RefCell::new(vec![0u64; count]));
    let watched = Rc::clone(&since);
    let load = Load::new(
        Target::parse(host).expect("a URL"),
        Plan {
            records: (first..first + count).map(numbered).collect(),
            passes: 1,
            users,
            spawn_rate: f64::INFINITY,
            wait: Duration::ZERO..Duration::ZERO,
            rate,
            keyed: false,
            watch: Some(Box::new(move |number, from: Instant| {
                let after = u64::try_from((from.saturating_duration_since(now)).as_micros()).expect("a short load");
                watched.borrow_mut()[number] = at_us + after;
            })),
        },
    );
    load.run().await;
    let bytes: Vec<u8> = since.borrow().iter().flat_map(|at| at.to_le_bytes()).collect();
    fs::write(times, bytes).expect("the folder is ours");
    println!("{}", load.tally().json());
}
