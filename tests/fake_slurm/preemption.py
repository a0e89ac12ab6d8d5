"""PreemptType=preempt/partition_prio: jobs of a lower tier make way for those of a higher one."""

import signal
import time

from .model import Node
from .request import place


def mode_for(controller, job):
    return controller.conf.partitions[job.partition].preempt_mode


def make_room(controller, job, partition):
    """Ask jobs of lower partitions to leave; True if that made room at once."""
    if not controller.conf.preempts:
        return False
    candidates = [other for other in controller.jobs.values() if may_be_preempted(controller, other, partition)]
    candidates.sort(key=lambda other: (controller.conf.partitions[other.partition].priority_tier, -other.started))
    victims = fewest(controller, job, partition, candidates)
    for victim in victims:
        preempt(controller, victim)
    return any(victim.state == "SUSPENDED" for victim in victims)


def may_be_preempted(controller, job, partition):
    if job.shown_state not in ("RUNNING", "STOPPED") or job.preempted_at:
        return False
    own = controller.conf.partitions[job.partition]
    return own.priority_tier < partition.priority_tier and own.preempt_mode != "OFF"


def fits_without(controller, job, partition, gone):
    """Would the job find its place without these and without those that are leaving already?"""
    leaving = {other.id for other in controller.jobs.values() if other.completing or other.preempted_at}
    leaving |= {other.id for other in gone}
    nodes = []
    for node in (controller.nodes[name] for name in partition.nodes):
        if node.usable:
            nodes.append(Node(node.conf, {number: share for number, share in node.holders.items() if number not in leaving}))
    return bool(place(job.request, controller.conf, nodes, partition.max_nodes))


def fewest(controller, job, partition, candidates):
    if fits_without(controller, job, partition, []) or not fits_without(controller, job, partition, candidates):
        return []
    victims = []
    for candidate in candidates:
        victims.append(candidate)
        if fits_without(controller, job, partition, victims):
            break
    for spared in list(victims):
        others = [victim for victim in victims if victim is not spared]
        if fits_without(controller, job, partition, others):
            victims = others
    return victims


def preempt(controller, job):
    """With a grace only the tasks are told, and the job runs on till the first slow cycle after it."""
    grace = controller.conf.partitions[job.partition].grace_time
    mode = mode_for(controller, job)
    if mode == "SUSPEND":
        controller.suspend(job)
        job.made_way = True
    elif not grace:
        end_preempted(controller, job)
    else:
        job.preempted_at = time.time()
        job.end_at = min(job.end_at or job.preempted_at + grace, job.preempted_at + grace)
        controller.soon(warn(controller, job))


async def warn(controller, job):
    """--signal goes out only where the site says so, and then in place of the early TERM."""
    conf, request = controller.conf, job.request
    sends_signal = "send_user_signal" in conf.values["PreemptParameters"] + conf.values["SlurmctldParameters"]
    if not (sends_signal and request.signal):
        for step in job.steps.values():
            step.say_cancelled("")
        await controller.signal_steps(job.steps.values(), signal.SIGCONT, signal.SIGTERM)
        return
    steps = [job.batch] if request.signal_batch and job.batch else job.steps.values()
    await controller.signal_steps(steps, signal.SIGCONT, request.signal, direct=request.signal_batch)


def end_preempted(controller, job):
    job.preempted_at = time.time()
    if mode_for(controller, job) == "REQUEUE" and job.request.requeue and job.script is not None:
        controller.end_and_requeue(job, "PREEMPTED")
    else:
        controller.end(job, "PREEMPTED")


def resume_those_who_made_way(controller):
    for job in controller.jobs.values():
        if job.made_way and job.state == "SUSPENDED" and all(has_room(controller.nodes[name], share)
                                                             for name, share in job.shares.items()):
            controller.resume(job)


def has_room(node, share):
    return node.free_cpus >= share.cpus and set(share.gpus) <= set(node.free_gpus)
