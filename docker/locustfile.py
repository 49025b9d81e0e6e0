"""Posts each record of traffic.json exactly once, over all users together, and stops when none is left.

The web page sets users, spawn rate and host; each start of a test is one pass. With `--headless` the program ends after one pass,
with exit status 1 if a record was refused. `TRAFFIC` names another file.
"""

import itertools
import json
import os
import uuid
from pathlib import Path

import gevent
from locust import FastHttpUser, between, events, task
from locust.runners import MasterRunner, WorkerRunner

TRAFFIC = Path(os.environ.get("TRAFFIC", Path(__file__).parent.parent / "traffic.json"))
RECORDS = [json.dumps(record, ensure_ascii=False).encode() for record in json.loads(TRAFFIC.read_bytes())]


class Pass:
    """One pass through the records. Users are greenlets of one thread, so it needs no lock."""

    def __init__(self):
        # One key per record and pass: a repeated POST is a duplicate, a second pass is not.
        run = uuid.uuid4().hex
        self.left = ((f"{run}-{index}", record) for index, record in enumerate(RECORDS))
        self.answered = itertools.count(1)


current = Pass()


@events.init.add_listener
def one_process(environment, **_):
    if isinstance(environment.runner, (MasterRunner, WorkerRunner)):
        raise SystemExit("run Locust as one process: each worker would post every record")
    # A user that stops first reads the answer to its record.
    environment.stop_timeout = environment.stop_timeout or 30


@events.test_start.add_listener
def begin(**_):
    global current
    current = Pass()


class Client(FastHttpUser):
    wait_time = between(0.2, 0.9)

    @task
    def post(self):
        this = current
        key, record = next(this.left, (None, None))
        if record is None:
            return
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        with self.client.post("/", data=record, headers=headers, catch_response=True) as answer:
            if answer.status_code == 202:
                answer.success()
            else:
                answer.failure(f"not taken: {answer.status_code} {answer.text}")
        if next(this.answered) == len(RECORDS):
            runner = self.environment.runner
            # With a web page, Locust stays up with the results. Another greenlet stops the users,
            # because stopping kills this one.
            gevent.spawn(runner.stop if self.environment.web_ui else runner.quit)
