//! The routes of the API, one module per subject. A handler reads a request, calls the modules that do the work, and builds the
//! answer.

pub mod events;
pub mod export;
pub mod fsck;
pub mod garbage;
pub mod hosts;
pub mod images;
pub mod jobs;
pub mod load;
pub mod metrics;
pub mod mirror;
pub mod profiles;
pub mod pull_admission;
pub mod pull_through;
pub mod schedules;
pub mod settings;
pub mod status;
pub mod tokens;
pub mod wanted;
