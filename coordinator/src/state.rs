//! What survives a restart: [`state_db`] (the database), [`replicated`] (what a standby must know, too), [`job`] (what is kept of a pull job) and [`events`]. [`clock`] says what time
//! it is.

pub mod clock;
pub mod events;
pub mod job;
pub mod replicated;
pub mod state_db;
