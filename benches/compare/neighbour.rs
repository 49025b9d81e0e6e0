//! A second API of the node, and a client that posts records for it at a steady rate.

use std::{
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use super::support::process::free_port;

/// The configuration of a node with that API.
pub const CONFIG: &str =
    "[[routes]]\nwhen = { header = \"x-api\", equals = \"second\" }\napi = \"second\"\n";
/// Requests for it a second, and the records of each.
const REQUESTS: u32 = 50;
const RECORDS: u32 = 20;

/// The conduct of the second API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondApi {
    /// It takes connections and never answers.
    Hangs,
    Answers,
}

/// Records for the second API. They end with it.
pub struct Neighbour {
    posted: Arc<AtomicU64>,
    _posting: AbortOnDropHandle<()>,
}

/// The address of an API that hangs as long as the process lives.
pub fn hanging_api() -> String {
    let port = free_port();
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
    std::thread::spawn(move || {
        let connections: Vec<_> = listener.incoming().collect();
        drop(connections);
    });
    format!("http://127.0.0.1:{port}/")
}

impl Neighbour {
    /// Posts to the node at `host` from now on.
    pub fn start(host: &str) -> Self {
        let url = host.to_owned();
        let posted = Arc::<AtomicU64>::default();
        let counted = Arc::clone(&posted);
        let posting = actix_rt::spawn(async move {
            let client = awc::Client::default();
            let record = include_str!("../../traffic.json");
            let record = waypost::load::records(record).expect("traffic.json holds records");
            let record = String::from_utf8_lossy(&record[0]).into_owned();
            let body = format!("[{}]", vec![record; RECORDS as usize].join(","));
            let mut ticks = interval(Duration::from_secs(1) / REQUESTS);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let request = client
                    .post(&url)
                    .insert_header(("x-api", "second"))
                    .content_type("application/json");
                let answer = request.send_body(body.clone()).await;
                if answer.is_ok_and(|answer| answer.status().is_success()) {
                    counted.fetch_add(RECORDS.into(), Relaxed);
                }
            }
        });
        Self {
            posted,
            _posting: AbortOnDropHandle::new(posting),
        }
    }

    /// Records that the node has taken.
    pub fn posted(&self) -> u64 {
        self.posted.load(Relaxed)
    }
}
