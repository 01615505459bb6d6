//! The one table of routes: path, methods, who may use each, and handlers.

use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, delete, get, post, put};
use coordinator_api::route;

use crate::http::access::Access::{Admins, AdminsSelfAudited, Any, Hosts as ForHosts, LimitedViewers, Open, Viewers};
use crate::http::access::Methods;
use crate::http::api_state::ApiState;
use crate::http::error;
use crate::http::guard::{self, Guard};
use crate::http::handlers::{
    events, export, fsck, garbage, hosts, images, jobs, load, metrics, mirror, profiles, schedules, settings, status,
    tokens, wanted,
};
use crate::http::openapi;

/// The state type of all handlers.
type Shared = Arc<ApiState>;

/// One route: its path, its methods and who may use each, and the handlers.
type Route = (&'static str, Methods, MethodRouter<Shared>);

/// All routes.
pub(super) fn routes() -> Vec<Route> {
    let mut routes = schedule_routes();
    routes.extend(store_routes());
    routes
}

/// The routes of images, jobs, hosts and the coordinator itself.
fn store_routes() -> Vec<Route> {
    vec![
        (route::OPENAPI, &[("get", Open)], get(openapi::document)),
        (route::VERSION, &[("get", Open)], get(status::version)),
        (route::STATUS, &[("get", Any)], get(status::status)),
        (route::METRICS, &[("get", Viewers)], get(metrics::metrics)),
        (route::IMAGES, &[("get", Any)], get(images::list)),
        (
            route::IMAGE,
            &[("get", Any), ("delete", AdminsSelfAudited)],
            get(images::detail).merge(delete(images::remove)),
        ),
        (route::EXPORT, &[("get", Any)], get(export::export)),
        (route::WAIT, &[("get", Any)], get(images::wait)),
        (route::PULLS, &[("post", ForHosts)], post(jobs::pull)),
        (route::LOAD, &[("post", AdminsSelfAudited)], post(load::load)),
        (route::JOBS, &[("get", Any)], get(jobs::list)),
        (route::JOB, &[("get", Any)], get(jobs::detail)),
        (route::CANCEL, &[("post", AdminsSelfAudited)], post(jobs::cancel)),
        (route::RETRY, &[("post", AdminsSelfAudited)], post(jobs::retry)),
        (
            route::GC,
            &[("get", Viewers), ("post", AdminsSelfAudited)],
            get(garbage::status).merge(post(garbage::collect)),
        ),
        (route::GC_PLAN, &[("get", Viewers)], get(garbage::plan)),
        (
            route::RETENTION,
            &[("get", Viewers), ("put", AdminsSelfAudited)],
            get(garbage::policy).merge(put(garbage::set_policy)),
        ),
        (
            route::PINS,
            &[("get", Viewers), ("post", AdminsSelfAudited), ("delete", AdminsSelfAudited)],
            get(garbage::pins).merge(post(garbage::pin)).merge(delete(garbage::unpin)),
        ),
        (route::TRACES, &[("post", ForHosts)], post(profiles::trace)),
        (route::PROFILE, &[("get", Any)], get(profiles::profile)),
        (route::EVENTS, &[("get", LimitedViewers)], get(events::list)),
        (route::HOSTS, &[("get", LimitedViewers)], get(hosts::list)),
        (route::LEASE, &[("post", ForHosts), ("delete", ForHosts)], post(hosts::renew).merge(delete(hosts::release))),
        (route::TOKENS, &[("get", Admins), ("post", AdminsSelfAudited)], get(tokens::list).merge(post(tokens::create))),
        (route::TOKEN, &[("delete", AdminsSelfAudited)], delete(tokens::revoke)),
        (route::MIRROR, &[("get", Any)], get(mirror::version)),
        (route::MIRROR_PATH, &[("get", Any)], get(mirror::answer)),
        (route::FSCK, &[("get", Viewers), ("post", AdminsSelfAudited)], get(fsck::show).merge(post(fsck::start))),
        (route::FSCK_STOP, &[("post", AdminsSelfAudited)], post(fsck::stop)),
    ]
}

/// The routes of schedules and settings.
fn schedule_routes() -> Vec<Route> {
    vec![
        (
            route::SCHEDULES,
            &[("get", Viewers), ("post", AdminsSelfAudited)],
            get(schedules::list).merge(post(schedules::add)),
        ),
        (
            route::SCHEDULE,
            &[("get", Viewers), ("delete", AdminsSelfAudited)],
            get(schedules::detail).merge(delete(schedules::remove)),
        ),
        (route::SCHEDULE_PAUSE, &[("post", AdminsSelfAudited)], post(schedules::pause)),
        (route::SCHEDULE_RESUME, &[("post", AdminsSelfAudited)], post(schedules::resume)),
        (route::SCHEDULE_RUN, &[("post", AdminsSelfAudited)], post(schedules::run)),
        (route::PLAN, &[("get", Viewers)], get(schedules::plan)),
        (
            route::SETTINGS,
            &[("get", Viewers), ("put", AdminsSelfAudited)],
            get(settings::present).merge(put(settings::apply)),
        ),
        (route::REGISTRIES, &[("get", Viewers)], get(settings::registries)),
        (route::WANTED, &[("post", ForHosts)], post(wanted::wanted)),
        // Webhooks present a secret of their own.
        (route::HOOK, &[("post", Open)], post(wanted::hook)),
    ]
}

/// The whole API.
pub fn router(app: Shared) -> Router {
    let mut router = Router::new();
    for (path, methods, handlers) in routes() {
        let guard = Guard { app: Arc::clone(&app), path, methods };
        let fallback = if path.starts_with(route::MIRROR) {
            handlers.fallback(mirror::no_such_method)
        } else {
            handlers.fallback(error::no_such_method)
        };
        let guarded = fallback.layer(from_fn_with_state(guard, guard::admit));
        router = router.route(path, guarded);
    }
    router = router.route(route::MIRROR_BARE, get(mirror::moved).fallback(mirror::no_such_method));
    router.fallback(error::no_such_path).with_state(app)
}
