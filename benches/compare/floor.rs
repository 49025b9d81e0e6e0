//! The floors: per lane, the barest program that takes a record over HTTP, sends it through the
//! message system, and POSTs it to the API. It has a handler, a client crate, a subscriber and a
//! POST; the broker's confirm comes before the 202, the ack after the POST. It has no validation,
//! ids, routing, supervision, metrics or disk.

use std::{
    collections::HashMap,
    env,
    net::{SocketAddr, TcpListener},
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex},
    time::Duration,
};

use actix_web::{App, HttpResponse, HttpServer, web};
use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, PullConsumer, pull},
    stream,
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::{
    client::{Publisher, Subscriber, SubscriptionAdmin, TopicAdmin},
    model::Message,
};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};
use waypost::proto::{
    Outcome, Passage, Receipt, Record, Summary, WatchRequest,
    waypost_client::WaypostClient,
    waypost_server::{Waypost, WaypostServer},
};

/// POSTs at the same time.
const POSTS: usize = 64;
const PREFETCH: u16 = 256;

/// Publishes to the message system, for the handler.
#[derive(Clone)]
enum LanePublisher {
    None(mpsc::Sender<Bytes>),
    Grpc(Calls),
    Nats(jetstream::Context, String),
    Rabbitmq(Channel, String),
    Pubsub(Publisher),
}

impl LanePublisher {
    /// Whether the message system has confirmed the record.
    async fn publish(&self, body: Bytes) -> bool {
        match self {
            Self::None(posts) => posts.send(body).await.is_ok(),
            Self::Grpc(calls) => calls.carry(body).await,
            Self::Nats(context, subject) => match context.publish(subject.clone(), body).await {
                Ok(ack) => ack.await.is_ok(),
                Err(_) => false,
            },
            Self::Rabbitmq(channel, queue) => {
                let options = BasicPublishOptions {
                    mandatory: true,
                    ..BasicPublishOptions::default()
                };
                let durable = BasicProperties::default().with_delivery_mode(2);
                match channel
                    .basic_publish("".into(), queue.as_str().into(), options, &body, durable)
                    .await
                {
                    Ok(confirm) => matches!(confirm.await, Ok(Confirmation::Ack(None))),
                    Err(_) => false,
                }
            }
            Self::Pubsub(publisher) => publisher
                .publish(Message::new().set_data(body))
                .await
                .is_ok(),
        }
    }
}

/// Runs the floor of `lane` until the process ends.
pub async fn run(lane: &str, listen: SocketAddr) {
    let publisher = match lane {
        "none" => none(),
        "grpc" => grpc().await,
        "nats" => nats().await,
        "rabbitmq" => rabbitmq().await,
        "pubsub" => pubsub().await,
        lane => panic!("no floor for {lane}"),
    };
    let socket = TcpListener::bind(listen).expect("the address is free");
    let server = HttpServer::new(move || {
        App::new()
            .app_data(web::Data::new(publisher.clone()))
            .service(
                web::resource("/")
                    .route(web::get().to(HttpResponse::Ok))
                    .route(web::post().to(
                        async |publisher: web::Data<LanePublisher>, body: web::Bytes| {
                            if publisher.publish(body).await {
                                HttpResponse::Accepted().finish()
                            } else {
                                HttpResponse::ServiceUnavailable().finish()
                            }
                        },
                    )),
            )
    });
    server
        .workers(1)
        .listen(socket)
        .expect("a bound socket")
        .run()
        .await
        .expect("it serves");
}

fn variable(name: &str) -> String {
    env::var(format!("WAYPOST_{name}")).unwrap_or_else(|_| panic!("WAYPOST_{name} is not set"))
}

/// POSTs to the API, over as many connections as there are POSTs at a time.
struct Poster {
    client: awc::Client,
    url: String,
}

impl Poster {
    fn new() -> Rc<Self> {
        let client = awc::Client::builder()
            .connector(awc::Connector::new().limit(POSTS))
            .finish();
        Rc::new(Self {
            client,
            url: variable("API__URL"),
        })
    }

    async fn post(&self, body: Bytes) -> bool {
        let request = self
            .client
            .post(&*self.url)
            .content_type("application/json");
        match request.send_body(body).await {
            Ok(mut answer) => answer.body().await.is_ok() && answer.status().is_success(),
            Err(_) => false,
        }
    }
}

fn none() -> LanePublisher {
    let (sender, records) = mpsc::channel(1024);
    let poster = Poster::new();
    actix_rt::spawn(
        ReceiverStream::new(records).for_each_concurrent(POSTS, move |body| {
            let poster = Rc::clone(&poster);
            async move {
                poster.post(body).await;
            }
        }),
    );
    LanePublisher::None(sender)
}

