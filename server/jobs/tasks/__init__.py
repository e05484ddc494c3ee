"""The work itself, each kind in its module: `run(task, report)`, in the worker's process."""

from server.jobs.tasks import compensate, convert, extract, fetch, loftq, merge, mix, verify

__all__ = ["TASKS"]

TASKS = {
    "convert": convert.run,
    "extract": extract.run,
    "import": fetch.run,
    "loftq": loftq.run,
    "loftq-compensation": compensate.run,
    "merge": merge.run,
    "mix": mix.run,
    "verify": verify.run,
}
