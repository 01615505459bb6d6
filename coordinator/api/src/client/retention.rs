//! The client's half of retention: collections, the policy, pins.

use std::time::Duration;

use http::Method;

use super::{Client, ClientError};
use crate::retention::{CollectRequest, CollectionPlan, CollectionStatus, Pin, PinList, PinRequest, RetentionPolicy};
use crate::route;

impl Client {
    /// What a garbage collection would remove, with the settings' grace or another.
    pub async fn collection_plan(&self, grace: Option<Duration>) -> Result<CollectionPlan, ClientError> {
        let grace = grace.map(|grace| grace.as_secs().to_string());
        self.ask(Method::GET, &route::with_query(route::GC_PLAN, &[("grace_seconds", grace.as_deref())])).await
    }

    /// Begins a garbage collection; [`Client::collection`] tells how it goes.
    pub async fn begin_collection(&self, request: &CollectRequest) -> Result<CollectionStatus, ClientError> {
        self.tell(route::GC, request).await
    }

    /// The present and the last garbage collection.
    pub async fn collection(&self) -> Result<CollectionStatus, ClientError> {
        self.ask(Method::GET, route::GC).await
    }

    /// What is kept and for how long.
    pub async fn retention(&self) -> Result<RetentionPolicy, ClientError> {
        self.ask(Method::GET, route::RETENTION).await
    }

    /// Changes what is kept and for how long.
    pub async fn set_retention(&self, policy: &RetentionPolicy) -> Result<RetentionPolicy, ClientError> {
        self.send_json(Method::PUT, route::RETENTION, policy).await
    }

    /// The pins.
    pub async fn pins(&self) -> Result<PinList, ClientError> {
        self.list(route::PINS).await
    }

    /// Pins an image's name, whether or not the store has such an image.
    pub async fn pin(&self, name: &str) -> Result<Pin, ClientError> {
        self.tell(route::PINS, &PinRequest { name: name.to_owned() }).await
    }

    /// Unpins an image's name.
    pub async fn unpin(&self, name: &str) -> Result<Pin, ClientError> {
        self.ask(Method::DELETE, &route::with_query(route::PINS, &[("name", Some(name))])).await
    }
}
