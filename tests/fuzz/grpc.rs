//! Messages of any client for the calls that take one message and answer with one, as the node itself
//! describes them.
//!
//! The same messages come each time, unless `PROPTEST_CASES` or `PROPTEST_RNG_SEED` asks for others.

use std::{env, pin::pin};

use actix_rt::System;
use bytes::{Buf as _, BufMut as _, Bytes};
use futures_util::{StreamExt as _, stream};
use http::uri::PathAndQuery;
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{Index, select},
    test_runner::{RngSeed, TestRunner},
};
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor,
    Value,
};
use tonic::{
    Code, Request, Status,
    client::Grpc as GrpcClient,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use waypost::{
    proto::{Outcome, Receipt, Record},
    record::{RecordRules, Schema, is_visible_ascii, parse},
    transport::grpc::{Grpc, Settings},
};

use super::{TORN, cases, changed, damaged};
use crate::{
    ingest::RECORD,
    support::{
        grpc::{channel, connect, settings},
        rig::Records as _,
    },
};

/// The most characters of an id, and of the name of an API.
const NAME_MAX: usize = 300;
/// As many of each call.
const CASES_MIN: u32 = 1000;

/// Passes messages as they are.
#[derive(Clone, Copy, Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(message);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = from.remaining();
        Ok(Some(from.copy_to_bytes(length)))
    }
}

/// The answer of the node's reflection.
async fn ask_reflection(channel: &Channel, question: MessageRequest) -> MessageResponse {
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    };
    let mut client = ServerReflectionClient::new(channel.clone());
    let answers = client.server_reflection_info(stream::iter([request]));
    let mut answers = answers.await.expect("reflection").into_inner();
    let answer = answers.next().await.expect("an answer").expect("no error");
    answer.message_response.expect("it says something")
}

/// The calls of the node's own services with one message each way.
async fn unary_calls(channel: &Channel) -> Vec<MethodDescriptor> {
    let listed = ask_reflection(channel, MessageRequest::ListServices(String::new())).await;
    let MessageResponse::ListServicesResponse(listed) = listed else {
        panic!("no list: {listed:?}");
    };
    let mut pool = DescriptorPool::new();
    for service in listed.service {
        if !service.name.starts_with("waypost.") {
            continue;
        }
        let question = MessageRequest::FileContainingSymbol(service.name);
        let described = ask_reflection(channel, question).await;
        let MessageResponse::FileDescriptorResponse(files) = described else {
            panic!("no files: {described:?}");
        };
        for file in files.file_descriptor_proto {
            pool.decode_file_descriptor_proto(&*file)
                .expect("descriptors");
        }
    }
    let calls = pool.services().flat_map(|service| {
        let methods: Vec<_> = service.methods().collect();
        methods
    });
    calls
        .filter(|call| !call.is_client_streaming() && !call.is_server_streaming())
        .collect()
}

fn text() -> impl Strategy<Value = String> {
    const KNOWN: &[&str] = &[
        "a",
        "k-1",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "id=7&source=/cases&specversion=1.0&type=org.example.case",
        "id=7",
        "run/1",
        "é",
        "a b",
        "\0",
    ];
    prop_oneof![
        4 => select(KNOWN).prop_map(ToOwned::to_owned),
        1 => any::<String>(),
        1 => (NAME_MAX - 5..NAME_MAX + 5).prop_map(|length| "x".repeat(length)),
    ]
}

fn scalar(field: &FieldDescriptor) -> BoxedStrategy<Value> {
    match field.kind() {
        Kind::String => text().prop_map(Value::String).boxed(),
        Kind::Bytes => {
            let records = select(&[RECORD, "{}", "[]", " {\"a\":1} "][..]);
            let bodies = damaged(records.prop_map(ToOwned::to_owned), TORN);
            bodies.prop_map(|body| Value::Bytes(body.into())).boxed()
        }
        Kind::Bool => any::<bool>().prop_map(Value::Bool).boxed(),
        Kind::Double => any::<f64>().prop_map(Value::F64).boxed(),
        Kind::Float => any::<f32>().prop_map(Value::F32).boxed(),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => any::<i32>().prop_map(Value::I32).boxed(),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => any::<i64>().prop_map(Value::I64).boxed(),
        Kind::Uint32 | Kind::Fixed32 => any::<u32>().prop_map(Value::U32).boxed(),
        Kind::Uint64 | Kind::Fixed64 => any::<u64>().prop_map(Value::U64).boxed(),
        Kind::Enum(_) => any::<i32>().prop_map(Value::EnumNumber).boxed(),
        Kind::Message(message) => messages(&message).prop_map(Value::Message).boxed(),
    }
}

