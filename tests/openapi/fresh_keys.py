"""Hooks of schemathesis: each request brings records that are new.

The node remembers keys, and the sources and ids of events: one that comes again with another record is
refused, which no schema can say.
"""

import copy
import itertools
import re

import schemathesis

KEY = re.compile(r'[!#-~][!-~]{0,254}|"(?:[!#-\[\]-~]|\\["\\]){1,255}"')
LENGTH_MAX = 255
NUMBERS = itertools.count()


@schemathesis.hook
def before_call(context, case, kwargs):
    key = (case.headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and KEY.fullmatch(key):
        case.headers["Idempotency-Key"] = fresh_key(key)
    if "cloudevents" in (case.media_type or ""):
        case.body = copy.deepcopy(case.body)
        for event in case.body if isinstance(case.body, list) else [case.body]:
            if isinstance(event, dict) and isinstance(event.get("id"), str) and event["id"]:
                event["id"] += number()


def fresh_key(key):
    quote = '"' if key[0] == '"' else ""
    characters = re.findall(r"\\.|.", key[1:-1] if quote else key)
    start = number()
    return quote + start + "".join(characters[: LENGTH_MAX - len(start)]) + quote


def number():
    return f"{next(NUMBERS):08}"
