//! What the coordinator answers to people and to programs.

use super::*;

#[test]
fn every_command_speaks_to_people_and_to_programs() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let site = Site::start().unwrap();
    let reference = registry.push(&image, "small", "1").unwrap();
    let pulled = site.ctl().json(&["pull", &reference]).unwrap();
    assert_eq!(pulled["jobs"][0]["state"], "published");
    let (manifest, config) = (&image.manifest.digest, &image.config.digest);
    let commands: [(&[&str], &str, &str); 6] = [
        (&["images"], "/images/0/name", &reference),
        (&["image", &reference], "/manifest", manifest),
        (&["jobs"], "/jobs/0/image", &reference),
        (&["job", "1"], "/state", "published"),
        (&["status"], "/role", "leader"),
        (&["remove", &reference], "/0/config", config),
    ];
    for (arguments, pointer, expected) in commands {
        if arguments[0] != "remove" {
            let text = site.ctl().run(arguments).unwrap();
            assert_eq!((text.code, text.stderr.as_str()), (0, ""), "{arguments:?}");
            // Text output shows short digests, and repositories separately from tags.
            let shown = expected.strip_prefix("sha256:").map_or(expected, |hex| &hex[..12]);
            let shown = shown.trim_end_matches(":1");
            assert!(text.stdout.contains(shown), "{arguments:?}: {}", text.stdout);
        }
        let document = site.ctl().json(arguments).unwrap();
        assert_eq!(document.pointer(pointer).and_then(Value::as_str), Some(expected), "{arguments:?}: {document}");
    }
    assert_eq!(site.images().unwrap(), Vec::<String>::new());
    let gone = site.ctl().run(&["image", &reference]).unwrap();
    assert_eq!(gone.code, 1);
    assert!(gone.stderr.contains(&reference), "{}", gone.stderr);
    let text = site.ctl().ok(&["pull", &reference]).unwrap();
    assert!(text.contains(&reference), "{text}");
    assert!(site.ctl().ok(&["remove", &reference]).unwrap().contains(&reference));
}

#[test]
fn the_description_lists_every_route() {
    let address = format!("127.0.0.1:{}", free_port().unwrap());
    let spec = SiteSpec { listen: Some(address.clone()), ..SiteSpec::default() };
    let _site = Site::start_with(&spec).unwrap();
    let answer = http::get(&address, "/openapi.json", &[]).unwrap();
    let document: Value = serde_json::from_slice(&answer.body).unwrap();
    let operations = document["paths"].as_object().unwrap().iter().flat_map(|(path, item)| {
        item.as_object().unwrap().keys().map(move |method| format!("{} {path}", method.to_uppercase()))
    });
    let found: BTreeSet<_> = operations.collect();
    for expected in [
        "GET /openapi.json",
        "GET /v1/version",
        "GET /v1/status",
        "GET /v1/images",
        "GET /v1/image",
        "DELETE /v1/image",
        "GET /v1/image/export",
        "GET /v1/image/wait",
        "POST /v1/pulls",
        "POST /v1/load",
        "GET /v1/jobs",
        "GET /v1/jobs/{id}",
        "POST /v1/jobs/{id}/cancel",
        "POST /v1/jobs/{id}/retry",
    ] {
        assert!(found.contains(expected), "{expected} is not in {found:?}");
    }
    // Every documented operation exists: it answers, if only with an error in the API's own format.
    for operation in &found {
        let (method, path) = operation.split_once(' ').unwrap();
        let path = path.replace("{id}", "99");
        let answer = http::request(&address, method, &path, &[], 0, std::io::empty()).unwrap();
        let body = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(!body.contains("there is nothing at") && !body.contains("does not take"), "{operation}: {body}");
        if answer.status != 200 {
            let problem: Value = serde_json::from_slice(&answer.body).unwrap();
            assert!(problem["error"]["message"].as_str().is_some_and(|text| !text.is_empty()), "{operation}: {body}");
        }
    }
    assert_eq!(http::get(&address, "/v1/nonesuch", &[]).unwrap().status, 404);
}
