//! The configuration.

use std::{collections::BTreeMap, fs};

use waypost::config::Config;

/// The password in the URLs, which nobody is to see.
const PASSWORD: &str = "hunter2";
const LOGIN: &str = "://me:hunter2";

/// The text of a file, and behind a byte that no text has, a variable in each line.
pub fn configuration(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == u8::MAX);
    let text = parts.next().unwrap_or_default();
    let lines = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let variables = lines.lines().filter_map(|line| line.split_once('='));
    // The name of a variable is told in its mistakes, and is no secret.
    let variables = variables.filter(|(name, _)| !name.contains(PASSWORD));
    let variables = variables.map(|(name, value)| (format!("WAYPOST_{name}"), value.to_owned()));
    check_configuration(text, &variables.collect());
}

/// A configuration is read, or each mistake has its place; and what is read is read again the same.
/// Nobody sees a password.
pub fn check_configuration(text: &[u8], variables: &BTreeMap<String, String>) {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), text).expect("room");
    let shown = format!("{}\n{variables:?}", String::from_utf8_lossy(text));
    // Without its beginning or its end, it is no password of a URL.
    let count = |part: &str| shown.matches(part).count();
    let is_hidden = |told: &str| {
        let is_whole = count(LOGIN) == count(PASSWORD)
            && count(&format!("{PASSWORD}@")) + count(&format!("{PASSWORD}%40@"))
                == count(PASSWORD);
        !is_whole || !told.contains(PASSWORD)
    };
    match Config::load(Some(file.path()), variables, &[]) {
        Ok(config) => {
            let written = config.to_toml();
            // Only an address has a password. A name is no secret: a tag is in each record, a queue is
            // known to its broker, and a folder to all who see the system.
            let is_name = |line: &&str| {
                let (key, _) = line.split_once(" = ").unwrap_or_default();
                !["url", "monitor", "endpoint", "peers"].contains(&key)
            };
            let mut names = written.lines().filter(is_name);
            let is_told = names.any(|name| name.contains(PASSWORD));
            for told in [&written, &format!("{config:?}")] {
                assert!(is_told || is_hidden(told), "{shown}: {told}");
            }
            fs::write(file.path(), &written).expect("room");
            let again = Config::load(Some(file.path()), &BTreeMap::new(), &[]);
            let again = again.unwrap_or_else(|mistakes| panic!("{shown}: {mistakes:?}\n{written}"));
            assert_eq!(again.to_toml(), written, "{shown}");
            assert!(again == config || written.contains("***"), "{shown}");
        }
        Err(mistakes) => {
            assert!(!mistakes.is_empty(), "{shown}");
            for mistake in mistakes {
                let told = mistake.to_string();
                assert!(
                    !mistake.place.is_empty() && !mistake.what.is_empty(),
                    "{shown}"
                );
                assert!(!told.contains('\n'), "{shown}: {told}");
                assert!(is_hidden(&told), "{shown}: {told}");
            }
        }
    }
}
