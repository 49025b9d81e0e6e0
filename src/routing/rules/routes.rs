//! The routes of a node: `[[routes]]`, and a last one that takes what no rule matches.

use std::{borrow::Cow, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    condition::{Condition, Subject},
    scalar::Scalar,
    unreachable,
};
use crate::{
    config::DEFAULT_API,
    lane_id::LaneId,
    record::pointer::{PointerSet, Values},
    routing::{
        hash::KeyHash,
        policy::{HashOn, Policy},
    },
};

/// One `[[routes]]` of the configuration. What is absent is as in [`RouteDefaults`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouteRule {
    /// The records that take this route; absent for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub when: Option<Condition>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash_on: Option<HashOn>,
    /// The names of its lanes, in the order of `failover`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lanes: Option<Vec<String>>,
    /// The name of its API; absent for `[api]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<String>,
}

/// The settings of a rule that says nothing else.
#[derive(Clone, Copy, Debug)]
pub struct RouteDefaults<'c> {
    /// `[router].policy`
    pub policy: Policy,
    /// `[router].hash_on`
    pub hash_on: &'c HashOn,
    /// The lanes that are on, in the order of the configuration.
    pub lanes: &'c [LaneId],
    /// The names of `[apis.NAME]`.
    pub apis: &'c [&'c str],
}

/// A mistake in a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteError {
    /// `routes[1].lanes`
    pub key: String,
    /// The mistake, and what is allowed.
    pub what: String,
}

/// A route, ready to be taken. Jobs hold it, so it outlives a reload of the configuration.
#[derive(Clone, Debug)]
pub struct CompiledRoute {
    /// Its place among the routes, from 0.
    pub index: usize,
    /// `routes[1]` for the first rule, `default` for what no rule matches.
    pub name: String,
    /// `None` for a route that takes every record which comes to it.
    pub when: Option<Condition>,
    pub policy: Policy,
    /// At least one, each once.
    pub lanes: Box<[LaneId]>,
    /// The rule has named the lanes, so its records take no other lane, whatever the configuration
    /// says later.
    pub names_lanes: bool,
    /// The name of the API that takes its records; `None` for `[api]`.
    pub api: Option<Arc<str>>,
    /// The index of the subject that `when` tests.
    tested: Option<usize>,
    /// The index of the subject that `hash` hashes; `None` for the id.
    hashed: Option<usize>,
}

/// The result of the rules for one record: all that routing needs of it later.
#[derive(Clone, Debug)]
pub struct Assignment {
    pub route: Arc<CompiledRoute>,
    /// Of policy `hash` only.
    pub key: KeyHash,
    /// The only lane that may take the record, if its request names one, whatever the route says.
    pub pinned: Option<LaneId>,
}

/// The routes in their order. The last one matches every record.
#[derive(Clone, Debug)]
pub struct Routes {
    all: Vec<Arc<CompiledRoute>>,
    subjects: Vec<SubjectSource>,
    pointers: PointerSet,
    /// `[router].policy`
    policy: Policy,
    /// The lanes that are on, in the order of the configuration.
    lanes: Box<[LaneId]>,
    /// The index behind the last route, for a route that is not among them any more.
    next: usize,
}

/// The source of a subject's value.
#[derive(Clone, Debug, PartialEq, Eq)]
enum SubjectSource {
    /// The index of a pointer's value.
    Value(usize),
    Header(String),
}

impl Assignment {
    /// Whether each lane of the route takes a copy.
    pub fn is_broadcast(&self) -> bool {
        self.pinned.is_none() && self.route.policy == Policy::Broadcast
    }

    /// The copies of the record `id`: their ids, and the assignment of each to its lane.
    pub fn copies(&self, id: &str) -> impl Iterator<Item = (Arc<str>, Self)> {
        self.route.lanes.iter().map(move |lane| {
            let assignment = Self {
                pinned: Some(*lane),
                ..self.clone()
            };
            (format!("{id}/{lane}").into(), assignment)
        })
    }

    /// Whether a record goes together with one of this assignment.
    pub fn is_shared_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.route, &other.route) && self.pinned == other.pinned
    }
}

