//! The checks of the tests, for a fuzzer.

#[path = "../tests/fuzz/checks/mod.rs"]
mod checks;

/// The check of the reader of this name.
pub fn check_of(reader: &str) -> Option<fn(&[u8])> {
    let mut readers = checks::READERS.into_iter();
    readers.find_map(|(name, check)| (name == reader).then_some(check))
}
