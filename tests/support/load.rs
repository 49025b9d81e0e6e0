//! A load that keeps account: each 2xx is an obligation, and the API and the dead letters show in
//! the end whether it was met.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    fmt,
    rc::Rc,
    time::{Duration, Instant},
};

use awc::http::StatusCode;
use bytes::Bytes;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::{
    Wait,
    api::Api,
    eventually,
    node::{Node, PATIENCE},
    traffic,
};

/// Clients that post at the same time.
pub const CLIENTS: usize = 8;
/// A client whose request was not taken waits this long.
const REST: Duration = Duration::from_millis(5);

/// Posts records until it is stopped.
pub struct Load {
    account: Rc<Account>,
    clients: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Account {
    /// Records per request; more than one are an array. 0 means one.
    together: usize,
    attempted: Cell<usize>,
    refused: Cell<usize>,
    /// The answer to each record with a 2xx.
    obligations: RefCell<HashMap<String, Value>>,
    /// No answer came, or none that counts; the node may have the record.
    unanswered: RefCell<HashSet<String>>,
    stop: Cell<bool>,
    /// See [`Load::power_fails`].
    has_no_power: Cell<bool>,
}

/// The result of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub attempted: usize,
    /// Answered with a 2xx.
    pub accepted: usize,
    /// Answered otherwise, or not at all.
    pub untaken: usize,
    /// Records that the API took, each counted once.
    pub delivered: usize,
    /// Records in the dead letters.
    pub dead: usize,
    /// Accepted, and in neither place.
    pub lost: usize,
    /// Records that the API took again.
    pub duplicated: usize,
    /// Records in either place that the load did not send.
    pub unexpected: usize,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            attempted,
            accepted,
            untaken,
            delivered,
            dead,
            lost,
            duplicated,
            unexpected,
        } = self;
        write!(
            f,
            "attempted {attempted}, accepted {accepted}, untaken {untaken}, delivered {delivered}, dead {dead}, "
        )?;
        write!(
            f,
            "lost {lost}, duplicated {duplicated}, unexpected {unexpected}"
        )
    }
}

impl Load {
    pub fn start(node: &Node) -> Self {
        Self::start_with(node, CLIENTS, Duration::ZERO)
    }

    /// Each of the `clients` waits between two requests.
    pub fn start_with(node: &Node, clients: usize, wait: Duration) -> Self {
        Self::begin(node, clients, wait, Account::default())
    }

    /// Each request has `together` records.
    pub fn start_with_batches(node: &Node, together: usize) -> Self {
        Self::begin(
            node,
            CLIENTS,
            Duration::ZERO,
            Account {
                together,
                ..Account::default()
            },
        )
    }

    /// Continues another load: no key comes twice.
    pub fn start_after(node: &Node, other: &Self) -> Self {
        let attempted = other.account.attempted.clone();
        let together = other.account.together;
        let account = Account {
            together,
            attempted,
            ..Account::default()
        };
        Self::begin(node, CLIENTS, Duration::ZERO, account)
    }

    fn begin(node: &Node, clients: usize, wait: Duration, account: Account) -> Self {
        let account = Rc::new(account);
        let records = Rc::new(traffic());
        let clients = (0..clients).map(|_| {
            let (client, account, records) =
                (node.client(), Rc::clone(&account), Rc::clone(&records));
            actix_rt::spawn(async move {
                while !account.stop.get() {
                    let number = account.attempted.replace(account.attempted.get() + 1);
                    match client
                        .post("/", &key(number), account.body(number, &records))
                        .await
                    {
                        Some((StatusCode::ACCEPTED, answer)) if !account.has_no_power.get() => {
                            let ids = account.ids(number).into_iter();
                            let obligations = ids.map(|id| (id, answer.clone()));
                            account.obligations.borrow_mut().extend(obligations);
                        }
                        Some((status, _)) if status != StatusCode::ACCEPTED => {
                            account.refused.set(account.refused.get() + 1);
                            tokio::time::sleep(REST).await;
                        }
                        _ => {
                            account.unanswered.borrow_mut().extend(account.ids(number));
                            tokio::time::sleep(REST).await;
                        }
                    }
                    if !wait.is_zero() {
                        tokio::time::sleep(wait).await;
                    }
                }
            })
        });
        let clients = clients.collect();
        Self { account, clients }
    }

    pub fn attempted(&self) -> usize {
        self.account.attempted.get()
    }

    pub fn accepted(&self) -> usize {
        self.account.obligations.borrow().len()
    }

    pub fn refused(&self) -> usize {
        self.account.refused.get()
    }

