//! When images are pulled.
//!
//! Pure decisions: [`spec`] (what a schedule means), [`cron`], [`times`] (its slots), [`pattern`] (which images it means), [`versions`]
//! (which tags are newer) and [`deadlines`] (what is ready by when). [`scheduler`] carries them out.

pub(super) mod cron;
pub mod deadlines;
pub mod pattern;
pub mod scheduler;
pub mod spec;
pub mod times;
pub mod versions;
