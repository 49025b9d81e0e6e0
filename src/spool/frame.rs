//! The format of entries in a file: each lies in a frame that proves by itself that it is whole.
//! Everything here is pure.
//!
//! ```text
//! mark (4) │ length (4) │ ordinal (4) │ CRC-32 (4) │ payload (length)
//! ```
//!
//! Numbers are little-endian. The checksum covers length, ordinal, payload and the salt of the
//! file. No client knows the salt, so bytes that a client has sent never pass for a frame. After
//! damage, reading goes on at the next mark whose frame is whole.

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

/// The beginning of some bytes of a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Read<'b> {
    /// A whole frame of `size` bytes.
    Frame {
        ordinal: u32,
        payload: &'b [u8],
        size: usize,
    },
    /// Too few bytes. The frame would end after `needed` of them.
    Short {
        needed: usize,
    },
    /// This many bytes are damaged. Then comes a frame, or the end.
    Damage {
        size: usize,
    },
    End,
}

/// Reads the beginning of `bytes`.
pub fn read(bytes: &[u8], salt: u32) -> Read<'_> {
    if bytes.is_empty() {
        return Read::End;
    }
    let damage = || Read::Damage {
        size: resume(bytes),
    };
    let known = bytes.len().min(MARK.len());
    if bytes[..known] != MARK[..known] {
        return damage();
    }
    let Some(head) = bytes.first_chunk::<HEAD>() else {
        return Read::Short { needed: HEAD };
    };
    let [_, length, ordinal, crc] = words(head);
    if length as usize > PAYLOAD_MAX {
        return damage();
    }
    let size = HEAD + length as usize;
    match bytes.get(HEAD..size) {
        None => Read::Short { needed: size },
        Some(payload) if checksum(salt, length, ordinal, payload) == crc => Read::Frame {
            ordinal,
            payload,
            size,
        },
        Some(_) => damage(),
    }
}

/// The number of bytes to skip: up to the next mark after the first byte, or up to bytes at the end
/// that may be the beginning of one.
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

/// Little-endian numbers. `N` is a quarter of the bytes.
pub fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let words = bytes.as_chunks().0;
    std::array::from_fn(|at| words.get(at).copied().map_or(0, u32::from_le_bytes))
}

/// The CRC-32 of two numbers and a payload, under the salt of their file.
pub fn checksum(salt: u32, first: u32, second: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(salt);
    hasher.update(&first.to_le_bytes());
    hasher.update(&second.to_le_bytes());
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
        let mut ordinals = Vec::new();
        let mut damaged = 0;
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
