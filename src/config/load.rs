//! From defaults, file, environment and flags to a configuration that is valid as a whole, or to all its mistakes.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    fmt::Write as _,
    fs,
    path::Path,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Config,
    keys::{KEYS, Key, Value, lane_of},
};
use crate::delivery::LaneId;

/// The beginning of our variables' names.
const PREFIX: &str = "WAYPOST_";
/// What the emulator's own tools set: the default of `lanes.pubsub.endpoint`.
const EMULATOR: &str = "PUBSUB_EMULATOR_HOST";

/// Something in the configuration that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// `FILE:LINE`, or the name of the variable or flag.
    pub place: String,
    /// `section.key`; empty where it is not about a key.
    pub key: String,
    /// What is wrong, and what is allowed.
    pub what: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, key, what } = self;
        if key.is_empty() { write!(f, "{place}: {what}") } else { write!(f, "{place}: {key}: {what}") }
    }
}

/// A value that a flag gives to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    pub flag: &'static str,
    pub section: &'static str,
    pub name: &'static str,
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
    ) -> Result<Self, Vec<Mistake>> {
        let mut loader = Loader::default();
        if let Some(file) = file {
            loader.file(file);
        }
        loader.environment(environment);
        for Flag { flag, section, name, value } in flags {
            loader.set(section, name, (*flag).to_owned(), &Value::Text(value.clone()));
        }
        loader.finish()
    }

    /// The effective configuration, as a file that loads to the same. Passwords in URLs are masked.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for key in KEYS {
            let Some(value) = (key.show)(self) else { continue };
            if key.section != section {
                section = key.section;
                let gap = if text.is_empty() { "" } else { "\n" };
                // Writing to a string cannot fail.
                writeln!(text, "{gap}[{section}]").ok();
            }
            writeln!(text, "{} = {}", key.name, mask(&value)).ok();
        }
        text
    }

    /// The lanes that are on, in the order of the configuration, with their tags.
    #[must_use]
    pub fn lanes_in_order(&self) -> Vec<(LaneId, String)> {
        let lanes = &self.lanes;
        let tag = |lane| match lane {
            LaneId::Grpc => lanes.grpc.as_ref().map(|lane| &lane.tag),
            LaneId::Nats => lanes.nats.as_ref().map(|lane| &lane.tag),
            LaneId::Rabbitmq => lanes.rabbitmq.as_ref().map(|lane| &lane.tag),
            LaneId::Pubsub => lanes.pubsub.as_ref().map(|lane| &lane.tag),
            LaneId::Memory => None,
        };
        let rest = LaneId::ALL.into_iter().filter(|lane| !self.lane_order.contains(lane));
        self.lane_order.iter().copied().chain(rest).filter_map(|lane| Some((lane, tag(lane)?.clone()))).collect()
    }
}

/// `scheme://user:password@host` with the password hidden.
fn mask(text: &str) -> String {
    let Some((before, rest)) = text.split_once("://") else { return text.to_owned() };
    let authority = rest.find(['/', '?', '"']).unwrap_or(rest.len());
    match rest[..authority].rsplit_once('@') {
        Some((login, _)) if login.contains(':') => {
            let user = login.split(':').next().unwrap_or_default();
            format!("{before}://{user}:***{}", &rest[login.len()..])
        }
        // A login without a password is a token.
        Some((login, _)) => format!("{before}://***{}", &rest[login.len()..]),
        None => text.to_owned(),
    }
}

#[derive(Default)]
struct Loader {
    config: Config,
    mistakes: Vec<Mistake>,
    /// Where each key that is not at its default was set.
    places: HashMap<(&'static str, &'static str), String>,
}

impl Loader {
    fn mistake(&mut self, place: impl Into<String>, key: impl Into<String>, what: impl Into<String>) {
        self.mistakes.push(Mistake { place: place.into(), key: key.into(), what: what.into() });
    }

    fn set(&mut self, section: &str, name: &str, place: String, value: &Value) {
        let path = format!("{section}.{name}");
        let Some(key) = KEYS.iter().find(|key| key.section == section && key.name == name) else {
            let known = KEYS.iter().map(|key| format!("{}.{}", key.section, key.name));
            return self.mistake(place, path.clone(), format!("there is no such key{}", hint(&path, known)));
        };
        if let Some(lane) = lane_of(section)
            && !self.config.lane_order.contains(&lane)
        {
            self.config.lane_order.push(lane);
            self.turn_on(lane);
        }
        match (key.set)(&mut self.config, value) {
            Ok(()) => {
                self.places.insert((key.section, key.name), place);
            }
            Err(what) => self.mistake(place, path, what),
        }
    }

