//! Lists in pages, as in Kubernetes: `limit` says how many items, and `continue` of the last answer where to go on.
//!
//! A page is also limited in bytes, whatever `limit` says, and without it. Each item has a key, and the next page continues after
//! the key of the last item. So a list that changes in the meantime shows nothing twice, and omits nothing that was there all the
//! time.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use crate::http::error::ApiError;

/// The most bytes of a page; a single item may exceed it.
const PAGE_BYTES: u64 = 2 << 20;

/// Which page of a list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// How many items at most. By default, as many as fit into one answer.
    pub limit: Option<usize>,
    /// The `continue` of the previous page; absent for the first one.
    #[serde(rename = "continue")]
    #[param(rename = "continue")]
    pub cursor: Option<String>,
}

/// Counts bytes.
struct Length(u64);

impl std::io::Write for Length {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl PageQuery {
    /// The key that the previous page ended with; `None` for the first page.
    pub fn after<K: DeserializeOwned>(&self) -> Result<Option<K>, ApiError> {
        let Some(cursor) = &self.cursor else { return Ok(None) };
        let bytes = URL_SAFE_NO_PAD.decode(cursor).ok();
        let key = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let refused = || ApiError::invalid("continue is none that this coordinator gave: begin with the first page");
        key.map(Some).ok_or_else(refused)
    }

    /// Cuts a page from the start of `items`, which follow the previous page, and returns the next page's `continue`.
    pub fn cut<K: Serialize, T: Serialize>(&self, items: impl IntoIterator<Item = (K, T)>) -> (Vec<T>, Option<String>) {
        let limit = self.limit.map_or(usize::MAX, |limit| limit.max(1));
        let (mut page, mut last, mut len) = (Vec::new(), None, Length(0));
        for (key, item) in items {
            // An item that cannot be serialised makes the whole answer fail later.
            let _ = serde_json::to_writer(&mut len, &item);
            if page.len() == limit || (len.0 > PAGE_BYTES && !page.is_empty()) {
                return (page, last.as_ref().map(encode));
            }
            page.push(item);
            last = Some(key);
        }
        (page, None)
    }
}

fn encode(key: &impl Serialize) -> String {
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(key).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(limit: Option<usize>, texts: &[String]) -> Vec<Vec<String>> {
        let (mut pages, mut cursor) = (Vec::new(), None);
        loop {
            let query = PageQuery { limit, cursor };
            let after = query.after::<usize>().unwrap();
            let rest =
                texts.iter().cloned().enumerate().filter(|(number, _)| after.is_none_or(|after| *number > after));
            let (page, next) = query.cut(rest);
            pages.push(page);
            match next {
                Some(next) => cursor = Some(next),
                None => return pages,
            }
        }
    }

    #[test]
    fn pages_are_as_long_as_they_may_be_and_show_everything_once() {
        let texts: Vec<String> = (0..10).map(|number| number.to_string()).collect();
        for (limit, expected) in [(None, 1), (Some(0), 10), (Some(1), 10), (Some(3), 4), (Some(5), 2), (Some(10), 1)] {
            let pages = walk(limit, &texts);
            assert_eq!((pages.len(), pages.concat()), (expected, texts.clone()), "{limit:?}");
        }
        assert_eq!(walk(Some(3), &[]), [Vec::<String>::new()]);
        let long: Vec<String> = (0..5).map(|number| number.to_string().repeat(PAGE_BYTES as usize / 2 - 10)).collect();
        assert_eq!(walk(None, &long).iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
        let huge = vec!["a".repeat(2 * PAGE_BYTES as usize); 2];
        assert_eq!(walk(None, &huge).len(), 2, "what is longer than a page is one by itself");
        assert!(PageQuery { limit: None, cursor: Some("?".to_owned()) }.after::<usize>().is_err());
        assert!(PageQuery { limit: None, cursor: Some(encode(&"x")) }.after::<usize>().is_err());
    }
}
