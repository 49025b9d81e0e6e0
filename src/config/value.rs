//! How the values of keys are read and shown. Environment variables and flags are texts, so each
//! number may be one too.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    ops::Deref,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ::url::Url;
use bytesize::ByteSize;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeOwned, Error, IntoDeserializer as _},
};
use toml::Value;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Tokens that nobody guesses have as many characters; few names of files have.
const SECRET_LENGTH: usize = 20;

/// The path of a secret or certificate. It is tried when it is read, so that no node starts without
/// it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReadableFile(PathBuf);

impl Deref for ReadableFile {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for ReadableFile {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl<T: Into<PathBuf>> From<T> for ReadableFile {
    fn from(path: T) -> Self {
        Self(path.into())
    }
}

impl<'de> Deserialize<'de> for ReadableFile {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let allowed = "the path of a file that can be read";
        let path = non_empty(input, allowed)?;
        let unreadable = |why| {
            Error::custom(format!(
                "{path:?} cannot be read: {why}; allowed is {allowed}"
            ))
        };
        let missing = |why: io::Error| {
            let is_there = why.kind() == io::ErrorKind::PermissionDenied;
            if may_be_secret(&path) && !is_there {
                Error::custom(format!(
                    "no file has this name, which may be the secret itself; allowed is {allowed}"
                ))
            } else {
                unreadable(why.to_string())
            }
        };
        let found = fs::metadata(&path).map_err(missing)?;
        if found.is_dir() {
            return Err(unreadable("it is a folder".into()));
        }
        // Opening a pipe would wait for its writer, and closing it would lose the secret.
        if found.is_file() {
            fs::File::open(&path).map_err(|why| unreadable(why.to_string()))?;
        }
        Ok(Self(path.into()))
    }
}

/// Whether the path of a file looks more like a secret, as somebody may write who takes the key for
/// that of the secret.
fn may_be_secret(path: &str) -> bool {
    // A JSON Web Token begins with `eyJ`, which is `{"` in base64.
    let begins_as_one = path.starts_with("whsec_") || path.starts_with("eyJ");
    let is_long = path.len() >= SECRET_LENGTH && !path.contains(['.', '\\', ' ']);
    let is_longer = path.len() >= 2 * SECRET_LENGTH && !path.contains(['/', '\\', ' ']);
    let has_digit = path.bytes().any(|byte| byte.is_ascii_digit());
    begins_as_one || (is_long || is_longer) && has_digit && !path.starts_with('/')
}

/// A text that is not empty.
pub fn text<'de, D: Deserializer<'de>, T: From<String>>(input: D) -> Result<T, D::Error> {
    non_empty(input, "a text that is not empty").map(T::from)
}

pub fn non_empty<'de, D: Deserializer<'de>>(input: D, allowed: &str) -> Result<String, D::Error> {
    match Value::deserialize(input)? {
        Value::String(text) if !text.is_empty() => Ok(text),
        Value::String(_) => Err(Error::custom(format!("is empty; allowed is {allowed}"))),
        other => Err(wrong_type(&other, allowed)),
    }
}

/// The variant of an enum that has this name.
pub fn name<'de, D: Deserializer<'de>, T: DeserializeOwned>(input: D) -> Result<T, D::Error> {
    let name = text_or_number(input, "a name")?;
    T::deserialize(name.as_str().into_deserializer()).map_err(|Variants(names)| {
        let allowed = names.join("\" or \"");
        Error::custom(format!("{name:?} does not fit; allowed is \"{allowed}\""))
    })
}

/// The same for a key that may be absent.
pub fn some_name<'de, D: Deserializer<'de>, T: DeserializeOwned>(
    input: D,
) -> Result<Option<T>, D::Error> {
    name(input).map(Some)
}

/// The error of an enum: the names of its variants.
#[derive(Debug)]
struct Variants(&'static [&'static str]);

impl Error for Variants {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self(&[])
    }

    fn unknown_variant(_: &str, expected: &'static [&'static str]) -> Self {
        Self(expected)
    }
}

impl std::error::Error for Variants {}

impl fmt::Display for Variants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "allowed are {}", self.0.join(", "))
    }
}

