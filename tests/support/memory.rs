//! The message system in memory, held to the same contract.

use waypost::transport::memory::{Broker, Faults, Memory};

use super::rig::Rig;

#[derive(Default)]
pub struct InMemory {
    brokers: Vec<Broker>,
}

impl InMemory {
    fn all(&self, faults: Faults) {
        for broker in &self.brokers {
            broker.set_faults(faults);
            broker.drop_connection();
        }
    }
}

impl Rig for InMemory {
    type T = Memory;
    /// The broker outlives its connections, and a kill is no more than their end.
    const SURVIVES_KILL: bool = true;

    async fn start() -> Option<Self> {
        Some(Self::default())
    }

    fn settings(&mut self) -> Broker {
        let broker = Broker::default();
        self.brokers.push(broker.clone());
        broker
    }

    async fn kill(&mut self) {
        self.all(Faults {
            refuse_connects: true,
            ..Faults::default()
        });
    }

    async fn revive(&mut self) {
        self.all(Faults::default());
    }
}
