//! The name of a layer below `layers/`: 64 hex digits, and a number where an image has the layer more than once.
//!
//! The kernel's overlayfs refuses a directory that it is given twice. Images that have a layer twice are common,
//! because every builder makes the same empty layer. So each further place of a layer in a chain has a directory of its
//! own, with the same content.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use store::Digest;

/// More copies than this do not fit into an overlay of any kernel.
const COPIES_MAX: u32 = 500;

/// The name of a layer's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LayerName {
    /// The layer.
    pub diff_id: Digest,
    /// How often the chain has the same layer below this one.
    pub copy: u32,
}

impl LayerName {
    /// The name of the layer where a chain has it for the first time.
    pub fn first(diff_id: Digest) -> LayerName {
        LayerName { diff_id, copy: 0 }
    }

    /// The names of a chain's layers, base first.
    pub fn of_chain(diff_ids: &[Digest]) -> Vec<LayerName> {
        let mut seen = std::collections::HashMap::new();
        let name = |diff_id: &Digest| {
            let count = seen.entry(*diff_id).or_insert(0);
            *count += 1;
            LayerName { diff_id: *diff_id, copy: *count - 1 }
        };
        diff_ids.iter().map(name).collect()
    }
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.copy {
            0 => f.write_str(&self.diff_id.hex()),
            copy => write!(f, "{}-{copy}", self.diff_id.hex()),
        }
    }
}

/// The text is not the name of a layer's directory.
#[derive(Debug, PartialEq, Eq)]
pub struct NoLayerName;

impl FromStr for LayerName {
    type Err = NoLayerName;

    fn from_str(text: &str) -> Result<LayerName, NoLayerName> {
        let (hex, copy) = match text.split_once('-') {
            None => (text, 0),
            Some((hex, number)) => {
                let is_canonical = number.bytes().all(|byte| byte.is_ascii_digit()) && !number.starts_with('0');
                let copy = number.parse().ok().filter(|copy| is_canonical && (1..=COPIES_MAX).contains(copy));
                (hex, copy.ok_or(NoLayerName)?)
            }
        };
        let diff_id = Digest::from_hex(hex).ok_or(NoLayerName)?;
        Ok(LayerName { diff_id, copy })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let diff_id = Digest::of(b"1");
        for copy in [0, 1, 2, 99, COPIES_MAX] {
            let name = LayerName { diff_id, copy };
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        assert_eq!(LayerName::first(diff_id).to_string(), diff_id.hex());
        let hex = diff_id.hex();
        let odd =
            ["-0", "-01", "-", "-501", "--1", "-1-1", "-a", "-99999999999", "+1"].map(|tail| format!("{hex}{tail}"));
        for text in odd.iter().map(String::as_str).chain(["", "-1", "x", &hex[1..]]) {
            assert_eq!(text.parse::<LayerName>(), Err(NoLayerName), "{text}");
        }
    }

    #[test]
    fn every_place_in_a_chain_has_its_own() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let copies: Vec<_> = LayerName::of_chain(&[a, b, a, a, b]).into_iter().map(|name| name.copy).collect();
        assert_eq!(copies, [0, 0, 1, 2, 1]);
    }
}
