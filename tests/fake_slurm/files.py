"""Where output goes: the patterns of sbatch -o and srun -o."""

import os
import re

from .arrays import NO_TASK


def name_files(job):
    """%j and the like are known only when a job, or a task of an array, has its number."""
    for name, pattern in job.patterns.items():
        path = os.path.join(job.workdir, expand_pattern(pattern, job)) if pattern else ""
        setattr(job, name, "/dev/null" if pattern == "none" else path)


def expand_pattern(path, job, step=None, task=None):
    """%j %x %N %t ...; a number in between pads: %4j. A backslash turns patterns off."""
    if "\\" in path:
        return path.replace("\\", "")
    values = {"%": "%", "j": job.id, "A": job.array.id if job.array else job.id,
              "a": NO_TASK if job.array_task is None else job.array_task,
              "J": job.id if step is None else step.label, "x": job.request.name, "u": job.user,
              "N": os.uname().nodename.split(".")[0], "n": task.nodeid if task else 0, "t": task.procid if task else 0,
              "s": step.id if step else "batch"}

    def value(match):
        width, letter = match.groups()
        text = str(values.get(letter, match.group(0)))
        return text.zfill(min(int(width), 10)) if width and text.isdigit() else text
    return re.sub(r"%(\d*)([%jAaJxuNnts])", value, path)
