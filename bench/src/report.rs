//! The output of a run: tables (Markdown) and a plot (SVG) for people, every sample for programs (JSON).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

mod bar;
mod plot;

pub(crate) use bar::{Bar, Bound};

/// The results of one benchmark.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The benchmark's name.
    name: &'static str,
    /// The machine that was measured.
    machine: Machine,
    /// When the report was created, RFC 3339.
    at: String,
    /// The table's header.
    columns: Vec<&'static str>,
    /// The table.
    rows: Vec<Vec<String>>,
    /// What was promised, and what was measured.
    targets: Vec<Target>,
    /// What the plot shows.
    bars: Vec<Bar>,
    /// Every sample.
    samples: Value,
}

/// A promised bound and the measured value.
#[derive(Debug, Serialize)]
struct Target {
    measure: String,
    reached: f64,
    bound: Bound,
    met: bool,
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

    /// A short name for a directory: number of processors and kernel version.
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
            targets: Vec::new(),
            bars: Vec::new(),
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

    /// Adds a row to the table of targets. `measure` names the unit unless `reached` is a ratio.
    pub(crate) fn target(&mut self, measure: impl Into<String>, reached: f64, bound: Bound) {
        self.targets.push(Target { measure: measure.into(), reached, bound, met: bound.holds(reached) });
    }

    /// Adds a bar to the plot; groups appear in the order of their first bars.
    pub(crate) fn bar(&mut self, bar: Bar) {
        self.bars.push(bar);
    }

    /// The tables, as Markdown.
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
        if !self.targets.is_empty() {
            text += "\n| target | reached | bound | met |\n| --- | --- | --- | --- |\n";
            for target in &self.targets {
                let met = if target.met { "yes" } else { "no" };
                let reached = format!("{:.2}", target.reached);
                text += &line(&[target.measure.clone(), reached, target.bound.to_string(), met.to_owned()]);
            }
        }
        if !self.bars.is_empty() {
            text += &format!("\n![{}]({}.svg)\n", self.name, self.name);
        }
        text
    }

    /// Writes all forms into `runs/<date>-<machine>/` and returns that directory.
    pub(crate) fn write(&self, runs: &Path) -> Result<PathBuf> {
        let dir = runs.join(format!("{}-{}", &self.at[..10], self.machine.label()));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(format!("{}.md", self.name)), self.markdown())?;
        fs::write(dir.join(format!("{}.json", self.name)), serde_json::to_vec_pretty(self)?)?;
        if !self.bars.is_empty() {
            let machine = &self.machine;
            let title = format!("{} ({}, {}, {} build)", self.name, &self.at[..10], machine.label(), machine.build);
            fs::write(dir.join(format!("{}.svg", self.name)), plot::svg(&title, &self.bars)?)?;
        }
        Ok(dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new("trial", vec!["what", "value"]);
        report.row(vec!["first".into(), "1 s".into()]);
        report.row(vec!["second".into(), "2 s".into()]);
        report.target("start, cachefs/native", 1.05, Bound::AtMost(1.1));
        report.target("throughput, cachefs/native", 0.8, Bound::AtLeast(0.95));
        report.target("never measured", f64::NAN, Bound::AtLeast(0.0));
        report.bar(Bar::new("start, s", "native", 1.0).p95(1.2));
        report.add_samples("first", serde_json::json!([1.0, 1.5]));
        report
    }

    #[test]
    fn the_tables_have_every_row_and_every_target() {
        let text = report().markdown();
        for line in [
            "| what | value |",
            "| first | 1 s |",
            "| second | 2 s |",
            "| start, cachefs/native | 1.05 | <= 1.1 | yes |",
            "| throughput, cachefs/native | 0.80 | >= 0.95 | no |",
            "| never measured | NaN | >= 0 | no |",
            "![trial](trial.svg)",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_run_leaves_tables_samples_and_plot() {
        let runs = tempfile::tempdir().unwrap();
        let dir = report().write(runs.path()).unwrap();
        let json: Value = serde_json::from_slice(&fs::read(dir.join("trial.json")).unwrap()).unwrap();
        assert_eq!(json["samples"]["first"], serde_json::json!([1.0, 1.5]));
        assert_eq!(json["targets"][1]["bound"]["at_least"], 0.95);
        assert!(fs::read_to_string(dir.join("trial.md")).unwrap().contains("| first |"));
        assert!(fs::read_to_string(dir.join("trial.svg")).unwrap().contains("native"));
    }
}
