//! Reads file, environment and flags over the defaults, to a valid configuration or to all mistakes
//! in it.
//!
//! Each key is deserialised alone first, so that one mistake hides no other.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt, fs,
    path::Path,
};

use serde::Deserialize as _;
use toml::{
    Spanned, Table, Value,
    de::{DeTable, DeValue, ValueDeserializer},
};

use super::{Config, rules};
use crate::lane_id::LaneId;

/// The beginning of our variables' names.
const PREFIX: &str = "WAYPOST_";
/// The variable that Pub/Sub's own tools set: the default of [`ENDPOINT`].
const EMULATOR: &str = "PUBSUB_EMULATOR_HOST";
const ENDPOINT: &str = "lanes.pubsub.endpoint";

/// A mistake in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
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
        let mut loader = Loader::new();
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
    ///
    /// # Panics
    /// Never: the defaults are valid and JSON can hold them.
    pub fn keys() -> Vec<String> {
        let mut all_on = Table::new();
        for lane in LaneId::ALL {
            insert(
                &mut all_on,
                &format!("lanes.{lane}"),
                Value::Table(Table::new()),
            );
        }
        let config = Self::deserialize(all_on).expect("each key has a valid default");
        // JSON has the keys that are not set, too.
        let json = serde_json::to_value(config).expect("sections of keys are JSON");
        let mut keys = Vec::new();
        collect_keys("", &json, &mut keys);
        keys
    }
}

fn collect_keys(path: &str, value: &serde_json::Value, keys: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(members) if path.is_empty() => {
            for (name, member) in members {
                collect_keys(name, member, keys);
            }
        }
        serde_json::Value::Object(members) => {
            for (name, member) in members {
                collect_keys(&format!("{path}.{name}"), member, keys);
            }
        }
        _ => keys.push(path.to_owned()),
    }
}

/// The environment variable of a key.
pub fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

struct Loader {
    known: Vec<String>,
    /// The values of all sources, without those that are wrong.
    values: Table,
    lanes: Vec<LaneId>,
    errors: Vec<ConfigError>,
    /// The place of each key that a source sets.
    places: HashMap<String, String>,
}

impl Loader {
    fn new() -> Self {
        Self {
            known: Config::keys(),
            values: Table::new(),
            lanes: Vec::new(),
            errors: Vec::new(),
            places: HashMap::new(),
        }
    }

    fn error(&mut self, place: impl Into<String>, key: impl Into<String>, what: impl Into<String>) {
        self.errors.push(ConfigError {
            place: place.into(),
            key: key.into(),
            what: what.into(),
        });
    }

    fn set(&mut self, key: &str, place: String, value: Value) {
        let section = key.rsplit_once('.').map_or("", |(section, _)| section);
        if !self.known.iter().any(|known| known == key) {
            let names = self
                .known
                .iter()
                .filter_map(|key| key.strip_prefix(section)?.strip_prefix('.'));
            let names: Vec<_> = names.collect();
            let meant = nearest(&key[section.len() + 1..], names.iter().copied()).map_or_else(
                || format!("allowed are {}", names.join(", ")),
                |near| format!("did you mean {section}.{near}?"),
            );
            return self.error(place, key, format!("there is no such key; {meant}"));
        }
        self.turn_on(section);
        let mut alone = Table::new();
        insert(&mut alone, key, value.clone());
        match Config::deserialize(alone) {
            Ok(_) => {
                insert(&mut self.values, key, value);
                self.places.insert(key.to_owned(), place);
            }
            Err(error) => self.error(place, key, error.message()),
        }
    }

