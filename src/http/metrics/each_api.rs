//! The metrics of each API, by its name, if there is more than one.

use prometheus_client::{
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::{Samples, Scrape};
use crate::{actors::apis::SharedApi, api::answer::FailureClass, spool::Queue};

/// The configuration bounds the names.
pub(super) fn register(scrape: &Scrape<'_>, registry: &mut Registry) {
    let all = scrape.apis.all();
    if all.len() < 2 {
        return;
    }
    let label = |api: &SharedApi| ("api", api.shown_name().to_owned());
    let gauge = |value: &dyn Fn(usize, &SharedApi) -> u64| {
        let samples = all.iter().enumerate();
        let samples = samples.map(|(at, api)| (vec![label(api)], ConstGauge::new(value(at, api))));
        Samples(samples.collect())
    };
    for (name, help, samples) in [
        (
            "waypost_each_api_up",
            "0 while records wait because the API fails or denies every POST",
            gauge(&|_, api| u64::from(!api.breaker.is_open())),
        ),
        (
            "waypost_each_api_in_flight",
            "POSTs to the API in flight",
            gauge(&|_, api| api.counts.in_flight()),
        ),
        (
            "waypost_each_api_concurrency_limit",
            "POSTs to the API that may be in flight now, over all lanes",
            gauge(&|at, _| scrape.api_limits[at] as u64),
        ),
        (
            "waypost_each_api_held_records",
            "Records on disk until the API has a place for them",
            gauge(&|_, api| api.stats().held()),
        ),
        (
            "waypost_each_api_parked_records",
            "Records on disk between two tries",
            gauge(&|_, api| {
                let stats = api.stats();
                stats.parked() - stats.held()
            }),
        ),
        (
            "waypost_each_api_dead_letters",
            "Dead letters on disk",
            gauge(&|_, api| api.stats().records(Queue::Dead)),
        ),
        (
            "waypost_each_api_disk_bytes",
            "Bytes on disk of those that the API's spool_max bounds",
            gauge(&|_, api| api.disk_bytes()),
        ),
        (
            "waypost_each_api_refuses",
            "1 while new records for the API are refused: its room on disk is nearly full",
            gauge(&|_, api| u64::from(scrape.apis.is_full(api.name.as_deref()))),
        ),
    ] {
        registry.register(name, help, samples);
    }
    let failures = all.iter().flat_map(|api| {
        FailureClass::ALL.map(|class| {
            let labels = vec![label(api), ("class", class.name().to_owned())];
            (labels, ConstCounter::new(api.counts.failures(class)))
        })
    });
    registry.register(
        "waypost_each_api_failures",
        "POSTs that the API has not taken",
        Samples(failures.collect()),
    );
}
