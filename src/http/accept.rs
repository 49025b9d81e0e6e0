//! The media types that a client accepts.

use actix_web::{
    HttpRequest,
    http::header::{Accept, Header as _, Quality},
};

/// Whether the client names `wanted`, and ranks it before `other`, which it gets unless it asks.
pub fn prefers(request: &HttpRequest, wanted: &str, other: &str) -> bool {
    let Ok(mut accepted) = Accept::parse(request) else {
        return false;
    };
    accepted.retain(|range| range.quality > Quality::ZERO);
    let ranked = accepted.ranked();
    let at = |name: &str| ranked.iter().position(|range| range.essence_str() == name);
    match (at(wanted), at(other)) {
        (Some(wanted), Some(other)) => wanted < other,
        (wanted, _) => wanted.is_some(),
    }
}
