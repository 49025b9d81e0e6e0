//! The state of each lane.

use prometheus_client::{metrics::gauge::ConstGauge, registry::Registry};

use super::{Scrape, age};
use crate::transport::Durability;

pub(super) fn register(scrape: &Scrape<'_>, registry: &mut Registry) {
    registry.register(
        "waypost_lane_up",
        "1 while the lane takes records",
        scrape.by_lane(|lane, _| ConstGauge::new(u64::from(lane.takes_records))),
    );
    registry.register(
        "waypost_lane_paused_seconds",
        "Time since an operator paused or drained the lane; 0 if none did, or it was resumed",
        scrape.by_lane(|lane, _| ConstGauge::new(lane.paused_s())),
    );
    registry.register(
        "waypost_in_flight",
        "Records that a lane has confirmed and the API has not taken",
        scrape.by_lane(|lane, _| ConstGauge::new(lane.in_flight)),
    );
    registry.register(
        "waypost_kept_copies",
        "Copies on this disk of records whose confirm a power cut could take",
        scrape.by_lane(|lane, _| ConstGauge::new(lane.kept)),
    );
    registry.register(
        "waypost_stranded_copies",
        "Copies that stay until the next start: it is not known when the broker syncs its confirms",
        scrape.by_lane(|lane, _| {
            let durability = lane.broker.outlives_power_cut;
            ConstGauge::new(durability.stranded(lane.kept, lane.in_flight))
        }),
    );
    registry.register(
        "waypost_lane_outlives_power_cut",
        "1 if a confirm of the lane survives a power cut of its broker; 0 if not, or unknown",
        scrape.by_lane(|lane, _| {
            let is_durable = lane.broker.outlives_power_cut == Durability::Yes;
            ConstGauge::new(u64::from(is_durable))
        }),
    );
    registry.register(
        "waypost_last_delivery_seconds",
        "Time since the API took a record of the lane",
        scrape.by_lane::<ConstGauge<f64>, _>(|_, lane| {
            let at_us = Some(lane.progress.last_delivery_us);
            at_us.filter(|at_us| *at_us > 0).map(age)
        }),
    );
    registry.register(
        "waypost_lane_lag_seconds",
        "Age of the oldest record that the lane has confirmed and the API has not taken; 0 if none",
        scrape.by_lane(|lane, ledger| {
            let lag = ledger.progress.lag().as_secs_f64();
            ConstGauge::new(if lane.in_flight > 0 { lag } else { 0.0 })
        }),
    );
}
