//! How an event is counted, by the flags of its record. Pure.
//!
//! | event | the record | is counted as |
//! | --- | --- | --- |
//! | delivered | was delivered before | redelivered |
//! | delivered | is ours; neither dead nor refused | delivered |
//! | delivered | any other | delivered and recovered |
//! | dead | is ours; neither delivered, dead nor refused | dead |
//! | dead | any other | dead and recovered |
//! | refused | was delivered, or is dead | refused too late, which adds to recovered |
//! | refused | any other | nothing |
//! | adopted | was adopted before | nothing |
//! | adopted | was delivered | double counted, which takes from recovered |
//! | adopted | any other | nothing: it was counted at the start, as recovered from disk |
//!
//! A record is *ours* if this run took it in or has adopted it. Then it was counted before its end.

use super::memory::Flags;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Delivered,
    Dead,
    Refused,
    Adopted,
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
    RefusedTooLate,
    DoubleCounted,
}

/// `is_own`: this run took the record in.
pub(super) fn count(event: Event, flags: Flags, is_own: bool) -> CountedAs {
    let is_ours = is_own || flags.has(Flags::ADOPTED);
    let is_ended = flags.has(Flags::DELIVERED | Flags::DEAD | Flags::REFUSED);
    match event {
        Event::Delivered if flags.has(Flags::DELIVERED) => CountedAs::Redelivered,
        Event::Delivered if is_ours && !is_ended => CountedAs::Delivered,
        Event::Delivered => CountedAs::DeliveredAndRecovered,
        Event::Dead if is_ours && !is_ended => CountedAs::Dead,
        Event::Dead => CountedAs::DeadAndRecovered,
        Event::Refused if flags.has(Flags::DELIVERED | Flags::DEAD) => CountedAs::RefusedTooLate,
        Event::Adopted if flags.has(Flags::ADOPTED) => CountedAs::Nothing,
        Event::Adopted if flags.has(Flags::DELIVERED) => CountedAs::DoubleCounted,
        Event::Refused | Event::Adopted => CountedAs::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_of_the_table() {
        const NONE: Flags = Flags::NONE;
        const OWN: bool = true;
        for (event, flags, is_own, expected) in [
            (
                Event::Delivered,
                Flags::DELIVERED,
                OWN,
                CountedAs::Redelivered,
            ),
            (Event::Delivered, NONE, OWN, CountedAs::Delivered),
            (
                Event::Delivered,
                Flags::MAYBE_PUBLISHED,
                OWN,
                CountedAs::Delivered,
            ),
            (Event::Delivered, Flags::ADOPTED, !OWN, CountedAs::Delivered),
            (
                Event::Delivered,
                Flags::DEAD,
                OWN,
                CountedAs::DeliveredAndRecovered,
            ),
            (
                Event::Delivered,
                Flags::REFUSED,
                OWN,
                CountedAs::DeliveredAndRecovered,
            ),
            (
                Event::Delivered,
                NONE,
                !OWN,
                CountedAs::DeliveredAndRecovered,
            ),
            (Event::Dead, NONE, OWN, CountedAs::Dead),
            (Event::Dead, Flags::ADOPTED, !OWN, CountedAs::Dead),
            (Event::Dead, Flags::DEAD, OWN, CountedAs::DeadAndRecovered),
            (
                Event::Dead,
                Flags::DELIVERED,
                OWN,
                CountedAs::DeadAndRecovered,
            ),
            (
                Event::Dead,
                Flags::REFUSED,
                OWN,
                CountedAs::DeadAndRecovered,
            ),
            (Event::Dead, NONE, !OWN, CountedAs::DeadAndRecovered),
            (
                Event::Refused,
                Flags::DELIVERED,
                OWN,
                CountedAs::RefusedTooLate,
            ),
            (Event::Refused, Flags::DEAD, OWN, CountedAs::RefusedTooLate),
            (
                Event::Refused,
                Flags::MAYBE_PUBLISHED,
                OWN,
                CountedAs::Nothing,
            ),
            (
                Event::Adopted,
                Flags::ADOPTED | Flags::DELIVERED,
                !OWN,
                CountedAs::Nothing,
            ),
            (
                Event::Adopted,
                Flags::DELIVERED,
                !OWN,
                CountedAs::DoubleCounted,
            ),
            (Event::Adopted, Flags::DEAD, !OWN, CountedAs::Nothing),
            (Event::Adopted, NONE, !OWN, CountedAs::Nothing),
        ] {
            let counted = count(event, flags, is_own);
            assert_eq!(counted, expected, "{event:?}, {flags:?}, own: {is_own}");
        }
    }
}
