//! Reads `[apis.NAME]`: sections with the keys of `[api]`, whose names the operator chooses.

use super::{Loader, PREFIX};
use crate::config::{ApiConfig, Config, DEFAULT_API};

/// The table of the sections.
pub(super) const APIS: &str = "apis";
/// The longest name.
const NAME_MAX: usize = 40;

/// The mistake in the name of a section, if it is one of `[apis.NAME]`.
pub(super) fn wrong_name(section: &str) -> Option<String> {
    let name = section.strip_prefix(APIS)?.strip_prefix('.')?;
    if name == DEFAULT_API {
        return Some(format!(
            "is the name of [api]; allowed is any other than {name}"
        ));
    }
    (!is_name(name)).then(|| {
        format!(
            "is no name of an API; allowed are up to {NAME_MAX} small letters, digits, - and single _, \
             beginning with a letter"
        )
    })
}

/// A name that a folder and, but for `-`, a variable may have.
fn is_name(name: &str) -> bool {
    name.len() <= NAME_MAX
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.contains("__")
        && !name.ends_with('_')
        && name
            .bytes()
            .all(|at| matches!(at, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
}

/// The key that a variable sets, if it is one of an API: `WAYPOST_APIS__BILLING__URL` is
/// `apis.billing.url`.
pub(super) fn key_of(variable: &str) -> Option<String> {
    let rest = variable.strip_prefix(PREFIX)?.strip_prefix("APIS__")?;
    let (name, key) = rest.split_once("__")?;
    let (name, key) = (name.to_ascii_lowercase(), key.to_ascii_lowercase());
    let is_known = ApiConfig::KEYS.contains(&&*key) && name != DEFAULT_API && is_name(&name);
    is_known.then(|| format!("{APIS}.{name}.{key}"))
}

impl Loader {
    /// Each needs a URL of its own: the default is that of `[api]`.
    pub(super) fn check_urls(&mut self, config: &Config) {
        for name in config.apis.keys() {
            let section = format!("{APIS}.{name}");
            let url = format!("{section}.url");
            if self.places.contains_key(&url) || self.errors.iter().any(|error| error.key == url) {
                continue;
            }
            let key = format!("{section}.");
            let mut places = self.places.iter();
            let place = places.find(|(known, _)| **known == section || known.starts_with(&key));
            let place = place.map_or_else(String::new, |(_, place)| place.clone());
            self.error(
                place,
                url,
                "is missing; allowed is http:// or https:// with a host",
            );
        }
    }
}
