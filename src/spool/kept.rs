//! Copies that an earlier run has kept, and the file that names the broker that has confirmed them.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use super::{
    disk::{self, sync},
    log::Position,
};
use crate::lane_id::LaneId;

/// The copies of one lane that an earlier run has kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundCopies {
    /// The place of the last one.
    pub last: Option<Position>,
    /// The broker that has confirmed all of them, if that is known.
    pub confirmed_by: Option<Confirmer>,
}

/// A broker that has confirmed copies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confirmer {
    /// [`BrokerInfo::incarnation`](crate::transport::BrokerInfo::incarnation).
    pub incarnation: String,
    /// The number of the last message that it is known to have had; 0 if it numbers none.
    pub last_message: u64,
}

/// The broker that has confirmed the copies of `lane` in `folder`.
pub fn read_broker(folder: &Path, lane: LaneId) -> Option<Confirmer> {
    // Without the file, or with a broken one, all copies are published again.
    let text = String::from_utf8(disk::read_all(&path(folder, lane)).ok()?).ok()?;
    let (incarnation, last_message) = text.split_once('\n').unwrap_or((&text, "0"));
    Some(Confirmer {
        incarnation: incarnation.into(),
        last_message: last_message.parse().ok()?,
    })
}

/// Makes `broker` the one that a later start reads, even after a power cut.
pub fn write_broker(folder: &Path, lane: LaneId, broker: &Confirmer) -> io::Result<()> {
    let Confirmer {
        incarnation,
        last_message,
    } = broker;
    let text = format!("{incarnation}\n{last_message}");
    disk::replace_durably(&path(folder, lane), text.as_bytes())
}

/// Makes a later start read no name, even after a power cut.
pub fn forget_broker(folder: &Path, lane: LaneId) -> io::Result<()> {
    match disk::remove(&path(folder, lane)) {
        Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| sync(&File::open(folder)?)),
    }
}

fn path(folder: &Path, lane: LaneId) -> PathBuf {
    folder.join(format!("kept_{lane}.broker"))
}
