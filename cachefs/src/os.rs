//! What this machine provides for the daemon.
//!
//! - [`fuse_limits`]: how long the kernel waits for a FUSE daemon.
//! - [`private_files`]: directories and files that nobody else on the host may read.
//! - [`pool`]: threads that may wait for a disk, so that no other thread has to.
//! - [`oom_score`]: which process the kernel kills when memory runs out.

pub mod fuse_limits;
pub mod oom_score;
pub mod pool;
pub mod private_files;
