//! Bodies that are small as they come and large once they are decoded.

use std::{io::Read as _, time::Duration};

use flate2::{Compression, write::GzEncoder};

use crate::{
    bodies::gzip,
    ingest::post,
    support::{lanes::grpc_variables, node::Node},
};

/// The node may take so much more memory for all of them.
const MEMORY_MAX: u64 = 8 << 20;
/// And run for so long for one, on a busy machine.
const CPU_MAX: Duration = Duration::from_secs(1);
/// Requests of each kind.
const TIMES: u32 = 10;

/// As many zeros, compressed, without ever being in memory.
pub fn bomb(zeros: u64) -> [(&'static str, Vec<u8>); 2] {
    let zeros = || std::io::repeat(0).take(zeros);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    std::io::copy(&mut zeros(), &mut encoder).expect("a vector takes all");
    let gzip = encoder.finish().expect("a vector takes all");
    let zstd = zstd::encode_all(zeros(), 0).expect("a vector takes all");
    [("gzip", gzip), ("zstd", zstd)]
}

/// The bomb of this size in each coding, as it is, within another one, twice in a row, and cut.
fn bombs(size: u64) -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let all = bomb(size).into_iter().flat_map(|(coding, whole)| {
        let stacked = match coding {
            "gzip" => gzip(&whole),
            _ => zstd::encode_all(&*whole, 0).expect("a vector takes all"),
        };
        let twice = [&whole[..], &whole[..]].concat();
        let cut = whole[..whole.len() * 2 / 3].to_vec();
        [
            (coding, "whole", whole),
            (coding, "stacked", stacked),
            (coding, "twice", twice),
            (coding, "cut", cut),
        ]
    });
    all.collect()
}

async fn is_refused(sizes: &[u64]) {
    let node = Node::start("http://127.0.0.1:9/", &grpc_variables()).await;
    let refuse = async |coding: &str, body: &[u8]| {
        let request = post(body.to_vec()).with("Content-Encoding", coding);
        let (status, _, problem) = request.send(&node).await;
        assert!(status.is_client_error(), "{coding}: {status}: {problem}");
        status
    };
    // The pages of the program that it has not run before are not the bombs'.
    for (coding, _, body) in bombs(4 << 20) {
        refuse(coding, &body).await;
    }
    let before = node.peak_memory();
    for &size in sizes {
        for (coding, shape, body) in bombs(size) {
            let began = node.cpu();
            let mut status = None;
            for _ in 0..TIMES {
                status = Some(refuse(coding, &body).await);
            }
            let each = node.cpu().saturating_sub(began) / TIMES;
            let (sent, more) = (body.len(), node.peak_memory().saturating_sub(before));
            println!(
                "{size} {coding} {shape}: {sent} bytes sent, {status:?}, {each:?} each, \
                 {more} bytes more memory so far"
            );
            assert!(each < CPU_MAX, "{size} {coding} {shape}: {each:?}");
            assert!(more < MEMORY_MAX, "{size} {coding} {shape}: {more} bytes");
        }
    }
}

#[actix_rt::test]
async fn bombs_are_refused_at_little_cost() {
    is_refused(&[10 << 10, 1 << 20, 16 << 20]).await;
}

#[actix_rt::test]
#[ignore = "takes a minute to make them"]
async fn bombs_of_up_to_a_gibibyte_are_refused_at_little_cost() {
    is_refused(&[10 << 10, 100 << 10, 1 << 20, 10 << 20, 100 << 20, 1 << 30]).await;
}
