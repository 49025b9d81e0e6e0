//! From defaults, file, environment and flags to a configuration that is valid as a whole, or to all its mistakes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
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
    rules::Blame,
};
use crate::lane_id::LaneId;

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
        for Flag {
            flag,
            section,
            name,
            value,
        } in flags
        {
            loader.set(
                section,
                name,
                (*flag).to_owned(),
                &Value::Text(value.clone()),
            );
        }
        loader.finish()
    }

    /// The effective configuration, as a file that loads to the same, but for the passwords in URLs, which are masked. Lanes
    /// come last, in their order.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let rank = |key: &&Key| {
            lane_of(key.section).map(|lane| {
                self.lane_order
                    .iter()
                    .position(|l| *l == lane)
                    .unwrap_or(usize::MAX)
            })
        };
        let mut keys: Vec<_> = KEYS.iter().collect();
        keys.sort_by_key(rank);
        let mut text = String::new();
        let mut section = "";
        for key in keys {
            let Some(value) = (key.show)(self) else {
                continue;
            };
            if key.section != section {
                section = key.section;
                let gap = if text.is_empty() { "" } else { "\n" };
                // Writing to a string cannot fail.
                writeln!(text, "{gap}[{section}]").ok();
            }
            writeln!(text, "{} = {value}", key.name).ok();
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
        let rest = LaneId::ALL
            .into_iter()
            .filter(|lane| !self.lane_order.contains(lane));
        self.lane_order
            .iter()
            .copied()
            .chain(rest)
            .filter_map(|lane| Some((lane, tag(lane)?.clone())))
            .collect()
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
    fn mistake(
        &mut self,
        place: impl Into<String>,
        key: impl Into<String>,
        what: impl Into<String>,
    ) {
        self.mistakes.push(Mistake {
            place: place.into(),
            key: key.into(),
            what: what.into(),
        });
    }

    fn set(&mut self, section: &str, name: &str, place: String, value: &Value) {
        let path = format!("{section}.{name}");
        let Some(key) = KEYS
            .iter()
            .find(|key| key.section == section && key.name == name)
        else {
            let names: Vec<_> = KEYS
                .iter()
                .filter(|key| key.section == section)
                .map(|key| key.name)
                .collect();
            let meant = nearest(name, names.iter().copied()).map_or_else(
                || format!("allowed are {}", names.join(", ")),
                |near| format!("did you mean {section}.{near}?"),
            );
            return self.mistake(place, path, format!("there is no such key; {meant}"));
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
        let mut torn = HashSet::new();
        for error in errors {
            let at = line(error.span().map_or(0, |span| span.start));
            // What follows an error on its line is guesswork.
            if torn.insert(format!("{shown}:{at}")) {
                self.mistake(
                    format!("{shown}:{at}"),
                    "",
                    format!("not TOML: {}", error.message()),
                );
            }
        }
        let syntax = self.mistakes.len();
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
        let meaning = self.mistakes.split_off(syntax);
        self.mistakes.extend(
            meaning
                .into_iter()
                .filter(|mistake| !torn.contains(&mistake.place)),
        );
    }

    fn section(
        &mut self,
        section: &str,
        at: String,
        value: &DeValue<'_>,
        place: &impl Fn(usize) -> String,
    ) {
        if !KEYS.iter().any(|key| key.section == section) {
            let mut sections: Vec<_> = KEYS.iter().map(|key| key.section).collect();
            sections.dedup();
            return self.mistake(
                at,
                section,
                format!(
                    "there is no such section; allowed are {}",
                    sections.join(", ")
                ),
            );
        }
        let DeValue::Table(keys) = value else {
            return self.mistake(
                at,
                section,
                "is a section, written as [".to_owned() + section + "]",
            );
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
        for (variable, text) in environment
            .iter()
            .filter(|(name, _)| name.starts_with(PREFIX))
        {
            match KEYS.iter().find(|key| key.variable() == *variable) {
                Some(key) => self.set(
                    key.section,
                    key.name,
                    variable.clone(),
                    &Value::Text(text.clone()),
                ),
                None => {
                    let known: Vec<_> = KEYS.iter().map(Key::variable).collect();
                    let meant = nearest(variable, known.iter().map(String::as_str)).map_or_else(
                        || "allowed is WAYPOST_SECTION__KEY for a key of the file".into(),
                        |near| format!("did you mean {near}?"),
                    );
                    self.mistake(variable, "", format!("there is no such variable; {meant}"));
                }
            }
        }
        if let (Some(pubsub), Some(host)) =
            (&mut self.config.lanes.pubsub, environment.get(EMULATOR))
            && pubsub.endpoint.is_none()
            && !host.is_empty()
        {
            pubsub.endpoint = Some(host.clone());
            self.places
                .insert(("lanes.pubsub", "endpoint"), EMULATOR.into());
        }
    }

    fn finish(mut self) -> Result<Config, Vec<Mistake>> {
        if self.config.lane_order.is_empty() {
            self.config.lane_order.push(LaneId::Grpc);
            self.turn_on(LaneId::Grpc);
        }
        // A key that has its mistake already needs no second one.
        let known: HashSet<_> = self
            .mistakes
            .iter()
            .map(|mistake| mistake.key.clone())
            .collect();
        for blames in super::rules::broken(&self.config) {
            if blames
                .iter()
                .any(|blame| known.contains(&format!("{}.{}", blame.section, blame.name)))
            {
                continue;
            }
            let set = blames
                .iter()
                .position(|blame| self.places.contains_key(&(blame.section, blame.name)));
            if let Some(Blame {
                section,
                name,
                what,
            }) = blames.into_iter().nth(set.unwrap_or(0))
            {
                let place = self
                    .places
                    .get(&(section, name))
                    .cloned()
                    .unwrap_or_else(|| "default".into());
                self.mistake(place, format!("{section}.{name}"), what);
            }
        }
        if self.mistakes.is_empty() {
            Ok(self.config)
        } else {
            Err(self.mistakes)
        }
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
        // In decimal, however it was written; one that is too long for that fits no key.
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or(Value::Other("integer of that size"), |number| {
                Value::Integer(number.to_string())
            }),
        DeValue::Array(items) => {
            let texts = items
                .iter()
                .map(|item| item.get_ref().as_str().map(str::to_owned));
            texts
                .collect::<Option<_>>()
                .map_or(Value::Other("list of other things than texts"), Value::List)
        }
        other => Value::Other(other.type_str()),
    }
}

/// What may have been meant: the known name that is a slip or two away.
fn nearest<'k>(given: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let (distance, known) = known
        .map(|known| (strsim::levenshtein(given, known), known))
        .min()?;
    (distance <= (given.len() / 3).clamp(1, 3)).then_some(known)
}
