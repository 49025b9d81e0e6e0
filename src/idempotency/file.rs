//! The files of the key table: an entry per key, in frames.

use std::{fs::File, io, path::Path};

use prost::Message;
use tracing::warn;

use super::{CompletedKey, RecordDigest};
use crate::{
    clock::unix_us,
    delivery::Receipt,
    lane_id::LaneId,
    spool::frames::{Item, Scanner, write_frame},
};

/// The files have no salt: a client that forges an entry forges its own keys only.
const SALT: u32 = 0;

/// An entry of the file. An older version wrote no digest: a key without one counts as new, and the
/// API still recognises its record by the id.
#[derive(Clone, PartialEq, Message)]
pub(super) struct KeyLine {
    #[prost(string, tag = "1")]
    pub(super) key: String,
    /// The lane's name; empty for the spool.
    #[prost(string, tag = "2")]
    lane: String,
    #[prost(uint64, tag = "3")]
    pub(super) at_us: u64,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) digest: Vec<u8>,
}

impl KeyLine {
    pub(super) fn new(key: &str, digest: RecordDigest, receipt: Receipt) -> Self {
        let lane = match receipt {
            Receipt::Lane(lane) => lane.name(),
            Receipt::Spool => "",
        };
        Self {
            key: key.into(),
            lane: lane.into(),
            at_us: unix_us(),
            digest: digest.0.into(),
        }
    }

    /// `None` if it has no digest, or another version knows its lane.
    pub(super) fn completed(&self) -> Option<CompletedKey> {
        let digest = RecordDigest(self.digest.as_slice().try_into().ok()?);
        let receipt = if self.lane.is_empty() {
            Receipt::Spool
        } else {
            Receipt::Lane(LaneId::from_name(&self.lane)?)
        };
        Some(CompletedKey::new(digest, receipt, self.at_us))
    }
}

pub(super) fn append(bytes: &mut Vec<u8>, line: &KeyLine) {
    write_frame(bytes, SALT, 0, &line.encode_to_vec());
}

pub(super) fn read(path: &Path, mut each: impl FnMut(KeyLine)) -> io::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(why) => return Err(why),
    };
    let size = file.metadata()?.len();
    let mut scanner = Scanner::new(file, SALT);
    while let Some(item) = scanner.next(size)? {
        match item {
            Item::Frame { payload, .. } => match KeyLine::decode(&*payload) {
                Ok(line) => each(line),
                Err(why) => warn!(reason = %why, "cannot read an entry of the key table"),
            },
            Item::Damage { at, size } => {
                warn!(file = %path.display(), at, size, "damage in the key table");
            }
        }
    }
    Ok(())
}
