//! The promises of each reader of what others write. They hold whatever bytes it is given. The tests
//! beside this folder draw bytes that are nearly right. The target in `fuzz/` gets them from a fuzzer,
//! which sees what code they reach.

pub mod configuration;
pub mod events;
pub mod keys;
pub mod messages;
pub mod records;

/// Panics if a reader breaks a promise on these bytes.
type Check = fn(&[u8]);

/// The readers, by the names of their targets.
pub const READERS: [(&str, Check); 8] = [
    ("attributes", events::check_attributes),
    ("batch", records::batch),
    ("configuration", configuration::configuration),
    ("event", events::check_events),
    ("key", keys::key),
    ("key_table", keys::key_table),
    ("message", messages::message),
    ("record", records::check_record),
];
