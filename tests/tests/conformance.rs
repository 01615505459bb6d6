//! The pull and content discovery parts of the OCI distribution specification, requirement by requirement, checked as
//! its conformance tests check them. The same requests go to docker-registry, to show that they are correct. The
//! requirements that it does not meet are listed.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::http::{self, Answer};
use tests::images::{Compression, ImageBuilder, MediaTypes, Pools, digest_of, small};
use tests::registry::{Registry, free_port};
use tests::site::{Site, SiteSpec};

/// All media types of manifests, as engines send them.
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// The error codes of the specification.
const CODES: [&str; 14] = [
    "BLOB_UNKNOWN",
    "BLOB_UPLOAD_INVALID",
    "BLOB_UPLOAD_UNKNOWN",
    "DIGEST_INVALID",
    "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID",
    "MANIFEST_UNKNOWN",
    "NAME_INVALID",
    "NAME_UNKNOWN",
    "SIZE_INVALID",
    "UNAUTHORIZED",
    "DENIED",
    "UNSUPPORTED",
    "TOOMANYREQUESTS",
];

/// A registry and the content of one repository: an image under four tags.
struct Target {
    address: String,
    name: String,
    manifest: Vec<u8>,
    media_type: String,
    config: String,
    layers: Vec<String>,
}

const TAGS: [&str; 4] = ["test0", "test1", "test2", "test3"];

impl Target {
    /// Reads the manifest that the registry at `address` has in the repository `name`.
    fn new(address: &str, name: &str) -> Result<Target> {
        let found = http::get(address, &format!("/v2/{name}/manifests/test0"), &[("Accept", ACCEPT)])?;
        ensure!(found.status == 200, "{}", String::from_utf8_lossy(&found.body));
        let document: Value = serde_json::from_slice(&found.body)?;
        let digest = |value: &Value| value["digest"].as_str().unwrap_or_default().to_owned();
        let layers = document["layers"].as_array().context("no layers")?;
        Ok(Target {
            address: address.to_owned(),
            name: name.to_owned(),
            media_type: document["mediaType"].as_str().unwrap_or_default().to_owned(),
            config: digest(&document["config"]),
            layers: layers.iter().map(digest).collect(),
            manifest: found.body,
        })
    }

    fn ask(&self, method: &str, below: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let headers = [&[("Accept", ACCEPT)], headers].concat();
        http::request(&self.address, method, &format!("/v2/{}/{below}", self.name), &headers, 0, std::io::empty())
    }

    fn get(&self, below: &str) -> Result<Answer> {
        self.ask("GET", below, &[])
    }

    /// The manifest's paths, by tag and by digest.
    fn manifests(&self) -> Vec<String> {
        let digest = digest_of(&self.manifest);
        vec![format!("manifests/{}", TAGS[0]), format!("manifests/{digest}")]
    }

    /// The paths of all blobs.
    fn blobs(&self) -> Vec<String> {
        [&self.config].into_iter().chain(&self.layers).map(|digest| format!("blobs/{digest}")).collect()
    }

    fn tags(&self, query: &str) -> Result<(Vec<String>, Option<String>)> {
        let answer = self.get(&format!("tags/list{query}"))?;
        ensure!(answer.status == 200, "tags/list{query}: {}", answer.status);
        let list: Value = serde_json::from_slice(&answer.body)?;
        ensure!(list["name"] == self.name.as_str(), "{list}");
        Ok((serde_json::from_value(list["tags"].clone())?, answer.head.header("Link").map(str::to_owned)))
    }
}

/// A digest that no content has.
fn nothing() -> String {
    digest_of(b"nobody has this")
}

fn check_status(answer: &Answer, expected: u16, what: &str) -> Result<()> {
    ensure!(answer.status == expected, "{what}: {} and not {expected}", answer.status);
    Ok(())
}

/// Checks that an error has the shape that the specification requires.
fn check_errors(answer: &Answer, what: &str) -> Result<()> {
    let document: Value = serde_json::from_slice(&answer.body).with_context(|| format!("{what}: no JSON"))?;
    let errors = document["errors"].as_array().with_context(|| format!("{what}: no errors in {document}"))?;
    let code = errors.first().and_then(|error| error["code"].as_str()).unwrap_or_default();
    ensure!(CODES.contains(&code), "{what}: {code:?} is no code of the specification");
    Ok(())
}

