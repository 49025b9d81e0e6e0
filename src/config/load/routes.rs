//! Reads `[[routes]]`.

use serde::Deserialize as _;
use toml::{
    Table, Value,
    de::{DeArray, ValueDeserializer},
};
use tracing::warn;

use super::Loader;
use crate::routing::rules::{RouteRule, Routes};

/// The list of rules; the only one that is no section, and has no variables.
pub(super) const ROUTES: &str = "routes";

impl Loader {
    /// Each key of a rule is read alone, so that one mistake hides no other.
    pub(super) fn routes(&mut self, rules: &DeArray<'_>, place: &impl Fn(usize) -> String) {
        let mut tables = Vec::new();
        for (index, rule) in rules.iter().enumerate() {
            let name = format!("{ROUTES}[{}]", index + 1);
            let mut table = Table::new();
            let at = place(rule.span().start);
            let keys = rule.get_ref().as_table();
            if keys.is_none() {
                self.error(
                    at.as_str(),
                    name.as_str(),
                    "is a rule, written below [[routes]]",
                );
            }
            for (key, value) in keys.into_iter().flatten() {
                let at = place(key.span().start);
                let path = format!("{name}.{}", key.get_ref());
                let value = Value::deserialize(ValueDeserializer::from(value.clone()));
                let read = value.and_then(|value| {
                    let alone = Table::from_iter([(key.get_ref().to_string(), value.clone())]);
                    RouteRule::deserialize(alone).map(|_| value)
                });
                match read {
                    Ok(value) => {
                        table.insert(key.get_ref().to_string(), value);
                        self.places.insert(path, at);
                    }
                    Err(error) => self.error(at, path, error.message()),
                }
            }
            self.places.insert(name, at);
            tables.push(Value::Table(table));
        }
        self.values.insert(ROUTES.into(), tables.into());
    }

    /// Warns of each rule that no record can take.
    pub(super) fn warn_of_unreachable(&self, routes: &Routes) {
        for (route, why) in routes.unreachable() {
            let place = self.places.get(&route.name).map_or("", String::as_str);
            warn!("{place}: {}: can never match: {why}", route.name);
        }
    }
}