    fn turn_on(&mut self, lane: LaneId) {
        let lanes = &mut self.config.lanes;
        match lane {
            LaneId::Grpc => drop(lanes.grpc.get_or_insert_default()),
            LaneId::Nats => drop(lanes.nats.get_or_insert_default()),
            LaneId::Rabbitmq => drop(lanes.rabbitmq.get_or_insert_default()),
            LaneId::Pubsub => drop(lanes.pubsub.get_or_insert_default()),
            LaneId::Memory => {}
        }
    }

    fn file(&mut self, file: &Path) {
        let shown = file.display().to_string();
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(why) => return self.mistake(shown, "", format!("cannot be read: {why}")),
        };
        let line = |at: usize| 1 + text[..at.min(text.len())].matches('\n').count();
        let (table, errors) = DeTable::parse_recoverable(&text);
        for error in errors {
            let at = line(error.span().map_or(0, |span| span.start));
            self.mistake(format!("{shown}:{at}"), "", format!("not TOML: {}", error.message()));
        }
        let place = |at: usize| format!("{shown}:{}", line(at));
        for (section, at, value) in in_order(table.get_ref()) {
            match value {
                DeValue::Table(lanes) if section == "lanes" => {
                    for (lane, at, keys) in in_order(lanes) {
                        self.section(&format!("lanes.{lane}"), place(at), keys, &place);
                    }
                }
                _ => self.section(section, place(at), value, &place),
            }
        }
    }

    fn section(&mut self, section: &str, at: String, value: &DeValue<'_>, place: &impl Fn(usize) -> String) {
        if !KEYS.iter().any(|key| key.section == section) {
            let mut sections: Vec<_> = KEYS.iter().map(|key| key.section).collect();
            sections.dedup();
            return self.mistake(at, section, format!("there is no such section; allowed are {}", sections.join(", ")));
        }
        let DeValue::Table(keys) = value else {
            return self.mistake(at, section, "is a section, written as [".to_owned() + section + "]");
        };
        if let Some(lane) = lane_of(section) {
            self.config.lane_order.push(lane);
            self.turn_on(lane);
        }
        for (name, at, value) in in_order(keys) {
            self.set(section, name, place(at), &to_value(value));
        }
    }

    fn environment(&mut self, environment: &BTreeMap<String, String>) {
        for (variable, text) in environment.iter().filter(|(name, _)| name.starts_with(PREFIX)) {
            match KEYS.iter().find(|key| key.variable() == *variable) {
                Some(key) => self.set(key.section, key.name, variable.clone(), &Value::Text(text.clone())),
                None => {
                    let hint = hint(variable, KEYS.iter().map(Key::variable));
                    self.mistake(variable, "", format!("there is no such variable{hint}"));
                }
            }
        }
        if let (Some(pubsub), Some(host)) = (&mut self.config.lanes.pubsub, environment.get(EMULATOR))
            && pubsub.endpoint.is_none()
            && !host.is_empty()
        {
            pubsub.endpoint = Some(host.clone());
        }
    }

    fn finish(mut self) -> Result<Config, Vec<Mistake>> {
        if self.config.lane_order.is_empty() {
            self.config.lane_order.push(LaneId::Grpc);
            self.turn_on(LaneId::Grpc);
        }
        for (section, name, what) in super::rules::broken(&self.config) {
            // A key that has its mistake already needs no second one.
            let path = format!("{section}.{name}");
            if !self.mistakes.iter().any(|mistake| mistake.key == path) {
                let place = self.places.get(&(section, name)).cloned().unwrap_or_else(|| "default".into());
                self.mistake(place, path, what);
            }
        }
        if self.mistakes.is_empty() { Ok(self.config) } else { Err(self.mistakes) }
    }
}

/// A table's entries as they stand in the file, with where each begins.
fn in_order<'t>(table: &'t DeTable<'_>) -> Vec<(&'t str, usize, &'t DeValue<'t>)> {
    let entry = |(key, value): (&'t Spanned<_>, &'t Spanned<DeValue<'t>>)| {
        let key: &'t Spanned<std::borrow::Cow<'t, str>> = key;
        (key.get_ref().as_ref(), key.span().start, value.get_ref())
    };
    let mut entries: Vec<_> = table.iter().map(entry).collect();
    entries.sort_by_key(|(_, at, _)| *at);
    entries
}

fn to_value(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => Value::Integer(number.as_str().to_owned()),
        DeValue::Array(items) => {
            let texts = items.iter().map(|item| item.get_ref().as_str().map(str::to_owned));
            texts.collect::<Option<_>>().map_or(Value::Other("list of other things than texts"), Value::List)
        }
        other => Value::Other(other.type_str()),
    }
}

/// What may have been meant.
fn hint(given: &str, known: impl Iterator<Item = String>) -> String {
    let nearest = known.map(|known| (distance(given, &known), known)).min();
    match nearest {
        Some((distance, known)) if distance <= 3 => format!("; did you mean {known}?"),
        _ => "; `waypost check` prints those there are".into(),
    }
}

/// The Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
