//! A malicious web page in the browser of somebody who works on the coordinator's machine.

use super::*;

#[test]
fn a_web_page_gets_no_token_by_rebinding_a_name_or_by_asking_across_origins() {
    let (mut site, address) = open_site("").unwrap();
    let watch = Watch::begin(site.coordinator()).unwrap();
    let json = ("Content-Type", "application/json");
    let make = |name: &str, headers: &[(&str, &str)]| {
        let body = format!(r#"{{"name": "{name}", "role": "admin"}}"#);
        ask(&address, "POST", "/v1/tokens", &[&[json], headers].concat(), body.as_bytes()).unwrap()
    };
    let own_origin = format!("http://{address}");
    for (number, headers) in [
        &[("Host", "evil.example")][..],
        &[("Host", "evil.example:7070"), ("Origin", "http://evil.example:7070")],
        &[("Host", &address), ("Origin", "http://evil.example")],
        &[("Host", &address), ("Origin", "null")],
        &[("Host", &address), ("Sec-Fetch-Site", "cross-site")],
        &[("Host", &address), ("Origin", "http://localhost:1")],
    ]
    .iter()
    .enumerate()
    {
        let (status, body) = make(&format!("t{number}"), headers);
        let text = String::from_utf8_lossy(&body).into_owned();
        assert_eq!(status, 403, "{headers:?}: {text}");
        assert!(!text.contains("cfs_"), "{text}");
        // Reads are refused too, even one that starts a pull, because browsers fetch pictures without sending an origin.
        for path in ["/v1/images", "/v1/image/wait?name=a&timeout_seconds=0&pull=true", "/v1/version", "/v2/"] {
            assert_eq!(ask(&address, "GET", path, headers, b"").unwrap().0, 403, "{path} {headers:?}");
        }
    }
    for (name, headers) in [
        ("a", &[("Host", address.as_str())][..]),
        ("b", &[("Host", &address.replace("127.0.0.1", "localhost"))]),
        ("c", &[("Host", &address), ("Origin", &own_origin)]),
    ] {
        assert_eq!(make(name, headers).0, 200, "{headers:?}");
    }
    // A content type that a form can send across origins without a preflight is not accepted.
    let body = br#"{"name": "d", "role": "admin"}"#;
    assert_eq!(ask(&address, "POST", "/v1/tokens", &[("Content-Type", "text/plain")], body).unwrap().0, 400);
    let tokens = site.ctl().json(&["token", "list"]).unwrap();
    assert_eq!(tokens["tokens"].as_array().unwrap().len(), 3, "{tokens}");
    assert!(events(&site).unwrap().iter().any(|(kind, _)| kind == "access.refused"));
    watch.check(32 * MIB).unwrap();
}
