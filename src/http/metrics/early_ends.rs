//! The connections that the node has ended early, and the streams that it has refused.

use prometheus_client::{metrics::counter::ConstCounter, registry::Registry};

use super::{Samples, Scrape};
use crate::http::early_ends::{EarlyEnd, RefusedStream};

pub(super) fn register(scrape: &Scrape<'_>, registry: &mut Registry) {
    let sides = scrape.early_ends.iter();
    let ends = sides.flat_map(|(side, ends)| {
        EarlyEnd::ALL.map(|end| {
            let labels = vec![("side", (*side).into()), ("reason", end.name().into())];
            (labels, ConstCounter::new(ends.counted(end)))
        })
    });
    registry.register(
        "waypost_connections_ended",
        "Connections that the node ended because the client held them without a request",
        Samples(ends.collect()),
    );
    let sides = scrape.early_ends.iter();
    let refused = sides.flat_map(|(side, ends)| {
        RefusedStream::ALL.map(|why| {
            let labels = vec![("side", (*side).into()), ("reason", why.name().into())];
            (labels, ConstCounter::new(ends.refused(why)))
        })
    });
    registry.register(
        "waypost_streams_refused",
        "HTTP/2 streams that the node refused, which their clients may send again",
        Samples(refused.collect()),
    );
}
