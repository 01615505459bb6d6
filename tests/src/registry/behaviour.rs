//! The ways in which registries differ: dimensions with their values, and behaviours that have one value of each.
//!
//! [`super::Played`] plays a behaviour. The first value of each dimension is that of a well-behaved registry with tokens.

use std::fmt;

/// The dimensions, each with its values.
pub const DIMENSIONS: &[(&str, &[&str])] = &[
    // The client's login. `public` has none, but the token service issues tokens to everybody.
    ("credentials", &["right", "none", "public", "wrong", "identity"]),
    ("channel", &["plain", "tls"]),
    (
        "challenge",
        &[
            "bearer",
            "open",
            "basic",
            "basic, bearer",
            "bearer; basic",
            "bearer oddly written",
            "negotiate, bearer",
            "negotiate; basic",
            "basic without realm",
            "bearer without realm",
            "bearer with relative realm",
            "bearer without scope",
            "bearer with several scopes",
            "bearer with another scope",
            "negotiate",
            "nothing",
        ],
    ),
    // Where the challenge is sent. A hidden image is answered with 404 or 403 until the client has logged in.
    (
        "place",
        &[
            "everywhere",
            "root, hidden 404",
            "root, hidden 403",
            "repository",
            "repository, no root",
            "manifest",
            "blob",
        ],
    ),
    (
        "token",
        &[
            "token",
            "access_token",
            "both",
            "empty token and access_token",
            "expires absent",
            "expires 0",
            "expires as text",
            "expires in 1",
            "two requests long",
            "post only",
            "401",
            "403",
            "404",
            "503 once",
            "429 once",
            "503",
            "redirect here",
            "redirect elsewhere",
            "html",
            "none",
        ],
    ),
    (
        "redirect",
        &[
            "none",
            "signed here",
            "301",
            "302",
            "303",
            "307",
            "308",
            "relative",
            "protocol-relative",
            "signed exactly",
            "api",
            "place of its own",
            "circle",
            "nowhere",
            "downgrade",
        ],
    ),
    ("redirected", &["blobs", "manifests"]),
    (
        "coding",
        &[
            "none",
            "manifest gzip",
            "manifest x-gzip",
            "manifest identity",
            "manifest twice",
            "manifest br",
            "manifest said to be gzip",
            "blob gzip",
            "blob said to be gzip",
            "blob identity",
        ],
    ),
    ("type", &["right", "absent", "charset", "upper case", "text", "json", "octet-stream", "dialect", "kind"]),
    (
        "document",
        &[
            "docker",
            "oci",
            "oci untyped",
            "docker list",
            "oci index",
            "nested index",
            "attestations",
            "duplicates",
            "other platform",
            "other platforms",
            "only 386",
            "variants",
            "without platform",
            "empty index",
            "null index",
            "no layers",
            "null layers",
            "absent layers",
            "index and image",
            "config untyped",
            "config type absent",
            "config octet-stream",
            "config json",
            "config html",
            "config helm",
            "config empty",
            "layer untyped",
            "layer octet-stream",
            "layer plain",
            "layer zstd",
            "layer foreign",
            "layer foreign and absent",
            "layer nondistributable",
            "layer odd",
            "schema 1",
            "schema 1 signed",
            "key twice",
            "key in another case",
            "trailing bytes",
            "bom",
            "inline data",
            "size absent",
            "size null",
            "size 0",
            "size too small",
            "size too large",
            "size negative",
            "size beyond Go's integers",
            "config size absent",
            "config size too small",
            "config size too large",
            "index with sizes absent",
            "index with sizes too large",
            "too few diff_ids",
        ],
    ),
    ("head", &["right", "405", "404", "501", "400", "no digest", "weak digest", "wrong digest"]),
    ("stated", &["right", "absent", "weak", "wrong"]),
    ("framing", &["length", "chunked", "until close", "cut", "longer"]),
    ("range", &["honoured", "ignored", "416", "elsewhere", "multipart"]),
    (
        "fault",
        &[
            "none",
            "manifest 429",
            "manifest 429 by date",
            "manifest 503",
            "blob 429",
            "blob 503",
            "manifest 500 for ever",
        ],
    ),
];

/// One value of each dimension. Dimensions that are not set have their first value.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Behaviour {
    /// Dimension and value where it is not the first value, in the order of [`DIMENSIONS`].
    others: Vec<(&'static str, &'static str)>,
}

impl Behaviour {
    /// A well-behaved registry.
    pub fn good() -> Self {
        Self::default()
    }

    /// The same behaviour with another value of a dimension. Both must be known.
    pub fn with(mut self, dimension: &str, value: &str) -> Self {
        let known = DIMENSIONS.iter().find(|(name, _)| *name == dimension);
        let (name, values) = known.unwrap_or_else(|| panic!("there is no dimension {dimension}"));
        let value = values.iter().find(|known| **known == value);
        let value = value.unwrap_or_else(|| panic!("dimension {dimension} has no such value"));
        self.others.retain(|(other, _)| other != name);
        if *value != values[0] {
            self.others.push((name, value));
            self.others.sort_by_key(|(name, _)| DIMENSIONS.iter().position(|(known, _)| known == name));
        }
        self
    }

    /// The value of a dimension.
    pub fn get(&self, dimension: &str) -> &'static str {
        let found = self.others.iter().find(|(name, _)| *name == dimension);
        let first = || DIMENSIONS.iter().find(|(name, _)| *name == dimension).map_or("", |(_, values)| values[0]);
        found.map_or_else(first, |(_, value)| value)
    }

    /// Whether a dimension has this value.
    pub fn is(&self, dimension: &str, value: &str) -> bool {
        self.get(dimension) == value
    }

    /// The dimensions whose value is not their first, with these values.
    pub fn others(&self) -> &[(&'static str, &'static str)] {
        &self.others
    }
}

impl fmt::Display for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others: Vec<String> = self.others.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        f.write_str(if others.is_empty() { "well-behaved".to_owned() } else { others.join(" | ") }.as_str())
    }
}
