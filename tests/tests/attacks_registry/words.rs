//! Text from registries that controls terminals or forges lines is shown escaped.

use super::*;

/// Text that controls terminals, forges lines and reverses direction.
const EVIL: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}\r\n2026-01-01T00:00:00Z  INFO forged line\u{202e}gpj.exe\u{9b}31m";

/// A config of one layer.
const CONFIG: &str = r#"{"os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"]}}"#;

fn is_deceptive(c: char) -> bool {
    (c.is_control() && c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A registry whose answers contain [`EVIL`] wherever possible, and the names of its images. The last image can still be pulled.
fn speak_evil() -> Result<(ScriptedRegistry, [String; 5])> {
    let good = other_image();
    let registry = ScriptedRegistry::start(move |seen| {
        let errors = json!({"errors": [{"code": EVIL, "message": EVIL, "detail": EVIL}]}).to_string();
        let manifest = |config: &str, layer: &str, digest: &str| {
            json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": {"mediaType": config, "digest": digest_of(CONFIG.as_bytes()), "size": CONFIG.len()},
                "layers": [{"mediaType": layer, "digest": digest, "size": 2}]})
            .to_string()
        };
        let oci = "application/vnd.oci.image.manifest.v1+json";
        let config = "application/vnd.oci.image.config.v1+json";
        match seen.path().trim_start_matches("/v2/") {
            "error/manifests/1" => Reply { status: 418, ..Reply::body("application/json", errors) },
            "type/manifests/1" => Reply::body(oci, manifest(EVIL, "x", "sha256:0")),
            "shape/manifests/1" => {
                Reply::body(oci, json!({"schemaVersion": 2, "mediaType": EVIL, "manifests": [EVIL]}).to_string())
            }
            "layer/manifests/1" => Reply::body(oci, manifest(config, EVIL, EVIL)),
            path if path.starts_with("layer/blobs/") => Reply::body(config, CONFIG),
            path if path.starts_with("app/tags/list") => {
                Reply::body("application/json", json!({"tags": [EVIL, "1", format!("v{EVIL}")]}).to_string())
            }
            _ => good(seen.path()).unwrap_or(Reply::status(404)),
        }
    })?;
    let names = ["error", "type", "shape", "layer", "app"].map(|name| registry.reference(name, "1"));
    Ok((registry, names))
}

#[test]
fn what_a_registry_says_is_printed_escaped_everywhere() -> Result<()> {
    for form in ["text", "json"] {
        let (registry, names) = speak_evil()?;
        let mut site = Site::start_with(&SiteSpec {
            arguments: vec!["--log=trace".to_owned(), format!("--log-format={form}")],
            settings: "retry_attempts = 1\n".to_owned(),
            ..SiteSpec::default()
        })?;
        let mut said = Vec::new();
        for name in &names[..4] {
            let output = site.ctl().run(&["pull", name])?;
            assert_eq!(output.code, 1, "{name}");
            said.push(output);
        }
        said.push(site.ctl().run(&["pull", &names[4]])?);
        let pattern = registry.reference("app", "*");
        site.ctl().ok(&["schedule", "add", "all", "--image", &pattern, "--cron", "0 3 1 1 *"])?;
        for arguments in [
            &["schedule", "run", "all"][..],
            &["schedule", "list"],
            &["jobs"],
            &["job", "1"],
            &["job", "2"],
            &["job", "3"],
            &["job", "4"],
            &["images"],
            &["image", &names[4]],
            &["events", "--since", "0"],
            &["registries"],
            &["status"],
        ] {
            said.push(site.ctl().run(arguments)?);
            let json = site.ctl().run(&[&["--json"], arguments].concat())?;
            if json.code == 0 {
                serde_json::from_str::<Value>(&json.stdout).with_context(|| json.stdout.clone())?;
            }
            said.push(json);
        }
        for output in &said {
            let text = format!("{}{}", output.stdout, output.stderr);
            assert!(!text.chars().any(is_deceptive), "{}: {text:?}", output.command);
            assert!(!text.lines().any(|line| line.starts_with("2026-01-01")), "{}: {text}", output.command);
        }
        let heard = said.iter().filter(|output| output.stderr.contains("forged line")).count();
        assert!(heard >= 3, "what it said is told, escaped: {heard}");
        site.coordinator().stop()?;
        let log = site.coordinator().process().log();
        assert!(log.contains("forged line"), "and logged");
        assert!(!log.chars().any(is_deceptive), "{form}");
        assert!(!log.lines().any(|line| line.starts_with("2026-01-01")), "{form}");
        if form == "json" {
            let lines = log.lines().filter(|line| !line.is_empty());
            assert!(
                lines.clone().count() > 10 && lines.clone().all(|line| serde_json::from_str::<Value>(line).is_ok())
            );
        }
    }
    Ok(())
}
