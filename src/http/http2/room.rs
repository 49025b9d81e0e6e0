//! The room for streams: places on a server thread, and memory for the heads of a connection's requests.

use std::{cell::Cell, rc::Rc};

use super::{HEADS_MAX, STREAMS_MAX};

/// An amount of which parts are lent.
struct Pool(Rc<Cell<usize>>);

/// A part of a pool. Dropped, it is given back.
struct Lent {
    left: Rc<Cell<usize>>,
    size: usize,
}

impl Pool {
    fn new(all: usize) -> Self {
        Self(Rc::new(Cell::new(all)))
    }

    fn lend(&self, size: usize) -> Option<Lent> {
        self.0.set(self.0.get().checked_sub(size)?);
        let left = Rc::clone(&self.0);
        Some(Lent { left, size })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.left.set(self.left.get() + self.size);
    }
}

/// The streams that a server thread may have beside the first one of each connection.
pub struct StreamRoom {
    all: usize,
    pool: Pool,
}

/// The place of a stream.
pub struct StreamPlace {
    _lent: Option<Lent>,
}

impl StreamRoom {
    pub fn new(streams: usize) -> Self {
        Self {
            all: streams,
            pool: Pool::new(streams),
        }
    }

    /// A place for one more stream of a connection that has `open` ones. The first one has the place of
    /// the connection.
    ///
    /// A connection may have all its streams while half of the places are free. The fewer are free from
    /// there on, the fewer streams it may have: a few clients leave places for the others, and the last
    /// ones go to those that have one.
    pub fn take(&self, open: usize) -> Option<StreamPlace> {
        if open == 0 {
            return Some(StreamPlace { _lent: None });
        }
        let most = self.all.min(STREAMS_MAX as usize);
        if open > 1 && open * self.all >= 2 * most * self.pool.0.get() {
            return None;
        }
        let lent = self.pool.lend(1)?;
        Some(StreamPlace { _lent: Some(lent) })
    }
}

/// The memory for the heads of a connection's requests.
pub struct HeadRoom(Pool);

/// The memory of a head.
pub struct HeadPlace {
    _lent: Lent,
}

impl HeadRoom {
    pub fn new() -> Self {
        Self(Pool::new(HEADS_MAX))
    }

    pub fn take(&self, size: usize) -> Option<HeadPlace> {
        let lent = self.0.lend(size)?;
        Some(HeadPlace { _lent: lent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The streams that connections get which want as many as they may have, one connection after the
    /// other.
    fn greedy(room: &StreamRoom, connections: usize) -> Vec<Vec<StreamPlace>> {
        let mut all: Vec<Vec<_>> = Vec::new();
        for _ in 0..connections {
            let mut streams = Vec::new();
            while streams.len() < STREAMS_MAX as usize
                && let Some(place) = room.take(streams.len())
            {
                streams.push(place);
            }
            all.push(streams);
        }
        all
    }

    #[test]
    fn a_place_is_free_again_once_it_is_dropped() {
        let room = StreamRoom::new(2);
        let firsts = [room.take(0), room.take(0), room.take(0)];
        assert!(firsts.iter().all(Option::is_some));
        let (one, other) = (room.take(1), room.take(1));
        assert!(one.is_some() && other.is_some());
        assert!(room.take(1).is_none());
        drop(firsts);
        assert!(room.take(1).is_none(), "they had none of these");
        drop(one);
        let again = room.take(1);
        assert!(again.is_some() && room.take(1).is_none());
    }

    #[test]
    fn a_connection_has_all_its_streams_while_half_of_the_places_are_free() {
        let room = StreamRoom::new(1000);
        let all = greedy(&room, 5);
        assert!(all.iter().all(|streams| streams.len() == 100));
    }

    #[test]
    fn a_few_connections_leave_places_for_the_others() {
        for (thread, few) in [(25_000, 250), (1000, 10), (512, 5), (8, 2), (4, 1)] {
            let room = StreamRoom::new(thread);
            let taken = greedy(&room, few);
            let late = greedy(&room, 1)[0].len();
            assert!(late > 1, "{few} connections leave none of {thread} places");
            drop(taken);
            let first = greedy(&room, 1)[0].len();
            assert!(first >= late);
        }
    }

    #[test]
    fn the_last_places_go_to_connections_that_have_one_stream() {
        let room = StreamRoom::new(1000);
        let taken = greedy(&room, 1000);
        let most = taken.iter().map(Vec::len).max();
        assert_eq!(most, Some(100));
        let last = &taken[900..];
        assert!(last.iter().all(|streams| (1..=2).contains(&streams.len())));
    }
}
