//! JSON as Go reads it: registries, builders, engines and login tools are tested against programs in Go and nothing
//! else.
//!
//! Go's `encoding/json` accepts what serde does not: a key in another case; a key that occurs twice (the last one
//! counts; objects that have types of their own are merged); `null` anywhere (it empties pointers, lists and maps, and
//! leaves everything else as it is); bytes that are not UTF-8 and halves of surrogate pairs (both are read as U+FFFD).
//! The text must be valid JSON all the same, at most [`MAX_DEPTH`] deep, and numbers and types must fit. Source: the
//! documentation of `json.Unmarshal`.
//!
//! Memory: until its type is known, a value is kept as a slice of the document, so what no field asks for costs
//! nothing. Do not use `#[serde(flatten)]`, or types that ask for any value: serde_json's own rules apply inside of
//! them. If a list or a map occurs twice, the last one counts.

use std::borrow::Cow;
use std::marker::PhantomData;

use serde::de::{
    Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::Error;
use serde_json::value::RawValue;

/// How deep lists and objects may be nested, as in Go.
pub const MAX_DEPTH: usize = 10_000;

/// Reads a document that is one value, as `json.Unmarshal` does.
///
/// # Errors
/// If the text is not JSON, or a value does not fit its type.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let text = String::from_utf8_lossy(bytes);
    Raw::of(&text)?.read()
}

/// Reads a document's first value and ignores what follows, as `json.Decoder` does.
///
/// # Errors
/// If there is no value, or as for [`from_slice`].
pub fn first_from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let text = String::from_utf8_lossy(bytes);
    let first = serde_json::Deserializer::from_str(&text).into_iter::<&RawValue>().next();
    Raw::checked(first.unwrap_or_else(|| Err(Error::custom("the document is empty")))?)?.read()
}

/// The text of a document in a form that other readers accept: bytes that are not UTF-8 and halves of surrogate pairs
/// are replaced, everything else is unchanged.
pub fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    without_lone_surrogates(&text).into_owned()
}

/// Whether Go takes `key` for `field`, which is ASCII. Case is ignored, and the two letters that Unicode folds to ASCII
/// (U+017F and U+212A) count as `s` and `k`.
fn is_key(field: &str, key: &str) -> bool {
    let fold = |letter: char| match letter {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    };
    field.chars().map(fold).eq(key.chars().map(fold))
}

/// The one of `fields` that Go takes `key` for: an exact match if there is one.
pub(crate) fn field<'f, F>(fields: &'f [F], name: impl Fn(&F) -> &str, key: &str) -> Option<&'f F> {
    let exact = fields.iter().find(|field| name(field) == key);
    exact.or_else(|| fields.iter().find(|field| is_key(name(field), key)))
}

/// The kind of a value, before it has a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool,
    /// A number.
    Number,
    /// A text.
    Text,
    /// A list.
    List,
    /// An object.
    Object,
}

/// One value of a document, of which only the bounds are known.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Raw<'de>(&'de RawValue);

impl<'de> Raw<'de> {
    /// Parses a document that is exactly one value.
    pub(crate) fn of(text: &'de str) -> Result<Raw<'de>, Error> {
        Raw::checked(serde_json::from_str(text)?)
    }

    /// Refuses a value that is nested deeper than [`MAX_DEPTH`].
    fn checked(raw: &'de RawValue) -> Result<Raw<'de>, Error> {
        if depth(raw.get()) > MAX_DEPTH {
            Err(Error::custom(format_args!("it is nested deeper than {MAX_DEPTH}")))
        } else {
            Ok(Raw(raw))
        }
    }

    /// Reads the value as a type.
    pub(crate) fn read<T: Deserialize<'de>>(self) -> Result<T, Error> {
        T::deserialize(Go::one(self.0))
    }

    /// The value's JSON text.
    pub(crate) fn literal(self) -> &'de str {
        self.0.get()
    }

