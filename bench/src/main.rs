//! Measurements, side by side in one run. README.md names the question that each one answers.
//!
//! - `samples`: medians and percentiles. `report`: what is written to `runs/`. `process`: what a process has used.
//! - `pull`: registry to store against `docker pull`. `footprint`: the store's size, the daemon's memory.
//! - `shared_pages`: the page cache of images on one base.
//! - `read_path`: files, walks and starts on a mount against the local disk. `whole_read`: an image from a slow disk.
//! - `cold_start`: time until a container is useful, by the way its image comes to the host; `application`, `start`,
//!   `throttle`: what is started, how without an engine, and a registry's bandwidth.
//! - `engine_start`: the same when Docker 28 starts it; `engine_run`: one start by an engine.
//! - `boot_storm`: many hosts that start one image at once.
//! - `scale`: a coordinator with many images, hosts and schedules.
//! - `slowdisk`: not a measurement, but the slow shared disk that measurements and tests use. `quantity`: durations, rates.
//!
//! Machines are noisy, so only ratios within one run mean something. The order of the ways is shuffled in each round.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

mod application;
mod boot_storm;
mod cold_start;
mod engine_run;
mod engine_start;
mod footprint;
mod own_layers;
mod process;
mod pull;
mod quantity;
mod read_path;
mod report;
mod samples;
mod scale;
mod shared_pages;
mod slowdisk;
mod start;
mod throttle;
mod whole_read;

/// Benchmarks of cachefs on this machine, with real registries, engines and images.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    benchmark: Benchmark,
    /// Where results go: one directory a day and machine is made below it.
    #[arg(long, global = true, default_value = "bench/runs")]
    runs: PathBuf,
}

#[derive(Subcommand)]
enum Benchmark {
    /// An image from a registry into the store, against docker pull from the same registry.
    Pull {
        /// How often each way is measured.
        #[arg(long, default_value_t = 5)]
        samples: usize,
        /// Which of the test images.
        #[arg(long, value_delimiter = ',', default_value = "python3,gcc")]
        images: Vec<String>,
    },
    /// The store's size against the compressed layers, and the daemon's memory with 20 images mounted and walked.
    Footprint,
    /// What ten started images on one base take of the page cache, on native trees and on the mount's own.
    SharedPages,
    /// Reading through cachefs against reading the same trees on the local disk: cold, from the local cache, warm.
    ReadPath(read_path::Options),
    /// A whole image, cold, through cachefs from a slow shared disk, against plain copies from that disk.
    WholeRead(whole_read::Options),
    /// Time until a container does useful work: docker pull and run, a naive share, cachefs, the local disk.
    ColdStart(cold_start::Options),
    /// Time until a container that Docker 28 starts does useful work: its own pull and run, and the share.
    EngineStart(engine_start::Options),
    /// Many hosts that start one image at once, after one pull from a registry.
    BootStorm(boot_storm::Options),
    /// A coordinator that looks after many images, layers, schedules and hosts.
    Scale(scale::Options),
    /// Show a directory as a slow shared disk, until SIGTERM.
    Slowdisk(slowdisk::Arguments),
    /// Send a command to a slow disk: a fault (eio, estale, hang, readonly, enospc), its end (ok), latency 5ms,
    /// bandwidth 50M, stats, reset, record, timeline.
    SlowdiskControl {
        /// The socket that was given to --control.
        socket: PathBuf,
        /// The command and its value.
        #[arg(required = true)]
        command: Vec<String>,
    },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let report = match &arguments.benchmark {
        Benchmark::Pull { samples, images } => pull::run(*samples, images)?,
        Benchmark::Footprint => footprint::run()?,
        Benchmark::SharedPages => shared_pages::run()?,
        Benchmark::ReadPath(options) => read_path::run(options)?,
        Benchmark::WholeRead(options) => whole_read::run(options)?,
        Benchmark::ColdStart(options) => cold_start::run(options)?,
        Benchmark::EngineStart(options) => engine_start::run(options)?,
        Benchmark::BootStorm(options) => boot_storm::run(options)?,
        Benchmark::Scale(options) => scale::run(options)?,
        Benchmark::Slowdisk(arguments) => return slowdisk::serve(arguments),
        Benchmark::SlowdiskControl { socket, command } => {
            println!("{}", tests::slowdisk::command(socket, &command.join(" "))?);
            return Ok(());
        }
    };
    let written = report.write(&arguments.runs)?;
    println!("{}\nwritten to {}", report.markdown(), written.display());
    Ok(())
}
