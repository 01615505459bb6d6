//! Pull jobs: [`queue`] holds them, [`queue_order`] says which goes next, [`runner`] starts them, and [`pull`] brings one image into the store.

pub mod pull;
pub mod queue;
pub mod queue_order;
pub mod runner;
