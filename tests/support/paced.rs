//! Records at a pace that changes.

use std::{rc::Rc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{node::Node, traffic};

const TICK: Duration = Duration::from_millis(10);

/// Posts records until it is dropped.
pub struct PacedRecords(JoinHandle<()>);

impl PacedRecords {
    /// Their keys begin with `name`. `pace` tells the records a second, by the seconds since the begin.
    pub fn start(node: &Node, name: &'static str, pace: impl Fn(f64) -> f64 + 'static) -> Self {
        let client = Rc::new(node.client());
        let records = traffic();
        let task = async move {
            let mut ticks = interval(TICK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let began = Instant::now();
            let mut last = began;
            let (mut due, mut sent) = (0.0, 0_usize);
            loop {
                ticks.tick().await;
                let now = Instant::now();
                // A tick that came late has more.
                due += pace((now - began).as_secs_f64()) * (now - last).as_secs_f64();
                last = now;
                while due >= 1.0 {
                    due -= 1.0;
                    let client = Rc::clone(&client);
                    let record = records[sent % records.len()].clone();
                    let key = format!("{name}-{sent}");
                    actix_rt::spawn(async move { client.post("/", &key, record).await });
                    sent += 1;
                }
            }
        };
        Self(actix_rt::spawn(task))
    }
}

impl Drop for PacedRecords {
    fn drop(&mut self) {
        self.0.abort();
    }
}
