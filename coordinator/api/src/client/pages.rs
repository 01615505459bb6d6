//! Puts lists together that arrive in pages, so that callers see whole lists.

use http::Method;
use serde::de::DeserializeOwned;

use super::{Client, ClientError};
use crate::access::TokenList;
use crate::host::HostList;
use crate::image::ImageList;
use crate::job::JobList;
use crate::retention::PinList;
use crate::route;
use crate::schedule::ScheduleList;

/// Items per page that are asked for.
const PAGE: &str = "500";

/// A list, or a part of one.
pub(super) trait Paged: DeserializeOwned {
    /// Where the next page continues.
    fn next_page(&mut self) -> &mut Option<String>;
    /// Adds the items of a page.
    fn add(&mut self, page: Self);
}

macro_rules! paged {
    ($($list:ident.$items:ident),*) => {$(
        impl Paged for $list {
            fn next_page(&mut self) -> &mut Option<String> {
                &mut self.next_page
            }

            fn add(&mut self, page: Self) {
                self.$items.extend(page.$items);
            }
        }
    )*};
}

paged!(JobList.jobs, ImageList.images, HostList.hosts, TokenList.tokens, ScheduleList.schedules, PinList.pins);

impl Client {
    /// A whole list, page by page. A coordinator that knows no pages gives all of it at once.
    pub(super) async fn list<L: Paged>(&self, path: &str) -> Result<L, ClientError> {
        let mut whole: L = self.ask(Method::GET, &route::with_query(path, &[("limit", Some(PAGE))])).await?;
        let mut next = whole.next_page().take();
        while let Some(cursor) = next {
            let parameters = [("limit", Some(PAGE)), ("continue", Some(cursor.as_str()))];
            let mut page: L = self.ask(Method::GET, &route::with_query(path, &parameters)).await?;
            next = page.next_page().take();
            if next.as_ref() == Some(&cursor) {
                let why = "its list does not end".to_owned();
                return Err(ClientError::NotACoordinator { address: self.address.clone(), why });
            }
            whole.add(page);
        }
        Ok(whole)
    }
}
