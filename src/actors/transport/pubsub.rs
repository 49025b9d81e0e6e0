use super::{Broker, Transport, TransportError};
use crate::{delivery::{Delivery, LaneId}, record::Record};
pub struct Pubsub;
#[derive(Clone)] pub struct Settings; impl Settings { pub fn new(_: crate::config::Pubsub)->Self{Self} }
impl Transport for Pubsub {
    const LANE: LaneId = LaneId::Pubsub;
    type Settings = Settings;
    async fn connect(_: &Self::Settings) -> Result<Self, TransportError> { Err(TransportError::Connect("stub".into())) }
    async fn publish(&self, _: &Record) -> Result<(), TransportError> { Ok(()) }
    async fn next(&self) -> Result<Delivery, TransportError> { std::future::pending().await }
    async fn close(&self) {}
    fn broker(&self) -> Broker { Broker::default() }
}
