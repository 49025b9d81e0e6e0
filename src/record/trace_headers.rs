//! W3C Trace Context of a record, as it came with the record.

use std::sync::Arc;

use super::is_visible_ascii;

/// The most bytes of a `traceparent` of a later version.
const PARENT_MAX: usize = 255;
/// The most bytes of a `tracestate` that is passed on, as many as the standard asks for.
const STATE_MAX: usize = 512;
/// The most members of a `tracestate`.
const MEMBERS_MAX: usize = 32;
/// One that does not fit loses the members that are longer first.
const LONG_MEMBER: usize = 128;
/// The flags that version 00 knows: sampled, and a trace id that is random (level 2 of the standard).
pub const KNOWN_FLAGS: u8 = 0b11;

/// A `traceparent`, and the `tracestate` of the same trace if there is one. Clones share the text:
/// both, with a space between them, which no `traceparent` has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceHeaders(Arc<str>);

impl TraceHeaders {
    /// Reads both headers. Without a valid `traceparent` there is none, and a `tracestate` that is
    /// malformed is left out (W3C Trace Context, 3.3.1.1 and 4.3).
    pub fn read(parent: &str, state: Option<&str>) -> Option<Self> {
        if !is_traceparent(parent) {
            return None;
        }
        let state = state.and_then(fitting_state);
        let known = known_flags(parent);
        let parent = known.as_deref().unwrap_or(parent);
        Some(match state {
            None => Self(parent.into()),
            Some(state) => Self([parent, " ", &state].concat().into()),
        })
    }

    /// The same trace at another span.
    #[must_use]
    pub fn at(&self, parent: &str) -> Self {
        match self.state() {
            None => Self(parent.into()),
            Some(state) => Self([parent, " ", state].concat().into()),
        }
    }

    /// The `traceparent`.
    pub fn parent(&self) -> &str {
        self.0
            .split_once(' ')
            .map_or(&*self.0, |(parent, _)| parent)
    }

    /// The `tracestate`.
    pub fn state(&self) -> Option<&str> {
        self.0.split_once(' ').map(|(_, state)| state)
    }

    /// The bytes of both.
    pub fn size(&self) -> usize {
        self.0.len()
    }
}

