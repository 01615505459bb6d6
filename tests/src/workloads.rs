//! What people run on an engine besides single containers.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::process::{TIMEOUT, run, wait_until};

const COMPOSE: &str = r#"version: "3"
services:
  web:
    image: IMAGE
    command: ["httpd", "-f", "-p", "8080", "-h", "/data"]
  client:
    image: IMAGE
    depends_on: [web]
    command: ["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do wget -q -O - http://web:8080/greeting && exit 0; sleep 1; done; exit 1"]
"#;

/// Two services of the test image `small` that find each other, on the engine that the environment names.
pub fn compose(image: &str, environment: &[(String, String)]) -> Result<()> {
    let project = tempfile::tempdir()?;
    std::fs::write(project.path().join("docker-compose.yml"), COMPOSE.replace("IMAGE", image))?;
    let compose = |arguments: &[&str]| {
        let mut command = Command::new("/usr/bin/docker-compose");
        run(command.current_dir(project.path()).args(arguments).envs(environment.iter().cloned()))?.ok()
    };
    let up = compose(&["--no-ansi", "up", "--timeout", "0", "--exit-code-from", "client"])?;
    ensure!(up.contains("| hello again"), "{up}");
    compose(&["down", "--timeout", "0"]).map(drop)
}

/// A service of the test image `small` on a swarm of one node: made, changed, restarted one task after the other, removed.
/// `docker` runs the client.
pub fn swarm(image: &str, docker: impl Fn(&[&str]) -> Result<String>) -> Result<()> {
    docker(&["swarm", "init", "--advertise-addr", "127.0.0.1"])?;
    let create = [
        "service",
        "create",
        "--detach",
        "--name",
        "web",
        "--network",
        "host",
        "--update-monitor",
        "0s",
        "--replicas",
        "2",
    ];
    docker(&[&create[..], &["--stop-grace-period", "0s", "--no-resolve-image", image, "sleep", "1000000"]].concat())?;
    let running = || -> Result<Vec<String>> {
        let tasks = ["ps", "--filter", "label=com.docker.swarm.service.name=web", "--format"];
        let script = "{{.ID}}";
        let mut ids: Vec<String> = docker(&[&tasks[..], &[script]].concat())?.lines().map(str::to_owned).collect();
        ids.sort();
        Ok(ids)
    };
    wait_until("two tasks", TIMEOUT, || Ok(running()?.len() == 2))?;
    let before = running()?;
    docker(&["service", "update", "--detach", "--env-add", "A=changed", "--update-parallelism", "1", "web"])?;
    let changed = |before: &[String]| -> Result<bool> {
        let now = running()?;
        Ok(now.len() == 2 && now.iter().all(|id| !before.contains(id)))
    };
    wait_until("two changed tasks", TIMEOUT, || changed(&before))?;
    let before = running()?;
    ensure!(docker(&["exec", &before[0], "sh", "-c", "echo $A"])? == "changed", "the task is not the changed one");
    docker(&["service", "update", "--detach", "--force", "web"])?;
    wait_until("two tasks anew", TIMEOUT, || changed(&before))?;
    docker(&["service", "rm", "web"])?;
    wait_until("the end of the tasks", TIMEOUT, || Ok(running()?.is_empty()))?;
    docker(&["swarm", "leave", "--force"]).map(drop)
}
