//! What a run leaves behind: a table for people (Markdown) and the samples for programs (JSON).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

/// The results of one benchmark.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The benchmark's name.
    name: &'static str,
    /// The machine that was measured.
    machine: Machine,
    /// When, RFC 3339.
    at: String,
    /// The table's head.
    columns: Vec<&'static str>,
    /// The table.
    rows: Vec<Vec<String>>,
    /// Every sample.
    samples: Value,
}

/// What the numbers depend on.
#[derive(Debug, Serialize)]
struct Machine {
    processors: usize,
    model: String,
    memory_gib: u64,
    kernel: String,
    build: &'static str,
}

fn line_of(path: &str, key: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_once(':').map_or(line, |(_, value)| value).trim().to_owned()
}

impl Machine {
    fn this() -> Machine {
        let memory = line_of("/proc/meminfo", "MemTotal");
        Machine {
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            model: line_of("/proc/cpuinfo", "model name"),
            memory_gib: memory.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) >> 20,
            kernel: line_of("/proc/sys/kernel/osrelease", ""),
            build: if cfg!(debug_assertions) { "dev" } else { "release" },
        }
    }

    /// A short name for a directory: processors and kernel.
    fn label(&self) -> String {
        let release = self.kernel.split('-').next().unwrap_or_default();
        format!("{}cpu-linux{release}", self.processors)
    }
}

impl Report {
    /// A report with an empty table.
    pub(crate) fn new(name: &'static str, columns: Vec<&'static str>) -> Report {
        let at = jiff::Timestamp::now().to_string();
        Report {
            name,
            machine: Machine::this(),
            at,
            columns,
            rows: Vec::new(),
            samples: Value::Object(serde_json::Map::new()),
        }
    }

    /// Adds the samples behind a row.
    pub(crate) fn add_samples(&mut self, key: &str, samples: Value) {
        if let Some(all) = self.samples.as_object_mut() {
            all.insert(key.to_owned(), samples);
        }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table.
    pub(crate) fn markdown(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "## {} ({}, {} processors, {}, {} GiB, Linux {}, {} build)\n\n",
            self.name,
            &self.at[..10],
            machine.processors,
            machine.model,
            machine.memory_gib,
            machine.kernel,
            machine.build
        );
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        text += &line(&self.columns.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>());
        text += &line(&vec!["---".to_owned(); self.columns.len()]);
        self.rows.iter().for_each(|row| text += &line(row));
        text
    }

    /// Writes both forms into `runs/<date>-<machine>/`; gives that directory.
    pub(crate) fn write(&self, runs: &Path) -> Result<PathBuf> {
        let dir = runs.join(format!("{}-{}", &self.at[..10], self.machine.label()));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(format!("{}.md", self.name)), self.markdown())?;
        fs::write(dir.join(format!("{}.json", self.name)), serde_json::to_vec_pretty(self)?)?;
        Ok(dir)
    }
}
