//! Finds routes that no record can take.
//!
//! Each condition tests one subject, so a route is never taken if earlier routes take every value
//! of its subject that passes, or every value and the lack of one of any other subject.

use super::{
    condition::{Condition, Predicate, Subject},
    routes::CompiledRoute,
    scalar::{Number, Scalar},
};

/// Why no record takes `route`, if none does. `earlier` are the routes before it.
pub fn reason(route: &CompiledRoute, earlier: &[impl AsRef<CompiledRoute>]) -> Option<String> {
    let earlier: Vec<&CompiledRoute> = earlier.iter().map(AsRef::as_ref).collect();
    let taken_by = |routes: &[&CompiledRoute]| {
        let names: Vec<_> = routes.iter().map(|route| route.name.clone()).collect();
        let takes = if names.len() == 1 { "takes" } else { "take" };
        format!(
            "{} {takes} all of its records before it",
            names.join(" and ")
        )
    };
    if let Some(all) = earlier.iter().find(|route| route.when.is_none()) {
        return Some(taken_by(&[all]));
    }
    if let Some(pair) = complete_pair(&earlier) {
        return Some(taken_by(&pair));
    }
    let Condition { subject, predicate } = route.when.as_ref()?;
    if let Some(why) = impossible(subject, predicate) {
        return Some(why);
    }
    let of_subject = earlier.iter().filter_map(|route| {
        let condition = route.when.as_ref()?;
        (condition.subject == *subject).then_some((*route, &condition.predicate))
    });
    let of_subject: Vec<_> = of_subject.collect();
    let covering = covered_by(predicate, &of_subject)?;
    Some(taken_by(&covering))
}

/// Two routes that take all records between them: those with a value and those without.
fn complete_pair<'r>(earlier: &[&'r CompiledRoute]) -> Option<[&'r CompiledRoute; 2]> {
    let exists = |is_there| {
        earlier.iter().filter_map(move |route| {
            let condition = route.when.as_ref()?;
            (condition.predicate == Predicate::Exists(is_there)).then_some((*route, condition))
        })
    };
    exists(true).find_map(|(with, one)| {
        let (without, _) = exists(false).find(|(_, other)| other.subject == one.subject)?;
        Some([with, without])
    })
}

/// Why no record passes, if none does.
fn impossible(subject: &Subject, predicate: &Predicate) -> Option<String> {
    match subject {
        Subject::Pointer(pointer) if pointer.tokens()[0] == "path" => {
            let holds = matches!(predicate, Predicate::Exists(false));
            (!holds).then(|| "a record has no member `path`: the node removes it".into())
        }
        Subject::Header(name) if name == "content-type" => {
            let is_written_so = |text: &str| {
                text == text.to_ascii_lowercase() && !text.contains(';') && text.trim() == text
            };
            let can_pass = match predicate {
                Predicate::OneOf(allowed) => allowed
                    .iter()
                    .any(|allowed| allowed.as_text().is_some_and(is_written_so)),
                Predicate::Prefix(prefix) => is_written_so(prefix),
                Predicate::Range { .. } => false,
                Predicate::Exists(_) | Predicate::Matches(_) => true,
            };
            let why = "content-type is compared in lower case and without parameters";
            (!can_pass).then(|| why.into())
        }
        _ => None,
    }
}

/// The earlier routes of the same subject that take every value which passes `predicate`.
fn covered_by<'r>(
    predicate: &Predicate,
    earlier: &[(&'r CompiledRoute, &Predicate)],
) -> Option<Vec<&'r CompiledRoute>> {
    let one = earlier.iter().find(|(_, other)| implies(predicate, other));
    if let Some((route, _)) = one {
        return Some(vec![*route]);
    }
    match predicate {
        Predicate::OneOf(values) => {
            let mut covering: Vec<&CompiledRoute> = Vec::new();
            for value in values {
                let (route, _) = earlier.iter().find(|(_, other)| takes(value, other))?;
                if !covering.iter().any(|known| known.index == route.index) {
                    covering.push(route);
                }
            }
            Some(covering)
        }
        Predicate::Range { min, max } => cover(*min, *max, earlier),
        _ => None,
    }
}

/// Every value that passes `narrow` passes `wide`.
fn implies(narrow: &Predicate, wide: &Predicate) -> bool {
    match (narrow, wide) {
        (Predicate::Exists(false), _) => *wide == Predicate::Exists(false),
        (_, Predicate::Exists(true)) => true,
        (Predicate::OneOf(values), _) => values.iter().all(|value| takes(value, wide)),
        (Predicate::Prefix(narrow), Predicate::Prefix(wide)) => narrow.starts_with(wide.as_str()),
        (
            Predicate::Range { min, max },
            Predicate::Range {
                min: wide_min,
                max: wide_max,
            },
        ) => {
            wide_min.is_none_or(|wide| min.is_some_and(|min| wide <= min))
                && wide_max.is_none_or(|wide| max.is_some_and(|max| max <= wide))
        }
        (Predicate::Matches(_), Predicate::Matches(_)) => narrow == wide,
        _ => false,
    }
}

/// Every value that is equal to `value` passes `predicate`. Headers included: one that is equal to
/// a number may be written in many ways, and a number passes no test of texts here.
fn takes(value: &Scalar<'_>, predicate: &Predicate) -> bool {
    predicate.holds(Some(value))
}

/// The ranges that leave no gap between `min` and `max`, if there are such.
fn cover<'r>(
    min: Option<Number>,
    max: Option<Number>,
    earlier: &[(&'r CompiledRoute, &Predicate)],
) -> Option<Vec<&'r CompiledRoute>> {
    let ranges = earlier
        .iter()
        .filter_map(|(route, predicate)| match predicate {
            Predicate::Range { min, max } => Some((*min, *max, *route)),
            _ => None,
        });
    let ranges: Vec<_> = ranges.collect();
    let mut covering = Vec::new();
    // All numbers up to here are taken, this one included.
    let mut up_to = None;
    loop {
        let begins = |from: &Option<Number>| match (from, up_to.or(min)) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(from), Some(needed)) => *from <= needed,
        };
        let next = ranges.iter().filter(|(from, ..)| begins(from));
        // The one that reaches furthest; no end is the furthest.
        let (_, end, route) = next.max_by_key(|(_, end, _)| (end.is_none(), *end))?;
        covering.push(*route);
        match (end, max) {
            (None, _) => return Some(covering),
            (Some(end), Some(max)) if max <= *end => return Some(covering),
            (Some(end), _)
                if up_to.is_none_or(|before| before < *end)
                    && min.is_none_or(|min| min <= *end) =>
            {
                up_to = Some(*end);
            }
            _ => return None,
        }
    }
}