    /// The value's kind.
    pub(crate) fn kind(self) -> Kind {
        match self.0.get().as_bytes().first() {
            Some(b'n') => Kind::Null,
            Some(b't' | b'f') => Kind::Bool,
            Some(b'"') => Kind::Text,
            Some(b'[') => Kind::List,
            Some(b'{') => Kind::Object,
            _ => Kind::Number,
        }
    }

    /// Calls `each` with every element of a list.
    pub(crate) fn elements<E: From<Error>>(self, mut each: impl FnMut(Raw<'de>) -> Result<(), E>) -> Result<(), E> {
        self.members_or_elements(|_, value| each(value))
    }

    /// Calls `each` with every member of an object.
    pub(crate) fn members<E: From<Error>>(
        self,
        mut each: impl FnMut(&str, Raw<'de>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.members_or_elements(|key, value| each(&string(key)?, value))
    }

    fn members_or_elements<E: From<Error>>(
        self,
        mut each: impl FnMut(&'de RawValue, Raw<'de>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut failed = None;
        let mut call = |key, value| each(key, Raw(value)).map_err(|error| failed = Some(error)).is_ok();
        let deserializer = &mut serde_json::Deserializer::from_str(self.0.get());
        let walked = deserializer.deserialize_any(Each(&mut call, PhantomData));
        match (failed, walked) {
            (Some(error), _) => Err(error),
            (None, walked) => Ok(walked?),
        }
    }
}

/// How deep a value is nested.
fn depth(text: &str) -> usize {
    let (mut now, mut deepest) = (0_usize, 0);
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                now += 1;
                deepest = deepest.max(now);
            }
            b']' | b'}' => now = now.saturating_sub(1),
            b'"' => {
                while let Some(inside) = bytes.next() {
                    match inside {
                        b'"' => break,
                        b'\\' => drop(bytes.next()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    deepest
}

/// Calls a function with each element of a list or member of an object (an element is its own key), until it returns
/// false.
struct Each<'de, 'c>(&'c mut dyn FnMut(&'de RawValue, &'de RawValue) -> bool, PhantomData<&'de ()>);

impl<'de> Visitor<'de> for Each<'de, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a list or an object")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(element) = list.next_element()? {
            if !(self.0)(element, element) {
                return Err(A::Error::custom("it was enough"));
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        while let Some((key, value)) = object.next_entry()? {
            if !(self.0)(key, value) {
                return Err(A::Error::custom("it was enough"));
            }
        }
        Ok(())
    }
}

/// A value that is not read yet: all values of its key, in order.
struct Go<'de> {
    earlier: Vec<&'de RawValue>,
    last: &'de RawValue,
}

fn is_null(raw: &RawValue) -> bool {
    raw.get() == "null"
}

impl<'de> Go<'de> {
    fn one(raw: &'de RawValue) -> Go<'de> {
        Go { earlier: Vec::new(), last: raw }
    }

    /// Adds a later value of the same key.
    fn again(&mut self, raw: &'de RawValue) {
        self.earlier.push(std::mem::replace(&mut self.last, raw));
    }

    fn is_null(&self) -> bool {
        is_null(self.last)
    }

    /// The last value that is not `null`, for types that `null` does not change.
    fn value(&self) -> &'de RawValue {
        let all = self.earlier.iter().chain([&self.last]);
        all.rev().find(|raw| !is_null(raw)).copied().unwrap_or(self.last)
    }
}

fn plain(raw: &RawValue) -> serde_json::Deserializer<serde_json::de::StrRead<'_>> {
    serde_json::Deserializer::from_str(raw.get())
}

/// A string's value; halves of surrogate pairs are replaced.
fn string(raw: &RawValue) -> Result<String, Error> {
    serde_json::from_str(raw.get()).or_else(|error| {
        let whole = without_lone_surrogates(raw.get());
        if whole == raw.get() { Err(error) } else { serde_json::from_str(&whole) }
    })
}

/// The text with the escape of each lone surrogate replaced by that of U+FFFD.
fn without_lone_surrogates(text: &str) -> Cow<'_, str> {
    let unit = |at: usize| {
        let escape = text.get(at..at + 6).filter(|escape| escape.starts_with("\\u"))?;
        u16::from_str_radix(&escape[2..], 16).ok()
    };
    let mut whole = String::new();
    let (mut at, mut copied) = (0, 0);
    while let Some(found) = text[at..].find('\\') {
        at += found;
        let is_low = |unit: u16| (0xdc00..0xe000).contains(&unit);
        let len = match unit(at) {
            None => 2,
            Some(0xd800..0xdc00) if unit(at + 6).is_some_and(is_low) => 12,
            Some(0xd800..0xe000) => {
                whole.push_str(&text[copied..at]);
                whole.push_str("\\ufffd");
                copied = at + 6;
                6
            }
            Some(_) => 6,
        };
        at += len;
        if !text.is_char_boundary(at) || at >= text.len() {
            break;
        }
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    whole.push_str(&text[copied..]);
    Cow::Owned(whole)
}

/// Types for which `null` gives the zero value, as if nothing were there.
macro_rules! zero_if_null {
    ($($method:ident => $visit:ident($zero:expr);)*) => { $(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            let value = self.value();
            if is_null(value) {
                return visitor.$visit($zero);
            }
            (&mut plain(value)).$method(visitor)
        }
    )* };
}

impl<'de> Deserializer<'de> for Go<'de> {
    type Error = Error;

    zero_if_null! {
        deserialize_bool => visit_bool(false);
        deserialize_i8 => visit_i8(0);
        deserialize_i16 => visit_i16(0);
        deserialize_i32 => visit_i32(0);
        deserialize_i64 => visit_i64(0);
        deserialize_u8 => visit_u8(0);
        deserialize_u16 => visit_u16(0);
        deserialize_u32 => visit_u32(0);
        deserialize_u64 => visit_u64(0);
        deserialize_f32 => visit_f32(0.0);
        deserialize_f64 => visit_f64(0.0);
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        (&mut plain(self.last)).deserialize_any(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let value = self.value();
        if is_null(value) {
            return visitor.visit_str("");
        }
        if !value.get().starts_with('"') {
            return (&mut plain(value)).deserialize_str(visitor);
        }
        visitor.visit_string(string(value)?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.is_null() {
            return visitor.visit_none();
        }
        let emptied = self.earlier.iter().rposition(|raw| is_null(raw)).map_or(0, |at| at + 1);
        visitor.visit_some(Go { earlier: self.earlier[emptied..].to_vec(), last: self.last })
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.is_null() {
            return visitor.visit_seq(serde::de::value::SeqDeserializer::new(std::iter::empty::<()>()));
        }
        (&mut plain(self.last)).deserialize_seq(Elements(visitor))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.is_null() {
            return visitor.visit_map(Members(Vec::new().into_iter(), None));
        }
        (&mut plain(self.last)).deserialize_map(Object(visitor))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let mut members = Vec::new();
        for raw in self.earlier.iter().chain([&self.last]).filter(|raw| !is_null(raw)) {
            (&mut plain(raw)).deserialize_map(Fields { fields, members: &mut members })?;
        }
        // A key whose values are all `null` is as if it were absent.
        members.retain(|(_, value)| !is_null(value.value()));
        visitor.visit_map(Members(members.into_iter(), None))
    }

    serde::forward_to_deserialize_any! {
        char bytes byte_buf unit unit_struct tuple tuple_struct enum identifier ignored_any i128 u128
    }
}

/// Reads a list, each element by Go's rules.
struct Elements<V>(V);

impl<'de, V: Visitor<'de>> Visitor<'de> for Elements<V> {
    type Value = V::Value;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.expecting(formatter)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(List(list)).map_err(A::Error::custom)
    }
}

struct List<A>(A);

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for List<A> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        let element: Option<&'de RawValue> = self.0.next_element().map_err(Error::custom)?;
        element.map(|element| seed.deserialize(Go::one(element))).transpose()
    }
}

