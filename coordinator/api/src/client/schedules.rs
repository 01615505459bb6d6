//! The client's half of schedules, settings, limits, and reports of images that hosts lack.

use http::Method;

use crate::client::{Client, ClientError};
use crate::limits::RegistryCondition;
use crate::route;
use crate::schedule::{Plan, Run, Schedule, ScheduleList, ScheduleSpec};
use crate::settings::{Settings, SettingsAnswer, SettingsRequest};
use crate::wanted::{Wanted, WantedAnswer};

impl Client {
    /// The schedules, by name.
    pub async fn schedules(&self) -> Result<ScheduleList, ClientError> {
        self.list(route::SCHEDULES).await
    }

    /// Adds a schedule; one of the same name is a conflict.
    pub async fn add_schedule(&self, spec: &ScheduleSpec) -> Result<Schedule, ClientError> {
        self.send_json(Method::POST, route::SCHEDULES, spec).await
    }

    /// One schedule.
    pub async fn schedule(&self, name: &str) -> Result<Schedule, ClientError> {
        self.ask(Method::GET, &route::with_name(route::SCHEDULE, name)).await
    }

    /// Removes a schedule; its jobs go on.
    pub async fn remove_schedule(&self, name: &str) -> Result<Schedule, ClientError> {
        self.ask(Method::DELETE, &route::with_name(route::SCHEDULE, name)).await
    }

    /// Pauses a schedule: it makes no jobs until it is resumed.
    pub async fn pause_schedule(&self, name: &str) -> Result<Schedule, ClientError> {
        self.ask(Method::POST, &route::with_name(route::SCHEDULE_PAUSE, name)).await
    }

    /// Resumes a paused schedule.
    pub async fn resume_schedule(&self, name: &str) -> Result<Schedule, ClientError> {
        self.ask(Method::POST, &route::with_name(route::SCHEDULE_RESUME, name)).await
    }

    /// Makes a schedule's jobs now.
    pub async fn run_schedule(&self, name: &str) -> Result<Run, ClientError> {
        self.ask(Method::POST, &route::with_name(route::SCHEDULE_RUN, name)).await
    }

    /// Deadlines and how they will be met.
    pub async fn plan(&self) -> Result<Plan, ClientError> {
        self.ask(Method::GET, route::PLAN).await
    }

    /// The condition of each registry.
    pub async fn registries(&self) -> Result<Vec<RegistryCondition>, ClientError> {
        self.ask(Method::GET, route::REGISTRIES).await
    }

    /// The present settings.
    pub async fn settings(&self) -> Result<Settings, ClientError> {
        self.ask(Method::GET, route::SETTINGS).await
    }

    /// Applies settings, or says what would change.
    pub async fn apply(&self, request: &SettingsRequest) -> Result<SettingsAnswer, ClientError> {
        self.send_json(Method::PUT, route::SETTINGS, request).await
    }

    /// Reports that a host lacks an image.
    pub async fn want(&self, wanted: &Wanted) -> Result<WantedAnswer, ClientError> {
        self.send_json(Method::POST, route::WANTED, wanted).await
    }
}
