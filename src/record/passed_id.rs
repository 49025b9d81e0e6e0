//! Ids of records that have passed, for logs of the last thousands.

/// The length of an id of our own, and a few bytes more.
const SHORT: usize = 40;

/// A copy of a record's id, or of a list of ids. A short one needs no memory of its own, which would
/// have left all caches by the time that a log forgets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassedId {
    /// The number of its bytes, and these with zeros behind them.
    Short(u8, [u8; SHORT]),
    Long(Box<str>),
}

impl PassedId {
    pub fn is(&self, id: &str) -> bool {
        *self.bytes() == *id.as_bytes()
    }

    /// Whether `id` is in this list, which has commas between its ids.
    pub fn lists(&self, id: &str) -> bool {
        let mut ids = self.bytes().split(|byte| *byte == b',');
        ids.any(|listed| *listed == *id.as_bytes())
    }

    /// The name behind `id` and a slash.
    pub fn name_behind(&self, id: &str) -> Option<&str> {
        let end = self.bytes().strip_prefix(id.as_bytes())?;
        str::from_utf8(end.strip_prefix(b"/")?).ok()
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Short(length, bytes) => &bytes[..usize::from(*length)],
            Self::Long(id) => id.as_bytes(),
        }
    }
}

impl From<&str> for PassedId {
    fn from(id: &str) -> Self {
        let mut bytes = [0; SHORT];
        match (u8::try_from(id.len()), bytes.get_mut(..id.len())) {
            (Ok(length), Some(place)) => {
                place.copy_from_slice(id.as_bytes());
                Self::Short(length, bytes)
            }
            _ => Self::Long(id.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_of_any_length_is_found() {
        let long = "é".repeat(SHORT);
        for id in ["", "a", &long[..SHORT], &*long] {
            let passed = PassedId::from(id);
            assert!(passed.is(id) && !passed.is("b"), "{id}");
            let list = PassedId::from(&*format!("x,{id}"));
            assert!(
                list.lists(id) && list.lists("x") && !list.lists("y"),
                "{id}"
            );
            let copy = PassedId::from(&*format!("{id}/nats"));
            assert_eq!(copy.name_behind(id), Some("nats"));
            assert_eq!(passed.name_behind(id), None);
        }
    }
}
