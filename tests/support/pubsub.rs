use super::rig::Rig;
pub struct Pubsub;
impl Rig for Pubsub {
    type T = waypost::actors::transport::pubsub::Pubsub;
    const SURVIVES_KILL: bool = false;
    async fn start() -> Option<Self> {
        None
    }
    fn settings(&mut self) -> waypost::actors::transport::pubsub::Settings {
        unimplemented!()
    }
    async fn kill(&mut self) {}
    async fn revive(&mut self) {}
}
impl Pubsub {
    pub fn config(&mut self) -> waypost::config::Pubsub {
        unimplemented!()
    }
}
