//! The orders of operators: carried out one after the other, each with who gave it and when.

mod orders;
mod reload;

use std::sync::Arc;

use actix::{Addr, MailboxError};
use tokio::sync::Mutex;
use tracing::info;

pub use self::{
    orders::{LaneOrders, Order, Orders},
    reload::{ConfigSource, ReloadOutcome, ReloadReport},
};
use crate::{
    actors::supervisor::{Action, CommandOutcome, LaneCommand, Supervisor},
    changes::{Change, ChangeLog},
    config::{Config, Policy},
    lane_id::LaneId,
    routing::{scores::Scores, settings::CurrentRouting},
};

/// Carries out orders. Clones share their turns.
#[derive(Clone)]
pub struct Control(Arc<Parts>);

struct Parts {
    supervisor: Addr<Supervisor>,
    scores: Arc<Scores>,
    routing: CurrentRouting,
    orders: Orders,
    source: ConfigSource,
    change_log: ChangeLog,
    /// The configuration in effect, but for what orders have changed. Held while an order is carried
    /// out: what is noted of orders is in the order of their effects.
    config: Mutex<Config>,
    last_reload: tracing_mutex::parkinglot::Mutex<Option<ReloadReport>>,
}

/// The parts that orders act on.
pub struct ControlParams {
    pub supervisor: Addr<Supervisor>,
    pub scores: Arc<Scores>,
    pub routing: CurrentRouting,
    pub orders: Orders,
    /// The configuration of the start.
    pub config: Config,
    pub source: ConfigSource,
    pub change_log: ChangeLog,
}

impl Control {
    pub fn new(params: ControlParams) -> Self {
        Self(Arc::new(Parts {
            supervisor: params.supervisor,
            scores: params.scores,
            routing: params.routing,
            orders: params.orders,
            source: params.source,
            change_log: params.change_log,
            config: Mutex::new(params.config),
            last_reload: tracing_mutex::parkinglot::Mutex::default(),
        }))
    }

    /// The policy in effect where no rule says another.
    pub fn policy(&self) -> Policy {
        self.0.routing.get().policy()
    }

    /// The last orders to `lane`.
    pub fn orders(&self, lane: LaneId) -> LaneOrders {
        self.0.orders.of(lane)
    }

    /// Gives an order to `lanes`. One that changes nothing is not noted, but kept if it could not be
    /// before.
    ///
    /// # Errors
    /// If the supervisor has ended.
    pub async fn command(
        &self,
        lanes: &[LaneId],
        action: Action,
        by: &str,
    ) -> Result<(), MailboxError> {
        let _turn = self.0.config.lock().await;
        let mut changed = Vec::new();
        for &lane in lanes {
            let command = LaneCommand { lane, action };
            if self.0.supervisor.send(command).await? == CommandOutcome::Done {
                changed.push(lane);
            }
        }
        if changed.is_empty() {
            self.0.orders.keep_again().await;
            return Ok(());
        }
        let names: Vec<_> = changed.iter().map(|lane| lane.name()).collect();
        info!(
            lanes = names.join(", "),
            action = action.name(),
            by,
            "an operator has given an order"
        );
        self.0.change_log.add(Change::Order {
            lanes: &changed,
            action: action.name(),
            by,
        });
        for lane in changed {
            self.0.orders.note_action(lane, action, by);
        }
        self.0.orders.keep().await;
        Ok(())
    }

    /// Sets the weight of `lane`: the router's next choice has it.
    pub async fn set_weight(&self, lane: LaneId, weight: u32, by: &str) {
        let _turn = self.0.config.lock().await;
        let known = self.0.orders.of(lane).weight;
        if known.is_some_and(|known| known.what == weight) {
            self.0.orders.keep_again().await;
            return;
        }
        info!(%lane, weight, by, "the weight of the lane is set");
        let change = Change::Weight { lane, weight, by };
        self.0.change_log.add(change);
        self.0.scores.set_weight(lane, weight);
        self.0.orders.note_weight(lane, weight, by);
        self.0.orders.keep().await;
    }
}