async fn nats() -> LanePublisher {
    let client = async_nats::connect(variable("LANES__NATS__URL"))
        .await
        .expect("NATS answers");
    let context = jetstream::new(client);
    let subject = variable("LANES__NATS__SUBJECT");
    let stream = context.get_or_create_stream(stream::Config {
        name: variable("LANES__NATS__STREAM"),
        subjects: vec![subject.clone()],
        retention: stream::RetentionPolicy::WorkQueue,
        storage: stream::StorageType::File,
        ..stream::Config::default()
    });
    let durable = variable("LANES__NATS__DURABLE");
    let wanted = pull::Config {
        durable_name: Some(durable.clone()),
        ack_policy: AckPolicy::Explicit,
        ..pull::Config::default()
    };
    let consumer: PullConsumer = stream
        .await
        .expect("a stream")
        .get_or_create_consumer(&durable, wanted)
        .await
        .expect("a consumer");
    let messages = consumer
        .stream()
        .max_messages_per_batch(PREFETCH.into())
        .messages()
        .await
        .expect("messages");
    let poster = Poster::new();
    actix_rt::spawn(messages.for_each_concurrent(POSTS, move |message| {
        let poster = Rc::clone(&poster);
        async move {
            if let Ok(message) = message
                && poster.post(message.payload.clone()).await
            {
                message.ack().await.expect("an ack leaves");
            }
        }
    }));
    LanePublisher::Nats(context, subject)
}

async fn rabbitmq() -> LanePublisher {
    let url = variable("LANES__RABBITMQ__URL");
    let connection = Connection::connect(&url, ConnectionProperties::default())
        .await
        .expect("RabbitMQ answers");
    let queue = variable("LANES__RABBITMQ__QUEUE");
    let publishing = connection.create_channel().await.expect("a channel");
    publishing
        .confirm_select(ConfirmSelectOptions::default())
        .await
        .expect("confirms");
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    let durable = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    publishing
        .queue_declare(queue.as_str().into(), durable, arguments)
        .await
        .expect("a queue");
    let consuming = connection.create_channel().await.expect("a channel");
    consuming
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await
        .expect("a prefetch");
    let options = BasicConsumeOptions::default();
    let deliveries = consuming.basic_consume(
        queue.as_str().into(),
        "".into(),
        options,
        FieldTable::default(),
    );
    let deliveries = deliveries.await.expect("a consumer");
    let poster = Poster::new();
    actix_rt::spawn(async move {
        let _connection = connection;
        let each = deliveries.for_each_concurrent(POSTS, move |delivery| {
            let poster = Rc::clone(&poster);
            async move {
                if let Ok(delivery) = delivery
                    && poster.post(delivery.data.clone().into()).await
                {
                    delivery
                        .ack(lapin::options::BasicAckOptions::default())
                        .await
                        .expect("an ack leaves");
                }
            }
        });
        each.await;
    });
    LanePublisher::Rabbitmq(publishing, queue)
}

async fn create_topic_and_subscription(endpoint: &str, topic: &str, subscription: &str) {
    let topics = TopicAdmin::builder()
        .with_endpoint(endpoint)
        .with_credentials(anonymous::Builder::new().build())
        .build();
    let create = topics.await.expect("a client").create_topic();
    create.set_name(topic).send().await.expect("a topic");
    let subscriptions = SubscriptionAdmin::builder()
        .with_endpoint(endpoint)
        .with_credentials(anonymous::Builder::new().build())
        .build();
    let create = subscriptions.await.expect("a client").create_subscription();
    create
        .set_name(subscription)
        .set_topic(topic)
        .send()
        .await
        .expect("a subscription");
}