/// A value that has a text form.
pub fn from_text<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(
    input: D,
) -> Result<T, D::Error> {
    text_or_number(input, "a text")?
        .parse()
        .map_err(Error::custom)
}

pub fn address<'de, D: Deserializer<'de>>(input: D) -> Result<SocketAddr, D::Error> {
    let allowed = "an IP address and a port, as in \"127.0.0.1:8000\"";
    parse(input, allowed, |text| text.parse().ok())
}

/// Texts; in a variable, separated by commas.
pub fn list<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    let texts: Option<Vec<String>> = match Value::deserialize(input)? {
        Value::Array(items) => items.into_iter().map(|item| item.try_into().ok()).collect(),
        Value::String(text) => Some(text.split(',').map(|part| part.trim().into()).collect()),
        _ => None,
    };
    let texts = texts.ok_or_else(|| Error::custom("does not fit; allowed is a list of texts"))?;
    if texts.iter().any(String::is_empty) {
        return Err(Error::custom("holds an empty text; leave it out"));
    }
    Ok(texts)
}

/// Host names without a port. One that begins with a dot stands for all names that end with it.
pub fn host_names<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    let names = list(input)?;
    let is_name = |name: &String| {
        let labels = name.strip_prefix('.').unwrap_or(name);
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let mut labels = labels.split('.');
        labels.all(|label| !label.is_empty() && label.chars().all(is_allowed))
    };
    if let Some(wrong) = names.iter().find(|name| !is_name(name)) {
        return Err(Error::custom(format!(
            "{wrong:?} does not fit; allowed are host names without a port, as in \
             \"waypost.example.com\" or, for all names below one, \".example.com\""
        )));
    }
    Ok(names)
}

/// Origins of web pages, as a browser sends them (RFC 6454, 6.2).
pub fn origins<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    let origins = list(input)?;
    let is_origin = |text: &String| {
        let parsed = Url::parse(text).ok();
        let parsed = parsed.filter(|url| matches!(url.scheme(), "http" | "https"));
        parsed.is_some_and(|url| url.origin().ascii_serialization() == *text)
    };
    if let Some(wrong) = origins.iter().find(|origin| !is_origin(origin)) {
        return Err(Error::custom(format!(
            "{wrong:?} does not fit; allowed are origins in small letters, without a path or a port \
             that is the scheme's own, as in \"https://app.example.com\""
        )));
    }
    Ok(origins)
}

/// `true` or `false`.
pub fn yes_or_no<'de, D: Deserializer<'de>>(input: D) -> Result<bool, D::Error> {
    let allowed = "true or false";
    match Value::deserialize(input)? {
        Value::Boolean(value) => Ok(value),
        Value::String(text) => text
            .parse()
            .map_err(|_| Error::custom(format!("{text:?} does not fit; allowed is {allowed}"))),
        other => Err(wrong_type(&other, allowed)),
    }
}

/// A whole number in a range.
pub fn whole<'de, const MIN: usize, const MAX: usize, D: Deserializer<'de>, T: TryFrom<usize>>(
    input: D,
) -> Result<T, D::Error> {
    let allowed = format!("a whole number from {MIN} to {MAX}");
    parse(input, &allowed, |text| {
        let number: usize = text.parse().ok()?;
        let fits = (MIN..=MAX).contains(&number);
        fits.then(|| number.try_into().ok()).flatten()
    })
}

pub fn replicas<'de, D: Deserializer<'de>>(input: D) -> Result<usize, D::Error> {
    parse(input, "1, 3 or 5", |text| {
        text.parse().ok().filter(|count| [1, 3, 5].contains(count))
    })
}

/// Bytes in a range, as in `"256KiB"`.
pub struct Size<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64> Size<MIN, MAX> {
    pub fn deserialize<'de, D: Deserializer<'de>, T: TryFrom<u64>>(
        input: D,
    ) -> Result<T, D::Error> {
        let most = match MAX {
            u64::MAX => String::new(),
            _ => format!(" to \"{}\"", in_largest_unit(MAX)),
        };
        let least = in_largest_unit(MIN);
        let allowed = format!("a size from \"{least}\"{most}, as in \"256MiB\"");
        parse(input, &allowed, |text| {
            let ByteSize(bytes) = text.parse().ok()?;
            let fits = (MIN..=MAX).contains(&bytes);
            fits.then(|| bytes.try_into().ok()).flatten()
        })
    }

