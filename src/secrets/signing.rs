//! Standard Webhooks signatures (version 1.0.0 of the specification at standardwebhooks.com), of the
//! symmetric kind `v1`: HMAC-SHA256 over `ID.TIMESTAMP.BODY`.

use std::{fs, path::Path};

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use ring::{
    digest::{SHA256, digest},
    hmac,
};
use subtle::{Choice, ConstantTimeEq as _};

/// Some programs leave the padding of a key out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The beginning of a secret that is written in base64.
const PREFIX: &str = "whsec_";
/// The specification's bounds of a secret, in bytes.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;
/// The kind of a signature.
const VERSION: &str = "v1,";
/// How far a timestamp may be from this node's time, both ways, in seconds: the specification's own
/// libraries allow as much.
const TOLERANCE_S: u64 = 300;
/// The most signatures of a request that are looked at. A sender has one for each of its keys.
const SIGNATURES_MAX: usize = 16;

/// The keys of a file.
#[derive(Clone)]
pub struct SigningKeys(Vec<SigningKey>);

#[derive(Clone)]
struct SigningKey {
    /// It tells two keys apart without either.
    digest: Vec<u8>,
    hmac: hmac::Key,
}

impl PartialEq for SigningKeys {
    fn eq(&self, other: &Self) -> bool {
        let digests = |keys: &Self| -> Vec<_> {
            let keys = keys.0.iter();
            keys.map(|key| key.digest.clone()).collect()
        };
        digests(self) == digests(other)
    }
}

/// The reason why a request does not count as signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("The webhook-timestamp is not the time in seconds since 1970")]
    Timestamp,
    #[error("The webhook-timestamp is more than {TOLERANCE_S} s from this node's time")]
    Time,
    #[error("No signature of kind v1 in webhook-signature is by a key that this node knows")]
    Unknown,
}

impl SigningKeys {
    /// Reads the file: a key a line, as `whsec_` and base64. White space around a key and empty lines
    /// do not count.
    ///
    /// # Errors
    /// If it cannot be read, or has a line that is no key, or none.
    pub fn read(path: &Path) -> Result<Self, String> {
        let wrong = |why: &str| format!("{}{why}", path.display());
        let text = fs::read_to_string(path).map_err(|why| wrong(&format!(": {why}")))?;
        let lines = text.lines().map(str::trim).enumerate();
        let lines = lines.filter(|(_, line)| !line.is_empty());
        let keys = lines.map(|(at, line)| {
            let key = SigningKey::parse(line);
            // The line itself is a secret.
            let at = at + 1;
            key.ok_or_else(|| {
                wrong(&format!(
                    ":{at}: a key is {PREFIX} and 24 to 64 bytes in base64"
                ))
            })
        });
        let keys: Vec<_> = keys.collect::<Result<_, _>>()?;
        if keys.is_empty() {
            return Err(wrong(" holds no key"));
        }
        Ok(Self(keys))
    }

    /// The header `webhook-signature` by the first key.
    pub fn sign(&self, id: &str, timestamp: u64, body: &[u8]) -> String {
        // `read` refuses a file without a key.
        let key = self.0.first();
        let signature = key.map(|key| key.signature(id, timestamp, body));
        let signature = signature.map(|tag| BASE64.encode(tag));
        format!("{VERSION}{}", signature.unwrap_or_default())
    }

    /// Whether one of the `signatures`, as in the header `webhook-signature`, is by one of the keys. `now`
    /// and the timestamp are seconds since 1970.
    ///
    /// # Errors
    /// If the timestamp is malformed or too far from `now`, or no signature fits.
    pub fn verify(
        &self,
        id: &str,
        timestamp: &str,
        signatures: &str,
        body: &[u8],
        now: u64,
    ) -> Result<(), SignatureError> {
        let timestamp = parse_timestamp(timestamp, now)?;
        // A sender may sign in other ways too.
        let signatures = signatures.split(' ').filter_map(|signature| {
            let signature = signature.strip_prefix(VERSION)?;
            BASE64.decode(signature).ok()
        });
        let signatures: Vec<_> = signatures.take(SIGNATURES_MAX).collect();
        let is_signed = self.0.iter().any(|key| {
            let expected = key.signature(id, timestamp, body);
            let equals = signatures
                .iter()
                .map(|given| expected.as_ref().ct_eq(given));
            equals.fold(Choice::from(0), |any, this| any | this).into()
        });
        is_signed.then_some(()).ok_or(SignatureError::Unknown)
    }
}

