"""Job arrays: which indices, how tasks leave the waiting remainder, and whom `3_2` or `3_[1-2]` names.

What has not started of an array is one job under the array's number. A task that starts leaves it under a number
of its own; the last one keeps the array's."""

import asyncio
import copy
import re
from dataclasses import dataclass

from .formats import fold_numbers

NO_TASK = 4294967294            # what %a says where there is no task
LONGEST_LIST = 64               # squeue cuts longer lists of indices, unless SLURM_BITSTR_LEN says otherwise
LONGEST_ID = 31


@dataclass
class Array:
    """What all tasks of one array share. limit: how many may run at once, 0 for all."""
    id: int
    count: int
    lowest: int
    highest: int
    step: int
    limit: int = 0

    def variables(self):
        return {"SLURM_ARRAY_JOB_ID": self.id, "SLURM_ARRAY_TASK_COUNT": self.count, "SLURM_ARRAY_TASK_MIN": self.lowest,
                "SLURM_ARRAY_TASK_MAX": self.highest, "SLURM_ARRAY_TASK_STEP": self.step}


def parse_indices(text):
    """`1,5-9:2` -> (1, 5, 7, 9), or None."""
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if not match:
            return None
        low, high, step = int(match.group(1)), int(match.group(2) or match.group(1)), int(match.group(3) or 1)
        if low > high or not step or high - low > 1 << 22:
            return None
        found.update(range(low, high + 1, step))
    return tuple(sorted(found))


def parse_array(text, largest):
    """--array -> (indices, the most at once), or None where Slurm refuses it."""
    words, percent, limit = text.partition("%")
    indices = parse_indices(words)
    if not indices or indices[-1] >= largest or not re.fullmatch(r"\d*", limit):
        return None
    return indices, int(limit or 0)


def make_array(job, text, largest):
    """Turn a job that just got its number into the waiting remainder of an array."""
    indices, limit = parse_array(text, largest)
    step = re.search(r":(\d+)", text)
    job.array = Array(job.id, len(indices), indices[0], indices[-1], int(step.group(1)) if step else 1, limit)
    job.array_waiting = indices


def split_off(controller, job, task):
    """The job of one task, which leaves the remainder; the last one is the remainder itself."""
    if len(job.array_waiting) > 1:
        job.array_waiting = tuple(index for index in job.array_waiting if index != task)
        job = copy.copy(job)
        job.id = controller.new_id()
        job.steps, job.finished, job.allocated = {}, asyncio.Event(), asyncio.Event()
        controller.jobs[job.id] = job
    job.array_waiting, job.array_task = (), task
    return job


def last_one(job):
    """A remainder of one task becomes that task once the scheduler looks at it."""
    if len(job.array_waiting) == 1:
        job.array_task, job.array_waiting = job.array_waiting[0], ()


def running_tasks(controller, job):
    return sum(other.array is job.array and other.shown_state in ("RUNNING", "STOPPED", "CONFIGURING", "COMPLETING", "SUSPENDED")
               for other in controller.jobs.values())


# Names -----------------------------------------------------------------------------------------

def read_name(word):
    """`3`, `3_1`, `3_[1-2]` -> (number, indices or None); None for what is no job's name."""
    match = re.fullmatch(r"(\d+)(?:\+\d+)?(?:_(?:(\d+)|\[([^\[\]]*)\]|\*))?", word)
    if not match:
        return None
    number, task, tasks = match.groups()
    return int(number), (int(task),) if task else parse_indices(tasks.partition("%")[0]) if tasks else None


def named_jobs(jobs, word):
    """The jobs behind a name: a number means one task by its own number, or all of an array."""
    name = read_name(word)
    if not name:
        return []
    number, indices = name
    if indices is None:
        array = [job for job in jobs.values() if job.array and job.array.id == number]
        return array or ([jobs[number]] if number in jobs else [])
    return [job for job in jobs.values() if job.array and job.array.id == number
            and ({job.array_task} | set(job.array_waiting)) & set(indices)]


def single_jobs(controller, word):
    """As named_jobs, for what changes them: a task named alone leaves the remainder for that."""
    name, found = read_name(word), []
    for job in named_jobs(controller.jobs, word):
        named = [index for index in job.array_waiting if name[1] and index in name[1]]
        found += [split_off(controller, job, index) for index in named] if named and job.state == "PENDING" else [job]
    return found


def drop_waiting(job, word):
    """scancel 3_[1-2]: named tasks that wait leave no record. True if others are left."""
    _, indices = read_name(word)
    left = tuple(index for index in job.array_waiting if indices is not None and index not in indices)
    if left:
        job.array_waiting = left
    return bool(left)


# Showing ---------------------------------------------------------------------------------------

def index_list(job, environment=None):
    """`2-4%2`; long even steps are written `1-43:2`."""
    first, last = job.array_waiting[0], job.array_waiting[-1]
    stride = (job.array_waiting + (last,))[1] - first
    even = last - first > 10 and stride > 1 and job.array_waiting == tuple(range(first, last + 1, stride))
    text = "%d-%d:%d" % (first, last, stride) if even else fold_numbers(job.array_waiting)
    size = (environment or {}).get("SLURM_BITSTR_LEN", "")
    longest = int(size) if size.isdigit() else LONGEST_LIST
    if longest and len(text) > longest - 3:
        text = text[:longest - 4] + "..."
    return text + "%%%d" % job.array.limit * bool(job.array.limit and not job.merged)


def id_text(job, environment=None):
    """`3`, `3_1`, `3_[2-4%2]`; without SLURM_BITSTR_LEN the field's size cuts long ones."""
    if not job.array:
        return str(job.id)
    if not job.array_waiting:
        return "%d_%d" % (job.array.id, job.array_task)
    text = "%d_[%s]" % (job.array.id, index_list(job, environment))
    return text if "SLURM_BITSTR_LEN" in (environment or {}) else text[:LONGEST_ID]


def task_text(job, environment=None):
    if not job.array:
        return "N/A"
    return index_list(job, environment) if job.array_waiting else str(job.array_task)


def some_of(job, indices, merged=False):
    """A look at some of a remainder's tasks."""
    view = copy.copy(job)
    view.merged = merged
    view.array_waiting, view.array_task = (indices, None) if len(indices) > 1 else ((), indices[0])
    return view


def one_line_each(jobs):
    """squeue -r"""
    return [view for job in jobs for view in ([some_of(job, (index,)) for index in job.array_waiting] or [job])]


def together(jobs):
    """squeue adds waiting tasks that have a number of their own (started before, or changed) to the remainder's line."""
    waiting = [job for job in jobs if job.array and job.shown_state == "PENDING"]
    lines = []
    for job in jobs:
        others = [other for other in waiting if job in waiting and other is not job and other.array is job.array]
        if not job.array_waiting or not others:
            lines += [job] * (not any(other.array_waiting for other in others))
            continue
        indices = sorted({*job.array_waiting, *(other.array_task for other in others)})
        lines.append(some_of(job, tuple(indices), merged=True))
    return lines
