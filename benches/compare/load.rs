//! The load: numbered records, posted by the engine of `waypost load`.

use std::{
    cell::RefCell,
    fs,
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use clap::Args;
use waypost::load::{Load, Plan, records};

use super::{
    api::{NUMBER, now_us},
    door::Credentials,
};

/// Options of the load.
#[derive(Args)]
pub struct Options {
    host: String,
    /// This file receives a time for each record: when it was due, or when its request began, in µs
    /// since the Unix epoch.
    times: PathBuf,
    users: usize,
    /// Records per request.
    batch: usize,
    /// The number of the first record.
    first: usize,
    count: usize,
    /// Records per second.
    rate: Option<f64>,
    #[command(flatten)]
    credentials: Credentials,
}

/// Posts, and prints the result as JSON.
#[expect(clippy::cast_precision_loss, reason = "a small batch")]
pub async fn run(options: &Options) {
    let traffic = records(include_str!("../../traffic.json")).expect("traffic.json holds records");
    let numbered = |number: usize| {
        let rest = traffic[number % traffic.len()]
            .strip_prefix(b"{")
            .expect("an object");
        [NUMBER, format!("{number},").as_bytes(), rest].concat()
    };
    let numbers: Vec<_> = (options.first..options.first + options.count).collect();
    let requests = numbers.chunks(options.batch).map(|numbers| match *numbers {
        [number] => numbered(number).into(),
        _ => {
            let all: Vec<_> = numbers.iter().map(|number| numbered(*number)).collect();
            Bytes::from([b"[", &*all.join(&b','), b"]"].concat())
        }
    });
    let now = Instant::now();
    let at_us = now_us();
    let since = Rc::new(RefCell::new(vec![
        0u64;
        options.count.div_ceil(options.batch)
    ]));
    let watched = Rc::clone(&since);
    let load = Load::new(
        options.credentials.endpoint(&options.host),
        Plan {
            records: requests.collect(),
            passes: 1,
            duration: None,
            users: options.users,
            spawn_rate: f64::INFINITY,
            wait: Duration::ZERO..Duration::ZERO,
            rate: options.rate.map(|rate| rate / options.batch as f64),
            keyed: false,
            watch: Some(Box::new(move |number, from: Instant, _| {
                let after = u64::try_from((from.saturating_duration_since(now)).as_micros())
                    .expect("a short load");
                watched.borrow_mut()[number] = at_us + after;
            })),
        },
    );
    load.run(|_| ()).await;
    let since = since.borrow();
    let bytes: Vec<u8> = (0..options.count)
        .flat_map(|at| since[at / options.batch].to_le_bytes())
        .collect();
    fs::write(&options.times, bytes).expect("the folder is ours");
    println!("{}", load.tally().json());
}
