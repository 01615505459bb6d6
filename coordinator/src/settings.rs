//! Everything that one document settles: schedules, limits, and whether images are pulled on demand.
//!
//! The document is the wish; [`SettingsBook::apply`] compares it with what is, says the differences in words, and brings
//! them about. All of it is checked before any of it is done, and doing it twice is doing it once.
//!
//! `present` guards what is kept here; schedules are kept by the scheduler.

use std::collections::BTreeMap;
use std::sync::Arc;

use coordinator_api::limits::Limits as LimitsSpec;
use coordinator_api::schedule::ScheduleSpec;
use coordinator_api::settings::{ChangeKind, Difference, Settings};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::journal::{Durability, Journal, JournalError, Table};
use crate::limits::Limits;
use crate::limits::rules::Rules;
use crate::schedule::Schedule;
use crate::scheduler::{ScheduleError, Scheduler};

/// The one record of the table.
const KEY: &[u8] = b"settings";

/// Settings that cannot be brought about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// A schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// Two schedules of one name.
    #[error("schedule {0} is named twice: give each its own name")]
    Twice(String),
    /// Limits.
    #[error("limits: {0}")]
    Limits(String),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What is kept beside the schedules.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Present {
    #[serde(default)]
    limits: LimitsSpec,
    #[serde(default)]
    pull_on_demand: bool,
}

/// The settings of one coordinator.
pub struct SettingsBook {
    journal: Arc<dyn Journal>,
    limits: Arc<Limits>,
    scheduler: Arc<Scheduler>,
    present: Mutex<Present>,
}

impl SettingsBook {
    /// Reads the journal and puts the limits into force.
    pub fn open(
        journal: Arc<dyn Journal>,
        limits: Arc<Limits>,
        scheduler: Arc<Scheduler>,
    ) -> Result<SettingsBook, JournalError> {
        let present: Present = match journal.record(Table::Settings, KEY)? {
            Some(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!("the settings in the database are not understood, none are in force: {error}");
                Present::default()
            }),
            None => Present::default(),
        };
        match Rules::parse(&present.limits) {
            Ok(rules) => limits.set(rules),
            Err(why) => tracing::warn!("the limits in the database are not understood, none are in force: {why}"),
        }
        Ok(SettingsBook { journal, limits, scheduler, present: Mutex::new(present) })
    }

    /// Whether an image that a host lacks is pulled without anybody's order.
    pub fn pull_on_demand(&self) -> bool {
        self.present.lock().pull_on_demand
    }

    /// What is, as a document that [`SettingsBook::apply`] finds no difference to.
    pub fn present(&self) -> Settings {
        let present = self.present.lock().clone();
        Settings {
            schedules: Some(self.scheduler.specs()),
            limits: Some(present.limits),
            pull_on_demand: Some(present.pull_on_demand),
        }
    }

    /// What bringing `wish` about would change. Refuses what makes no sense.
    pub fn differences(&self, wish: &Settings) -> Result<Vec<Difference>, SettingsError> {
        let present = self.present();
        let mut differences = Vec::new();
        if let Some(wished) = &wish.schedules {
            let mut names = BTreeMap::new();
            for spec in wished {
                Schedule::parse(spec.clone()).map_err(ScheduleError::from)?;
                if names.insert(spec.name.clone(), json(spec)).is_some() {
                    return Err(SettingsError::Twice(spec.name.clone()));
                }
            }
            let old = present.schedules.iter().flatten().map(|spec| (spec.name.clone(), json(spec))).collect();
            compare_objects("schedule ", &old, &names, &mut differences);
        }
        if let Some(limits) = &wish.limits {
            Rules::parse(limits).map_err(SettingsError::Limits)?;
            let old = json(&present.limits.clone().unwrap_or_default());
            compare_fields("limits: ", &old, &json(limits), &mut differences);
        }
        if let Some(wished) = wish.pull_on_demand {
            let old = present.pull_on_demand.unwrap_or_default();
            compare_values("pull_on_demand", Some(&Value::Bool(old)), Some(&Value::Bool(wished)), &mut differences);
        }
        Ok(differences)
    }

    /// Brings `wish` about; what was changed. Blocks on the journal.
    pub fn apply(&self, wish: &Settings) -> Result<Vec<Difference>, SettingsError> {
        let differences = self.differences(wish)?;
        let next = {
            let present = self.present.lock();
            Present {
                limits: wish.limits.clone().unwrap_or_else(|| present.limits.clone()),
                pull_on_demand: wish.pull_on_demand.unwrap_or(present.pull_on_demand),
            }
        };
        let rules = Rules::parse(&next.limits).map_err(SettingsError::Limits)?;
        let bytes = serde_json::to_vec(&next).unwrap_or_default();
        self.journal.change_records(Table::Settings, &[(KEY, Some(&bytes))], Durability::Synced)?;
        self.limits.set(rules);
        *self.present.lock() = next;
        if let Some(wished) = &wish.schedules {
            self.apply_schedules(wished)?;
        }
        Ok(differences)
    }

    fn apply_schedules(&self, wished: &[ScheduleSpec]) -> Result<(), ScheduleError> {
        let wanted = |name: &String| wished.iter().any(|spec| spec.name == *name);
        for spec in self.scheduler.specs().into_iter().filter(|spec| !wanted(&spec.name)) {
            self.scheduler.remove(&spec.name)?;
        }
        wished.iter().try_for_each(|spec| self.scheduler.put(spec.clone()))
    }
}

fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

/// A value as people read it: text without quotes.
fn words(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(words).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| format!("{name} {}", words(value))).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

/// Objects by name: those that come, go, or have a field changed.
fn compare_objects(
    prefix: &str,
    old: &BTreeMap<String, Value>,
    new: &BTreeMap<String, Value>,
    found: &mut Vec<Difference>,
) {
    for (name, wished) in new {
        match old.get(name) {
            Some(present) => compare_fields(&format!("{prefix}{name}: "), present, wished, found),
            None => compare_values(&format!("{prefix}{name}"), None, Some(&without_name(wished)), found),
        }
    }
    for (name, present) in old.iter().filter(|(name, _)| !new.contains_key(*name)) {
        compare_values(&format!("{prefix}{name}"), Some(&without_name(present)), None, found);
    }
}

fn without_name(value: &Value) -> Value {
    let mut value = value.clone();
    if let Some(fields) = value.as_object_mut() {
        fields.remove("name");
    }
    value
}

/// The fields of one object.
fn compare_fields(prefix: &str, old: &Value, new: &Value, found: &mut Vec<Difference>) {
    let none = serde_json::Map::new();
    let (old, new) = (old.as_object().unwrap_or(&none), new.as_object().unwrap_or(&none));
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for name in names {
        compare_values(&format!("{prefix}{name}"), old.get(name), new.get(name), found);
    }
}

fn compare_values(object: &str, old: Option<&Value>, new: Option<&Value>, found: &mut Vec<Difference>) {
    let kind = match (old, new) {
        (old, new) if old == new => return,
        (None, _) => ChangeKind::Added,
        (_, None) => ChangeKind::Removed,
        _ => ChangeKind::Changed,
    };
    found.push(Difference { kind, object: object.to_owned(), old: old.map(words), new: new.map(words) });
}
