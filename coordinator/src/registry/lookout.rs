//! Tags, listed and looked at, without fetching what they point to.
//!
//! A look is a HEAD with `If-None-Match`: Docker Hub does not count it, and a registry that knows the digest answers with
//! nothing but a status. Lists of tags come in pages, each naming the next.

use std::borrow::Cow;

use futures::FutureExt;
use futures::future::BoxFuture;
use http::header;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use store::Digest;
use store::image::ImageRef;

use crate::registry::error::RegistryError;
use crate::registry::manifest::ACCEPT;
use crate::registry::oci::{Ask, OciRegistry, Verb};
use crate::registry::{Lookout, TagLook};

/// Tags asked for at a time.
const PAGE: usize = 1000;
/// A list of more pages is cut off: nobody's pattern means a million tags.
const MAX_PAGES: usize = 100;
/// The longest page that is read: registries that do not page send all at once.
const MAX_PAGE: u64 = 8 << 20;
/// More tags of one repository are left out, which bounds what they take up: a tag has 128 characters at most.
const MOST_TAGS: usize = 100_000;

#[derive(Deserialize)]
struct TagPage {
    /// Absent or null when there is none.
    tags: Option<Tags>,
}

/// The tags of a page, as far as they are tags: what else a registry lists is not kept.
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

/// Whether a text can be a tag, as the distribution specification has it.
fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= 128
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'))
}

/// The query of the next page: what follows `tags/list` in `Link: <...>; rel="next"`.
fn next_page(link: &str) -> Option<String> {
    let (target, parameters) = link.split_once('<')?.1.split_once('>')?;
    let is_next = parameters.split(';').any(|part| matches!(part.trim(), "rel=\"next\"" | "rel=next"));
    let (_, query) = target.split_once("/tags/list?")?;
    is_next.then(|| query.to_owned())
}

impl OciRegistry {
    async fn list(&self, image: &ImageRef) -> Result<Vec<String>, RegistryError> {
        let what = format!("the tags of {}", image.familiar_repository());
        let mut all = Vec::new();
        let mut query = format!("n={PAGE}");
        for _ in 0..MAX_PAGES {
            let ask = Ask {
                image,
                path: format!("tags/list?{query}"),
                accept: Some("application/json"),
                offset: 0,
                what: &what,
                absent: unknown(image),
                verb: Verb::Get,
            };
            let (headers, bytes) = self.client.document(&ask, MAX_PAGE).await?;
            let page: TagPage = serde_json::from_slice(&bytes)
                .map_err(|why| RegistryError::Malformed { what: what.clone(), why: why.to_string() })?;
            all.extend(page.tags.into_iter().flat_map(|tags| tags.0));
            if all.len() >= MOST_TAGS {
                all.truncate(MOST_TAGS);
                break;
            }
            let link = headers.get(header::LINK).and_then(|link| link.to_str().ok()).and_then(next_page);
            match link {
                Some(next) if next != query => query = next,
                _ => return Ok(all),
            }
        }
        tracing::warn!("{what} are {} or more: the rest is left out", all.len());
        Ok(all)
    }

    async fn head(&self, image: &ImageRef, known: Option<Digest>) -> Result<TagLook, RegistryError> {
        let what = format!("the manifest of {image}");
        let ask = Ask {
            image,
            path: format!("manifests/{}", image.tag().unwrap_or("latest")),
            accept: Some(ACCEPT),
            offset: 0,
            what: &what,
            absent: unknown(image),
            verb: Verb::Head { unless: known },
        };
        let transport = self.client.transport();
        let response = transport.persist_briefly(image.registry(), &what, || self.client.once(&ask)).await?;
        if response.status() == http::StatusCode::NOT_MODIFIED {
            return Ok(TagLook::Same);
        }
        let stated =
            response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(match stated {
            Some(digest) if Some(digest) == known => TagLook::Same,
            Some(digest) => TagLook::At(digest),
            None => TagLook::Elsewhere,
        })
    }
}

fn unknown(image: &ImageRef) -> RegistryError {
    RegistryError::UnknownImage { registry: image.registry().to_owned(), image: image.to_string() }
}

impl Lookout for OciRegistry {
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
    fn the_next_page_is_found_in_relative_and_absolute_links() {
        let relative = r#"</v2/a/b/tags/list?last=v1&n=1000>; rel="next""#;
        assert_eq!(next_page(relative).as_deref(), Some("last=v1&n=1000"));
        let absolute = "<https://r.io/v2/a/tags/list?n=2&last=x>; rel=next";
        assert_eq!(next_page(absolute).as_deref(), Some("n=2&last=x"));
        for none in ["", "<x>", r#"</v2/a/tags/list?n=1>; rel="prev""#, r#"<https://evil/other?n=1>; rel="next""#] {
            assert_eq!(next_page(none), None, "{none}");
        }
    }
}
