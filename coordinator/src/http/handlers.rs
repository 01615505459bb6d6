//! The routes of the API, one module for each subject. A handler reads a request, asks the modules that do the work, and words the answer.

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
pub mod schedules;
pub mod settings;
pub mod status;
pub mod tokens;
pub mod wanted;
