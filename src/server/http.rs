//! HTTP for people and Prometheus: /metrics, /healthz, /readyz, a status page.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::Stop;
use crate::shared::{Shared, lock};

/// Serves until the process ends at once.
pub async fn serve(listener: TcpListener, shared: Arc<Shared>, mut stopping: watch::Receiver<Stop>) {
    let app = Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/status", get(status))
        .route("/report", get(report))
        .with_state(shared);
    let end = async move {
        let _ = stopping.wait_for(|stop| *stop == Stop::Now).await;
    };
    if let Err(error) = axum::serve(listener, app).with_graceful_shutdown(end).await {
        tracing::error!(%error, "the admin port has failed");
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], shared.metrics.text())
}

async fn ready(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    if shared.ready.load(Ordering::SeqCst) {
        (StatusCode::OK, "ready\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "not serving clients: the phase that holds is not known yet, or the proxy is stopping\n",
        )
    }
}

/// What this proxy knows of itself, as JSON.
pub fn state(shared: &Shared) -> serde_json::Value {
    let world = shared.world.load();
    let config = shared.config.load();
    serde_json::json!({
        "migration": config.name,
        "phase": world.phase,
        "epoch": world.epoch,
        "wanted": config.phase,
        "waiting_for": *lock(&shared.waiting),
        "cannot_follow": *lock(&shared.behind),
        "config_error": *lock(&shared.config_error),
        "clients": shared.metrics.clients.get(),
        "transactions": shared.gate.under_way(),
        "tables": world.catalog.tables.len(),
        "mirror_up": world.phase.mirror().map(|mirror| shared.health.get(mirror).up()),
    })
}

async fn status(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    axum::Json(state(&shared))
}

/// The statements that this proxy has seen, by shape, as JSON.
async fn report(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    axum::Json(super::report::report(&shared))
}

async fn page(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let state = state(&shared);
    let rows: String = state
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| format!("<tr><th align=left>{}<td>{}", escape(name), escape(&value.to_string())))
        .collect();
    axum::response::Html(format!(
        "<!doctype html><title>Crossfade</title><h1>Crossfade</h1><table>{rows}</table><p><a href=metrics>metrics</a>"
    ))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