/// The seconds since 1970, if they are near enough to `now`.
///
/// # Errors
/// If they are malformed, or too far.
pub fn parse_timestamp(text: &str, now: u64) -> Result<u64, SignatureError> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let timestamp: u64 = Some(text)
        .filter(|_| is_number)
        .and_then(|text| text.parse().ok())
        .ok_or(SignatureError::Timestamp)?;
    if timestamp.abs_diff(now) > TOLERANCE_S {
        return Err(SignatureError::Time);
    }
    Ok(timestamp)
}

impl SigningKey {
    fn parse(text: &str) -> Option<Self> {
        let bytes = BASE64.decode(text.strip_prefix(PREFIX)?).ok()?;
        KEY_BYTES.contains(&bytes.len()).then(|| Self {
            digest: digest(&SHA256, &bytes).as_ref().to_vec(),
            hmac: hmac::Key::new(hmac::HMAC_SHA256, &bytes),
        })
    }

    fn signature(&self, id: &str, timestamp: u64, body: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.hmac);
        context.update(format!("{id}.{timestamp}.").as_bytes());
        context.update(body);
        context.sign()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tempfile::NamedTempFile;

    use super::*;

    /// The example of the reference library: its tests sign with this key.
    const KEY: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const AT: u64 = 1_614_265_330;
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    fn keys(lines: &str) -> Result<SigningKeys, String> {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(lines.as_bytes()).unwrap();
        SigningKeys::read(file.path())
    }

    fn other(byte: u8) -> String {
        format!("{PREFIX}{}", BASE64.encode([byte; 32]))
    }

    #[test]
    fn the_first_key_signs_and_each_verifies() {
        let first = keys(&format!("\n {KEY} \r\n{}\n", other(7))).unwrap();
        assert_eq!(first.sign(ID, AT, BODY), SIGNATURE);
        let second = keys(&format!("{}\n{KEY}", other(7))).unwrap();
        assert_ne!(second.sign(ID, AT, BODY), SIGNATURE);
        assert!(first != second && first == first.clone());
        for keys in [&first, &second] {
            let verify =
                |signatures: &str, at: &str, now: u64| keys.verify(ID, at, signatures, BODY, now);
            let at = AT.to_string();
            let list = format!("v1a,abc v1,AAAA v1,%%% nothing {SIGNATURE}");
            for signatures in [SIGNATURE, &list] {
                for now in [AT - 300, AT, AT + 300] {
                    assert_eq!(verify(signatures, &at, now), Ok(()), "{signatures}");
                }
            }
            for now in [0, AT - 301, AT + 301, u64::MAX] {
                assert_eq!(verify(SIGNATURE, &at, now), Err(SignatureError::Time));
            }
            for wrong in [
                "",
                "now",
                "-1",
                "+1614265330",
                "1614265330.0",
                " 1614265330",
            ] {
                let refused = verify(SIGNATURE, wrong, AT);
                assert_eq!(refused, Err(SignatureError::Timestamp), "{wrong}");
            }
            let version = SIGNATURE.replace("v1,", "v1a,");
            for wrong in ["", "v1,", &SIGNATURE[3..], &SIGNATURE[..40], &version] {
                let refused = verify(wrong, &at, AT);
                assert_eq!(refused, Err(SignatureError::Unknown), "{wrong}");
            }
            // Every part is signed.
            let unknown = Err(SignatureError::Unknown);
            let later = (AT + 1).to_string();
            assert_eq!(verify(SIGNATURE, &later, AT), unknown);
            assert_eq!(keys.verify("msg", &at, SIGNATURE, BODY, AT), unknown);
            assert_eq!(keys.verify(ID, &at, SIGNATURE, b"{}", AT), unknown);
            // Any bytes can be signed.
            let odd = [0, 255, 10, 46];
            let signature = keys.sign(ID, AT, &odd);
            assert_eq!(keys.verify(ID, &at, &signature, &odd, AT), Ok(()));
        }
    }

    #[test]
    fn a_line_that_is_no_key_is_named_and_not_shown() {
        let short = format!("{PREFIX}{}", BASE64.encode([7; 23]));
        let long = format!("{PREFIX}{}", BASE64.encode([7; 65]));
        let unpadded = other(7).trim_end_matches('=').to_owned();
        assert!(keys(&unpadded).is_ok());
        for wrong in [&short, &long, &KEY[6..], "whsec_", "whsec_%", "# a comment"] {
            let why = keys(&format!("{KEY}\n{wrong}")).err().unwrap();
            assert!(why.contains(":2: a key is whsec_"), "{why}");
            assert!(!why.contains(wrong) || wrong == "whsec_", "{why}");
        }
        for empty in ["", "\n \n"] {
            assert!(keys(empty).err().unwrap().ends_with(" holds no key"));
        }
    }
}
