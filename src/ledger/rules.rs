//! How an event is counted, by the flags of its record. Pure.
//!
//! A record is *ours* if this run accepted or adopted it: then it is counted already.
//!
//! | event | the record | is counted as |
//! | --- | --- | --- |
//! | delivered | was delivered before | redelivered |
//! | delivered | is ours, and has no end yet | delivered |
//! | delivered | any other | delivered and recovered |
//! | dead | is ours, and has no end yet | dead |
//! | dead | any other | dead and recovered |
//! | parked | is ours, and has no end yet | parked |
//! | parked | any other | parked and recovered |
//! | refused | was delivered, is dead or parked | refused too late: adds one to recovered |
//! | refused | any other | nothing |
//! | adopted | was resent before | double counted: takes one from recovered |
//! | adopted | was adopted before | nothing |
//! | adopted | was delivered | double counted: takes one from recovered |
//! | adopted | any other | nothing: it was counted at the start, as recovered from disk |
//! | resent | was resent before | double counted: takes one from recovered |
//! | resent | was refused | nothing: a disk that hung wrote it, and has not removed it yet |
//! | resent | any other | resent |
//!
//! A power cut may leave two entries of one record on disk.
//!
//! The ends of a record are delivered, dead, refused and parked: a copy of a parked record is
//! another record.

use super::memory::Flags;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transition {
    Delivered,
    Dead,
    Parked,
    Refused,
    Adopted,
    Resent,
}

/// The last column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CountedAs {
    Nothing,
    Delivered,
    DeliveredAndRecovered,
    Redelivered,
    Dead,
    DeadAndRecovered,
    Parked,
    ParkedAndRecovered,
    RefusedTooLate,
    DoubleCounted,
    Resent,
}

/// `is_own`: this run took the record in.
pub(super) fn count(event: Transition, flags: Flags, is_own: bool) -> CountedAs {
    let is_ours = is_own || flags.has(Flags::ADOPTED);
    let is_ended = flags.has(Flags::DELIVERED | Flags::DEAD | Flags::REFUSED | Flags::PARKED);
    match event {
        Transition::Delivered if flags.has(Flags::DELIVERED) => CountedAs::Redelivered,
        Transition::Delivered if is_ours && !is_ended => CountedAs::Delivered,
        Transition::Delivered => CountedAs::DeliveredAndRecovered,
        Transition::Dead if is_ours && !is_ended => CountedAs::Dead,
        Transition::Dead => CountedAs::DeadAndRecovered,
        Transition::Parked if is_ours && !is_ended => CountedAs::Parked,
        Transition::Parked => CountedAs::ParkedAndRecovered,
        Transition::Refused if flags.has(Flags::DELIVERED | Flags::DEAD | Flags::PARKED) => {
            CountedAs::RefusedTooLate
        }
        Transition::Adopted | Transition::Resent if flags.has(Flags::RESENT) => {
            CountedAs::DoubleCounted
        }
        Transition::Resent if flags.has(Flags::REFUSED) => CountedAs::Nothing,
        Transition::Resent => CountedAs::Resent,
        Transition::Adopted if flags.has(Flags::ADOPTED) => CountedAs::Nothing,
        Transition::Adopted if flags.has(Flags::DELIVERED) => CountedAs::DoubleCounted,
        Transition::Refused | Transition::Adopted => CountedAs::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::too_many_lines, reason = "one row per case")]
    fn each_row_of_the_table() {
        const NONE: Flags = Flags::NONE;
        const OWN: bool = true;
        for (event, flags, is_own, expected) in [
            (
                Transition::Delivered,
                Flags::DELIVERED,
                OWN,
                CountedAs::Redelivered,
            ),
            (Transition::Delivered, NONE, OWN, CountedAs::Delivered),
            (
                Transition::Delivered,
                Flags::MAYBE_PUBLISHED,
                OWN,
                CountedAs::Delivered,
            ),
            (
                Transition::Delivered,
                Flags::ADOPTED,
                !OWN,
                CountedAs::Delivered,
            ),
            (
                Transition::Delivered,
                Flags::DEAD,
                OWN,
                CountedAs::DeliveredAndRecovered,
            ),
            (
                Transition::Delivered,
                Flags::REFUSED,
                OWN,
                CountedAs::DeliveredAndRecovered,
            ),
            (
                Transition::Delivered,
                NONE,
                !OWN,
                CountedAs::DeliveredAndRecovered,
            ),
            (Transition::Dead, NONE, OWN, CountedAs::Dead),
            (Transition::Dead, Flags::ADOPTED, !OWN, CountedAs::Dead),
            (
                Transition::Dead,
                Flags::DEAD,
                OWN,
                CountedAs::DeadAndRecovered,
            ),
            (
                Transition::Dead,
                Flags::DELIVERED,
                OWN,
                CountedAs::DeadAndRecovered,
            ),
            (
                Transition::Dead,
                Flags::REFUSED,
                OWN,
                CountedAs::DeadAndRecovered,
            ),
            (Transition::Dead, NONE, !OWN, CountedAs::DeadAndRecovered),
            (
                Transition::Delivered,
                Flags::PARKED,
                OWN,
                CountedAs::DeliveredAndRecovered,
            ),
            (
                Transition::Dead,
                Flags::PARKED,
                OWN,
                CountedAs::DeadAndRecovered,
            ),
            (Transition::Parked, NONE, OWN, CountedAs::Parked),
            (Transition::Parked, Flags::ADOPTED, !OWN, CountedAs::Parked),
            (
                Transition::Parked,
                NONE,
                !OWN,
                CountedAs::ParkedAndRecovered,
            ),
            (
                Transition::Parked,
                Flags::PARKED,
                OWN,
                CountedAs::ParkedAndRecovered,
            ),
            (
                Transition::Parked,
                Flags::DELIVERED,
                OWN,
                CountedAs::ParkedAndRecovered,
            ),
            (
                Transition::Refused,
                Flags::PARKED,
                OWN,
                CountedAs::RefusedTooLate,
            ),
            (
                Transition::Refused,
                Flags::DELIVERED,
                OWN,
                CountedAs::RefusedTooLate,
            ),
            (
                Transition::Refused,
                Flags::DEAD,
                OWN,
                CountedAs::RefusedTooLate,
            ),
            (
                Transition::Refused,
                Flags::MAYBE_PUBLISHED,
                OWN,
                CountedAs::Nothing,
            ),
            (
                Transition::Adopted,
                Flags::ADOPTED | Flags::DELIVERED,
                !OWN,
                CountedAs::Nothing,
            ),
            (
                Transition::Adopted,
                Flags::DELIVERED,
                !OWN,
                CountedAs::DoubleCounted,
            ),
            (
                Transition::Adopted,
                Flags::ADOPTED | Flags::RESENT,
                !OWN,
                CountedAs::DoubleCounted,
            ),
            (Transition::Resent, NONE, OWN, CountedAs::Resent),
            (Transition::Resent, Flags::ADOPTED, OWN, CountedAs::Resent),
            (Transition::Resent, Flags::DELIVERED, OWN, CountedAs::Resent),
            (
                Transition::Resent,
                Flags::RESENT,
                OWN,
                CountedAs::DoubleCounted,
            ),
            (Transition::Resent, Flags::REFUSED, OWN, CountedAs::Nothing),
            (Transition::Adopted, Flags::DEAD, !OWN, CountedAs::Nothing),
            (Transition::Adopted, NONE, !OWN, CountedAs::Nothing),
        ] {
            let counted = count(event, flags, is_own);
            assert_eq!(counted, expected, "{event:?}, {flags:?}, own: {is_own}");
        }
    }
}