impl Routes {
    /// Compiles the rules.
    ///
    /// # Errors
    /// Every mistake in them.
    pub fn new(rules: &[RouteRule], defaults: &RouteDefaults<'_>) -> Result<Self, Vec<RouteError>> {
        let mut routes = Self {
            all: Vec::with_capacity(rules.len() + 1),
            subjects: Vec::new(),
            pointers: PointerSet::default(),
            policy: defaults.policy,
            lanes: defaults.lanes.into(),
            next: rules.len() + 1,
        };
        let mut errors = Vec::new();
        for (index, rule) in rules.iter().enumerate() {
            let name = format!("routes[{}]", index + 1);
            routes.add(rule, name, defaults, &mut errors);
        }
        if rules.iter().all(|rule| rule.when.is_some()) {
            let default = RouteRule::default();
            routes.add(&default, "default".into(), defaults, &mut errors);
        }
        if errors.is_empty() {
            Ok(routes)
        } else {
            Err(errors)
        }
    }

    fn add(
        &mut self,
        rule: &RouteRule,
        name: String,
        defaults: &RouteDefaults<'_>,
        errors: &mut Vec<RouteError>,
    ) {
        let mut mistaken = |member: &str, what| {
            let key = format!("{name}.{member}");
            errors.push(RouteError { key, what });
        };
        let lanes = match &rule.lanes {
            None => Ok(defaults.lanes.into()),
            Some(names) => lanes_of(names, defaults.lanes),
        };
        let lanes = lanes.map_err(|what| mistaken("lanes", what));
        let api = rule.api.as_deref();
        let api = api.map_or(Ok(None), |api| api_of(api, defaults.apis));
        let api = api.map_err(|what| mistaken("api", what));
        let (Ok(lanes), Ok(api)) = (lanes, api) else {
            return;
        };
        let policy = rule.policy.unwrap_or(defaults.policy);
        let hashed = match rule.hash_on.as_ref().unwrap_or(defaults.hash_on) {
            _ if policy != Policy::Hash => None,
            HashOn::Id => None,
            HashOn::Pointer(pointer) => Some(Subject::Pointer(pointer.clone())),
            HashOn::Header(name) => Some(Subject::Header(name.clone())),
        };
        let tested = rule.when.as_ref();
        let tested = tested.map(|condition| self.subject(&condition.subject));
        let hashed = hashed.map(|subject| self.subject(&subject));
        self.all.push(Arc::new(CompiledRoute {
            index: self.all.len(),
            name,
            when: rule.when.clone(),
            policy,
            lanes,
            names_lanes: rule.lanes.is_some(),
            api,
            tested,
            hashed,
        }));
    }

    /// The index of a subject. Each is read once, however many rules test it.
    fn subject(&mut self, subject: &Subject) -> usize {
        let source = match subject {
            Subject::Pointer(pointer) => SubjectSource::Value(self.pointers.add(pointer)),
            Subject::Header(name) => SubjectSource::Header(name.clone()),
        };
        let known = self.subjects.iter().position(|known| *known == source);
        known.unwrap_or_else(|| {
            self.subjects.push(source);
            self.subjects.len() - 1
        })
    }

    /// The pointers whose values [`Routes::assign`] takes. Empty without rules.
    pub const fn pointers(&self) -> &PointerSet {
        &self.pointers
    }

    /// `[router].policy`
    pub const fn policy(&self) -> Policy {
        self.policy
    }

    /// The routes in their order. The last one matches every record.
    pub fn all(&self) -> &[Arc<CompiledRoute>] {
        &self.all
    }

    /// Whether a policy reads outcomes and times of the lanes.
    pub fn measure(&self) -> bool {
        self.all.iter().any(|route| route.policy.measures())
    }

