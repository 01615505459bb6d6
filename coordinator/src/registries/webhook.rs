//! Parses registries' push notifications: which tags were pushed.
//!
//! There are three dialects: Docker Registry (an envelope of events; <https://distribution.github.io/distribution/about/notifications/>),
//! Harbor (`PUSH_ARTIFACT` with resources, `REPLICATION` with what arrived, or the same as CloudEvents) and Docker Hub (one tag of one
//! repository).
//!
//! A payload is a claim by whoever knows the secret. It can make the coordinator pull what a schedule names anyway, and nothing else: names
//! in it are only compared with those of schedules, and the schedule says what is pulled.

use serde::Deserialize;
use store::image::ImageRef;

/// The dialect of a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookKind {
    /// CNCF distribution, `docker-registry`.
    DockerRegistry,
    /// Harbor.
    Harbor,
    /// Docker Hub.
    DockerHub,
}

/// The secret that a webhook must present. Only its hash is kept in memory; two hashes are compared in constant time.
#[derive(Clone, Copy)]
pub struct HookSecret(blake3::Hash);

impl HookSecret {
    /// The secret `text`, without surrounding whitespace; `None` if nothing is left.
    pub fn new(text: &str) -> Option<HookSecret> {
        let text = text.trim();
        (!text.is_empty()).then(|| HookSecret(blake3::hash(text.as_bytes())))
    }

    /// Whether `shown` is the secret.
    pub fn is(&self, shown: &str) -> bool {
        self.0 == blake3::hash(shown.as_bytes())
    }
}

impl std::fmt::Debug for HookSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HookSecret")
    }
}

/// A payload that cannot be parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not a notification of {kind}: {why}")]
pub struct BadPayload {
    /// The dialect.
    pub kind: &'static str,
    /// What the parser says.
    pub why: String,
}

/// A tag that was pushed. The host is what the registry calls itself, which may differ from the name in image references.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Push {
    /// The registry's host, if the payload states it.
    pub host: Option<String>,
    /// The repository's path in its registry.
    pub repository: String,
    /// The tag.
    pub tag: String,
}

impl HookKind {
    /// Parses the name of a kind as it appears in URL paths.
    pub fn parse(name: &str) -> Option<HookKind> {
        [HookKind::DockerRegistry, HookKind::Harbor, HookKind::DockerHub].into_iter().find(|kind| kind.name() == name)
    }

    /// Its name in URL paths.
    pub fn name(self) -> &'static str {
        match self {
            HookKind::DockerRegistry => "docker-registry",
            HookKind::Harbor => "harbor",
            HookKind::DockerHub => "docker-hub",
        }
    }

    /// The pushes that a payload reports; other events are skipped.
    pub fn pushes(self, payload: &[u8]) -> Result<Vec<Push>, BadPayload> {
        let bad = |why: serde_json::Error| BadPayload { kind: self.name(), why: why.to_string() };
        Ok(match self {
            HookKind::DockerRegistry => docker_registry(serde_json::from_slice(payload).map_err(bad)?),
            HookKind::Harbor => harbor(serde_json::from_slice(payload).map_err(bad)?),
            HookKind::DockerHub => docker_hub(serde_json::from_slice(payload).map_err(bad)?),
        })
    }
}

impl Push {
    /// Whether `image`, as named by a schedule, may be what was pushed. Hosts are not compared, except that a push to Docker Hub only
    /// matches Docker Hub: a registry behind a proxy does not know its own name, and a wrong guess costs one conditional request.
    pub fn names(&self, image: &ImageRef) -> bool {
        let hub = self.host.as_deref() == Some("docker.io");
        image.path() == self.repository && (!hub || image.registry() == "docker.io")
    }
}

#[derive(Deserialize)]
struct Envelope {
    events: Option<Vec<RegistryEvent>>,
}

#[derive(Deserialize)]
struct RegistryEvent {
    action: String,
    target: Option<RegistryTarget>,
    request: Option<RegistryRequest>,
}

#[derive(Deserialize)]
struct RegistryTarget {
    #[serde(default)]
    repository: String,
    tag: Option<String>,
}

#[derive(Deserialize)]
struct RegistryRequest {
    host: Option<String>,
}

/// Blobs, and manifests that were pushed by digest, have no tag and are skipped.
fn docker_registry(envelope: Envelope) -> Vec<Push> {
    let pushed = envelope.events.into_iter().flatten().filter(|event| event.action == "push");
    let push = |event: RegistryEvent| {
        let target = event.target?;
        let host = event.request.and_then(|request| request.host).filter(|host| !host.is_empty());
        Some(Push { host, repository: target.repository, tag: target.tag.filter(|tag| !tag.is_empty())? })
    };
    pushed.filter_map(push).collect()
}

