//! `GET /api/history`: what has passed, by intervals: see [`crate::history`].

use actix_web::{HttpRequest, HttpResponse, http::header::ContentType, web};
use flate2::Compression;
use serde::Deserialize;

use super::{page::PackedText, status::AdminState};
use crate::history::HistoryRange;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryQuery {
    #[serde(default)]
    range: HistoryRange,
}

/// The history of a range, packed if the client takes that.
pub async fn of_range(
    state: web::Data<AdminState>,
    request: HttpRequest,
    query: web::Query<HistoryQuery>,
) -> HttpResponse {
    let columns = state.history.range(query.range);
    let json = serde_json::to_string(&columns);
    let json = json.expect("names and numbers have a JSON");
    let mut answer = HttpResponse::Ok();
    answer.content_type(ContentType::json());
    PackedText::new(json, Compression::fast()).answer(&request, answer)
}
