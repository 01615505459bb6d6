//! The API's description, derived from the handlers and the messages.

use axum::Json;
use utoipa::OpenApi;

use crate::server::{
    events, export, fsck, garbage, hosts, images, jobs, load, metrics, mirror, profiles, schedules, settings, status,
    tokens, wanted,
};

#[derive(OpenApi)]
#[openapi(
    info(title = "cachefs coordinator", description = "Images in a shared store: pulled once, served to many hosts."),
    paths(
        document,
        status::version,
        status::status,
        images::list,
        images::detail,
        images::remove,
        images::wait,
        export::export,
        jobs::pull,
        jobs::list,
        jobs::detail,
        jobs::cancel,
        jobs::retry,
        load::load,
        metrics::metrics,
        garbage::status,
        garbage::collect,
        garbage::plan,
        garbage::policy,
        garbage::set_policy,
        garbage::pins,
        garbage::pin,
        garbage::unpin,
        profiles::trace,
        profiles::profile,
        mirror::version,
        mirror::answer,
        fsck::show,
        fsck::start,
        fsck::stop,
        schedules::list,
        schedules::add,
        schedules::detail,
        schedules::remove,
        schedules::pause,
        schedules::resume,
        schedules::run,
        schedules::plan,
        settings::present,
        settings::apply,
        settings::registries,
        wanted::wanted,
        wanted::hook,
        events::list,
        hosts::list,
        hosts::renew,
        hosts::release,
        tokens::list,
        tokens::create,
        tokens::revoke,
    )
)]
struct Description;

/// The OpenAPI description of this API.
#[utoipa::path(get, path = coordinator_api::route::OPENAPI, responses((status = 200, description = "This document")))]
pub async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Description::openapi())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_description_and_the_router_name_the_same_routes() {
        let document = serde_json::to_value(Description::openapi()).unwrap();
        let described: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, item)| item.as_object().unwrap().keys().map(|method| (path.clone(), method.clone())))
            .collect();
        let routed: BTreeSet<(String, String)> = crate::server::routes()
            .iter()
            .flat_map(|(path, methods, _)| methods.iter().map(|(method, _)| (path.to_string(), method.to_string())))
            .collect();
        assert_eq!(described, routed);
    }

    #[test]
    fn every_message_that_is_referred_to_is_described() {
        let text = serde_json::to_string(&Description::openapi()).unwrap();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        for reference in text.split("\"#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
        }
    }
}
