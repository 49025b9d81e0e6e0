//! Headers on a command line.

use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};

/// A header, as in `NAME: VALUE`.
pub type Header = (HeaderName, HeaderValue);

/// Reads a header.
pub fn header(text: &str) -> Result<Header, String> {
    let header = text.split_once(':').and_then(|(name, value)| {
        let name = name.trim().parse().ok()?;
        Some((name, HeaderValue::from_str(value.trim()).ok()?))
    });
    header.ok_or_else(|| "a header is 'NAME: VALUE'".into())
}

/// All of them; a name may come again.
pub fn header_map(headers: &[Header]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(name.clone(), value.clone());
    }
    map
}