async fn pubsub() -> LanePublisher {
    let endpoint = variable("LANES__PUBSUB__ENDPOINT");
    // A bare `host:port` is an emulator.
    let endpoint = if endpoint.contains("://") {
        endpoint
    } else {
        format!("http://{endpoint}")
    };
    let project = variable("LANES__PUBSUB__PROJECT");
    let topic = format!(
        "projects/{project}/topics/{}",
        variable("LANES__PUBSUB__TOPIC")
    );
    let subscription = format!(
        "projects/{project}/subscriptions/{}",
        variable("LANES__PUBSUB__SUBSCRIPTION")
    );
    create_topic_and_subscription(&endpoint, &topic, &subscription).await;
    let publisher = Publisher::builder(&*topic)
        .with_endpoint(&*endpoint)
        .with_credentials(anonymous::Builder::new().build())
        .set_message_count_threshold(200)
        .set_delay_threshold(Duration::from_millis(2));
    let publisher = publisher.build().await.expect("a publisher");
    let subscriber = Subscriber::builder()
        .with_endpoint(&*endpoint)
        .with_credentials(anonymous::Builder::new().build())
        .build();
    let messages = subscriber
        .await
        .expect("a subscriber")
        .subscribe(&*subscription)
        .build();
    let messages = futures_util::stream::unfold(messages, async |mut messages| {
        let next = messages.next().await?;
        Some((next, messages))
    });
    let poster = Poster::new();
    actix_rt::spawn(messages.for_each_concurrent(POSTS, move |message| {
        let poster = Rc::clone(&poster);
        async move {
            if let Ok((message, handler)) = message
                && poster.post(message.data).await
            {
                handler.ack();
            }
        }
    }));
    LanePublisher::Pubsub(publisher)
}

/// Records under way on the stream to the server in the same process.
#[derive(Clone)]
struct Calls {
    records: mpsc::Sender<Record>,
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    by_number: HashMap<u64, oneshot::Sender<()>>,
}

impl Calls {
    async fn carry(&self, body: Bytes) -> bool {
        let (done, receipt) = oneshot::channel();
        let number = {
            let mut waiting = self.waiting.lock().expect("no holder panics");
            waiting.next += 1;
            let number = waiting.next;
            waiting.by_number.insert(number, done);
            number
        };
        let record = Record {
            id: number.to_string(),
            body,
            ..Record::default()
        };
        self.records.send(record).await.is_ok() && receipt.await.is_ok()
    }
}

/// A record, and the stream that its receipt goes to.
type Carried = (Record, mpsc::Sender<Result<Receipt, Status>>);

/// POSTs each record and sends its receipt.
fn post_carried(incoming: mpsc::Receiver<Carried>) {
    let poster = Poster::new();
    actix_rt::spawn(ReceiverStream::new(incoming).for_each_concurrent(
        POSTS,
        move |(record, receipts)| {
            let poster = Rc::clone(&poster);
            async move {
                if poster.post(record.body).await {
                    let receipt = Receipt {
                        id: record.id,
                        outcome: Outcome::Safe.into(),
                        detail: String::new(),
                    };
                    receipts
                        .send(Ok(receipt))
                        .await
                        .expect("the stream is open");
                }
            }
        },
    ));
}

async fn grpc() -> LanePublisher {
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let address = socket.local_addr().expect("a bound socket");
    let (posts, incoming) = mpsc::channel(1024);
    post_carried(incoming);
    let service = WaypostServer::new(Server { posts });
    actix_rt::spawn(async move {
        let server = tonic::transport::Server::builder().add_service(service);
        server
            .serve_with_incoming(TcpListenerStream::new(socket))
            .await
            .expect("it serves");
    });
    let (records, outgoing) = mpsc::channel(1024);
    let calls = Calls {
        records,
        waiting: Arc::default(),
    };
    let mut client = WaypostClient::connect(format!("http://{address}"))
        .await
        .expect("the server answers");
    let mut receipts = client
        .carry(ReceiverStream::new(outgoing))
        .await
        .expect("a stream")
        .into_inner();
    let waiting = Arc::clone(&calls.waiting);
    actix_rt::spawn(async move {
        while let Ok(Some(receipt)) = receipts.message().await {
            let number = receipt.id.parse().expect("a number");
            let done = waiting
                .lock()
                .expect("no holder panics")
                .by_number
                .remove(&number);
            done.expect("it waits").send(()).ok();
        }
    });
    LanePublisher::Grpc(calls)
}

struct Server {
    posts: mpsc::Sender<Carried>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Waypost for Server {
    type WatchStream = Answers<Passage>;
    type CarryStream = ReceiverStream<Result<Receipt, Status>>;

    async fn send(&self, _: Request<Record>) -> Result<Response<Receipt>, Status> {
        Err(Status::unimplemented("a floor"))
    }

    async fn send_all(&self, _: Request<Streaming<Record>>) -> Result<Response<Summary>, Status> {
        Err(Status::unimplemented("a floor"))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("a floor"))
    }

    async fn carry(
        &self,
        records: Request<Streaming<Record>>,
    ) -> Result<Response<Self::CarryStream>, Status> {
        let (receipts, answers) = mpsc::channel(1024);
        let posts = self.posts.clone();
        let mut records = records.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(record)) = records.message().await {
                posts
                    .send((record, receipts.clone()))
                    .await
                    .expect("the poster lives");
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}
