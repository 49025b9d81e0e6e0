//! Reads file, environment and flags over the defaults, to a valid configuration or to all mistakes
//! in it.
//!
//! Each key is deserialised alone first, so that one mistake hides no other.

mod apis;
mod routes;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt, fs, mem,
    net::IpAddr,
    path::Path,
};

use schemars::JsonSchema;
use serde::{Deserialize as _, Serialize};
use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue, ValueDeserializer},
};
use tracing::warn;

use self::{apis::APIS, routes::ROUTES};
use super::{Config, SECTIONS, rules, url::without_logins};
use crate::{
    lane_id::LaneId,
    trace::{OtelVariables, settings::PREFIX as OTEL},
};

/// The beginning of our variables' names.
const PREFIX: &str = "WAYPOST_";
/// The variable that Pub/Sub's own tools set: the default of [`ENDPOINT`].
const EMULATOR: &str = "PUBSUB_EMULATOR_HOST";
const ENDPOINT: &str = "lanes.pubsub.endpoint";

/// A mistake in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ConfigError {
    /// `FILE:LINE`, or the name of the variable or flag.
    pub place: String,
    /// `section.key`, or empty for a mistake that has no key.
    pub key: String,
    /// The mistake, and the allowed values.
    pub what: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, key, what } = self;
        if key.is_empty() {
            write!(f, "{place}: {what}")
        } else {
            write!(f, "{place}: {key}: {what}")
        }
    }
}

/// A value that a flag gives to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    pub flag: &'static str,
    /// `section.key`
    pub key: &'static str,
    pub value: String,
}

impl Config {
    /// Reads all sources, later ones over earlier ones: defaults, `file`, `environment`, `flags`.
    ///
    /// # Errors
    /// All mistakes, in the order of the sources.
    pub fn load(
        file: Option<&Path>,
        environment: &BTreeMap<String, String>,
        flags: &[Flag],
    ) -> Result<Self, Vec<ConfigError>> {
        let mut loader = Loader::default();
        if let Some(file) = file {
            loader.file(file);
        }
        loader.environment(environment);
        for flag in flags {
            loader.set(flag.key, flag.flag.into(), flag.value.as_str().into());
        }
        loader.finish()
    }

    /// The effective configuration as TOML. It loads to the same configuration, but for the
    /// passwords in URLs, which are masked.
    #[expect(clippy::missing_panics_doc, reason = "it never panics")]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("sections of texts, numbers and lists of texts are TOML")
    }

    /// Every key, as `section.key`.
    pub fn keys() -> impl Iterator<Item = String> {
        SECTIONS
            .iter()
            .flat_map(|(section, names)| names.iter().map(move |name| format!("{section}.{name}")))
    }
}

/// The keys of a section, if there is one of this name.
fn names_in(section: &str) -> Option<&'static [&'static str]> {
    let section = match section.split_once('.') {
        Some((APIS, _)) => "api",
        _ => section,
    };
    let known = SECTIONS.iter().find(|(known, _)| *known == section);
    known.map(|(_, names)| *names)
}

/// The environment variable of a key.
pub fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

#[derive(Default)]
struct Loader {
    /// The values of all sources, without those that are wrong.
    values: Table,
    errors: Vec<ConfigError>,
    /// Lines with a syntax error. The rest of such a line is guesswork, so it has no other error.
    torn: HashSet<String>,
    /// The place of each key that a source sets.
    places: HashMap<String, String>,
    otel: OtelVariables,
}

impl Loader {
    fn error(&mut self, place: impl Into<String>, key: impl Into<String>, what: impl Into<String>) {
        let place = place.into();
        if !self.torn.contains(&place) {
            self.errors.push(ConfigError {
                place,
                key: in_one_line(key.into()),
                what: in_one_line(without_logins(&what.into())),
            });
        }
    }

    fn set(&mut self, key: &str, place: String, value: Value) {
        let (section, name) = key.rsplit_once('.').unwrap_or_default();
        let names = names_in(section).unwrap_or_default();
        if !names.contains(&name) {
            let meant = nearest(name, names).map_or_else(
                || format!("allowed are {}", sorted(names)),
                |near| format!("did you mean {section}.{near}?"),
            );
            return self.error(place, key, format!("there is no such key; {meant}"));
        }
        let mut alone = Table::new();
        insert(&mut alone, section, Some((name, value.clone())));
        match Config::deserialize(alone) {
            Ok(_) => {
                insert(&mut self.values, section, Some((name, value)));
                self.places.insert(key.to_owned(), place);
            }
            Err(error) => {
                insert(&mut self.values, section, None);
                self.error(place, key, error.message());
            }
        }
    }

