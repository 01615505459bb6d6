//! Lists tags and checks what they point to, without fetching images.
//!
//! A check is a HEAD with `If-None-Match`: Docker Hub does not count it, and a registry that knows the digest answers with nothing but a
//! status. If a registry does not support HEAD, or states no digest, the document itself is fetched and hashed. Lists of tags come in
//! pages, and each names the next.

use std::borrow::Cow;

use futures::FutureExt;
use futures::future::BoxFuture;
use http::header;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use store::image::{ImageRef, is_tag};
use store::{Digest, go_json};

use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{ACCEPT, MAX_MANIFEST};
use crate::registries::oci::client::{Ask, Verb};
use crate::registries::oci::reference::{reference, stated_digest};
use crate::registries::oci::registry::OciRegistry;
use crate::registries::{TagLister, TagLook};

/// Page sizes that are requested in turn: as many tags as possible, then what every registry must accept, then the registry's own choice.
const PAGES: [&str; 3] = ["n=1000", "n=100", ""];
/// Maximum number of pages of a list; the rest is left out, because nobody's pattern means a million tags.
const MAX_PAGES: usize = 100;
/// The longest page that is read, in bytes: registries without pages send everything at once.
const MAX_PAGE: u64 = 8 << 20;
/// Maximum number of tags of one repository; the rest is left out. This bounds memory: a tag has 128 characters at most.
const MOST_TAGS: usize = 100_000;

#[derive(Deserialize)]
struct TagPage {
    /// Absent or null when there is none.
    tags: Option<Tags>,
}

/// The valid tags of a page; anything else that a registry lists is dropped.
struct Tags(Vec<String>);

impl<'de> Deserialize<'de> for Tags {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Tags, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Tags;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of tags")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Tags, A::Error> {
                let mut tags = Vec::new();
                while let Some(tag) = list.next_element::<Cow<'de, str>>()? {
                    if tags.len() < MOST_TAGS && is_tag(&tag) {
                        tags.push(tag.into_owned());
                    }
                }
                Ok(Tags(tags))
            }
        }
        deserializer.deserialize_seq(Collect)
    }
}

/// The query of the next page, as `Link` headers name it (RFC 8288): several links, each with several parameters and relations. Only the
/// query of a link to a list of tags is used: the host and the path stay the same.
fn next_page<'a>(links: impl IntoIterator<Item = &'a str>) -> Option<String> {
    links.into_iter().find_map(next_of_header)
}

/// The same for one header.
fn next_of_header(mut rest: &str) -> Option<String> {
    loop {
        let (target, after) = rest.split_once('<')?.1.split_once('>')?;
        let end = end_of_link(after);
        rest = &after[end..];
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let path = path.trim_end_matches('/');
        let is_list = path.is_empty() || path == "tags/list" || path.ends_with("/tags/list");
        if is_list && !query.is_empty() && after[..end].split(';').any(is_next) {
            return Some(query.to_owned());
        }
    }
}

/// The length of a link's parameters: up to a comma that is not quoted.
fn end_of_link(parameters: &str) -> usize {
    let mut quoted = false;
    for (at, byte) in parameters.bytes().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b',' if !quoted => return at,
            _ => {}
        }
    }
    parameters.len()
}

/// Whether a parameter names the relation `next`, among others or alone.
fn is_next(parameter: &str) -> bool {
    let Some((name, value)) = parameter.split_once('=') else { return false };
    let mut relations = value.trim().trim_matches('"').split_ascii_whitespace();
    name.trim().eq_ignore_ascii_case("rel") && relations.any(|relation| relation.eq_ignore_ascii_case("next"))
}

impl OciRegistry {
    async fn list(&self, image: &ImageRef) -> Result<Vec<String>, RegistryError> {
        let what = format!("the tags of {}", image.familiar_repository());
        let mut all = Vec::new();
        let (mut query, mut smaller) = (PAGES[0].to_owned(), PAGES[1..].iter());
        for _ in 0..MAX_PAGES {
            let ask = Ask {
                image,
                path: format!("tags/list{}{query}", if query.is_empty() { "" } else { "?" }),
                accept: Some("application/json"),
                offset: 0,
                what: &what,
                absent: unknown(image),
                verb: Verb::Get,
            };
            let (headers, bytes) = match (self.client.document(&ask, MAX_PAGE).await, all.is_empty()) {
                (Err(RegistryError::BadAnswer { why, .. }), true) if why.starts_with("400") && smaller.len() > 0 => {
                    query = smaller.next().map(|query| (*query).to_owned()).unwrap_or_default();
                    continue;
                }
                (answer, _) => answer?,
            };
            let page: TagPage = go_json::from_slice(&bytes)
                .map_err(|why| RegistryError::Malformed { what: what.clone(), why: why.to_string() })?;
            all.extend(page.tags.into_iter().flat_map(|tags| tags.0));
            if all.len() >= MOST_TAGS {
                all.truncate(MOST_TAGS);
                break;
            }
            let links = headers.get_all(header::LINK).iter().filter_map(|link| link.to_str().ok());
            match next_page(links) {
                Some(next) if next != query => query = next,
                Some(_) => {
                    let why = "the page after this one is this one".to_owned();
                    return Err(RegistryError::BadAnswer { registry: image.registry().to_owned(), what, why });
                }
                None => return Ok(all),
            }
        }
        tracing::warn!("{what} are {} or more: the rest is left out", all.len());
        Ok(all)
    }

