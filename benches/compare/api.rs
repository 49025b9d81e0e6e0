//! The API: takes each POST, of one record or an array, and knows when which record came first and how often one came again. A
//! record's number is its first member.

use std::{cell::RefCell, convert::Infallible, net::SocketAddr, rc::Rc, time::SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpListener;

/// What stands before the number.
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

/// Where a PUT makes the API answer 503 to records, and a DELETE makes it take them again.
pub const AWAY: &str = "/away";

async fn answer(
    request: Request<Incoming>,
    arrivals: Rc<RefCell<Arrivals>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let method = request.method().clone();
    let path = request.uri().path();
    let (wants_all, is_of_away) = (path == "/arrivals", path == AWAY);
    let first = path.trim_start_matches('/').parse().unwrap_or_default();
    let body = request
        .into_body()
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();
    let answer = if is_of_away {
        arrivals.borrow_mut().is_away = method == Method::PUT;
        Bytes::new()
    } else if method == Method::DELETE {
        let mut arrivals = arrivals.borrow_mut();
        arrivals.first = first;
        arrivals.at_us.clear();
        Bytes::new()
    } else if method == Method::POST {
        if arrivals.borrow().is_away {
            let mut away = Response::new(Full::default());
            *away.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            return Ok(away);
        }
        for number in numbers(&body) {
            arrivals.borrow_mut().take(number);
        }
        Bytes::new()
    } else if wants_all {
        arrivals
            .borrow()
            .at_us
            .iter()
            .flat_map(|at| at.to_le_bytes())
            .collect()
    } else {
        let Arrivals {
            distinct,
            times,
            last_us,
            ..
        } = &*arrivals.borrow();
        json!({"distinct": distinct, "times": times, "last_us": last_us})
            .to_string()
            .into()
    };
    Ok(Response::new(Full::new(answer)))
}

/// Serves for ever.
pub async fn run(listen: SocketAddr) {
    let socket = TcpListener::bind(listen)
        .await
        .expect("the address is free");
    let arrivals = Rc::new(RefCell::new(Arrivals::default()));
    loop {
        let (stream, _) = socket.accept().await.expect("a connection");
        stream.set_nodelay(true).expect("a TCP socket");
        let arrivals = Rc::clone(&arrivals);
        actix_rt::spawn(async move {
            let service = service_fn(move |request| answer(request, Rc::clone(&arrivals)));
            // A client that disconnects ends its connection.
            http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await
                .ok();
        });
    }
}