/// Messages of this type, of which each field may be left out.
fn messages(of: &MessageDescriptor) -> BoxedStrategy<DynamicMessage> {
    let of = of.clone();
    let fields: Vec<_> = of
        .fields()
        .map(|field| {
            let value = if field.is_list() {
                vec(scalar(&field), 0..4).prop_map(Value::List).boxed()
            } else {
                scalar(&field)
            };
            (Just(field), option::weighted(0.6, value))
        })
        .collect();
    fields
        .prop_map(move |fields| {
            let mut message = DynamicMessage::new(of.clone());
            for (field, value) in fields {
                if let Some(value) = value {
                    message.set_field(&field, value);
                }
            }
            message
        })
        .boxed()
}

/// The bytes of messages, some of them with a piece cut out, put in or replaced.
fn wire(of: &MessageDescriptor) -> impl Strategy<Value = Vec<u8>> {
    // A field that nobody knows, one of another type, a group, a length beyond the end, and a number that
    // is too long.
    const PIECES: &[&[u8]] = &[
        &[0x7a, 1, 0],
        &[0x08, 1],
        &[0x0b, 0x0c],
        &[0x12, 0xff, 0xff, 0x03],
        &[0xff; 11],
    ];
    let piece = prop_oneof![
        select(PIECES).prop_map(<[u8]>::to_vec),
        vec(any::<u8>(), 0..4),
    ];
    let change = (any::<Index>(), 0..4_usize, piece);
    let changes = prop_oneof![3 => Just(Vec::new()), 1 => vec(change, 1..3)];
    (messages(of), changes).prop_map(|(message, changes)| changed(message.encode_to_vec(), changes))
}

/// A record that comes out of the node once it is safe, and no other way.
async fn check(
    node: &Grpc,
    channel: &Channel,
    call: &MethodDescriptor,
    sent: &[u8],
    rules: &RecordRules,
) {
    let path = format!("/{}/{}", call.parent_service().full_name(), call.name());
    let path: PathAndQuery = path.parse().expect("a path");
    let mut client = GrpcClient::new(channel.clone());
    client.ready().await.expect("the node serves");
    let request = Request::new(Bytes::copy_from_slice(sent));
    let mut answer = pin!(client.unary(request, path, RawCodec));
    let mut delivered = Vec::new();
    let answer = loop {
        tokio::select! {
            biased;
            delivery = node.next() => {
                let delivery = delivery.expect("the node serves");
                delivered.push((delivery.record.id.to_string(), delivery.record.body.clone()));
                delivery.ack();
            }
            answer = &mut answer => break answer,
        }
    };
    let Ok(record) = Record::decode(sent) else {
        let status = answer.expect_err("it is no message");
        assert_eq!(status.code(), Code::Internal, "{status:?}");
        assert!(status.message().contains("decode"), "{status:?}");
        assert_eq!(delivered, []);
        return;
    };
    let answer = answer.expect("a receipt").into_inner();
    let described = DynamicMessage::decode(call.output(), &*answer).expect("as it is described");
    assert_eq!(described.unknown_fields().count(), 0);
    let receipt = Receipt::decode(answer).expect("a receipt");
    assert!(record.id.is_empty() || receipt.id == record.id);
    let has_names = [&record.id, &record.api]
        .iter()
        .all(|name| name.is_empty() || name.len() <= NAME_MAX && is_visible_ascii(name));
    let body = parse(&record.body, rules);
    match receipt.outcome() {
        Outcome::Safe => {
            assert!(has_names);
            assert_eq!(receipt.detail, "");
            let body = body.expect("it fits the schema");
            assert_eq!(delivered, [(receipt.id, body)]);
        }
        Outcome::Refused => {
            assert_ne!(receipt.detail, "");
            assert_eq!(delivered, []);
            // The attributes of an event have their own rules.
            assert!(!has_names || body.is_err() || !record.event.is_empty());
        }
        Outcome::Retry | Outcome::Unspecified => panic!("{receipt:?}"),
    }
}

#[test]
fn a_call_with_any_message_gets_the_answer_that_its_description_promises() {
    let mut config = ProptestConfig {
        cases: cases().cases.max(CASES_MIN),
        ..cases()
    };
    if matches!(config.rng_seed, RngSeed::Random) && env::var_os("PROPTEST_CASES").is_none() {
        config.rng_seed = RngSeed::Fixed(25);
    }
    let system = System::new();
    let rules = RecordRules::from(Schema::Case);
    let (node, channel, calls) = system.block_on(async {
        let node = connect(&Settings {
            rules: rules.clone(),
            ..settings()
        })
        .await;
        let channel = channel(&node).await;
        let calls = unary_calls(&channel).await;
        (node, channel, calls)
    });
    let names: Vec<_> = calls.iter().map(MethodDescriptor::full_name).collect();
    assert_eq!(
        names,
        ["waypost.v1.Waypost.Send"],
        "`check` knows the calls"
    );
    for call in &calls {
        let mut runner = TestRunner::new(config.clone());
        let checked = runner.run(&wire(&call.input()), |sent| {
            system.block_on(check(&node, &channel, call, &sent, &rules));
            Ok(())
        });
        checked.unwrap_or_else(|why| panic!("{}: {why}", call.full_name()));
    }
}