/// Reads an object whose keys are data, each member by Go's rules.
struct Object<V>(V);

impl<'de, V: Visitor<'de>> Visitor<'de> for Object<V> {
    type Value = V::Value;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.expecting(formatter)
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(Entries(object)).map_err(A::Error::custom)
    }
}

struct Entries<A>(A);

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Entries<A> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let key: Option<&'de RawValue> = self.0.next_key().map_err(Error::custom)?;
        key.map(|key| seed.deserialize(Go::one(key))).transpose()
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        let value: &'de RawValue = self.0.next_value().map_err(Error::custom)?;
        seed.deserialize(Go::one(value))
    }
}

/// Collects the members of an object that a type has fields for.
struct Fields<'de, 'm> {
    fields: &'static [&'static str],
    members: &'m mut Vec<(&'static str, Go<'de>)>,
}

impl<'de> Visitor<'de> for Fields<'de, '_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        while let Some(key) = object.next_key::<&RawValue>()? {
            let key = string(key).map_err(A::Error::custom)?;
            let Some(field) = field(self.fields, |field| field, &key) else {
                object.next_value::<IgnoredAny>()?;
                continue;
            };
            let value = object.next_value::<&RawValue>()?;
            match self.members.iter_mut().find(|(name, _)| name == field) {
                Some((_, known)) => known.again(value),
                None => self.members.push((field, Go::one(value))),
            }
        }
        Ok(())
    }
}

