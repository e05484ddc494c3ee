"""CallerJobs: the jobs as one caller sees them.

Administrators see and begin all of them. A tenant begins those that concern its adapters only, sees what was begun for
it, and reads names as it writes them; the others' jobs do not exist for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from server.auth.caller import Caller
from server.errors import ForbiddenError, NotFoundError
from server.jobs.queue import JobQueue, JobView, no_such_job
from server.jobs.record import JobRecord
from server.tenancy import CallerAdapters, Note

__all__ = ["CallerJobs"]

# The others read folders of the server's disk, write models of gigabytes or run the model for minutes.
TENANT_KINDS = frozenset({"convert", "import", "mix", "verify"})
# They name folders of the server's disk, or what it reads with its own credentials.
SERVERS_OPTIONS = ("path", "initial_path", "original_path", "url")


class CallerJobs:
    """JobQueue for one caller; every method has the same meaning, for the jobs that the caller may know."""

    def __init__(self, jobs: JobQueue, adapters: CallerAdapters, caller: Caller, note: Note) -> None:
        self._jobs = jobs
        self._adapters = adapters
        self._caller = caller
        self._note = note

    def submit(self, kind: str, options: Mapping[str, Any]) -> JobView:
        """Queue a job, durably.

        Raises:
            ForbiddenError: only administrators may begin this, or the key does not reach the new adapter's name.
            NotFoundError: an adapter that it reads does not exist.
            ServerError: as from the queue.
        """
        owner: dict[str, Any] = {}
        if not self._caller.sees_all:
            self._refuse_what_only_administrators_do(kind, options)
            options = self._stored(kind, options)
            quota = self._adapters.quota
            owner = {"tenant": self._caller.tenant, "max_adapters": quota.max_adapters, "max_bytes": quota.max_bytes}
        self._note({"action": "submit_job", "kind": kind, "adapter": options.get("name")})
        view = self._jobs.submit(kind, options, owner)
        self._note({"job_id": view.record.job_id})
        return self._shown(view)

    def views(self) -> list[JobView]:
        """All jobs that the caller may know, newest first."""
        return [self._shown(view) for view in self._jobs.views() if self._sees(view.record)]

    def get(self, job_id: str) -> JobView:
        """One job; NotFoundError if there is none."""
        view = self._jobs.peek(job_id)
        if view is None or not self._sees(view.record):
            raise no_such_job()
        return self._shown(view)

    def cancel(self, job_id: str) -> JobView:
        """End a job that has not ended."""
        return self._change("cancel_job", job_id, self._jobs.cancel)

    def retry(self, job_id: str) -> JobView:
        """Queue a job again that did not succeed."""
        return self._change("retry_job", job_id, self._jobs.retry)

    def _change(self, action: str, job_id: str, change: Callable[[str], JobView]) -> JobView:
        self.get(job_id)
        self._note({"action": action, "job_id": job_id})
        return self._shown(change(job_id))

    def _refuse_what_only_administrators_do(self, kind: str, options: Mapping[str, Any]) -> None:
        if kind not in TENANT_KINDS:
            raise ForbiddenError(f"jobs of kind {kind!r} need a key with the scope `admin`")
        for option in SERVERS_OPTIONS:
            if options.get(option) is not None:
                raise ForbiddenError(f"`{option}` needs a key with the scope `admin`", param=option)

    def _stored(self, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options under the names by which the store knows the caller's adapters."""
        stored = dict(options)
        find = self._adapters.stored_name
        if "name" in options:
            stored["name"] = self._adapters.own_name(options["name"])
        if kind == "mix":
            stored["adapters"] = [{**one, "name": find(one["name"])} for one in options["adapters"]]
        if kind == "convert":
            stored["adapter"] = find(options["adapter"])
        if kind == "verify":
            stored["adapters"] = [find(name) for name in options["adapters"]] or self._adapters.owned_references()
            if not stored["adapters"]:  # to the queue, none would mean all of everybody's
                raise NotFoundError("there is no adapter of yours", code="adapter_not_found", param="adapters")
        return stored

    def _sees(self, record: JobRecord) -> bool:
        if self._caller.sees_all:
            return True
        if record.owner.get("tenant") != self._caller.tenant:
            return False
        shown = self._adapters.in_own_words({"options": record.options, "inputs": record.inputs})
        names = [one["name"] for one in shown["inputs"]]
        names += [shown["options"]["name"]] if shown["options"].get("name") else []
        return all(self._caller.may_use(name) for name in names)

    def _shown(self, view: JobView) -> JobView:
        """A job in the caller's words."""
        if self._caller.sees_all:
            return view
        record, words = view.record, self._adapters.in_own_words
        error = dict(record.error)
        if "message" in error:
            error["message"] = self._adapters.without_tenant(error["message"])
        return replace(
            view,
            record=replace(
                record,
                options=words(record.options),
                inputs=tuple(words(record.inputs)),
                result=words(record.result),
                error=error,
            ),
        )
