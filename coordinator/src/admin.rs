//! Administration besides pulls: [`settings`] as one document, garbage collection ([`gc`]) and checks of the store ([`fsck`]).

pub mod fsck;
pub mod gc;
pub mod settings;
