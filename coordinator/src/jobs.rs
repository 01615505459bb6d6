//! Pull jobs: [`queue`] holds them, [`order`] says which goes next, [`runner`] starts them, and [`pull`] brings one image into the store.

pub mod order;
pub mod pull;
pub mod queue;
pub mod runner;
