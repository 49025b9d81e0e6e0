//! JSON pointers (RFC 6901), and the values of many pointers read in one pass.

use std::{fmt, str::FromStr};

use serde::{
    Deserialize, Serialize,
    de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// A JSON pointer to something inside of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pointer {
    text: String,
    /// Without escapes.
    tokens: Vec<String>,
}

impl Pointer {
    /// The names of the members, or the indexes of the elements, from the outside to the inside.
    pub fn tokens(&self) -> &[String] {
        &self.tokens
    }
}

impl FromStr for Pointer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no JSON pointer; allowed is / and a member's name, as in \"/state\" \
                 or \"/patient/age\", with ~1 for / and ~0 for ~"
            )
        };
        let inside = text.strip_prefix('/').ok_or_else(wrong)?;
        let token = |escaped: &str| {
            let plain = escaped.replace("~1", "").replace("~0", "");
            (!plain.contains('~')).then(|| escaped.replace("~1", "/").replace("~0", "~"))
        };
        let tokens: Option<Vec<_>> = inside.split('/').map(token).collect();
        Ok(Self {
            text: text.to_owned(),
            tokens: tokens.ok_or_else(wrong)?,
        })
    }
}

impl TryFrom<String> for Pointer {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<Pointer> for String {
    fn from(pointer: Pointer) -> Self {
        pointer.text
    }
}

/// Several pointers, as the tree of their tokens.
#[derive(Clone, Debug, Default)]
pub struct PointerSet {
    root: PointerNode,
    len: usize,
}

/// A member, or an element, that a pointer leads to or through.
#[derive(Clone, Debug, Default)]
pub struct PointerNode {
    /// The index of its value, if a pointer ends here.
    index: Option<usize>,
    children: Vec<(String, PointerNode)>,
}

/// The JSON texts that the pointers of a set lead to, as they stand in the record. Of members with
/// the same name, the last one counts, as it does to most parsers.
#[derive(Clone, Debug, Default)]
pub struct Values<'r>(Vec<Option<&'r str>>);

impl<'r> Values<'r> {
    /// The JSON text at this index of the set.
    pub fn get(&self, index: usize) -> Option<&'r str> {
        self.0.get(index).copied().flatten()
    }

    fn set(&mut self, index: usize, value: Option<&'r str>) {
        if self.0.len() <= index {
            self.0.resize(index + 1, None);
        }
        self.0[index] = value;
    }
}

impl PointerSet {
    /// Adds a pointer, and returns the index of its value. The same pointer has one index.
    pub fn add(&mut self, pointer: &Pointer) -> usize {
        let mut node = &mut self.root;
        for token in &pointer.tokens {
            let known = node.children.iter().position(|(name, _)| name == token);
            let at = known.unwrap_or_else(|| {
                node.children.push((token.clone(), PointerNode::default()));
                node.children.len() - 1
            });
            node = &mut node.children[at].1;
        }
        *node.index.get_or_insert_with(|| {
            self.len += 1;
            self.len - 1
        })
    }

    /// Whether no value is wanted.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The top-level member of this name, if a pointer leads to it or through it.
    pub fn member(&self, name: &str) -> Option<&PointerNode> {
        self.root.child(name)
    }

    /// The values in `record`, a JSON text.
    ///
    /// # Errors
    /// If it is not JSON.
    pub fn read<'r>(&self, record: &'r str) -> serde_json::Result<Values<'r>> {
        let mut values = Values::default();
        if !self.is_empty() {
            self.root.capture(record, &mut values)?;
        }
        Ok(values)
    }
}

impl PointerNode {
    /// Keeps `text`, the JSON text of this member, and what the pointers find in it.
    ///
    /// # Errors
    /// If it is not JSON.
    pub fn capture<'r>(&self, text: &'r str, values: &mut Values<'r>) -> serde_json::Result<()> {
        if let Some(index) = self.index {
            values.set(index, Some(text));
        }
        if self.children.is_empty() {
            return Ok(());
        }
        // An earlier member of the same name counts no more.
        self.children
            .iter()
            .for_each(|(_, child)| child.forget(values));
        let mut json = serde_json::Deserializer::from_str(text);
        let inside = Inside { node: self, values };
        match text.trim_start().as_bytes().first() {
            Some(b'{') => json.deserialize_map(inside),
            Some(b'[') => json.deserialize_seq(inside),
            _ => Ok(()),
        }
    }

    fn forget(&self, values: &mut Values<'_>) {
        if let Some(index) = self.index {
            values.set(index, None);
        }
        self.children
            .iter()
            .for_each(|(_, child)| child.forget(values));
    }

    fn child(&self, name: &str) -> Option<&Self> {
        let mut children = self.children.iter();
        children.find_map(|(known, child)| (known == name).then_some(child))
    }
}

