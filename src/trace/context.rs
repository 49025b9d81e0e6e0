//! W3C Trace Context as numbers.

use std::fmt;

use crate::record::{KNOWN_FLAGS, TraceHeaders};

/// The flag of a trace that is recorded.
const SAMPLED: u8 = 1;

/// A span, as others refer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanContext {
    pub trace: u128,
    pub span: u64,
    pub flags: u8,
}

impl SpanContext {
    /// The first span of a new trace.
    pub fn root(is_sampled: bool) -> Self {
        Self {
            trace: fastrand::u128(1..),
            span: new_span_id(),
            flags: u8::from(is_sampled),
        }
    }

    /// Another span of the same trace.
    #[must_use]
    pub fn child(self, is_sampled: bool) -> Self {
        Self {
            span: new_span_id(),
            flags: self.flags & !SAMPLED | u8::from(is_sampled),
            ..self
        }
    }

    /// The context in these headers. Flags that this node does not know are not passed on.
    pub fn of(headers: &TraceHeaders) -> Option<Self> {
        let mut fields = headers.parent().split('-').skip(1);
        Some(Self {
            trace: u128::from_str_radix(fields.next()?, 16).ok()?,
            span: u64::from_str_radix(fields.next()?, 16).ok()?,
            flags: u8::from_str_radix(fields.next()?, 16).ok()? & KNOWN_FLAGS,
        })
    }

    /// The context in these headers, if its trace is recorded.
    pub fn sampled(headers: Option<&TraceHeaders>) -> Option<Self> {
        Self::of(headers?).filter(|context| context.is_sampled())
    }

    pub const fn is_sampled(self) -> bool {
        self.flags & SAMPLED != 0
    }
}

/// The `traceparent` of version 00.
impl fmt::Display for SpanContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trace, span, flags } = self;
        write!(f, "00-{trace:032x}-{span:016x}-{flags:02x}")
    }
}

/// Zero is no id.
fn new_span_id() -> u64 {
    fastrand::u64(1..)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(text: &str) -> SpanContext {
        SpanContext::of(&TraceHeaders::read(text, None).unwrap()).unwrap()
    }

    #[test]
    fn a_traceparent_reads_back_and_a_child_is_of_its_trace() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03";
        let parent = context(text);
        assert_eq!(parent.to_string(), text);
        let child = parent.child(false);
        assert_eq!((child.trace, child.flags), (parent.trace, 2));
        assert_ne!(child.span, parent.span);
        let root = SpanContext::root(true);
        assert_eq!(context(&root.to_string()), root);
        assert!(root.is_sampled() && !child.is_sampled());
        let unsampled = TraceHeaders::read(&child.to_string(), None);
        assert_eq!(SpanContext::sampled(unsampled.as_ref()), None);
        let later = context("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff");
        assert_eq!(later.child(true).flags, 3);
    }
}
