//! Reading a file of frames from one end to the other, a piece at a time.

use std::{fs::File, io};

use super::{
    disk,
    frame::{self, Read},
};

/// The bytes that are read at once; a longer frame is read whole.
const PIECE: usize = 256 << 10;

/// A file of which a part is read.
pub struct Scanner {
    file: File,
    salt: u32,
    /// The offset of the piece in the file.
    base: u64,
    piece: Vec<u8>,
    /// The bytes of the piece that are read.
    used: usize,
}

/// The next part of the file.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    Frame {
        ordinal: u32,
        payload: Vec<u8>,
    },
    /// `size` bytes from `at` on are not a whole frame.
    Damage {
        at: u64,
        size: u64,
    },
}

impl Scanner {
    pub fn new(file: File, salt: u32) -> Self {
        Self {
            file,
            salt,
            base: 0,
            piece: Vec::new(),
            used: 0,
        }
    }

    /// The next item before byte `end` of the file, which may have moved on since the last call.
    pub fn next(&mut self, end: u64) -> io::Result<Option<Item>> {
        let mut damage: Option<(u64, u64)> = None;
        loop {
            let at = self.base + self.used as u64;
            let rest = &self.piece[self.used..];
            let is_last = at + rest.len() as u64 >= end;
            let broken = match frame::read(rest, self.salt) {
                Read::Frame {
                    ordinal,
                    payload,
                    size,
                } if damage.is_none() => {
                    let payload = payload.to_vec();
                    self.used += size;
                    return Ok(Some(Item::Frame { ordinal, payload }));
                }
                Read::Frame { .. } => break,
                Read::End if is_last => break,
                Read::Damage { size } => size,
                // A frame that would end after the file does is none.
                Read::Short { needed } if is_last || at + needed as u64 > end => {
                    frame::resume(rest)
                }
                Read::Short { needed } => {
                    self.refill(at, needed.max(PIECE), end)?;
                    continue;
                }
                Read::End => {
                    self.refill(at, PIECE, end)?;
                    continue;
                }
            };
            let (from, size) = damage.unwrap_or((at, 0));
            damage = Some((from, size + broken as u64));
            self.used += broken;
        }
        Ok(damage.map(|(at, size)| Item::Damage { at, size }))
    }

    /// The bytes of a damage, for setting them aside.
    pub fn bytes(&self, at: u64, size: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
        disk::read(&self.file, &mut bytes, at)?;
        Ok(bytes)
    }

    fn refill(&mut self, at: u64, wanted: usize, end: u64) -> io::Result<()> {
        let size = usize::try_from(end - at).unwrap_or(usize::MAX).min(wanted);
        self.piece.resize(size, 0);
        self.base = at;
        self.used = 0;
        if let Err(why) = disk::read(&self.file, &mut self.piece, at) {
            self.piece.clear();
            return Err(why);
        }
        Ok(())
    }
}
