//! The last orders to each lane, and the file that keeps them over a restart.
//!
//! The file is JSON, by the names of the lanes. It is replaced as a whole, durably, before an order
//! is answered.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use tracing_mutex::parkinglot::Mutex;

use crate::{
    actors::supervisor::{Action, LaneCommand},
    clock::unix_us,
    file_work::with_a_file,
    lane_id::{LaneId, PerLane},
    spool::replace_durably,
};

const NAME: &str = "orders";

/// An order of an operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order<T> {
    pub what: T,
    /// The operator's address.
    pub by: String,
    /// Microseconds since the Unix epoch.
    pub at_us: u64,
    /// The next start of the node knows it.
    #[serde(skip)]
    pub is_kept: bool,
}

/// The last orders to one lane.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LaneOrders {
    pub action: Option<Order<Action>>,
    pub weight: Option<Order<u32>>,
}

/// The last orders to all lanes. Clones share them.
#[derive(Clone, Debug)]
pub struct Orders {
    lanes: Arc<Mutex<PerLane<LaneOrders>>>,
    /// There if orders are kept. Locked while it is written: the last write has all orders.
    file: Option<Arc<Mutex<PathBuf>>>,
    /// The file has not the last change.
    is_behind: Arc<AtomicBool>,
}

impl Orders {
    /// The orders that earlier runs have kept in `folder`, if this run keeps orders. Otherwise they
    /// are forgotten: later orders will not be in that file.
    pub fn open(folder: &Path, keep: bool) -> Self {
        let path = folder.join(NAME);
        let mut lanes = PerLane::<LaneOrders>::default();
        if keep {
            match read(&path) {
                Ok(found) => lanes = found,
                Err(why) => warn!(
                    file = %path.display(), reason = %why,
                    "cannot be read: the orders of earlier runs have no effect; give them again"
                ),
            }
        } else if let Err(why) = fs::remove_file(&path)
            && why.kind() != io::ErrorKind::NotFound
        {
            warn!(
                file = %path.display(), reason = %why,
                "cannot be removed: a later run that keeps orders would obey these; remove it"
            );
        }
        let orders = Self {
            lanes: Arc::new(Mutex::new(lanes)),
            file: keep.then(|| Arc::new(Mutex::new(path))),
            is_behind: Arc::default(),
        };
        for lane in LaneId::ALL {
            orders.of(lane).tell(lane);
        }
        orders
    }

    pub fn of(&self, lane: LaneId) -> LaneOrders {
        self.lanes.lock()[lane as usize].clone()
    }

    /// The commands that have the lanes as they were when the last run ended.
    pub fn commands(&self) -> Vec<LaneCommand> {
        let lanes = LaneId::ALL.into_iter();
        let commands = lanes.filter_map(|lane| {
            let action = self.of(lane).action?.what;
            matches!(action, Action::Pause | Action::Drain).then_some(LaneCommand { lane, action })
        });
        commands.collect()
    }

    pub(super) fn note_action(&self, lane: LaneId, action: Action, by: &str) {
        let known = &mut self.lanes.lock()[lane as usize].action;
        let drains = known
            .as_ref()
            .is_some_and(|known| known.what == Action::Drain);
        // A restart ends no drain.
        if !(action == Action::Restart && drains) {
            *known = Some(Order::new(action, by));
        }
    }

    pub(super) fn note_weight(&self, lane: LaneId, weight: u32, by: &str) {
        self.lanes.lock()[lane as usize].weight = Some(Order::new(weight, by));
    }

    /// Whether there was an order.
    pub(super) fn forget_weight(&self, lane: LaneId) -> bool {
        self.lanes.lock()[lane as usize].weight.take().is_some()
    }

    /// Does [`Self::keep`] again if it could not be done the last time.
    pub(super) async fn keep_again(&self) {
        if self.is_behind.load(Relaxed) {
            self.keep().await;
        }
    }

    /// Makes the next start know the orders, if they are kept.
    pub(super) async fn keep(&self) {
        let Some(file) = self.file.clone() else {
            return;
        };
        let orders = self.clone();
        let written = with_a_file(move || {
            let path = file.lock();
            let text = text(&orders.lanes.lock())?;
            replace_durably(&path, &text)
        });
        match written
            .await
            .unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
        {
            Ok(()) => {
                self.is_behind.store(false, Relaxed);
                for orders in &mut *self.lanes.lock() {
                    orders.are_kept();
                }
            }
            Err(why) => {
                self.is_behind.store(true, Relaxed);
                warn!(
                    reason = %why,
                    "orders cannot be written: the next start does not know the last one, or obeys one \
                     that a reload has replaced; free or repair the disk, and give an order or reload \
                     again"
                );
            }
        }
    }
}

impl<T> Order<T> {
    fn new(what: T, by: &str) -> Self {
        Self {
            what,
            by: by.into(),
            at_us: unix_us(),
            is_kept: false,
        }
    }
}

impl LaneOrders {
    fn are_kept(&mut self) {
        if let Some(order) = &mut self.action {
            order.is_kept = true;
        }
        if let Some(order) = &mut self.weight {
            order.is_kept = true;
        }
    }

    /// Logs what an earlier run has left in effect.
    fn tell(&self, lane: LaneId) {
        if let Some(order) = &self.action
            && let Action::Pause | Action::Drain = order.what
        {
            let (action, by) = (order.what.name(), &order.by);
            info!(%lane, action, by, "an order to an earlier run is in effect");
        }
        if let Some(order) = &self.weight {
            let (weight, by) = (order.what, &order.by);
            info!(%lane, weight, by, "an order to an earlier run is in effect");
        }
    }
}