#[derive(Deserialize)]
struct HarborEvent {
    #[serde(rename = "type")]
    kind: String,
    /// Called `data` in CloudEvents.
    #[serde(alias = "data")]
    event_data: Option<HarborData>,
}

#[derive(Deserialize)]
struct HarborData {
    resources: Option<Vec<HarborResource>>,
    repository: Option<HarborRepository>,
    replication: Option<HarborReplication>,
}

/// What was copied from one registry to another.
#[derive(Deserialize)]
struct HarborReplication {
    dest_resource: Option<HarborDestination>,
    successful_artifact: Option<Vec<HarborArtifact>>,
}

#[derive(Deserialize)]
struct HarborDestination {
    endpoint: Option<String>,
    namespace: Option<String>,
}

#[derive(Deserialize)]
struct HarborArtifact {
    #[serde(rename = "type")]
    kind: Option<String>,
    /// `app:1`; since 2.7 `app [1 item(s) in total]`, with the tags in `references`.
    name_tag: Option<String>,
    references: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct HarborResource {
    tag: Option<String>,
    resource_url: Option<String>,
}

#[derive(Deserialize)]
struct HarborRepository {
    #[serde(default)]
    repo_full_name: String,
}

/// `type` is `PUSH_ARTIFACT` (2.x), `harbor.artifact.pushed` (2.x, as CloudEvents) or `pushImage` (1.x). For images that were replicated it
/// is `REPLICATION` or `harbor.replication.status.changed`.
fn harbor(event: HarborEvent) -> Vec<Push> {
    match (&*event.kind, event.event_data) {
        ("PUSH_ARTIFACT" | "harbor.artifact.pushed" | "pushImage", Some(data)) => harbor_pushed(data),
        ("REPLICATION" | "harbor.replication.status.changed", Some(data)) => {
            data.replication.map(harbor_replicated).unwrap_or_default()
        }
        _ => Vec::new(),
    }
}

/// The tags that arrived at the replication's destination.
fn harbor_replicated(replication: HarborReplication) -> Vec<Push> {
    let Some(destination) = replication.dest_resource else { return Vec::new() };
    let endpoint = destination.endpoint.unwrap_or_default();
    let host = endpoint.rsplit("//").next().and_then(|rest| rest.split('/').next());
    let host = host.filter(|host| !host.is_empty()).map(str::to_owned);
    let namespace = destination.namespace.filter(|namespace| !namespace.is_empty());
    let artifacts = replication.successful_artifact.into_iter().flatten();
    let images = artifacts.filter(|artifact| artifact.kind.as_deref().is_none_or(|kind| kind == "image"));
    let pushes = images.flat_map(|artifact| {
        let name_tag = artifact.name_tag.unwrap_or_default();
        let name_tag = name_tag.split(' ').next().unwrap_or_default();
        let (name, tag) = name_tag.split_once(':').map_or((name_tag, None), |(name, tag)| (name, Some(tag.to_owned())));
        let repository = namespace.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join("/");
        let mut tags = artifact.references.unwrap_or_default();
        tags.extend(tag);
        tags.retain(|tag| !tag.is_empty() && !tag.contains([':', '[']));
        tags.sort();
        tags.dedup();
        let host = host.clone();
        tags.into_iter().map(move |tag| Push { host: host.clone(), repository: repository.clone(), tag })
    });
    pushes.collect()
}

fn harbor_pushed(data: HarborData) -> Vec<Push> {
    let repository = data.repository.map(|repository| repository.repo_full_name).unwrap_or_default();
    let push = |resource: HarborResource| {
        let url = resource.resource_url.unwrap_or_default();
        let host = url.split_once('/').map(|(host, _)| host.to_owned()).filter(|host| !host.is_empty());
        let tag = resource.tag.filter(|tag| !tag.is_empty() && !tag.starts_with("sha256:"))?;
        Some(Push { host, repository: repository.clone(), tag })
    };
    data.resources.into_iter().flatten().filter_map(push).collect()
}

#[derive(Deserialize)]
struct HubEvent {
    push_data: HubPush,
    repository: HubRepository,
}

#[derive(Deserialize)]
struct HubPush {
    tag: Option<String>,
}

#[derive(Deserialize)]
struct HubRepository {
    repo_name: String,
}

fn docker_hub(event: HubEvent) -> Vec<Push> {
    let name = event.repository.repo_name;
    let repository = if name.contains('/') { name } else { format!("library/{name}") };
    let tag = event.push_data.tag.unwrap_or_else(|| "latest".to_owned());
    vec![Push { host: Some("docker.io".to_owned()), repository, tag }]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn push(host: &str, repository: &str, tag: &str) -> Push {
        Push { host: Some(host.to_owned()), repository: repository.to_owned(), tag: tag.to_owned() }
    }

    /// As distribution 2.8 sends them: the layers' events, then the manifest's.
    const DOCKER_REGISTRY: &str = r#"{"events": [
      {"id": "asdf-asdf-asdf-asdf-0", "timestamp": "2006-01-02T15:04:05Z", "action": "push",
       "target": {"mediaType": "application/octet-stream", "size": 2, "length": 2, "repository": "library/test",
         "digest": "sha256:3b3692957d439ac1928219a83fac91e7bf96c153725526874673ae1f2023f8d5",
         "url": "http://example.com/v2/library/test/blobs/sha256:3b36"},
       "request": {"id": "asdfasdf", "addr": "client.local", "host": "registrycluster.local", "method": "PUT", "useragent": "test/0.1"},
       "actor": {"name": "test-actor"}, "source": {"addr": "hostname.local:port"}},
      {"id": "asdf-asdf-asdf-asdf-1", "timestamp": "2006-01-02T15:04:05Z", "action": "push",
       "target": {"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "size": 1, "length": 1,
         "digest": "sha256:fea8895f450959fa676bcc1df0611ea93823a735a01205fd8622846041d0c7cf", "repository": "library/test",
         "url": "http://example.com/v2/library/test/manifests/sha256:fea8", "tag": "latest"},
       "request": {"id": "asdfasdf", "addr": "client.local", "host": "registrycluster.local", "method": "PUT", "useragent": "test/0.1"},
       "actor": {"name": "test-actor"}, "source": {"addr": "hostname.local:port"}},
      {"id": "2", "action": "pull", "target": {"repository": "library/test", "tag": "latest"}},
      {"id": "3", "action": "delete", "target": {"repository": "library/test", "digest": "sha256:fea8"}}]}"#;

    const HARBOR: &str = r#"{"type": "PUSH_ARTIFACT", "occur_at": 1680501893, "operator": "harbor-jobservice",
      "event_data": {"resources": [{"digest": "sha256:954b378c375d852eb3c63ab88978f640b4348b01c1b3e0e1e4e4e4f3c9a9c0f7",
          "tag": "v1.0", "resource_url": "harbor.example.com/prod/nginx:v1.0"}],
        "repository": {"date_created": 1680501893, "name": "nginx", "namespace": "prod",
          "repo_full_name": "prod/nginx", "repo_type": "private"}}}"#;

    const DOCKER_HUB: &str = r#"{"callback_url": "https://registry.hub.docker.com/u/svendowideit/testhook/hook/2141b5bi5i5b02bec211i4eeih0242eg11000a/",
      "push_data": {"pushed_at": 1417566161, "pusher": "trustedbuilder", "tag": "latest"},
      "repository": {"comment_count": 0, "date_created": 1417494799, "description": "", "is_official": false,
        "is_private": true, "is_trusted": true, "name": "testhook", "namespace": "svendowideit", "owner": "svendowideit",
        "repo_name": "svendowideit/testhook", "repo_url": "https://registry.hub.docker.com/u/svendowideit/testhook/",
        "star_count": 0, "status": "Active"}}"#;

    #[test]
    fn the_documented_payloads_are_understood() {
        let pushes = HookKind::DockerRegistry.pushes(DOCKER_REGISTRY.as_bytes()).unwrap();
        assert_eq!(pushes, [push("registrycluster.local", "library/test", "latest")]);
        let pushes = HookKind::Harbor.pushes(HARBOR.as_bytes()).unwrap();
        assert_eq!(pushes, [push("harbor.example.com", "prod/nginx", "v1.0")]);
        let cloud = HARBOR.replace("PUSH_ARTIFACT", "harbor.artifact.pushed").replace("event_data", "data");
        let pushes = HookKind::Harbor.pushes(cloud.as_bytes()).unwrap();
        assert_eq!(pushes, [push("harbor.example.com", "prod/nginx", "v1.0")], "as CloudEvents");
        let other = HARBOR.replace("PUSH_ARTIFACT", "SCANNING_COMPLETED");
        assert_eq!(HookKind::Harbor.pushes(other.as_bytes()).unwrap(), []);
        let pushes = HookKind::DockerHub.pushes(DOCKER_HUB.as_bytes()).unwrap();
        assert_eq!(pushes, [push("docker.io", "svendowideit/testhook", "latest")]);
    }

    /// As Harbor 2.7 and later send it; before, without `references` and with `app:1` as `name_tag`.
    const REPLICATION: &str = r#"{"type": "REPLICATION", "occur_at": 1586922308, "operator": "MANUAL", "event_data": {"replication": {
      "harbor_hostname": "h.io", "job_status": "Success", "artifact_type": "image", "override_mode": true, "trigger_type": "MANUAL",
      "src_resource": {"registry_name": "hub", "registry_type": "docker-hub", "endpoint": "https://hub.docker.com", "namespace": "library"},
      "dest_resource": {"registry_type": "harbor", "endpoint": "https://h.io", "namespace": "mirror"},
      "successful_artifact": [{"type": "image", "status": "Success", "name_tag": "team/app [3 item(s) in total]",
        "references": ["1", "2", "sha256:954b378c375d852eb3c63ab88978f640b4348b01c1b3e0e1e4e4e4f3c9a9c0f7"]},
        {"type": "chart", "status": "Success", "name_tag": "chart [1 item(s) in total]", "references": ["3"]}]}}}"#;

    #[test]
    fn what_arrives_by_replication_is_a_push() {
        let pushes = |payload: &str| HookKind::Harbor.pushes(payload.as_bytes()).unwrap();
        let both = [push("h.io", "mirror/team/app", "1"), push("h.io", "mirror/team/app", "2")];
        assert_eq!(pushes(REPLICATION), both);
        let cloud =
            REPLICATION.replace("REPLICATION", "harbor.replication.status.changed").replace("event_data", "data");
        assert_eq!(pushes(&cloud), both, "as CloudEvents");
        let before = REPLICATION.replace("app [3 item(s) in total]", "app:9").replace("references", "other");
        assert_eq!(pushes(&before), [push("h.io", "mirror/team/app", "9")]);
        let failed = REPLICATION.replace("successful_artifact", "failed_artifact");
        assert_eq!(pushes(&failed), []);
        assert_eq!(
            pushes(&REPLICATION.replace("app [3 item(s) in total]", "app:[1 2]").replace("references", "other")),
            []
        );
    }

    #[test]
    fn nothing_is_read_as_go_writes_it() {
        let harbor = r#"{"type": "PUSH_ARTIFACT", "event_data": {"resources": null}}"#;
        assert_eq!(HookKind::Harbor.pushes(harbor.as_bytes()).unwrap(), []);
        assert_eq!(HookKind::DockerRegistry.pushes(br#"{"events": null}"#).unwrap(), []);
    }

    #[test]
    fn a_payload_of_another_dialect_is_refused_by_name() {
        let error = HookKind::DockerHub.pushes(HARBOR.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with("this is not a notification of docker-hub"), "{error}");
        assert_eq!(HookKind::parse("gitlab"), None);
    }

    #[test]
    fn a_push_to_docker_hub_is_not_one_elsewhere() {
        let push = push("docker.io", "me/app", "1");
        assert!(push.names(&"me/app:1".parse().unwrap()));
        assert!(!push.names(&"r.io/me/app:1".parse().unwrap()));
        let own = Push { host: Some("10.0.0.1:5000".to_owned()), ..push };
        assert!(own.names(&"registry.example.com/me/app:1".parse().unwrap()), "behind a proxy");
    }

    #[test]
    fn a_secret_is_compared_and_not_shown() {
        let secret = HookSecret::new(" s3cret\n").unwrap();
        assert!(secret.is("s3cret") && !secret.is("s3cre") && !secret.is(""));
        assert_eq!(format!("{secret:?}"), "HookSecret");
        assert!(HookSecret::new("\n").is_none());
    }

    proptest! {
        #[test]
        fn any_payload_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..400), cut in 0usize..3000) {
            for kind in [HookKind::DockerRegistry, HookKind::Harbor, HookKind::DockerHub] {
                let _ = kind.pushes(&bytes);
                for sample in [DOCKER_REGISTRY, HARBOR, REPLICATION, DOCKER_HUB] {
                    let mut damaged = sample.as_bytes().to_vec();
                    damaged.truncate(cut.min(sample.len()));
                    let _ = kind.pushes(&damaged);
                    let at = cut % sample.len();
                    damaged = sample.as_bytes().to_vec();
                    damaged[at] = bytes.first().copied().unwrap_or(b'"');
                    let _ = kind.pushes(&damaged);
                }
            }
        }
    }
}
