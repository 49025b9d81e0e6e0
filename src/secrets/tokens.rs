//! Bearer tokens (RFC 6750): a file has one a line.

use std::{collections::HashSet, fs, path::Path};

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};

/// A token as it is kept. The time of a look-up may tell something of a digest, and so nothing of the
/// token.
type TokenDigest = [u8; SHA256_OUTPUT_LEN];

/// The tokens of a file. Each lets its owner in.
#[derive(PartialEq, Eq)]
pub struct TokenSet(HashSet<TokenDigest>);

impl TokenSet {
    /// Reads the file: a token a line. White space around a token and empty lines do not count.
    ///
    /// # Errors
    /// If it cannot be read, has a token that no client can send, or has none, which would lock
    /// everybody out.
    pub fn read(path: &Path) -> Result<Self, String> {
        let tokens = lines(path)?;
        if tokens.is_empty() {
            return Err(no_token(path));
        }
        Ok(Self(tokens.iter().map(|token| digest_of(token)).collect()))
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Whether `token` is one of them. Its time depends neither on how much of it is right nor on how
    /// many there are.
    pub fn has(&self, token: &[u8]) -> bool {
        self.0.contains(&digest_of(token))
    }
}

/// The first token of a file: the one that this program presents to others.
///
/// # Errors
/// If the file cannot be read, has no token, or has one that nobody can send.
pub fn first_token(path: &Path) -> Result<String, String> {
    let first = lines(path)?.into_iter().next();
    // Each is ASCII.
    let first = first.and_then(|token| String::from_utf8(token).ok());
    first.ok_or_else(|| no_token(path))
}

/// The token of a file that holds one alone.
///
/// # Errors
/// Those of [`first_token`], or if the file has another token.
pub fn only_token(path: &Path) -> Result<String, String> {
    if lines(path)?.len() > 1 {
        return Err(format!("{} holds more than one token", path.display()));
    }
    first_token(path)
}

fn no_token(path: &Path) -> String {
    format!("{} holds no token", path.display())
}

fn lines(path: &Path) -> Result<Vec<Vec<u8>>, String> {
    let text = fs::read(path).map_err(|why| format!("{}: {why}", path.display()))?;
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let tokens = lines.enumerate().filter(|(_, token)| !token.is_empty());
    let tokens = tokens.map(|(at, token)| {
        if token.iter().all(u8::is_ascii_graphic) {
            Ok(token.to_owned())
        } else {
            // The token itself is a secret.
            let (path, line) = (path.display(), at + 1);
            Err(format!(
                "{path}:{line}: a token has visible ASCII characters only"
            ))
        }
    });
    tokens.collect()
}

fn digest_of(token: &[u8]) -> TokenDigest {
    let mut bytes = TokenDigest::default();
    bytes.copy_from_slice(digest(&SHA256, token).as_ref());
    bytes
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tempfile::NamedTempFile;

    use super::*;

    #[test]
    fn a_token_of_the_file_is_known_and_no_other_is() {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(b"first\n\n  second \r\n# third").unwrap();
        for why in [
            TokenSet::read(file.path()).err().unwrap(),
            first_token(file.path()).unwrap_err(),
        ] {
            assert!(
                why.ends_with(":4: a token has visible ASCII characters only"),
                "{why}"
            );
        }
        fs::write(file.path(), "\nfirst\n\n  second \r\nthird").unwrap();
        let tokens = TokenSet::read(file.path()).unwrap();
        assert_eq!(tokens.0.len(), 3);
        for token in ["first", "second", "third"] {
            assert!(tokens.has(token.as_bytes()), "{token}");
        }
        for token in ["", "firs", "firstt", "First", "first second", "fourth"] {
            assert!(!tokens.has(token.as_bytes()), "{token}");
        }
        assert_eq!(first_token(file.path()).unwrap(), "first");
        let why = only_token(file.path()).unwrap_err();
        assert!(why.ends_with(" holds more than one token"), "{why}");
        fs::write(file.path(), "\nfirst \n").unwrap();
        assert_eq!(only_token(file.path()).unwrap(), "first");
        fs::write(file.path(), "\n \n").unwrap();
        for why in [
            TokenSet::read(file.path()).err().unwrap(),
            first_token(file.path()).unwrap_err(),
        ] {
            assert!(why.ends_with(" holds no token"), "{why}");
        }
    }
}
