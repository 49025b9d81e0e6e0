//! The API: accepts POSTs of one record or an array, and keeps when each record first arrived and
//! how many copies followed. A record's number is its first member.

use std::{net::SocketAddr, time::SystemTime};

use actix_web::{
    App, HttpRequest, HttpResponse, HttpServer,
    http::Method,
    web::{self, Bytes, Data},
};
use serde_json::json;
use tracing_mutex::parkinglot::Mutex;

/// The bytes before the number.
pub const NUMBER: &[u8] = b"{\"n\":";

#[derive(Default)]
struct Arrivals {
    /// The first record that `at_us` covers. Earlier records are only counted.
    first: usize,
    /// When each record first arrived, in µs since the Unix epoch; 0 if it has not.
    at_us: Vec<u64>,
    distinct: u64,
    /// Arrivals, repeated ones included.
    times: u64,
    last_us: u64,
    /// Answers 503 to every record.
    is_away: bool,
}

pub fn now_us() -> u64 {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("a clock after 1970");
    u64::try_from(now.as_micros()).expect("a clock before 586512")
}

/// The numbers of the records in a body.
fn numbers(body: &[u8]) -> impl Iterator<Item = usize> {
    memchr::memmem::find_iter(body, NUMBER).filter_map(|at| {
        let rest = &body[at + NUMBER.len()..];
        let end = rest.iter().position(|byte| !byte.is_ascii_digit())?;
        std::str::from_utf8(&rest[..end]).ok()?.parse().ok()
    })
}

impl Arrivals {
    fn take(&mut self, number: usize) {
        self.times += 1;
        self.last_us = now_us();
        let Some(at) = number.checked_sub(self.first) else {
            return;
        };
        if self.at_us.len() <= at {
            self.at_us.resize(at + 1, 0);
        }
        if self.at_us[at] == 0 {
            self.at_us[at] = self.last_us;
            self.distinct += 1;
        }
    }
}

/// A PUT here makes the API answer 503 to records, and a DELETE makes it take them again.
pub const AWAY: &str = "/away";
/// The largest body: a thousand records of a batch fit.
const BODY_MAX: usize = 16 << 20;

/// One worker serves, so nothing waits for the lock.
type Shared = Data<Mutex<Arrivals>>;

async fn set_away(request: HttpRequest, arrivals: Shared) -> HttpResponse {
    arrivals.lock().is_away = request.method() == Method::PUT;
    HttpResponse::Ok().finish()
}

/// When each record came first, as 8 bytes, little-endian.
async fn all(arrivals: Shared) -> HttpResponse {
    let bytes: Vec<u8> = arrivals
        .lock()
        .at_us
        .iter()
        .flat_map(|at| at.to_le_bytes())
        .collect();
    HttpResponse::Ok().body(bytes)
}

/// The path of a DELETE is the first record of the next load.
async fn answer(request: HttpRequest, body: Bytes, arrivals: Shared) -> HttpResponse {
    let mut arrivals = arrivals.lock();
    if request.method() == Method::DELETE {
        let first = request.path().trim_start_matches('/').parse();
        arrivals.first = first.unwrap_or_default();
        arrivals.at_us.clear();
    } else if request.method() == Method::POST {
        if arrivals.is_away {
            return HttpResponse::ServiceUnavailable().finish();
        }
        for number in numbers(&body) {
            arrivals.take(number);
        }
    } else {
        let Arrivals {
            distinct,
            times,
            last_us,
            ..
        } = &*arrivals;
        let counts = json!({"distinct": distinct, "times": times, "last_us": last_us});
        return HttpResponse::Ok().json(counts);
    }
    HttpResponse::Ok().finish()
}

/// Serves until the process ends.
pub async fn run(listen: SocketAddr) {
    let arrivals = Shared::new(Mutex::new(Arrivals::default()));
    HttpServer::new(move || {
        App::new()
            .app_data(Data::clone(&arrivals))
            .app_data(web::PayloadConfig::new(BODY_MAX))
            .route("/arrivals", web::get().to(all))
            .route(AWAY, web::put().to(set_away))
            .route(AWAY, web::delete().to(set_away))
            // The collector of traces.
            .route("/v1/traces", web::post().to(HttpResponse::Ok))
            .default_service(web::to(answer))
    })
    .workers(1)
    .disable_signals()
    .bind(listen)
    .expect("the address is free")
    .run()
    .await
    .expect("the API serves to its end");
}