    async fn head(&self, image: &ImageRef, known: Option<Digest>) -> Result<TagLook, RegistryError> {
        let what = format!("the manifest of {image}");
        let mut ask = Ask {
            image,
            path: format!("manifests/{}", reference(image)),
            accept: Some(ACCEPT),
            offset: 0,
            what: &what,
            absent: unknown(image),
            verb: Verb::Head { unless: known },
        };
        let stated = match self.client.head(&ask).await? {
            Some(response) if response.status() == http::StatusCode::NOT_MODIFIED => return Ok(TagLook::Same),
            Some(response) => stated_digest(response.headers()),
            None => None,
        };
        let target = match stated {
            Some(digest) => digest,
            None => {
                ask.verb = Verb::Get;
                let (_, bytes) = self.client.document(&ask, MAX_MANIFEST).await?;
                Digest::of(&bytes)
            }
        };
        Ok(if Some(target) == known { TagLook::Same } else { TagLook::At(target) })
    }
}

fn unknown(image: &ImageRef) -> RegistryError {
    RegistryError::UnknownImage { registry: image.registry().to_owned(), image: image.to_string() }
}

impl TagLister for OciRegistry {
    fn tags<'a>(&'a self, image: &'a ImageRef) -> BoxFuture<'a, Result<Vec<String>, RegistryError>> {
        self.list(image).boxed()
    }

    fn look<'a>(&'a self, image: &'a ImageRef, known: Option<Digest>) -> BoxFuture<'a, Result<TagLook, RegistryError>> {
        self.head(image, known).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tag_is_not_kept() {
        let long = "x".repeat(129);
        let text = serde_json::json!({"tags": ["v1", "\u{1b}[2J", "", "-a", "a b", "_ok.1-x", long, "\u{202e}x"]});
        let page: TagPage = serde_json::from_str(&text.to_string()).unwrap();
        assert_eq!(page.tags.unwrap().0, ["v1", "_ok.1-x"]);
        assert!(serde_json::from_str::<TagPage>("{\"tags\": null}").unwrap().tags.is_none());
        assert!(serde_json::from_str::<TagPage>("{\"tags\": [1]}").is_err());
    }

    #[test]
    fn the_next_page_is_found_however_links_are_written() {
        let (first, next) = ("</v2/a/tags/list?n=2>; rel=\"first\"", "</v2/a/tags/list?n=2&last=b>; rel=\"next\"");
        let both = format!("{first}, {next}");
        for (links, expected) in [
            (vec!["</v2/a/b/tags/list?last=v1&n=1000>; rel=\"next\""], Some("last=v1&n=1000")),
            (vec!["<https://r.io/v2/a/tags/list?n=2&last=x>; rel=next"], Some("n=2&last=x")),
            (vec![&both], Some("n=2&last=b")),
            (vec![first, next], Some("n=2&last=b")),
            (vec!["<?n=2&last=b>; rel=\"next last\""], Some("n=2&last=b")),
            (vec!["<tags/list?last=a,b>; Rel=Next"], Some("last=a,b")),
            (
                vec!["</artifactory/api/docker/x/v2/a/tags/list/?last=b>; title=\"a;b, c\"; rel=\"next\""],
                Some("last=b"),
            ),
            (vec![""], None),
            (vec!["<x>"], None),
            (vec!["</v2/a/tags/list?n=1>; rel=\"prev\""], None),
            (vec!["</v2/a/tags/list?n=1>; rev=\"next\""], None),
            (vec!["</v2/a/tags/list>; rel=\"next\""], None),
            (vec!["<https://evil/other?n=1>; rel=\"next\""], None),
        ] {
            assert_eq!(next_page(links.iter().copied()).as_deref(), expected, "{links:?}");
        }
    }
}
