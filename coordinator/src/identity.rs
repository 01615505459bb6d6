//! Who asks, and what they may do: [`caller`] (roles, and the images that they are limited to), [`tokens`], [`image_pattern`], and
//! [`hosts`] with their leases.

pub mod caller;
pub mod hosts;
pub mod image_pattern;
pub mod tokens;
