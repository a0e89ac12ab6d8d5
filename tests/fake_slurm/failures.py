"""Nodes that fall silent, and what becomes of their jobs when the controller notices: after SlurmdTimeout, not before.

A node is lost with all its processes (its power failed), or only its slurmd is: then its processes live on, with their
pipes and files, but hear no signal of Slurm's and nobody hears of their end."""

import signal
import time

from .processes import CLUSTER_MARK, NODE_MARK, STEP_MARK, descendants, mark_values, send, start_time, with_marks

SILENT_PART = 0.5       # of SlurmdTimeout, after which sinfo marks a silent node with *


def processes_on(controller, name):
    """By their marks, and what is below them without any."""
    marked = with_marks(**{CLUSTER_MARK: controller.folder, NODE_MARK: name})
    return sorted(set(marked + [pid for pid in descendants(marked) if start_time(pid)]))


def lose(controller, name, kill):
    """For tests: a node falls silent now."""
    node = controller.nodes[name]
    node.lost_at, node.killed = node.lost_at or time.time(), node.killed or kill
    controller.tracking.lost.add(name)
    while kill and processes_on(controller, name):
        send(processes_on(controller, name), signal.SIGKILL)
        controller.reap()


def give_back(controller, name):
    """For tests: a node answers again. What still runs there without a right to is killed."""
    node = controller.nodes[name]
    if node.killed and not node.down:
        take_down(controller, node, "Node unexpectedly rebooted")
    unheard, node.unheard = node.unheard, []
    controller.tracking.lost.discard(name)
    node.lost_at, node.killed, node.silent, node.down, node.reason = None, False, False, False, ""
    for task, ended, status in unheard:
        if not task.given_up:
            ended(task, status)
    rightful = {step.mark for job in controller.jobs.values() for step in job.all_steps() if name in step.shares}
    strays = [pid for pid in processes_on(controller, name) if mark_values(pid).get(STEP_MARK, "") not in {"", *rightful}]
    send(strays + descendants(strays), signal.SIGKILL)
    controller.schedule()


def look_at_nodes(controller, now):
    timeout = controller.conf.number("SlurmdTimeout")
    for node in controller.nodes.values():
        if node.lost_at is None or node.down:
            continue
        node.silent = now - node.lost_at >= timeout * SILENT_PART
        if now - node.lost_at >= timeout:
            take_down(controller, node, "Not responding")


def take_down(controller, node, reason):
    node.down, node.reason = True, reason
    for job in list(controller.jobs.values()):
        if job.live and node.name in job.shares:
            lose_share(controller, job, node.name)
    controller.schedule()


def lose_share(controller, job, name):
    """The job goes, unless --no-kill lets it shrink to what is left of it."""
    survives = job.request.no_kill and len(job.shares) > 1 and name != job.batch_host
    for step in job.all_steps():
        if name in step.shares:
            if name in controller.tracking.lost:
                give_up_tasks(step, name)
            step.node_failed(name, survives)
    controller.nodes[name].holders.pop(job.id, None)
    if len(job.shares) > 1:
        job.shares = {node: share for node, share in job.shares.items() if node != name}
    if survives or job.completing:
        controller.settle(job)
    elif job.request.requeue and job.script is not None:
        controller.end_and_requeue(job, "NODE_FAIL")
    else:
        controller.end(job, "NODE_FAIL", "NodeDown")


def give_up_tasks(step, name):
    for task in step.tasks:
        if task.node == name and task.status is None:
            task.given_up, task.status = True, signal.SIGKILL
    step.shares = {node: share for node, share in step.shares.items() if node != name}