/// Passes members on, each key once.
struct Members<'de>(std::vec::IntoIter<(&'static str, Go<'de>)>, Option<Go<'de>>);

impl<'de> MapAccess<'de> for Members<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((name, value)) = self.0.next() else { return Ok(None) };
        self.1 = Some(value);
        seed.deserialize(serde::de::value::StrDeserializer::new(name)).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        let value = self.1.take().ok_or_else(|| Error::custom("a member without a key"))?;
        seed.deserialize(value)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Document {
        media_type: String,
        size: i64,
        is_last: bool,
        urls: Vec<String>,
        annotations: BTreeMap<String, String>,
        config: Option<Box<Document>>,
        layers: Vec<Document>,
    }

    fn read(text: impl AsRef<[u8]>) -> Document {
        from_slice(text.as_ref()).unwrap()
    }

    #[test]
    fn keys_have_no_case_and_the_last_of_two_counts() {
        let document =
            read(r#"{"MediaType": "a", "SIZE": 1, "size": 2, "Config": {"mediatype": "b", "mediaType": "c"}}"#);
        assert_eq!((document.media_type.as_str(), document.size), ("a", 2));
        assert_eq!(document.config.unwrap().media_type, "c");
        assert_eq!(read(r#"{"annotations": {"a": "1", "A": "2", "a": "3"}}"#).annotations["a"], "3");
        assert_eq!(read("{\"\u{17f}ize\": 1, \"\u{17f}ize\": 2}").size, 2, "Unicode folds the long s to s");
    }

    #[test]
    fn objects_that_come_twice_are_merged_and_null_empties() {
        let merged = read(r#"{"config": {"size": 1, "mediaType": "a"}, "Config": {"size": 2}}"#).config.unwrap();
        assert_eq!((merged.size, merged.media_type.as_str()), (2, "a"));
        assert!(read(r#"{"config": {"size": 1}, "config": null}"#).config.is_none());
        let anew = read(r#"{"config": {"size": 1}, "config": null, "config": {"mediaType": "a"}}"#).config.unwrap();
        assert_eq!((anew.size, anew.media_type.as_str()), (0, "a"));
        let emptied = read(r#"{"urls": ["u"], "urls": null, "annotations": {"a": "b"}, "annotations": null}"#);
        assert!(emptied.urls.is_empty() && emptied.annotations.is_empty());
        assert_eq!(read(r#"{"mediaType": "a", "mediaType": null}"#).media_type, "a");
    }

    #[test]
    fn what_others_read_is_text() {
        let text = readable(b"{\"a\xe9\": \"\\ud800\", \"n\": 1e999}");
        assert_eq!(text, "{\"a\u{fffd}\": \"\\ufffd\", \"n\": 1e999}");
    }

    #[test]
    fn null_is_as_if_absent() {
        let nulls = r#"{"mediaType": null, "size": null, "isLast": null, "urls": null, "annotations": null, "config": null, "layers": null}"#;
        assert_eq!(read(nulls), Document::default());
        assert_eq!(read("null"), Document::default());
        assert_eq!(read(r#"{"size": 5, "size": null}"#).size, 5);
        let inside = read(r#"{"urls": [null, "u"], "annotations": {"a": null}, "layers": [null]}"#);
        assert_eq!(
            (inside.urls, inside.annotations["a"].as_str(), inside.layers.len()),
            (vec![String::new(), "u".into()], "", 1)
        );
    }

    #[test]
    fn what_is_no_text_is_replaced() {
        assert_eq!(read(b"{\"mediaType\": \"caf\xe9\"}").media_type, "caf\u{fffd}");
        let escaped = r#"{"mediaType": "\ud800x\ud83d\ude00\udc00 \\ud800 \n\ud801"}"#;
        assert_eq!(read(escaped).media_type, "\u{fffd}x\u{1f600}\u{fffd} \\ud800 \n\u{fffd}");
        assert_eq!(read(r#"{"media\u0054ype": "escaped"}"#).media_type, "escaped");
    }

    #[test]
    fn what_go_refuses_is_refused() {
        let texts = [
            "",
            "{",
            "{} {}",
            "{\"size\": 1.0}",
            "{\"size\": \"1\"}",
            "{\"urls\": {}}",
            "{\"mediaType\": 1}",
            "[]",
            "{\"config\": []}",
        ];
        for text in texts {
            assert!(from_slice::<Document>(text.as_bytes()).is_err(), "{text}");
        }
        assert!(from_slice::<Document>(b"\xef\xbb\xbf{}").is_err(), "a byte order mark");
        assert!(first_from_slice::<Document>(b" ").is_err());
        assert_eq!(first_from_slice::<Document>(b"{\"size\": 1}\n}").unwrap().size, 1);
    }

    #[test]
    fn depth_costs_nothing_and_ends_where_gos_does() {
        let nested = |depth: usize| {
            format!("{{\"x\": {}{}, \"y\": \"[[\\\"[\", \"size\": 1}}", "[".repeat(depth), "]".repeat(depth))
        };
        assert_eq!(read(nested(MAX_DEPTH - 1)).size, 1);
        assert!(from_slice::<Document>(nested(MAX_DEPTH).as_bytes()).is_err());
        assert!(from_slice::<Document>(nested(1 << 20).as_bytes()).is_err());
    }

    fn documents() -> impl Strategy<Value = Document> {
        let flat =
            (any::<String>(), any::<i64>(), any::<bool>(), any::<Vec<String>>(), any::<BTreeMap<String, String>>());
        let leaf = flat.prop_map(|(media_type, size, is_last, urls, annotations)| Document {
            media_type,
            size,
            is_last,
            urls,
            annotations,
            ..Document::default()
        });
        leaf.prop_recursive(3, 8, 3, |inner| {
            (proptest::option::of(inner.clone()), proptest::collection::vec(inner, 0..3))
                .prop_map(|(config, layers)| Document { config: config.map(Box::new), layers, ..Document::default() })
        })
    }

    proptest! {
        #[test]
        fn what_serde_reads_is_read_alike(document in documents()) {
            prop_assert_eq!(read(serde_json::to_vec(&document).unwrap()), document);
        }

        #[test]
        fn nothing_panics(bytes: Vec<u8>, text in "[{}\\[\\]\",:a-z0-9\\\\ud8c]{0,40}") {
            let _ = from_slice::<Document>(&bytes);
            let _ = from_slice::<Document>(text.as_bytes());
            let _ = from_slice::<Document>(format!("{{\"mediaType\": \"{text}\"}}").as_bytes());
        }
    }
}
