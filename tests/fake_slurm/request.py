"""From options to what a job asks, whether the cluster can ever give it, and where it would run."""

import re
from dataclasses import replace

from .formats import UNLIMITED, expand, parse_megabytes, parse_moment, parse_signal, parse_time
from .model import Request, Share
from .options import Refusal

FAILED = {"sbatch": "Batch job submission failed", "salloc": "Job submit/allocate failed", "srun": "Unable to allocate resources"}


def failed(tool, words):
    return "%s: error: %s: %s" % (tool, FAILED[tool], words)


# Reading ---------------------------------------------------------------------------------------

def node_range(text):
    low, _, high = text.partition("-")
    scale = {"k": 1024, "m": 1048576}
    numbers = [int(part.rstrip("kKmM")) * scale.get(part[-1].lower(), 1) for part in (low, high or low)]
    return numbers[0], numbers[1]


def gpu_count(text):
    """gpu:2, gpu:a100:2, a100:2, 2 -> 2"""
    last = text.split(":")[-1]
    return int(last) if last.isdigit() else 1


def gres_gpus(tool, text):
    """--gres -> GPUs a node."""
    total = 0
    for part in text.split(","):
        name = part.split(":")[0]
        if name not in ("gpu", "none", ""):
            raise Refusal(1, "%s: error: Invalid generic resource (gres) specification" % tool)
        total += gpu_count(part) if name == "gpu" else 0
    return total


def user_signal(text):
    """[B:|R:]SIG[@N] -> number, batch only, lead in seconds"""
    flags, name, lead = re.fullmatch(r"(?:((?:b|r|rb|br)):)?([^@:]+)(?:@(\d+))?", text, re.I).groups()
    return {"signal": parse_signal(name), "signal_batch": "B" in (flags or "").upper(),
            "signal_lead": 60 if lead is None else int(lead)}


def sizes(options):
    """The part of a request that says how big."""
    found = {}
    if "nodes" in options:
        low, high = node_range(options["nodes"])
        found.update(min_nodes=low, max_nodes=high, nodes_given=True)
    elif "nodelist" in options:
        count = len(set(expand(options["nodelist"])))
        found.update(min_nodes=count, max_nodes=count)
    for option, name in (("ntasks", "ntasks"), ("ntasks-per-node", "ntasks_per_node"),
                         ("cpus-per-task", "cpus_per_task")):
        if option in options:
            found[name] = int(options[option])
    for option, name in (("mem", "memory"), ("mem-per-cpu", "memory_per_cpu")):
        if option in options:
            found[name] = parse_megabytes(options[option])
    for option, name in (("gpus", "gpus"), ("gpus-per-node", "gpus_per_node"), ("gpus-per-task", "gpus_per_task")):
        if option in options:
            found[name] = gpu_count(options[option])
    found["cpus_given"] = "cpus-per-task" in options
    if "nodes" not in options and "nodelist" not in options:
        found["max_nodes"] = 1 << 20
    return found


def read_request(tool, options, conf, default_name, now):
    partitions = tuple(options["partition"].split(",")) if "partition" in options else tuple(
        name for name, partition in conf.partitions.items() if partition.default)[:1]
    gres = options.get("gres", "")
    found = sizes(options)
    if gres:
        found["gpus_per_node"] = gres_gpus(tool, gres)
    if "signal" in options:
        found.update(user_signal(options["signal"]))
    return Request(
        name=options.get("job-name", default_name), partitions=partitions, gres=gres,
        nodelist=tuple(expand(options.get("nodelist", ""))), exclude=tuple(expand(options.get("exclude", ""))),
        features=options.get("constraint", ""), exclusive="exclusive" in options and tool != "step",
        time_limit=parse_time(options["time"]) if "time" in options else None,
        dependency=options.get("dependency", ""), hold="hold" in options, comment=options.get("comment", ""),
        begin=parse_moment(options["begin"], now) if "begin" in options else None,
        reservation=options.get("reservation", ""), no_kill="no-kill" in options,
        requeue="no-requeue" not in options and ("requeue" in options or conf.values["JobRequeue"] != "0"),
        append=options.get("open-mode", "t").lower().startswith("a"),
        kill_on_invalid_dep=options.get("kill-on-invalid-dep", "no").lower().startswith("y"), **found)


# Judging ---------------------------------------------------------------------------------------

def judge(tool, request, conf):
    """Refuse what Slurm refuses at once; returns True where it leaves a FAILED record behind."""
    for name in request.partitions:
        if name not in conf.partitions:
            raise Refusal(1, "%s: error: invalid partition specified: %s" % (tool, name),
                          failed(tool, "Invalid partition name specified"))
    if not request.partitions:
        raise Refusal(1, failed(tool, "No partition specified or system default partition"))
    for name in request.nodelist + request.exclude:
        if name not in conf.nodes:
            raise Refusal(1, failed(tool, "Invalid node name specified"))
    features = {word for node in conf.nodes.values() for word in node.features.split(",")}
    if set(re.findall(r"\w+", request.features)) - features:
        raise Refusal(1, failed(tool, "Invalid feature specification"))
    if request.reservation:             # nobody has made any here
        raise Refusal(1, failed(tool, "Requested reservation is invalid"))
    if request.hold:
        return
    judge_sizes(tool, request, conf)
    if conf.is_set("EnforcePartLimits", "ALL", "ANY", "YES"):
        judge_limits(tool, request, conf)


