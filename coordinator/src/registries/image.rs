//! The documents of an image: of which kind they are ([`shape`]), what they say ([`manifest`]), which of them serves a platform
//! ([`platform`]), and the walk from a name to its layers ([`resolve`]).

pub mod manifest;
pub mod platform;
pub mod resolve;
pub(super) mod shape;