fn text(lanes: &PerLane<LaneOrders>) -> io::Result<Vec<u8>> {
    let by_name = LaneId::ALL.map(|lane| (lane.name(), &lanes[lane as usize]));
    let by_name = BTreeMap::from(by_name);
    Ok(serde_json::to_vec(&by_name)?)
}

fn read(path: &PathBuf) -> io::Result<PerLane<LaneOrders>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(PerLane::default()),
        Err(why) => return Err(why),
    };
    let mut by_name: BTreeMap<String, LaneOrders> = serde_json::from_slice(&text)?;
    Ok(LaneId::ALL.map(|lane| {
        let mut orders = by_name.remove(lane.name()).unwrap_or_default();
        orders.are_kept();
        orders
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NATS: LaneId = LaneId::Nats;

    #[tokio::test]
    async fn a_later_run_knows_the_orders_if_both_keep_them() {
        let folder = tempfile::tempdir().unwrap();
        let orders = Orders::open(folder.path(), true);
        orders.note_action(NATS, Action::Pause, "127.0.0.1");
        orders.note_weight(LaneId::Grpc, 7, "::1");
        orders.keep().await;
        orders.note_action(LaneId::Grpc, Action::Drain, "after the last write");
        assert!(orders.of(NATS).action.unwrap().is_kept);
        assert!(!orders.of(LaneId::Grpc).action.unwrap().is_kept);

        let later = Orders::open(folder.path(), true);
        assert_eq!(later.of(NATS), orders.of(NATS));
        assert_eq!(
            later.of(LaneId::Grpc).weight,
            orders.of(LaneId::Grpc).weight
        );
        let commands: Vec<_> = later.commands();
        let [LaneCommand { lane, action }] = commands[..] else {
            panic!("{commands:?}");
        };
        assert_eq!((lane, action), (NATS, Action::Pause));

        for keep in [false, true] {
            let orders = Orders::open(folder.path(), keep);
            assert_eq!(orders.of(NATS), LaneOrders::default(), "forgotten");
        }
        let orders = Orders::open(folder.path(), false);
        orders.note_action(NATS, Action::Pause, "127.0.0.1");
        orders.keep().await;
        assert!(!orders.of(NATS).action.unwrap().is_kept);
        assert!(!folder.path().join(NAME).exists());
    }

    #[tokio::test]
    async fn a_damaged_file_has_no_order_by_half_and_the_next_order_replaces_it() {
        let folder = tempfile::tempdir().unwrap();
        let orders = Orders::open(folder.path(), true);
        orders.note_action(NATS, Action::Pause, "127.0.0.1");
        orders.note_weight(NATS, 7, "127.0.0.1");
        orders.keep().await;
        let path = folder.path().join(NAME);
        let whole = fs::read(&path).unwrap();
        for size in 0..whole.len() {
            fs::write(&path, &whole[..size]).unwrap();
            let orders = Orders::open(folder.path(), true);
            assert_eq!(orders.of(NATS), LaneOrders::default(), "{size} bytes");
        }
        let orders = Orders::open(folder.path(), true);
        orders.note_weight(LaneId::Grpc, 2, "127.0.0.1");
        orders.keep().await;
        let later = Orders::open(folder.path(), true);
        assert_eq!(later.of(LaneId::Grpc), orders.of(LaneId::Grpc));
    }

    #[tokio::test]
    async fn an_order_that_cannot_be_written_is_noted_as_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let orders = Orders::open(&folder.path().join("missing"), true);
        orders.note_action(NATS, Action::Pause, "127.0.0.1");
        orders.keep().await;
        let order = orders.of(NATS).action.unwrap();
        assert_eq!((order.what, order.is_kept), (Action::Pause, false));
        fs::create_dir(folder.path().join("missing")).unwrap();
        orders.keep_again().await;
        assert!(orders.of(NATS).action.unwrap().is_kept);
    }

    #[tokio::test]
    async fn a_weight_that_a_reload_has_replaced_is_not_obeyed_after_a_full_disk() {
        let folder = tempfile::tempdir().unwrap();
        let [place, away] = ["place", "away"].map(|name| folder.path().join(name));
        fs::create_dir(&place).unwrap();
        let orders = Orders::open(&place, true);
        orders.note_weight(NATS, 7, "127.0.0.1");
        orders.keep().await;
        fs::rename(&place, &away).unwrap();
        assert!(orders.forget_weight(NATS));
        orders.keep().await;
        fs::rename(&away, &place).unwrap();
        assert!(Orders::open(&place, true).of(NATS).weight.is_some());
        orders.keep_again().await;
        assert_eq!(Orders::open(&place, true).of(NATS).weight, None);
    }

    #[test]
    fn a_restart_ends_a_pause_and_no_drain() {
        let folder = tempfile::tempdir().unwrap();
        let orders = Orders::open(folder.path(), false);
        let last = || orders.of(NATS).action.unwrap().what;
        orders.note_action(NATS, Action::Drain, "a");
        orders.note_action(NATS, Action::Restart, "b");
        assert_eq!(last(), Action::Drain);
        orders.note_action(NATS, Action::Pause, "c");
        orders.note_action(NATS, Action::Restart, "d");
        assert_eq!(last(), Action::Restart);
        assert!(orders.commands().is_empty());
    }
}