    /// The route of a record. `values` are those of [`Routes::pointers`]; `header` returns the
    /// value of a header by its name in lower case.
    pub fn assign<'r>(
        &self,
        id: &str,
        values: &Values<'r>,
        header: impl Fn(&str) -> Option<&'r str>,
    ) -> Assignment {
        let facts = self.facts(values, header);
        let matching = self.all.iter().find(|route| matches(route, &facts));
        // The last one matches, so another answer never comes.
        let route = matching.unwrap_or(&self.all[self.all.len() - 1]);
        let hashed = match route.hashed {
            Some(at) => match (&facts[at], &self.subjects[at]) {
                (Some(Scalar::Text(text) | Scalar::Header(text)), _) => Some(&**text),
                (Some(_), SubjectSource::Value(at)) => values.get(*at),
                _ => None,
            },
            None => None,
        };
        let key = match route.policy {
            Policy::Hash => KeyHash::of(hashed.unwrap_or(id).as_bytes()),
            _ => KeyHash::default(),
        };
        Assignment {
            route: Arc::clone(route),
            key,
            pinned: None,
        }
    }

    /// The route that a record for `api` took before: one of these if it is among them still, else
    /// one with this policy, and with these lanes alone if the rule had named them.
    pub fn taken_before(
        &self,
        name: &str,
        policy: Policy,
        lanes: Option<Box<[LaneId]>>,
        api: Option<&str>,
    ) -> Arc<CompiledRoute> {
        let is_same = |route: &&Arc<CompiledRoute>| {
            let named = route.names_lanes.then_some(&*route.lanes);
            route.name == name
                && route.policy == policy
                && named == lanes.as_deref()
                && route.api.as_deref() == api
        };
        if let Some(route) = self.all.iter().find(is_same) {
            return Arc::clone(route);
        }
        Arc::new(CompiledRoute {
            index: self.next,
            name: name.to_owned(),
            when: None,
            policy,
            names_lanes: lanes.is_some(),
            lanes: lanes.unwrap_or_else(|| self.lanes.clone()),
            api: api.map(Into::into),
            tested: None,
            hashed: None,
        })
    }

    /// Each route up to the one that the record takes, with the value that it tested.
    pub fn trace<'r>(
        &self,
        values: &Values<'r>,
        header: impl Fn(&str) -> Option<&'r str>,
    ) -> Vec<(Arc<CompiledRoute>, Option<Scalar<'r>>)> {
        let facts = self.facts(values, header);
        let taken = self.all.iter().position(|route| matches(route, &facts));
        let routes = self.all.iter().take(taken.map_or(0, |at| at + 1));
        let tested = |route: &CompiledRoute| facts[route.tested?].clone();
        routes
            .map(|route| (Arc::clone(route), tested(route)))
            .collect()
    }

    /// The rules that no record can take, each with the reason. A rule that is not named may be one
    /// as well: the language of a regular expression is not compared with another.
    pub fn unreachable(&self) -> Vec<(Arc<CompiledRoute>, String)> {
        let routes = self.all.iter().enumerate();
        let never = routes.filter_map(|(at, route)| {
            let why = unreachable::reason(route, &self.all[..at])?;
            Some((Arc::clone(route), why))
        });
        never.filter(|(route, _)| route.name != "default").collect()
    }

    fn facts<'r>(
        &self,
        values: &Values<'r>,
        header: impl Fn(&str) -> Option<&'r str>,
    ) -> Vec<Option<Scalar<'r>>> {
        let fact = |source: &SubjectSource| match source {
            SubjectSource::Value(at) => values.get(*at).map(Scalar::read),
            SubjectSource::Header(name) if name == "content-type" => {
                header(name).map(|value| Scalar::Header(media_type(value)))
            }
            SubjectSource::Header(name) => header(name).map(|value| Scalar::Header(value.into())),
        };
        self.subjects.iter().map(fact).collect()
    }
}

fn matches(route: &CompiledRoute, facts: &[Option<Scalar<'_>>]) -> bool {
    match (&route.when, route.tested) {
        (Some(condition), Some(at)) => condition.predicate.holds(facts[at].as_ref()),
        _ => true,
    }
}

/// The type of a `content-type`, in lower case and without parameters (RFC 9110, 8.3.1).
fn media_type(value: &str) -> Cow<'_, str> {
    let essence = value.split(';').next().unwrap_or_default().trim();
    if essence.bytes().any(|byte| byte.is_ascii_uppercase()) {
        essence.to_ascii_lowercase().into()
    } else {
        essence.into()
    }
}

/// The API of a rule that says `name`.
fn api_of(name: &str, configured: &[&str]) -> Result<Option<Arc<str>>, String> {
    if name == DEFAULT_API {
        return Ok(None);
    }
    if configured.contains(&name) {
        return Ok(Some(name.into()));
    }
    let allowed = [DEFAULT_API].iter().chain(configured).copied();
    let allowed: Vec<_> = allowed.collect();
    Err(format!(
        "{name:?} is no API; allowed are {}, of [api] and [apis.NAME]",
        allowed.join(", ")
    ))
}

fn lanes_of(names: &[String], configured: &[LaneId]) -> Result<Box<[LaneId]>, String> {
    let allowed = || {
        let names: Vec<_> = configured.iter().map(|lane| lane.name()).collect();
        names.join(", ")
    };
    if names.is_empty() {
        let allowed = allowed();
        return Err(format!(
            "is empty; allowed are lanes that are on: {allowed}"
        ));
    }
    let mut lanes = Vec::new();
    for name in names {
        let lane = LaneId::from_name(name).filter(|lane| configured.contains(lane));
        let lane = lane
            .ok_or_else(|| format!("{name:?} is no lane that is on; allowed are {}", allowed()))?;
        if lanes.contains(&lane) {
            return Err(format!(
                "{name:?} is there twice; allowed is each lane once"
            ));
        }
        lanes.push(lane);
    }
    Ok(lanes.into())
}