def judge_sizes(tool, request, conf):
    biggest = max(node.memory for node in conf.nodes.values())
    memory = request.memory or (request.memory_per_cpu or 0) * request.cpus_per_task
    if memory > biggest:
        raise Refusal(1, "%s: error: Memory specification can not be satisfied" % tool,
                      failed(tool, "Requested node configuration is not available"))
    if request.gpus_per_node > max(node.gpus for node in conf.nodes.values()):
        raise Refusal(1, failed(tool, "Requested node configuration is not available"))
    if request.gpus > sum(node.gpus for node in conf.nodes.values()):
        raise Refusal(1, failed(tool, "Requested node configuration is not available"))


def judge_limits(tool, request, conf):
    for name in request.partitions:
        reason = partition_reason(request, conf, name)
        words = {"PartitionTimeLimit": "Requested time limit is invalid (missing or exceeds some limit)",
                 "PartitionNodeLimit": "Node count specification invalid",
                 "PartitionConfig": "More processors requested than permitted"}
        if reason == "PartitionConfig" and request.min_nodes > len(conf.partitions[name].nodes):
            reason = "PartitionNodeLimit"
        if reason:
            raise Refusal(1, failed(tool, words[reason]))


def exceeds(value, bound):
    return bound != UNLIMITED and (value == UNLIMITED or value > bound)


def partition_reason(request, conf, name):
    """Why a job can never start in a partition, or ''."""
    partition = conf.partitions[name]
    if request.time_limit is not None and exceeds(request.time_limit, partition.max_time):
        return "PartitionTimeLimit"
    if exceeds(request.min_nodes, partition.max_nodes):
        return "PartitionNodeLimit"
    nodes = [conf.nodes[node] for node in partition.nodes]
    if request.min_nodes > len(nodes) or request.cpus_per_task > max(node.cpus for node in nodes):
        return "PartitionConfig"
    return ""


# Placing ---------------------------------------------------------------------------------------

def tasks_that_fit(request, conf, node, cpus, memory, gpus):
    """How many of the job's tasks this much of a node can take."""
    if request.exclusive and cpus < node.cpus or cpus < request.cpus_per_task:
        return 0
    if gpus < request.gpus_per_node or gpus < request.gpus_per_task or (request.gpus and not gpus):
        return 0
    if request.features and not set(re.findall(r"\w+", request.features)) <= set(node.features.split(",")):
        return 0
    count = cpus // request.cpus_per_task
    if conf.memory_counts:
        if memory < memory_wanted(request, node):
            return 0
        if request.memory_per_cpu:
            count = min(count, memory // (request.memory_per_cpu * request.cpus_per_task))
    if request.gpus_per_task:
        count = min(count, gpus // request.gpus_per_task)
    return min(count, request.ntasks_per_node) if request.ntasks_per_node else count


def memory_wanted(request, node):
    """On each node; who names no amount takes all of it."""
    return request.memory or (0 if request.memory_per_cpu else node.memory)


def choose(request, fits, limit):
    """The fewest nodes that do, the named ones first; {} if they do not suffice."""
    most = min(request.max_nodes, limit) if limit != UNLIMITED else request.max_nodes
    order = [name for name in fits if name in request.nodelist] + [name for name in fits if name not in request.nodelist]
    wanted = max(request.min_nodes, len(request.nodelist))
    if request.ntasks and request.ntasks_per_node:
        wanted = max(wanted, -(-request.ntasks // request.ntasks_per_node))
    chosen = order[:wanted]
    while sum(fits[name] for name in chosen) < request.tasks and len(chosen) < min(most, len(order)):
        chosen.append(order[len(chosen)])
    if len(chosen) < wanted or len(chosen) > max(most, wanted) or not set(request.nodelist) <= set(chosen):
        return []
    enough = sum(fits[name] for name in chosen) >= request.tasks
    return [name for name in fits if name in chosen] if enough else []


def deal(count, fits, even):
    """Tasks over nodes: round about when a node count was given, else one node after the other."""
    dealt = dict.fromkeys(fits, 1 if even or count >= len(fits) else 0)
    left = count - sum(dealt.values())
    while left > 0:
        before = left
        for name in dealt:
            take = min(left, fits[name] - dealt[name], 1 if even else left)
            dealt[name] += take
            left -= take
        if left == before:
            break
    return dealt


def place(request, conf, nodes, limit):
    """{node: Share} for a job on these Node objects as they are now, or {}."""
    fits = {}
    for node in nodes:
        if node.name not in request.exclude and node.usable:
            count = tasks_that_fit(request, conf, node.conf, node.free_cpus, node.free_memory, len(node.free_gpus))
            if count > 0:
                fits[node.name] = count
    chosen = choose(request, fits, limit)
    dealt = deal(request.tasks, {name: fits[name] for name in chosen}, request.nodes_given)
    by_name = {node.name: node for node in nodes}
    shares = {name: share_on(request, conf, by_name[name], count) for name, count in dealt.items()}
    return deal_gpus(request, shares, by_name) if request.gpus else shares


def share_on(request, conf, node, tasks):
    cpus = node.conf.cpus if request.exclusive else max(tasks, 1) * request.cpus_per_task
    memory = 0
    if conf.memory_counts:
        memory = (request.memory_per_cpu or 0) * cpus or memory_wanted(request, node.conf)
    gpus = request.gpus_per_node or request.gpus_per_task * tasks
    return Share(cpus, memory, node.free_gpus[:gpus], tasks)


def deal_gpus(request, shares, by_name):
    """-G: as many as a node has, one node after the other, but one for each."""
    left, result = request.gpus, {}
    for position, (name, share) in enumerate(shares.items()):
        others = len(shares) - position - 1
        take = max(0, min(left - others, len(by_name[name].free_gpus)))
        result[name] = replace(share, gpus=by_name[name].free_gpus[:take])
        left -= take
    return result if left == 0 else {}