    /// Turns the lane on if the section is a lane's.
    fn turn_on(&mut self, section: &str) {
        let lane = section.strip_prefix("lanes.").and_then(LaneId::from_name);
        if let Some(lane) = lane
            && !self.lanes.contains(&lane)
        {
            self.lanes.push(lane);
            insert(&mut self.values, section, Value::Table(Table::new()));
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
        let mut torn = HashSet::new();
        for error in syntax_errors {
            let place = place(error.span().map_or(0, |span| span.start));
            // The rest of a line after an error is guesswork.
            if torn.insert(place.clone()) {
                self.error(place, "", format!("not TOML: {}", error.message()));
            }
        }
        let syntax = self.errors.len();
        for (section, at, value) in in_order(table.get_ref()) {
            match value.get_ref() {
                DeValue::Table(lanes) if section == "lanes" => {
                    for (lane, at, keys) in in_order(lanes) {
                        self.section(&format!("lanes.{lane}"), place(at), keys, &place);
                    }
                }
                _ => self.section(section, place(at), value, &place),
            }
        }
        let meaning = self.errors.split_off(syntax);
        let whole = meaning
            .into_iter()
            .filter(|error| !torn.contains(&error.place));
        self.errors.extend(whole);
    }

    fn section(
        &mut self,
        section: &str,
        at: String,
        value: &Spanned<DeValue<'_>>,
        place: &impl Fn(usize) -> String,
    ) {
        let mut sections: Vec<_> = self
            .known
            .iter()
            .filter_map(|key| key.rsplit_once('.'))
            .collect();
        sections.dedup_by_key(|(section, _)| *section);
        let sections: Vec<_> = sections.into_iter().map(|(section, _)| section).collect();
        if !sections.contains(&section) {
            let what = format!(
                "there is no such section; allowed are {}",
                sections.join(", ")
            );
            return self.error(at, section, what);
        }
        let DeValue::Table(keys) = value.get_ref() else {
            return self.error(at, section, format!("is a section, written as [{section}]"));
        };
        self.turn_on(section);
        for (name, at, value) in in_order(keys) {
            let key = format!("{section}.{name}");
            match Value::deserialize(ValueDeserializer::from(value.clone())) {
                Ok(value) => self.set(&key, place(at), value),
                Err(error) => self.error(place(at), key, error.message()),
            }
        }
    }

    fn environment(&mut self, environment: &BTreeMap<String, String>) {
        let variables = self.known.iter().map(|key| (variable(key), key.clone()));
        let keys: BTreeMap<_, _> = variables.collect();
        // A name without `__` is another program's, such as one that Kubernetes makes for a
        // Service.
        let ours = |name: &str| {
            name.strip_prefix(PREFIX)
                .is_some_and(|rest| rest.contains("__"))
        };
        for (name, text) in environment.iter().filter(|(name, _)| ours(name)) {
            match keys.get(name) {
                Some(key) => self.set(key, name.clone(), text.as_str().into()),
                None => {
                    let meant = nearest(name, keys.keys()).map_or_else(
                        || "allowed is WAYPOST_SECTION__KEY for a key of the file".into(),
                        |near| format!("did you mean {near}?"),
                    );
                    self.error(name, "", format!("there is no such variable; {meant}"));
                }
            }
        }
        if let Some(host) = environment.get(EMULATOR).filter(|host| !host.is_empty())
            && self.lanes.contains(&LaneId::Pubsub)
            && !self.places.contains_key(ENDPOINT)
        {
            self.set(ENDPOINT, EMULATOR.into(), host.as_str().into());
        }
    }

    fn finish(mut self) -> Result<Config, Vec<ConfigError>> {
        if self.lanes.is_empty() {
            self.turn_on("lanes.grpc");
        }
        let mut config = match Config::deserialize(self.values.clone()) {
            Ok(config) => config,
            // Each value was read alone; a file may have gone since.
            Err(error) => {
                self.error("configuration", "", error.message());
                return Err(self.errors);
            }
        };
        config.lanes.order = std::mem::take(&mut self.lanes);
        // A key that has its error already needs no second one.
        let wrong: HashSet<_> = self.errors.iter().map(|error| error.key.clone()).collect();
        for violations in rules::violations(&config) {
            if violations
                .iter()
                .any(|violation| wrong.contains(&violation.key))
            {
                continue;
            }
            let set = violations
                .iter()
                .position(|violation| self.places.contains_key(&violation.key));
            if let Some(violation) = violations.into_iter().nth(set.unwrap_or(0)) {
                let place = self.places.get(&violation.key).cloned();
                let place = place.unwrap_or_else(|| "default".into());
                self.error(place, violation.key, violation.what);
            }
        }
        if self.errors.is_empty() {
            Ok(config)
        } else {
            Err(self.errors)
        }
    }
}

/// Sets `a.b.c` in a table of tables.
fn insert(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
        }
        Some((section, rest)) => {
            let section = table
                .entry(section)
                .or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                insert(section, rest, value);
            }
        }
    }
}

/// A table's entries as they stand in the file, with the offset of each.
fn in_order<'t>(table: &'t DeTable<'_>) -> Vec<(&'t str, usize, &'t Spanned<DeValue<'t>>)> {
    let entry = |(key, value): (&'t Spanned<_>, &'t Spanned<DeValue<'t>>)| {
        let key: &'t Spanned<std::borrow::Cow<'t, str>> = key;
        (key.get_ref().as_ref(), key.span().start, value)
    };
    let mut entries: Vec<_> = table.iter().map(entry).collect();
    entries.sort_by_key(|(_, at, _)| *at);
    entries
}

/// The known name that is a slip or two away.
fn nearest(given: &str, known: impl IntoIterator<Item = impl AsRef<str>>) -> Option<String> {
    let (distance, known) = known
        .into_iter()
        .map(|known| {
            (
                strsim::levenshtein(given, known.as_ref()),
                known.as_ref().to_owned(),
            )
        })
        .min()?;
    (distance <= (given.len() / 3).clamp(1, 3)).then_some(known)
}
