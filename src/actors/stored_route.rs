//! The route of a record that waits on disk. The entry has all that the route has promised, so that
//! it holds after a restart with another configuration.

use super::receipts::PendingRecord;
use crate::{
    lane_id::LaneId,
    routing::{
        hash::KeyHash,
        policy::Policy,
        rules::{Assignment, CompiledRoute, Routes},
    },
    spool::{Entry, EntryRoute, Queue},
};

/// The queue of records for lane `pinned`, or for the lanes of `route`.
pub fn queue(route: &CompiledRoute, pinned: Option<LaneId>) -> Queue {
    match pinned {
        Some(lane) => Queue::Pinned(lane),
        None if route.names_lanes => Queue::of(route.lanes.iter().copied().collect()),
        None => Queue::Waiting,
    }
}

/// The entry of a record that takes `route`.
pub fn entry(route: &CompiledRoute, pending: &PendingRecord) -> Entry {
    let named: &[LaneId] = if route.names_lanes { &route.lanes } else { &[] };
    Entry {
        route: Some(EntryRoute {
            name: route.name.clone(),
            policy: route.policy.name().into(),
            lanes: named.iter().map(|lane| lane.name().into()).collect(),
            key: pending.key.bits(),
        }),
        ..Entry::new(&pending.record, None)
    }
}

/// The assignment of a record that has waited on disk. One that has no route there is matched by its
/// body alone.
pub fn assignment(entry: &Entry, routes: &Routes) -> Assignment {
    let Some(stored) = &entry.route else {
        let text = std::str::from_utf8(&entry.body);
        let values = text.ok().and_then(|text| routes.pointers().read(text).ok());
        let assignment = routes.assign(&entry.id, &values.unwrap_or_default(), |_| None);
        return of_api(assignment, entry.api.as_deref(), routes);
    };
    let policy = Policy::from_name(&stored.policy);
    let policy = policy.unwrap_or(Policy::RoundRobin);
    let lanes = stored.lanes.iter();
    let lanes: Box<[LaneId]> = lanes.filter_map(|name| LaneId::from_name(name)).collect();
    let lanes = Some(lanes).filter(|lanes| !lanes.is_empty());
    Assignment {
        route: routes.taken_before(&stored.name, policy, lanes, entry.api.as_deref()),
        key: KeyHash::from_bits(stored.key),
        pinned: None,
    }
}

/// The same assignment for a record that goes to `api`: a header may have chosen that.
fn of_api(assignment: Assignment, api: Option<&str>, routes: &Routes) -> Assignment {
    let route = &assignment.route;
    if route.api.as_deref() == api {
        return assignment;
    }
    let lanes = route.names_lanes.then(|| route.lanes.clone());
    Assignment {
        route: routes.taken_before(&route.name, route.policy, lanes, api),
        ..assignment
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use prost::Message as _;

    use super::*;
    use crate::{
        actors::receipts::{AssignedRecord, Replies},
        record::Record,
        routing::{
            policy::HashOn,
            rules::{RouteDefaults, RouteRule},
        },
    };

    fn routes(rules: &[&str]) -> Routes {
        let rules = rules.iter();
        let rules = rules.map(|rule| toml::from_str::<RouteRule>(rule).unwrap());
        let defaults = RouteDefaults {
            policy: Policy::RoundRobin,
            hash_on: &HashOn::Id,
            lanes: &LaneId::ALL,
            apis: &[],
        };
        Routes::new(&rules.collect::<Vec<_>>(), &defaults).unwrap()
    }

    /// The queue and the bytes of the entry of a record, with the route that it took.
    fn stored(routes: &Routes, header: Option<&'static str>) -> (Queue, Vec<u8>, Assignment) {
        let record = Record {
            id: "id".into(),
            body: r#"{"a":1,"b":"key"}"#.into(),
            trace: None,
            origin: None,
            api: None,
            event: None,
        };
        let values = routes.pointers().read(r#"{"a":1,"b":"key"}"#).unwrap();
        let assignment = routes.assign(&record.id, &values, |_| header);
        let assigned = [AssignedRecord { record, assignment }];
        let replies = Replies::new(&assigned, None);
        let (Assignment { route, pinned, .. }, pending) = &replies.unanswered()[0];
        let bytes = entry(route, &pending[0]).encode_to_vec();
        (queue(route, *pinned), bytes, assigned[0].assignment.clone())
    }

    #[test]
    fn a_record_on_disk_keeps_lanes_policy_and_key_of_its_rule() {
        let hash = "when = { header = \"x\", exists = true }\n\
                    policy = \"hash\"\nhash_on = \"/b\"\nlanes = [\"pubsub\", \"nats\"]";
        let before = routes(&[hash]);
        let (queue, bytes, took) = stored(&before, Some("there"));
        assert_eq!(
            queue,
            Queue::of([LaneId::Nats, LaneId::Pubsub].into_iter().collect())
        );
        let entry = Entry::decode(&*bytes).unwrap();
        let again = assignment(&entry, &before);
        assert!(Arc::ptr_eq(&again.route, &took.route));
        assert_eq!(again.key, KeyHash::of(b"key"));
        for after in [routes(&[]), routes(&["lanes = [\"grpc\"]"])] {
            let Assignment { route, key, .. } = assignment(&entry, &after);
            assert_eq!((&*route.name, route.policy), ("routes[1]", Policy::Hash));
            assert_eq!(&*route.lanes, [LaneId::Pubsub, LaneId::Nats]);
            assert_eq!(key, KeyHash::of(b"key"));
        }
    }

    #[test]
    fn a_rule_without_lanes_lets_a_record_on_disk_take_any() {
        let (queue, bytes, _) = stored(&routes(&["policy = \"adaptive\""]), None);
        assert_eq!(queue, Queue::Waiting);
        let entry = Entry::decode(&*bytes).unwrap();
        let Assignment { route, .. } = assignment(&entry, &routes(&[]));
        assert_eq!(
            (route.policy, route.lanes.len()),
            (Policy::Adaptive, LaneId::ALL.len())
        );
        let later = routes(&["lanes = [\"nats\"]"]);
        let Assignment { route, .. } = assignment(&entry, &later);
        assert_eq!(&*route.lanes, LaneId::ALL, "whatever a later rule names");
        let (queue, ..) = stored(&routes(&["lanes = [\"grpc\"]"]), None);
        assert_eq!(queue, Queue::Pinned(LaneId::Grpc));
    }

    #[test]
    fn a_record_without_a_route_goes_to_its_own_api() {
        let entry = Entry {
            body: r#"{"a":1}"#.into(),
            api: Some("slow".into()),
            ..Entry::default()
        };
        let Assignment { route, .. } = assignment(&entry, &routes(&[]));
        assert_eq!(
            (&*route.name, route.api.as_deref()),
            ("default", Some("slow"))
        );
    }

    #[test]
    fn an_entry_of_a_version_without_routes_is_matched_by_its_body() {
        // Fields 1 and 2, as every version has written them.
        let old = b"\x0a\x02id\x12\x07{\"a\":1}";
        let entry = Entry::decode(&old[..]).unwrap();
        let routes = routes(&[
            "when = { header = \"x\", exists = true }\nlanes = [\"grpc\"]",
            "when = { pointer = \"/a\", equals = 1 }\nlanes = [\"nats\"]",
        ]);
        assert_eq!(assignment(&entry, &routes).route.name, "routes[2]");
        let entry = Entry {
            body: "no JSON".into(),
            ..entry
        };
        assert_eq!(assignment(&entry, &routes).route.name, "default");
    }
}
