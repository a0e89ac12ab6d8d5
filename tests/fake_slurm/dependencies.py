"""--dependency: what a job waits for."""

import re

from .arrays import named_jobs

GOOD = ("COMPLETED",)
KINDS = ("after", "afterany", "afterok", "afternotok", "aftercorr", "singleton")


def parse_dependency(text):
    """`afterok:1:2,afterany:3_4` -> [(kind, name), ...]; None if Slurm does not take it."""
    parts = []
    for word in re.split(r"[,?]", text) if text else []:
        kind, *ids = word.split(":")
        if kind not in KINDS or (kind == "singleton") == bool(ids):
            return None
        if kind == "singleton":
            parts.append((kind, None))
        for number in ids:
            if not re.fullmatch(r"(\d+)(?:_\d+|_\*)?(?:\+\d+)?", number):
                return None
            parts.append((kind, number))
    return parts


def verdict(kind, job, jobs, name):
    """met, wait or never; of an array's tasks all. A job that nobody knows counts as done well."""
    if kind == "aftercorr" and job.array and "_" not in name:
        name = "%s_%d" % (name, job.array_task if job.array_task is not None else job.array_waiting[0])
    found = [one_verdict(kind, other) for other in named_jobs(jobs, name)]
    return next((word for word in ("never", "wait") if word in found), "met")


def one_verdict(kind, other):
    if kind == "after":
        return "met" if other.started or not other.live else "wait"
    if other.live:
        return "wait"
    if kind == "afterany":
        return "met"
    return "met" if (other.state in GOOD) == (kind != "afternotok") else "never"


def singleton(job, jobs):
    earlier = (other for other in jobs.values() if other.id < job.id and other.uid == job.uid)
    return "wait" if any(other.live and other.request.name == job.request.name for other in earlier) else "met"


def verdicts(job, jobs):
    for kind, name in parse_dependency(job.request.dependency) or ():
        yield kind, name, singleton(job, jobs) if kind == "singleton" else verdict(kind, job, jobs, name)


def judge_dependency(job, jobs):
    found = [result for _, _, result in verdicts(job, jobs)]
    if "?" in job.request.dependency:
        return next((word for word in ("met", "wait") if word in found), "never")
    return next((word for word in ("never", "wait") if word in found), "met")


def show_dependency(job, jobs):
    """As squeue %E: `afterok:157(unfulfilled)`."""
    if job.state != "PENDING":
        return "(null)"
    words = []
    for kind, name, result in verdicts(job, jobs):
        if result != "met":
            note = "(failed)" if result == "never" else "(unfulfilled)"
            words.append(("singleton" if name is None else "%s:%s" % (kind, name)) + note)
    return ("?" if "?" in job.request.dependency else ",").join(words) or "(null)"
