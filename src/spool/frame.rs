//! How entries lie in a file: each in a frame that proves by itself that it is whole. Everything here is pure.
//!
//! ```text
//! mark (4) │ length (4) │ ordinal (4) │ CRC-32 (4) │ payload (length)
//! ```
//!
//! Numbers are little-endian. The checksum covers length, ordinal, payload and the salt of the file, which no client knows: bytes
//! that a client has sent never pass for a frame. After damage, the next mark whose frame is whole is where reading goes on.

use memchr::memmem;

const MARK: [u8; 4] = [0xF7, b'W', b'P', 0x0A];
/// Bytes of a frame before its payload.
pub const HEAD: usize = 16;
/// No payload is longer: a length beyond it is damage.
pub const PAYLOAD_MAX: usize = 16 << 20;

/// Appends the frame of `payload` to `file`.
pub fn write(file: &mut Vec<u8>, salt: u32, ordinal: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    file.extend_from_slice(&MARK);
    file.extend_from_slice(&length.to_le_bytes());
    file.extend_from_slice(&ordinal.to_le_bytes());
    file.extend_from_slice(&checksum(salt, length, ordinal, payload).to_le_bytes());
    file.extend_from_slice(payload);
}

/// What lies at the beginning of some bytes of a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Read<'b> {
    /// A whole frame of `size` bytes.
    Frame {
        ordinal: u32,
        payload: &'b [u8],
        size: usize,
    },
    /// Too few bytes to tell; a frame would end after `needed` of them.
    Short {
        needed: usize,
    },
    /// This many bytes are damaged. What follows may be a frame, or the end.
    Damage {
        size: usize,
    },
    End,
}

/// Reads on from the beginning of `bytes`.
pub fn read(bytes: &[u8], salt: u32) -> Read<'_> {
    if bytes.is_empty() {
        return Read::End;
    }
    match whole(bytes, salt) {
        Ok(frame) => frame,
        Err(Some(needed)) => Read::Short { needed },
        Err(None) => Read::Damage {
            size: resume(bytes),
        },
    }
}

/// `Err` holds the bytes that a frame would need, if more of them could make one.
fn whole(bytes: &[u8], salt: u32) -> Result<Read<'_>, Option<usize>> {
    let known = bytes.len().min(MARK.len());
    if bytes[..known] != MARK[..known] {
        return Err(None);
    }
    let Some(head) = bytes.first_chunk::<HEAD>() else {
        return Err(Some(HEAD));
    };
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (length, ordinal, crc) = (word(4), word(8), word(12));
    let Some(size) = usize::try_from(length)
        .ok()
        .filter(|&length| length <= PAYLOAD_MAX)
        .map(|length| HEAD + length)
    else {
        return Err(None);
    };
    let Some(payload) = bytes.get(HEAD..size) else {
        return Err(Some(size));
    };
    if checksum(salt, length, ordinal, payload) == crc {
        Ok(Read::Frame {
            ordinal,
            payload,
            size,
        })
    } else {
        Err(None)
    }
}

/// Where the next mark, or what may be the beginning of one, lies after the first byte: how much to skip.
pub fn resume(bytes: &[u8]) -> usize {
    let from = 1.min(bytes.len());
    if let Some(at) = memmem::find(&bytes[from..], &MARK) {
        return from + at;
    }
    let tail = (1..MARK.len())
        .rev()
        .find(|&known| bytes.len() - from >= known && bytes.ends_with(&MARK[..known]));
    bytes.len() - tail.unwrap_or(0)
}

fn checksum(salt: u32, length: u32, ordinal: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(salt);
    hasher.update(&length.to_le_bytes());
    hasher.update(&ordinal.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: u32 = 0xDEAD_BEEF;

    fn file() -> Vec<u8> {
        let mut file = Vec::new();
        write(&mut file, SALT, 0, b"first");
        write(&mut file, SALT, 1, b"");
        write(&mut file, SALT, 2, &[&MARK[..], b"mark inside"].concat());
        file
    }

    /// The ordinals that are whole, and the bytes that are not.
    fn scan(mut bytes: &[u8]) -> (Vec<u32>, usize) {
        let (mut ordinals, mut damaged) = (Vec::new(), 0);
        loop {
            let step = match read(bytes, SALT) {
                Read::Frame { ordinal, size, .. } => {
                    ordinals.push(ordinal);
                    size
                }
                // At the end of a file, what is short is damaged: look behind its mark.
                Read::Short { .. } => {
                    let step = resume(bytes);
                    damaged += step;
                    step
                }
                Read::Damage { size } => {
                    damaged += size;
                    size
                }
                Read::End => return (ordinals, damaged),
            };
            bytes = &bytes[step..];
        }
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        let file = file();
        assert_eq!(
            read(&file, SALT),
            Read::Frame {
                ordinal: 0,
                payload: b"first",
                size: HEAD + 5
            }
        );
        assert_eq!(scan(&file), (vec![0, 1, 2], 0));
        assert_eq!(
            read(&file[..HEAD + 4], SALT),
            Read::Short { needed: HEAD + 5 }
        );
        assert_eq!(read(&file[..3], SALT), Read::Short { needed: HEAD });
        assert_eq!(read(&[], SALT), Read::End);
        assert!(
            matches!(read(&file, SALT + 1), Read::Damage { .. }),
            "of another file"
        );
    }

    #[test]
    fn a_flipped_bit_costs_the_frame_that_it_lies_in_and_no_other() {
        let whole = file();
        let starts = [0, HEAD + 5, 2 * HEAD + 5, whole.len()];
        for bit in 0..whole.len() * 8 {
            let mut file = whole.clone();
            file[bit / 8] ^= 1 << (bit % 8);
            let hit = starts
                .windows(2)
                .position(|ends| (ends[0]..ends[1]).contains(&(bit / 8)))
                .unwrap();
            let expected: Vec<_> = (0..3).filter(|&ordinal| ordinal as usize != hit).collect();
            let (ordinals, damaged) = scan(&file);
            assert_eq!(ordinals, expected, "bit {bit}");
            assert_eq!(damaged, starts[hit + 1] - starts[hit], "bit {bit}");
        }
    }

    #[test]
    fn a_file_that_is_cut_anywhere_keeps_the_frames_before() {
        let whole = file();
        let ends = [HEAD + 5, 2 * HEAD + 5, whole.len()];
        for cut in 0..=whole.len() {
            let expected = ends.iter().filter(|&&end| end <= cut).count();
            assert_eq!(scan(&whole[..cut]).0.len(), expected, "cut at {cut}");
        }
    }
}