/// A requirement that docker-registry 2.8.2 does not guarantee. Its tags are sorted only by chance.
const IN_ORDER: &str = "the list of tags is in order";

/// The requirements that docker-registry 2.8.2 does not meet: it answers 500 to an invalid digest, truncates the body
/// of its 416, and lists all tags whatever the query says.
const KNOWN: [&str; 4] = [
    "a digest that is none is 400 with a code, or 404",
    "a Range beyond the end is 416",
    "n limits the tags, last begins behind one, and Link leads on",
    "n=0 is an empty list without a Link",
];

/// A requirement, in the specification's words or shorter, and its check.
type Requirement = (&'static str, fn(&Target) -> Result<()>);

const REQUIREMENTS: &[Requirement] = &[
    ("GET /v2/ is 200", |target| check_status(&http::get(&target.address, "/v2/", &[])?, 200, "/v2/")),
    ("a manifest is 200 by tag and by digest, with its exact bytes", |target| {
        target.manifests().iter().try_for_each(|path| {
            let answer = target.get(path)?;
            check_status(&answer, 200, path)?;
            ensure!(answer.body == target.manifest, "{path}: other bytes");
            Ok(())
        })
    }),
    ("a manifest's Content-Type is its media type without parameters", |target| {
        target.manifests().iter().try_for_each(|path| {
            let answer = target.get(path)?;
            let found = answer.head.header("Content-Type");
            ensure!(found == Some(target.media_type.as_str()), "{path}: {found:?}");
            Ok(())
        })
    }),
    ("a blob is 200 with its bytes", |target| {
        target.blobs().iter().try_for_each(|path| {
            let answer = target.get(path)?;
            check_status(&answer, 200, path)?;
            ensure!(path.ends_with(&digest_of(&answer.body)), "{path}: other bytes");
            Ok(())
        })
    }),
    ("Docker-Content-Digest is the digest of the body", |target| {
        [target.manifests(), target.blobs()].concat().iter().try_for_each(|path| {
            let answer = target.get(path)?;
            let found = answer.head.header("Docker-Content-Digest");
            ensure!(found == Some(digest_of(&answer.body).as_str()), "{path}: {found:?}");
            Ok(())
        })
    }),
    ("HEAD is 200 with the headers of GET and no body", |target| {
        [target.manifests(), target.blobs()].concat().iter().try_for_each(|path| {
            let (whole, head) = (target.get(path)?, target.ask("HEAD", path, &[])?);
            check_status(&head, 200, path)?;
            for name in ["Content-Length", "Content-Type", "Docker-Content-Digest", "ETag"] {
                let (found, expected) = (head.head.header(name), whole.head.header(name));
                ensure!(found == expected && found.is_some(), "{name} of {path}: {found:?} and not {expected:?}");
            }
            ensure!(head.head.header("Content-Length") == Some(whole.body.len().to_string().as_str()), "{path}");
            Ok(())
        })
    }),
    ("what there is not is 404, for GET and HEAD", |target| {
        let absent = nothing();
        for path in [
            format!("blobs/{absent}"),
            format!("manifests/{absent}"),
            "manifests/.INVALID_MANIFEST_NAME".to_owned(),
            "manifests/absent".to_owned(),
        ] {
            let (get, head) = (target.get(&path)?, target.ask("HEAD", &path, &[])?);
            // A registry may answer 400 for a tag that is not valid.
            let is_impossible = path.contains(".INVALID") && [get.status, head.status] == [400, 400];
            ensure!(is_impossible || [get.status, head.status] == [404, 404], "{path}: {} {}", get.status, head.status);
        }
        Ok(())
    }),
    ("a repository that there is not is 404", |target| {
        let elsewhere = Target {
            name: format!("{}-absent", target.name),
            layers: Vec::new(),
            manifest: Vec::new(),
            address: target.address.clone(),
            media_type: String::new(),
            config: String::new(),
        };
        for path in ["manifests/test0", "tags/list", &format!("blobs/{}", target.config)] {
            let answer = elsewhere.get(path)?;
            check_status(&answer, 404, path)?;
            check_errors(&answer, path)?;
        }
        Ok(())
    }),
    ("a blob of one repository is not another's", |target| {
        let answer = http::get(&target.address, &format!("/v2/{}-other/blobs/{}", target.name, target.layers[0]), &[])?;
        check_status(&answer, 404, "a foreign blob")
    }),
    ("refusals have the specification's shape", |target| {
        for path in ["manifests/absent".to_owned(), format!("manifests/{}", nothing()), format!("blobs/{}", nothing())]
        {
            check_errors(&target.get(&path)?, &path)?;
        }
        Ok(())
    }),
    ("a digest that is none is 400 with a code, or 404", |target| {
        for path in ["manifests/sha256:totallywrong", "blobs/sha256:totallywrong", "blobs/sha256", "blobs/x:y"] {
            let answer = target.get(path)?;
            match answer.status {
                400 => check_errors(&answer, path)?,
                status => ensure!(status == 404, "{path}: {status}"),
            }
        }
        Ok(())
    }),
    ("a Range of a blob is 206 with that part", |target| {
        target.blobs().iter().try_for_each(|path| {
            let whole = target.get(path)?.body;
            let len = whole.len();
            let ranges = [
                ("bytes=0-0", 0..1),
                ("bytes=5-20", 5..21),
                ("bytes=9-", 9..len),
                ("bytes=-7", len - 7..len),
                ("bytes=3-99999999", 3..len),
            ];
            for (range, expected) in ranges {
                let part = target.ask("GET", path, &[("Range", range)])?;
                check_status(&part, 206, range)?;
                ensure!(part.body == whole[expected.clone()], "{range} of {path}: other bytes");
                let named = format!("bytes {}-{}/{len}", expected.start, expected.end - 1);
                ensure!(
                    part.head.header("Content-Range") == Some(named.as_str()),
                    "{range} of {path}: {:?}",
                    part.head
                );
            }
            Ok(())
        })
    }),
    ("a Range beyond the end is 416", |target| {
        let answer = target.ask("GET", &target.blobs()[0], &[("Range", "bytes=99999999-")])?;
        check_status(&answer, 416, "bytes=99999999-")
    }),
    ("If-Range with the ETag is a part, with another one the whole", |target| {
        let path = &target.blobs()[0];
        let etag = target.get(path)?.head.header("ETag").context("no ETag")?.to_owned();
        check_status(&target.ask("GET", path, &[("Range", "bytes=1-2"), ("If-Range", &etag)])?, 206, "the same")?;
        check_status(&target.ask("GET", path, &[("Range", "bytes=1-2"), ("If-Range", "\"x\"")])?, 200, "another")
    }),
    ("If-None-Match with the ETag is 304", |target| {
        [target.manifests(), target.blobs()].concat().iter().try_for_each(|path| {
            let etag = target.get(path)?.head.header("ETag").context("no ETag")?.to_owned();
            for method in ["GET", "HEAD"] {
                let answer = target.ask(method, path, &[("If-None-Match", &etag)])?;
                check_status(&answer, 304, path)?;
                ensure!(answer.body.is_empty(), "{path}");
            }
            check_status(&target.ask("GET", path, &[("If-None-Match", "\"x\"")])?, 200, path)
        })
    }),
    ("the list of tags is 200 and names all of them", |target| {
        let (mut tags, link) = target.tags("")?;
        tags.sort();
        ensure!(tags == TAGS && link.is_none(), "{tags:?} {link:?}");
        Ok(())
    }),
    (IN_ORDER, |target| {
        let (tags, _) = target.tags("")?;
        ensure!(tags.is_sorted(), "{tags:?}");
        Ok(())
    }),
    ("n limits the tags, last begins behind one, and Link leads on", |target| {
        ensure!(target.tags("?n=2")?.0 == TAGS[..2], "n");
        ensure!(target.tags("?n=2&last=test1")?.0 == TAGS[2..], "n and last");
        ensure!(target.tags("?last=test2")?.0 == TAGS[3..], "last");
        ensure!(target.tags("?n=100")?.0 == TAGS, "more than there are");
        let link = target.tags("?n=3")?.1.context("no Link")?;
        let to = link.strip_prefix('<').and_then(|rest| rest.split_once(">; rel=\"next\"")).context("no next")?.0;
        let next = http::get(&target.address, to, &[])?;
        let list: Value = serde_json::from_slice(&next.body)?;
        ensure!(list["tags"] == serde_json::json!(TAGS[3..]), "{list}");
        Ok(())
    }),
    ("n=0 is an empty list without a Link", |target| {
        let (tags, link) = target.tags("?n=0")?;
        ensure!(tags.is_empty() && link.is_none(), "{tags:?} {link:?}");
        Ok(())
    }),
    ("the catalogue leads on as the tags do", |target| {
        let first = http::get(&target.address, "/v2/_catalog?n=1", &[])?;
        let list: Value = serde_json::from_slice(&first.body)?;
        ensure!(list["repositories"].as_array().is_some_and(|names| names.len() == 1), "{list}");
        let link = first.head.header("Link").context("no Link")?;
        let to = link.strip_prefix('<').and_then(|rest| rest.split_once(">; rel=\"next\"")).context("no next")?.0;
        check_status(&http::get(&target.address, to, &[])?, 200, to)
    }),
    ("referrers are an index, or 404 where there are none", |target| {
        let answer = target.get(&format!("referrers/{}", digest_of(&target.manifest)))?;
        ensure!(
            answer.status == 404
                || answer.head.header("Content-Type") == Some("application/vnd.oci.image.index.v1+json"),
            "{}",
            answer.status
        );
        Ok(())
    }),
];

/// The requirements that a registry does not meet, with the reason.
fn unmet(target: &Target) -> Vec<(&'static str, String)> {
    let check = |(words, check): &Requirement| check(target).err().map(|error| (*words, format!("{error:#}")));
    REQUIREMENTS.iter().filter_map(check).collect()
}

/// Pushes an image in this family of media types under all tags of `team/app`, and an image of one of its layers to `team/app-other`.
fn push(registry: &Registry, family: MediaTypes) -> Result<Vec<String>> {
    let (image, directory) = (small()?, tempfile::tempdir()?);
    let pools = Pools::open(directory.path())?;
    let layer = pools.layer(&std::fs::read(&image.layers[1].tar)?, Compression::Gzip)?;
    let other = ImageBuilder::new("other").layer(layer).build(&pools, directory.path())?;
    let mut references = vec![registry.push(&other, "team/app-other", "1")?];
    for tag in TAGS {
        references.push(registry.push_as(family, &image, "team/app", tag)?);
    }
    Ok(references)
}

#[test]
fn the_mirror_meets_every_requirement_and_docker_registry_those_that_it_is_known_to_meet() {
    for family in [MediaTypes::Docker, MediaTypes::Oci] {
        let registry = Registry::start().unwrap();
        let references = push(&registry, family).unwrap();
        let target = Target::new(&registry.address(), "team/app").unwrap();
        let found = unmet(&target);
        let words: Vec<&str> = found.iter().map(|(words, _)| *words).filter(|words| *words != IN_ORDER).collect();
        assert_eq!(words, KNOWN, "{found:?}");

        for settings in ["", "blob_cache = '1G'\n"] {
            let address = format!("127.0.0.1:{}", free_port().unwrap());
            let spec = SiteSpec { listen: Some(address.clone()), settings: settings.to_owned(), ..SiteSpec::default() };
            let site = Site::start_with(&spec).unwrap();
            let pull: Vec<&str> = ["pull"].into_iter().chain(references.iter().map(String::as_str)).collect();
            site.ctl().ok(&pull).unwrap();
            let name = format!("{}/team/app", registry.address().replace(':', "_"));
            let mirror = Target::new(&address, &name).unwrap();
            assert_eq!(unmet(&mirror), [], "{family:?} {settings}");
            assert_eq!(mirror.config, target.config, "the image ID is the same");
            assert_eq!(mirror.media_type, target.media_type);
            if !settings.is_empty() {
                assert!(mirror.manifest == target.manifest, "as it was pushed, byte for byte");
            }
        }
    }
}