/// Reads the children of a node.
struct Inside<'s, 'v, 'r> {
    node: &'s PointerNode,
    values: &'v mut Values<'r>,
}

impl<'r> Visitor<'r> for Inside<'_, '_, 'r> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'r>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(child) = map.next_key_seed(ChildName(self.node))? {
            let Some(child) = child else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let text = map.next_value::<&'r RawValue>()?.get();
            child
                .capture(text, self.values)
                .map_err(serde::de::Error::custom)?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'r>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut at = 0_usize;
        while let Some(element) = seq.next_element::<&'r RawValue>()? {
            if let Some(child) = self.node.child(&at.to_string()) {
                child
                    .capture(element.get(), self.values)
                    .map_err(serde::de::Error::custom)?;
            }
            at += 1;
        }
        Ok(())
    }
}

/// Reads a member's name as the child of that name.
struct ChildName<'s>(&'s PointerNode);

impl<'r, 's> DeserializeSeed<'r> for ChildName<'s> {
    type Value = Option<&'s PointerNode>;

    fn deserialize<D: Deserializer<'r>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_str(self)
    }
}

impl<'s> Visitor<'_> for ChildName<'s> {
    type Value = Option<&'s PointerNode>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.child(name))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// JSON whose members have few names, escapes and duplicates included.
    fn json() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just("null".to_owned()),
            Just("-1.5e3".to_owned()),
            Just(r#""a\"b/é\u0041""#.to_owned()),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            let name = prop_oneof![
                Just(r#""a""#),
                Just(r#""a/b""#),
                Just(r#""\u0061""#),
                Just(r#""0""#),
                Just(r#""""#)
            ];
            let member =
                (name, inner.clone()).prop_map(|(name, value)| format!("{name} : {value}"));
            prop_oneof![
                prop::collection::vec(member, 0..5)
                    .prop_map(|members| format!("{{ {} }}", members.join(" ,"))),
                prop::collection::vec(inner, 0..4)
                    .prop_map(|elements| format!("[{}\n]", elements.join(","))),
            ]
        })
    }

    fn pointer() -> impl Strategy<Value = Pointer> {
        let token = prop_oneof![Just("a"), Just("a~1b"), Just("0"), Just("1"), Just("")];
        prop::collection::vec(token, 1..4)
            .prop_map(|tokens| format!("/{}", tokens.join("/")).parse().unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn it_finds_what_serde_json_finds(
            text in json(),
            pointers in prop::collection::vec(pointer(), 1..6)
        ) {
            let mut set = PointerSet::default();
            let indexes: Vec<_> = pointers.iter().map(|pointer| set.add(pointer)).collect();
            let values = set.read(&text).unwrap();
            let tree: Value = serde_json::from_str(&text).unwrap();
            for (pointer, index) in pointers.iter().zip(indexes) {
                let found = values.get(index).map(|text| serde_json::from_str(text).unwrap());
                prop_assert_eq!(found.as_ref(), tree.pointer(&pointer.to_string()));
            }
        }

        #[test]
        fn member_by_member_it_finds_the_same(
            members in prop::collection::vec((prop_oneof![Just("a"), Just("b")], json()), 0..4),
            pointers in prop::collection::vec(pointer(), 1..6)
        ) {
            let mut set = PointerSet::default();
            for pointer in &pointers {
                set.add(pointer);
            }
            let text: Vec<_> =
                members.iter().map(|(name, value)| format!("{name:?}:{value}")).collect();
            let text = format!("{{{}}}", text.join(","));
            let mut values = Values::default();
            for (name, value) in &members {
                if let Some(node) = set.member(name) {
                    node.capture(value.trim(), &mut values).unwrap();
                }
            }
            let expected = set.read(&text).unwrap();
            for at in 0..set.len {
                prop_assert_eq!(values.get(at).map(str::trim), expected.get(at));
            }
        }
    }

    #[test]
    fn a_pointer_is_as_rfc_6901_says() {
        let tokens = |text: &str| text.parse::<Pointer>().map(|pointer| pointer.tokens);
        assert_eq!(
            tokens("/a~1b/m~0n/~01"),
            Ok(vec!["a/b".into(), "m~n".into(), "~1".into()])
        );
        assert_eq!(tokens("/"), Ok(vec![String::new()]));
        for wrong in ["", "a", "/~", "/a~2"] {
            assert!(tokens(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_json_is_an_error() {
        let mut set = PointerSet::default();
        assert!(set.read("{").is_ok(), "nothing is wanted");
        set.add(&"/a".parse().unwrap());
        assert!(set.read("{").is_err());
        assert!(set.read("{\"a\":[}").is_err());
        assert!(set.read("1").unwrap().get(0).is_none());
    }
}
