//! Ids of records that have passed, for logs of the last thousands.

use smallvec::SmallVec;

/// The length of an id of our own, and a few bytes more.
const SHORT: usize = 40;

/// The id of a record, or a list of ids. A short one is in place: to forget it frees no memory, which
/// no processor has at hand any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedId(SmallVec<[u8; SHORT]>);

impl PassedId {
    pub fn is(&self, id: &str) -> bool {
        *self.0 == *id.as_bytes()
    }

    /// Whether `id` is in this list, which has commas between its ids.
    pub fn lists(&self, id: &str) -> bool {
        let mut ids = self.0.split(|byte| *byte == b',');
        ids.any(|listed| *listed == *id.as_bytes())
    }

    /// The name behind `id` and a slash.
    pub fn name_behind(&self, id: &str) -> Option<&str> {
        let end = self.0.strip_prefix(id.as_bytes())?;
        str::from_utf8(end.strip_prefix(b"/")?).ok()
    }
}

impl From<&str> for PassedId {
    fn from(id: &str) -> Self {
        Self(SmallVec::from_slice(id.as_bytes()))
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