    fn file(&mut self, file: &Path) {
        let shown = file.display();
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(why) => return self.error(shown.to_string(), "", format!("cannot be read: {why}")),
        };
        let place = |at: usize| {
            let line = 1 + text[..at.min(text.len())].matches('\n').count();
            format!("{shown}:{line}")
        };
        let (table, syntax_errors) = DeTable::parse_recoverable(&text);
        for error in syntax_errors {
            let place = place(error.span().map_or(0, |span| span.start));
            self.error(place.as_str(), "", format!("not TOML: {}", error.message()));
            self.torn.insert(place);
        }
        for (section, value) in table.get_ref() {
            match value.get_ref() {
                DeValue::Table(sections) if ["lanes", APIS].contains(&&**section.get_ref()) => {
                    for (name, keys) in sections {
                        let section = format!("{}.{}", section.get_ref(), name.get_ref());
                        self.section(&section, place(name.span().start), keys, &place);
                    }
                }
                DeValue::Array(rules) if section.get_ref() == ROUTES => {
                    self.routes(rules, &place);
                }
                _ if section.get_ref() == ROUTES => {
                    let what = "is a list of rules, each written below [[routes]]";
                    self.error(place(section.span().start), ROUTES, what);
                }
                _ => self.section(
                    section.get_ref(),
                    place(section.span().start),
                    value,
                    &place,
                ),
            }
        }
    }

    fn section(
        &mut self,
        section: &str,
        at: String,
        value: &Spanned<DeValue<'_>>,
        place: &impl Fn(usize) -> String,
    ) {
        if let Some(what) = apis::wrong_name(section) {
            return self.error(at, section, what);
        }
        if names_in(section).is_none() {
            let mut sections: Vec<_> = SECTIONS.iter().map(|(section, _)| *section).collect();
            sections.extend([ROUTES, "apis.NAME"]);
            let what = format!(
                "there is no such section; allowed are {}",
                sorted(&sections)
            );
            return self.error(at, section, what);
        }
        let DeValue::Table(keys) = value.get_ref() else {
            return self.error(at, section, format!("is a section, written as [{section}]"));
        };
        insert(&mut self.values, section, None);
        self.places.insert(section.to_owned(), at);
        for (name, value) in keys {
            let at = place(name.span().start);
            let key = format!("{section}.{}", name.get_ref());
            match Value::deserialize(ValueDeserializer::from(value.clone())) {
                Ok(value) => self.set(&key, at, value),
                Err(error) => self.error(at, key, error.message()),
            }
        }
    }

    fn environment(&mut self, environment: &BTreeMap<String, String>) {
        let keys: BTreeMap<_, _> = Config::keys().map(|key| (variable(&key), key)).collect();
        let otel = environment
            .iter()
            .filter(|(name, _)| name.starts_with(OTEL));
        let otel = otel.map(|(name, text)| (name.clone(), text.clone()));
        self.otel = OtelVariables(otel.collect());
        for (name, text) in environment {
            let key = keys.get(name).cloned().or_else(|| apis::key_of(name));
            if let Some(key) = key {
                self.set(&key, name.clone(), text.as_str().into());
                continue;
            }
            if !has_prefix(name) || is_service_link(name, text) {
                continue;
            }
            if !name.starts_with(PREFIX) || !name[PREFIX.len()..].contains("__") {
                // Another program's, unless it is a slip.
                if let Some(near) = nearest_without_underscores(name, keys.keys()) {
                    warn!(
                        variable = name,
                        "the variable is ignored: did you mean {near}?"
                    );
                }
                continue;
            }
            let meant = nearest(name, keys.keys()).map_or_else(
                || "allowed is WAYPOST_SECTION__KEY for a key of the file".into(),
                |near| format!("did you mean {near}?"),
            );
            self.error(name, "", format!("there is no such variable; {meant}"));
        }
        if let Some(host) = environment.get(EMULATOR).filter(|host| !host.is_empty())
            && self.lanes().contains(&LaneId::Pubsub)
            && !self.places.contains_key(ENDPOINT)
        {
            self.set(ENDPOINT, EMULATOR.into(), host.as_str().into());
        }
    }

    /// The lanes that a source names, in its order.
    fn lanes(&self) -> Vec<LaneId> {
        let lanes = self.values.get("lanes").and_then(Value::as_table);
        let names = lanes.into_iter().flat_map(Table::keys);
        names.filter_map(|name| LaneId::from_name(name)).collect()
    }

    fn finish(mut self) -> Result<Config, Vec<ConfigError>> {
        if self.lanes().is_empty() {
            insert(&mut self.values, "lanes.grpc", None);
        }
        let mut config = match Config::deserialize(self.values.clone()) {
            Ok(config) => config,
            // Each value was read alone; a file may have gone since.
            Err(error) => {
                self.error("configuration", "", error.message());
                return Err(self.errors);
            }
        };
        config.lanes.order = self.lanes();
        config.otel = mem::take(&mut self.otel);
        self.check_urls(&config);
        // A key that has its error already needs no second one.
        let wrong: HashSet<_> = self.errors.iter().map(|error| error.key.clone()).collect();
        for violations in rules::violations(&config) {
            let is_wrong = |violation: &rules::Violation| wrong.contains(&violation.key);
            let is_set = |violation: &&rules::Violation| self.places.contains_key(&violation.key);
            let found = violations.iter().find(is_set).or(violations.first());
            if let Some(rules::Violation { key, what }) = found
                && !violations.iter().any(is_wrong)
            {
                let place = self.places.get(key).map_or("default", String::as_str);
                self.error(place.to_owned(), key, what);
            }
        }
        if self.errors.is_empty() {
            if let Ok(routes) = config.routes() {
                self.warn_of_unreachable(&routes);
            }
            self.warn_of_overload(&config);
            Ok(config)
        } else {
            Err(self.errors)
        }
    }
}

