//! Where a profile's first knowledge comes from.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// Where a profile's first knowledge comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Traces of its own starts.
    #[default]
    Traced,
    /// The profile of an image that it follows; its own starts outweigh it once there are enough of them.
    Inherited {
        /// That image's top chainID.
        from: Digest,
    },
    /// A guess by what the image's command is; the first trace replaces it.
    Guessed,
}

impl Origin {
    /// Whether all of it comes from its own starts.
    pub fn is_traced(&self) -> bool {
        *self == Origin::Traced
    }
}
