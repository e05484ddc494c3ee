"""JobRecord: what a job is to do, how far it is, and how that is written down."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

__all__ = ["JOB_ID_PATTERN", "JobRecord", "JobState", "decode_job", "encode_job"]

JOB_ID_PATTERN = re.compile(r"[0-9a-f]{32}")
FORMAT = 1


class JobState(Enum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # the server went down meanwhile

    @property
    def is_final(self) -> bool:
        """Nothing more happens to it, unless it is tried again."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job; immutable, each change makes another.

    Attributes:
        options: what was asked for, as it was checked.
        inputs: the adapters that it reads: name, generation, digest.
        created_at, started_at, finished_at: ISO 8601, UTC; "" until then.
        attempt: counts from 1.
        stage, fraction: how far it is; fraction is from 0 to 1.
        result: what came of it.
        error: code and message, if it failed, and what else a program needs to react.
        owner: of a job that a tenant began: `tenant`, "" for the owner of the public adapters, and its quota
            (`max_adapters`, `max_bytes`). Empty for an administrator's.
    """

    job_id: str
    kind: str
    options: Mapping[str, Any]
    inputs: tuple[Mapping[str, Any], ...] = ()
    state: JobState = JobState.QUEUED
    created_at: str = ""
    started_at: str = ""
    finished_at: str = ""
    attempt: int = 1
    stage: str = ""
    fraction: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, Any] = field(default_factory=dict)
    owner: Mapping[str, Any] = field(default_factory=dict)


def encode_job(record: JobRecord) -> bytes:
    """The contents of a job's file."""
    values = json.loads(json.dumps({"format": FORMAT} | asdict(record) | {"state": record.state.value}))
    return json.dumps(values | {"checksum": _checksum(values)}, sort_keys=True).encode()


def decode_job(data: bytes) -> JobRecord:
    """Read a job's file.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        values = json.loads(data)
        if values.pop("checksum") != _checksum(values) or values["format"] != FORMAT:
            raise ValueError("the job's record is damaged or of another format")
        known = {of.name: values[of.name] for of in fields(JobRecord) if of.name != "owner"}
        known["owner"] = values.get("owner", {})  # there were none in the first of these files
        record = JobRecord(**known | {"state": JobState(values["state"]), "inputs": tuple(values["inputs"])})
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("the job's record is malformed") from error
    if not JOB_ID_PATTERN.fullmatch(record.job_id):
        raise ValueError("the job's id is malformed")
    return record


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