    pub fn serialize<S: Serializer, T: TryInto<u64> + Copy>(
        bytes: &T,
        output: S,
    ) -> Result<S::Ok, S::Error> {
        // Sizes are never over 64 bits.
        let bytes = (*bytes).try_into().unwrap_or(u64::MAX);
        output.serialize_str(&in_largest_unit(bytes))
    }
}

/// `bytes` in the largest unit that divides it.
fn in_largest_unit(bytes: u64) -> String {
    let units = [(GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")];
    let unit = units
        .into_iter()
        .find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    unit.map_or_else(
        || format!("{bytes}B"),
        |(unit, name)| format!("{}{name}", bytes / unit),
    )
}

/// A duration over zero.
pub mod wait {
    use super::{Deserializer, Duration, Serializer, parse, parse_wait};

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
        let allowed = "a duration over zero, as in \"250ms\", \"10s\" or \"24h\"";
        parse(input, allowed, parse_wait)
    }

    pub fn serialize<S: Serializer>(wait: &Duration, output: S) -> Result<S::Ok, S::Error> {
        let shown = humantime::format_duration(*wait).to_string();
        output.serialize_str(&shown.replace(' ', ""))
    }
}

/// A duration over zero, or `"never"`, which is `None`.
pub mod patience {
    use super::{Deserializer, Duration, Serializer, parse, parse_wait, wait};

    const NEVER: &str = "never";

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Duration>, D::Error> {
        let allowed = "a duration over zero, as in \"24h\", or \"never\"";
        parse(input, allowed, |text| match text {
            NEVER => Some(None),
            _ => parse_wait(text).map(Some),
        })
    }

    #[expect(clippy::ref_option, reason = "serde passes a reference")]
    pub fn serialize<S: Serializer>(
        patience: &Option<Duration>,
        output: S,
    ) -> Result<S::Ok, S::Error> {
        match patience {
            Some(duration) => wait::serialize(duration, output),
            None => output.serialize_str(NEVER),
        }
    }
}

fn parse_wait(text: &str) -> Option<Duration> {
    let duration = humantime::parse_duration(text).ok()?;
    (!duration.is_zero()).then_some(duration)
}

fn parse<'de, D: Deserializer<'de>, T>(
    input: D,
    allowed: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T, D::Error> {
    let text = text_or_number(input, allowed)?;
    parse(&text)
        .ok_or_else(|| Error::custom(format!("{text:?} does not fit; allowed is {allowed}")))
}

fn text_or_number<'de, D: Deserializer<'de>>(input: D, allowed: &str) -> Result<String, D::Error> {
    match Value::deserialize(input)? {
        Value::String(text) => Ok(text),
        Value::Integer(number) => Ok(number.to_string()),
        other => Err(wrong_type(&other, allowed)),
    }
}

fn wrong_type<E: Error>(value: &Value, allowed: &str) -> E {
    let found = match value {
        Value::Array(_) => "is a list".into(),
        other => format!("is of type {}", other.type_str()),
    };
    E::custom(format!("{found}; allowed is {allowed}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why_not(path: &str) -> String {
        let read = ReadableFile::deserialize(Value::from(path));
        read.unwrap_err().message().to_owned()
    }

    #[test]
    fn a_secret_in_the_place_of_its_file_is_not_shown() {
        for secret in [
            "whsec_MfKQ",
            "0123456789abcdef0123456789abcdef",
            "a/b+7Dk1VQq0aXc5fP2w==",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln",
            "sk.live_0123456789abcdef0123456789abcdef",
        ] {
            let why = why_not(secret);
            assert!(!why.contains(secret) && why.contains("allowed"), "{why}");
        }
        for path in ["tokens", "tls/key.pem", "/run/secrets/0123456789abcdef"] {
            let why = why_not(path);
            assert!(why.contains(path), "{why}");
        }
    }
}
