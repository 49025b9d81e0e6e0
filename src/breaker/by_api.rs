//! The breakers of a node, by API.

use std::sync::Arc;

use super::Breaker;

/// Clones share the breakers.
#[derive(Clone, Default)]
pub struct ApiBreakers(Arc<[NamedBreaker]>);

/// The name is as in [`Record::api`](crate::record::Record::api).
type NamedBreaker = (Option<Arc<str>>, Arc<Breaker>);

impl ApiBreakers {
    pub fn new(all: impl Iterator<Item = NamedBreaker>) -> Self {
        Self(all.collect())
    }

    /// Whether the API of this name is known to be down.
    pub fn is_open(&self, api: Option<&str>) -> bool {
        let mut all = self.0.iter();
        let known = all.find(|(name, _)| name.as_deref() == api);
        known.is_some_and(|(_, breaker)| breaker.is_open())
    }
}