impl Loader {
    /// Warns if records would die of an API that only has too much to do.
    fn warn_of_overload(&self, config: &Config) {
        let is_retried = |status: &u16| config.api.retry_statuses.contains(*status);
        for status in [429, 503].iter().filter(|status| !is_retried(status)) {
            let key = "api.retry_statuses";
            let place = self.places.get(key).map_or("default", String::as_str);
            warn!(
                "{place}: {key}: has no {status}: while the API has too much to do, records become \
                 dead letters"
            );
        }
    }
}

/// A mistake is one line, whatever a file or a variable has in its names and values.
fn in_one_line(text: String) -> String {
    if !text.contains(char::is_control) {
        return text;
    }
    let shown = text.chars().map(|character| {
        if character.is_control() {
            character.escape_debug().to_string()
        } else {
            character.to_string()
        }
    });
    shown.collect()
}

/// Sets a key of a section, and makes the section if it is missing.
fn insert(table: &mut Table, section: &str, key: Option<(&str, Value)>) {
    let section = section.split('.').try_fold(table, |table, name| {
        let section = table.entry(name).or_insert_with(|| Table::new().into());
        section.as_table_mut()
    });
    if let (Some(section), Some((name, value))) = (section, key) {
        section.insert(name.to_owned(), value);
    }
}

/// Whether a variable begins as ours do, in capitals or not.
fn has_prefix(name: &str) -> bool {
    let beginning = name.get(..PREFIX.len());
    beginning.is_some_and(|beginning| beginning.eq_ignore_ascii_case(PREFIX))
}

/// Whether Kubernetes makes this variable for a Service: `NAME_SERVICE_HOST`,
/// `NAME_SERVICE_PORT[_PORTNAME]`, `NAME_PORT`, or
/// `NAME_PORT_NUMBER_PROTOCOL[_PROTO|_PORT|_ADDR]`, each with a value of its kind. With another
/// value, it may be a key's that is misspelt.
fn is_service_link(name: &str, value: &str) -> bool {
    let is_number = |text: &str| text.parse::<u16>().is_ok();
    let is_address = |text: &str| text.parse::<IpAddr>().is_ok();
    let is_url = |text: &str| text.contains("://");
    let words: Vec<_> = name.split('_').collect();
    match &words[1..] {
        [.., "SERVICE", "HOST"] => is_address(value),
        [.., "PORT", number, "TCP" | "UDP" | "SCTP"] => is_number(number) && is_url(value),
        [.., "PORT", number, protocol, part] if matches!(*protocol, "TCP" | "UDP" | "SCTP") => {
            is_number(number)
                && match *part {
                    "PROTO" => value.eq_ignore_ascii_case(protocol),
                    "PORT" => is_number(value),
                    "ADDR" => is_address(value),
                    _ => false,
                }
        }
        words if words.windows(2).any(|pair| pair == ["SERVICE", "PORT"]) => is_number(value),
        [.., "PORT"] => is_url(value),
        _ => false,
    }
}

/// The variable that `name` is meant to be, if underscores are all that it gets wrong, or a slip
/// more.
fn nearest_without_underscores<'k>(
    name: &str,
    known: impl Iterator<Item = &'k String>,
) -> Option<&'k String> {
    let bare = |name: &str| name.replace('_', "").to_ascii_uppercase();
    let given = bare(name);
    let known = known.map(|known| (strsim::levenshtein(&given, &bare(known)), known));
    let (distance, nearest) = known.min()?;
    (distance <= 2).then_some(nearest)
}

fn sorted(names: &[&str]) -> String {
    let mut names = names.to_vec();
    names.sort_unstable();
    names.join(", ")
}

/// The known name that is a slip or two away.
fn nearest(given: &str, known: impl IntoIterator<Item = impl AsRef<str>>) -> Option<String> {
    let known = known.into_iter().map(|known| known.as_ref().to_owned());
    let (distance, nearest) = known
        .map(|known| (strsim::levenshtein(given, &known), known))
        .min()?;
    (distance <= (given.len() / 3).clamp(1, 3)).then_some(nearest)
}