/// Whether `text` is a `traceparent` of W3C Trace Context (3.2.2): version, trace id, parent id and
/// flags. A later version than ours may have more behind them (4.3).
fn is_traceparent(text: &str) -> bool {
    let is_hex = |field: &str, digits| {
        field.len() == digits
            && field
                .bytes()
                .all(|at| matches!(at, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_id = |field, digits| is_hex(field, digits) && field.bytes().any(|digit| digit != b'0');
    let fields: Vec<_> = text.splitn(5, '-').collect();
    let [version, trace, parent, flags, ref more @ ..] = fields[..] else {
        return false;
    };
    let is_later = version != "00";
    is_hex(version, 2)
        && version != "ff"
        && is_id(trace, 32)
        && is_id(parent, 16)
        && is_hex(flags, 2)
        && (more.is_empty() || is_later && text.len() <= PARENT_MAX && is_visible_ascii(text))
}

/// A `traceparent` of version 00 without flags that it does not know: they are to be zero, for a
/// later version may give them a meaning (3.2.2.5). `None` if it has none.
fn known_flags(parent: &str) -> Option<String> {
    let flags = parent.strip_prefix("00-")?.rsplit('-').next()?;
    let flags = u8::from_str_radix(flags, 16).ok()?;
    let (rest, _) = parent.rsplit_once('-')?;
    (flags & !KNOWN_FLAGS != 0).then(|| format!("{rest}-{:02x}", flags & KNOWN_FLAGS))
}

/// The trace id of a `traceparent`, if its flags say that the trace is recorded.
pub fn sampled_trace_id(traceparent: &str) -> Option<&str> {
    let flags = traceparent.split('-').nth(3)?;
    let is_sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
    traceparent.split('-').nth(1).filter(|_| is_sampled)
}

/// The members of a `tracestate`, as many as fit; `None` if it is malformed, or has none.
fn fitting_state(text: &str) -> Option<String> {
    let members = text.split(',');
    let members = members.map(|member| member.trim_matches([' ', '\t']));
    let mut members: Vec<_> = members.filter(|member| !member.is_empty()).collect();
    if members.len() > MEMBERS_MAX || !members.iter().all(|member| is_member(member)) {
        return None;
    }
    let size = |members: &[&str]| members.iter().map(|member| member.len() + 1).sum::<usize>();
    while size(&members) > STATE_MAX + 1 {
        let long = members
            .iter()
            .rposition(|member| member.len() > LONG_MEMBER);
        members.remove(long.unwrap_or(members.len() - 1));
    }
    (!members.is_empty()).then(|| members.join(","))
}

/// Whether `text` is a key with a value (3.3.1.3).
fn is_member(text: &str) -> bool {
    let Some((key, value)) = text.split_once('=') else {
        return false;
    };
    let is_value = |letter: u8| matches!(letter, b' '..=b'~') && !matches!(letter, b',' | b'=');
    is_key(key) && (1..=256).contains(&value.len()) && value.bytes().all(is_value)
}

/// A key of level 2 of the recommendation: those of level 1 are keys there, too.
fn is_key(key: &str) -> bool {
    let is_first = |letter: &u8| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    let is_letter =
        |letter: u8| is_first(&letter) || matches!(letter, b'_' | b'-' | b'*' | b'/' | b'@');
    key.len() <= 256 && key.as_bytes().first().is_some_and(is_first) && key.bytes().all(is_letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn state(text: &str) -> Option<String> {
        let read = TraceHeaders::read(PARENT, Some(text)).expect("a valid parent");
        assert_eq!(read.parent(), PARENT);
        read.state().map(Into::into)
    }

    #[test]
    fn a_traceparent_is_as_w3c_trace_context_says() {
        const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let with = |from: &str, to: &str| GOOD.replacen(from, to, 1);
        for good in [
            GOOD.to_owned(),
            with("-01", "-ff"),
            with("00-", "01-"),
            with("00-", "cc-") + "-more-of_it",
        ] {
            assert!(is_traceparent(&good), "{good}");
        }
        for bad in [
            String::new(),
            "00-1-2-01".into(),
            "nonsense".into(),
            format!(" {GOOD}"),
            format!("{GOOD} "),
            format!("{GOOD}-more"),
            format!("{GOOD}-"),
            with("00-", "ff-"),
            with("00-", "0-"),
            with("00-", "0g-"),
            with("4bf9", "4BF9"),
            with("4bf9", "4bf"),
            with("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            with("00f067aa0ba902b7", &"0".repeat(16)),
            with("00f067aa0ba902b7", "00f067aa0ba902b"),
            with("-01", ""),
            with("-01", "-1"),
            with("-01", "-0é"),
            with("00-", "01-") + "-a b",
            with("00-", "01-") + "-" + &"a".repeat(255),
        ] {
            assert!(!is_traceparent(&bad), "{bad}");
        }
    }

    #[test]
    fn a_trace_is_named_if_it_is_recorded() {
        const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
        let with = |flags: &str| format!("00-{TRACE}-00f067aa0ba902b7-{flags}");
        for flags in ["01", "03", "ff", "01-more"] {
            assert_eq!(sampled_trace_id(&with(flags)), Some(TRACE), "{flags}");
        }
        for flags in ["00", "02", "fe"] {
            assert_eq!(sampled_trace_id(&with(flags)), None, "{flags}");
        }
    }

    #[test]
    fn a_state_goes_with_its_parent_alone() {
        assert_eq!(TraceHeaders::read("nonsense", Some("a=1")), None);
        let without = TraceHeaders::read(PARENT, None).expect("a parent");
        assert_eq!((without.parent(), without.state()), (PARENT, None));
        assert_eq!(without.size(), PARENT.len());
        let with = TraceHeaders::read(PARENT, Some("a=1")).expect("a parent");
        let other = PARENT.replace("00f067aa0ba902b7", "00f067aa0ba902b8");
        let moved = with.at(&other);
        assert_eq!((moved.parent(), moved.state()), (&*other, Some("a=1")));
        assert_eq!(without.at(&other).state(), None);
    }

    #[test]
    fn flags_that_the_version_does_not_know_are_zero() {
        for (sent, kept) in [
            ("00", "00"),
            ("01", "01"),
            ("02", "02"),
            ("03", "03"),
            ("ff", "03"),
            ("fe", "02"),
            ("84", "00"),
        ] {
            let parent = PARENT.replace("-01", &format!("-{sent}"));
            let read = TraceHeaders::read(&parent, Some("a=1")).expect("a parent");
            assert_eq!(read.parent(), PARENT.replace("-01", &format!("-{kept}")));
            assert_eq!(read.state(), Some("a=1"));
        }
        // They may mean something in that version.
        let later = PARENT.replace("00-4", "01-4").replace("-01", "-ff-more");
        let read = TraceHeaders::read(&later, None).expect("a parent");
        assert_eq!(read.parent(), later);
    }

    #[test]
    fn a_state_is_a_list_of_keys_and_values() {
        for (sent, kept) in [
            ("a=1", "a=1"),
            (
                "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
                "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
            ),
            (" a=1 ,\tb=2\t, ,,c= x y", "a=1,b=2,c= x y"),
            ("a=1,a=2", "a=1,a=2"),
            ("1tenant@system=1,a_-*/9=!~", "1tenant@system=1,a_-*/9=!~"),
            ("1a=1,a@=1,a@b@c=1", "1a=1,a@=1,a@b@c=1"),
        ] {
            assert_eq!(state(sent).as_deref(), Some(kept), "{sent}");
        }
        let long_key = format!("{}=1", "k".repeat(257));
        let long_value = format!("k={}", "v".repeat(257));
        for bad in [
            "",
            " , ",
            "a",
            "a=",
            "=1",
            "A=1",
            "a.b=1",
            "a =1",
            "a=1=2",
            "a=é",
            "a=\u{7f}",
            "@a=1",
            "a=1;b=2,B=3",
            &long_key,
            &long_value,
        ] {
            assert_eq!(state(bad), None, "{bad}");
        }
        let members = |count: usize| (0..count).map(|at| format!("k{at}=1")).collect::<Vec<_>>();
        let most = members(32).join(",");
        assert_eq!(state(&most), Some(most.clone()));
        assert_eq!(state(&members(33).join(",")), None);
    }

    #[test]
    fn a_state_that_is_too_long_loses_long_members_and_then_the_last_ones() {
        let member = |key: &str, size: usize| format!("{key}={}", "v".repeat(size - key.len() - 1));
        let whole = [member("a", 255), member("b", 256)].join(",");
        assert_eq!(whole.len(), STATE_MAX);
        assert_eq!(state(&whole), Some(whole.clone()));
        let (short, long) = (member("s", 100), member("l", 129));
        let sent = [
            &*short,
            &long,
            &member("m", 128),
            &member("n", 128),
            &member("o", 128),
        ]
        .join(",");
        let kept = [
            &*short,
            &member("m", 128),
            &member("n", 128),
            &member("o", 128),
        ]
        .join(",");
        assert_eq!(state(&sent), Some(kept));
        let many: Vec<_> = (0..10).map(|at| member(&format!("k{at}"), 100)).collect();
        assert_eq!(state(&many.join(",")), Some(many[..5].join(",")));
    }
}
