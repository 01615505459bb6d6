//! What survives a restart: [`state_db`] (the database), [`replicated`] (what a standby must know as well), [`job`] (the record of a pull
//! job) and [`events`]. [`clock`] tells the time.

pub mod clock;
pub mod events;
pub mod job;
pub mod replicated;
pub mod state_db;
