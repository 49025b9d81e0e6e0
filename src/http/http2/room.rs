//! The streams of a server thread.

use std::{cell::Cell, rc::Rc};

/// The number of streams that there may be more.
pub struct StreamRoom(Rc<Cell<usize>>);

/// The place of a stream. Dropped, it is free.
pub struct StreamPlace(Option<Rc<Cell<usize>>>);

impl StreamRoom {
    pub fn new(streams: usize) -> Self {
        Self(Rc::new(Cell::new(streams)))
    }

    /// The first stream of a connection has the place of the connection.
    pub fn take(&self, is_first: bool) -> Option<StreamPlace> {
        if is_first {
            return Some(StreamPlace(None));
        }
        let left = self.0.get().checked_sub(1)?;
        self.0.set(left);
        Some(StreamPlace(Some(Rc::clone(&self.0))))
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        if let Some(left) = &self.0 {
            left.set(left.get() + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_once_it_is_dropped() {
        let room = StreamRoom::new(2);
        let firsts = [room.take(true), room.take(true), room.take(true)];
        assert!(firsts.iter().all(Option::is_some));
        let (one, other) = (room.take(false), room.take(false));
        assert!(one.is_some() && other.is_some());
        assert!(room.take(false).is_none());
        drop(firsts);
        assert!(room.take(false).is_none(), "they had none of these");
        drop(one);
        let again = room.take(false);
        assert!(again.is_some() && room.take(false).is_none());
    }
}
