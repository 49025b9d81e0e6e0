//! Signs a POST, as Standard Webhooks has it.

use awc::http::header::HeaderName;
use bytes::Bytes;
use ring::digest::{SHA256, digest};

use crate::{clock::system_unix_s, secrets::SigningKeys};

/// The most characters of a `webhook-id` that is no digest: as many as an Idempotency-Key has.
const WEBHOOK_ID_MAX: usize = 255;
const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// The headers that sign a POST under `key`, at this attempt's time.
pub(super) fn signature(keys: &SigningKeys, key: &str, body: &[u8]) -> [(HeaderName, String); 3] {
    let id = webhook_id(key);
    let timestamp = system_unix_s();
    let signature = keys.sign(&id, timestamp, body);
    [
        (WEBHOOK_ID, id),
        (WEBHOOK_TIMESTAMP, timestamp.to_string()),
        (WEBHOOK_SIGNATURE, signature),
    ]
}

/// The id that a POST under `key` is signed with. A full stop would blur where the id ends in what is
/// signed, and the ids of a batch are longer than servers take in a line, once they are coded.
fn webhook_id(key: &str) -> String {
    let id = key.replace('%', "%25").replace('.', "%2E");
    if id.len() <= WEBHOOK_ID_MAX {
        return id;
    }
    let digest = digest(&SHA256, key.as_bytes());
    let digest = Bytes::copy_from_slice(digest.as_ref());
    format!("sha256:{digest:x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_webhook_id_has_no_full_stop_and_is_a_digest_if_it_is_long() {
        assert_eq!(webhook_id("a.b%c"), "a%2Eb%25c");
        let most = "k".repeat(WEBHOOK_ID_MAX);
        assert_eq!(webhook_id(&most), most);
        // `printf 'a.%0253d' 0 | sha256sum`
        let digest = webhook_id(&format!("a.{}", "0".repeat(253)));
        assert_eq!(
            digest,
            "sha256:05b23f2d3b79516a0390352a82a6ffd549b07123b744abcb4233f51327f0f0e1"
        );
    }
}