    /// Requests with another answer than a 2xx, and records of requests without an answer.
    pub fn untaken(&self) -> usize {
        self.refused() + self.account.unanswered.borrow().len()
    }

    /// The machine of the node has lost its power: no answer leaves it from now on.
    pub fn power_fails(&self) {
        self.account.has_no_power.set(true);
    }

    /// Waits until `more` records are taken.
    pub async fn take(&self, more: usize) {
        let goal = self.accepted() + more;
        eventually("the node takes records", PATIENCE, async || {
            (self.accepted() >= goal).then_some(())
        })
        .await;
    }

    /// Ends the load after the answers to all requests in flight.
    pub async fn end(&mut self) {
        self.account.stop.set(true);
        for client in self.clients.drain(..) {
            client.await.expect("a client does not panic");
        }
    }

    /// Waits until the API has each accepted record; panics with the number of lost ones otherwise.
    pub async fn is_met(&self, api: &Api, patience: Duration) {
        if let Err(lost) = self.met(api, patience).await {
            panic!("{lost}");
        }
    }

    /// The same; the error names lost records, with the answers that they got.
    pub async fn met(&self, api: &Api, patience: Duration) -> Result<(), String> {
        let deadline = Instant::now() + patience;
        loop {
            let lost = self.lost(api);
            if lost.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let some = lost.iter().take(5).collect::<Vec<_>>();
                return Err(format!(
                    "{} of {} lost, as {some:?}",
                    lost.len(),
                    self.accepted(),
                ));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn lost(&self, api: &Api) -> Vec<(String, Value)> {
        let obligations = self.account.obligations.borrow();
        let missed = api.misses(obligations.keys()).into_iter();
        missed
            .map(|id| (id.clone(), obligations[id].clone()))
            .collect()
    }

    /// The number of records that the node may have, and the API has not.
    pub fn in_flight(&self, api: &Api) -> usize {
        let obligations = self.account.obligations.borrow();
        let unanswered = self.account.unanswered.borrow();
        api.misses(obligations.keys().chain(&*unanswered)).len()
    }

    /// The number of records that the API has though their requests got no answer.
    pub fn cut_off(&self, api: &Api) -> usize {
        let unanswered = self.account.unanswered.borrow();
        unanswered.len() - api.misses(unanswered.iter()).len()
    }

    /// Waits until all accepted records are delivered or dead, or `patience` is over, and until the
    /// node is at rest.
    pub async fn verdict(&self, node: &Node, api: &Api, patience: Duration) -> Verdict {
        let mut wait = Wait::new(patience);
        loop {
            let verdict = self.verdict_now(node, api).await;
            let ledger = node.status().await["ledger"].clone();
            let waits = ["in_flight", "spooled", "parked"];
            let rests = waits.iter().all(|term| ledger[term] == 0);
            let awaited = || format!("all records to end: {verdict}; {ledger}");
            if verdict.lost == 0 && rests || wait.is_over(awaited) {
                assert!(rests, "the node does not come to rest: {ledger}");
                return verdict;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn verdict_now(&self, node: &Node, api: &Api) -> Verdict {
        let dead = node.dead().await;
        let taken = api.taken();
        let obligations = self.account.obligations.borrow();
        let sent: HashSet<_> = (0..self.attempted())
            .flat_map(|number| self.account.ids(number))
            .collect();
        Verdict {
            attempted: self.attempted(),
            accepted: obligations.len(),
            untaken: self.untaken(),
            delivered: taken.len(),
            dead: dead.len(),
            lost: obligations
                .keys()
                .filter(|key| !taken.contains_key(*key) && !dead.contains(*key))
                .count(),
            duplicated: taken.values().map(|times| *times as usize - 1).sum(),
            unexpected: taken
                .keys()
                .chain(&dead)
                .filter(|key| !sent.contains(*key))
                .count(),
        }
    }
}

impl Account {
    fn body(&self, number: usize, records: &[Bytes]) -> Bytes {
        let nth = |at: usize| &*records[(number + at) % records.len()];
        match self.together {
            0 | 1 => records[number % records.len()].clone(),
            together => [
                b"[",
                &*(0..together).map(nth).collect::<Vec<_>>().join(&b","[..]),
                b"]",
            ]
            .concat()
            .into(),
        }
    }

    /// The ids that the contract makes of a request's key.
    fn ids(&self, number: usize) -> Vec<String> {
        match self.together {
            0 | 1 => vec![key(number)],
            together => (0..together)
                .map(|at| format!("{}/{at}", key(number)))
                .collect(),
        }
    }
}

fn key(number: usize) -> String {
    format!("load-{number}")
}
