"""--dependency: what a job waits for."""

import re

GOOD = ("COMPLETED",)
KINDS = ("after", "afterany", "afterok", "afternotok", "aftercorr", "singleton")


def parse_dependency(text):
    """`afterok:1:2,afterany:3` -> [(kind, id), ...]; None if Slurm does not take it."""
    parts = []
    for word in re.split(r"[,?]", text) if text else []:
        kind, *ids = word.split(":")
        if kind not in KINDS or (kind == "singleton") == bool(ids):
            return None
        if kind == "singleton":
            parts.append((kind, None))
        for number in ids:
            match = re.fullmatch(r"(\d+)(?:_\d+|_\*)?(?:\+\d+)?", number)
            if not match:
                return None
            parts.append((kind, int(match.group(1))))
    return parts


def verdict(kind, other):
    """met, wait or never. A job that nobody knows counts as done well."""
    if other is None:
        return "met"
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
    for kind, number in parse_dependency(job.request.dependency) or ():
        yield kind, number, singleton(job, jobs) if kind == "singleton" else verdict(kind, jobs.get(number))


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
    for kind, number, result in verdicts(job, jobs):
        if result != "met":
            note = "(failed)" if result == "never" else "(unfulfilled)"
            words.append(("singleton" if number is None else "%s:%d" % (kind, number)) + note)
    return ("?" if "?" in job.request.dependency else ",").join(words) or "(null)"
