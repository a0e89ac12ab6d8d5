"""The variables each role sees: batch script, task of a step, salloc's command.

What is not named here is left as the submitter had it, leaks of an outer job included: that is how
a job submitted from inside a job comes to believe it is a step or an array task."""

import os

from .formats import counts, fold

LOGIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def exported(environment, wish, login):
    """--export: ALL | NONE | NIL | [ALL,]A,B=1. Everything that begins with SLURM always goes along."""
    if wish in (None, "", "ALL"):
        return dict(environment)
    kept = {name: value for name, value in environment.items() if name.startswith("SLURM")}
    words = wish.split(",")
    if words[0] == "ALL":
        kept = dict(environment)
        words = words[1:]
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            kept[name] = value
        elif name in environment:
            kept[name] = environment[name]
    if login and not wish.startswith("ALL"):
        kept["SLURM_EXPORT_ENV"] = wish
        kept["SLURM_GET_USER_ENV"] = "1"
    return kept


def login_variables(environment, bin_folder):
    """What Slurm fetches from a login shell of the user, for sbatch --export=NONE."""
    kept = {name: environment[name] for name in ("HOME", "USER", "LOGNAME", "SHELL") if name in environment}
    return {**kept, "PATH": bin_folder + ":" + LOGIN_PATH}


def job_variables(job, conf, conf_path):
    request, shares = job.request, list(job.shares.values())
    nodes = fold(job.nodes)
    values = {
        "SLURM_JOB_ID": job.id, "SLURM_JOBID": job.id, "SLURM_JOB_NAME": request.name,
        "SLURM_JOB_NODELIST": nodes, "SLURM_NODELIST": nodes,
        "SLURM_JOB_NUM_NODES": len(shares), "SLURM_NNODES": len(shares),
        "SLURM_JOB_PARTITION": job.partition, "SLURM_TASKS_PER_NODE": counts(job.tasks_per_node),
        "SLURM_JOB_CPUS_PER_NODE": counts([share.cpus for share in shares]),
        "SLURM_CLUSTER_NAME": conf.values["ClusterName"], "SLURM_CONF": conf_path,
        "SLURM_JOB_USER": job.user, "SLURM_JOB_UID": job.uid, "SLURM_JOB_GID": job.gid,
        "SLURM_SUBMIT_DIR": job.environment.get("SLURM_SUBMIT_DIR", job.workdir), "SLURM_SUBMIT_HOST": os.uname().nodename,
        "SLURM_NODE_ALIASES": "(null)", **asked_variables(request),
    }
    if conf.since("23.11"):
        del values["SLURM_NODE_ALIASES"]
    if conf.since("23.02"):
        values["SLURM_JOB_START_TIME"] = int(job.started)
        if job.end_at:
            values["SLURM_JOB_END_TIME"] = int(job.end_at)
    if job.restarts:
        values["SLURM_RESTART_COUNT"] = job.restarts
    if job.array:
        values.update(job.array.variables(), SLURM_ARRAY_TASK_ID=job.array_task)
    return values


def asked_variables(request):
    """Only what the user asked for leaves a variable; --gres leaves none."""
    ntasks = request.ntasks or (request.tasks if request.ntasks_per_node else 0)
    values = {"SLURM_NTASKS": ntasks, "SLURM_NPROCS": ntasks, "SLURM_NTASKS_PER_NODE": request.ntasks_per_node,
              "SLURM_CPUS_PER_TASK": request.cpus_per_task if request.cpus_given else 0,
              "SLURM_MEM_PER_NODE": request.memory, "SLURM_MEM_PER_CPU": request.memory_per_cpu,
              "SLURM_GPUS": request.gpus, "SLURM_GPUS_PER_TASK": request.gpus_per_task,
              "SLURM_GPUS_PER_NODE": 0 if request.gres else request.gpus_per_node}
    return {name: value for name, value in values.items() if value}


def gpu_variables(gpus):
    if not gpus:
        return {}
    indices = ",".join(str(gpu) for gpu in gpus)
    return {"CUDA_VISIBLE_DEVICES": indices, "ROCR_VISIBLE_DEVICES": indices, "GPU_DEVICE_ORDINAL": indices,
            "ZE_AFFINITY_MASK": indices, "SLURM_GPUS_ON_NODE": len(gpus), "SLURM_JOB_GPUS": indices}


def node_variables(node, nodeid, procid, localid, gtids, share):
    return {"SLURMD_NODENAME": node, "SLURM_TOPOLOGY_ADDR": node, "SLURM_TOPOLOGY_ADDR_PATTERN": "node",
            "SLURM_NODEID": nodeid, "SLURM_PROCID": procid, "SLURM_LOCALID": localid, "SLURM_GTIDS": gtids,
            "SLURM_CPUS_ON_NODE": share.cpus}


def written(values):
    return {name: str(value) for name, value in values.items()}


def batch_variables(job, conf, conf_path):
    node = job.nodes[0]
    values = {**login_defaults(conf), **job.environment}
    if not job.request.ntasks and not job.request.ntasks_per_node:
        for name in ("SLURM_NTASKS", "SLURM_NPROCS"):
            values.pop(name, None)
    values.update(written({**job_variables(job, conf, conf_path),
                           **node_variables(node, 0, 0, 0, 0, job.shares[node]), **gpu_variables(job.shares[node].gpus),
                           "SLURM_PRIO_PROCESS": 0, "ENVIRONMENT": "BATCH", "HOSTNAME": node}))
    if job.command == "(stdin)":
        values.pop("SLURM_JOB_NAME")
    return values


def allocation_variables(job, conf, conf_path):
    """salloc's command: knows the job, but runs on no node of it."""
    values = job_variables(job, conf, conf_path)
    for name in ("SLURM_JOB_UID", "SLURM_JOB_GID", "SLURM_JOB_USER"):
        del values[name]
    return written(values)


def task_variables(step, task, environment, conf, conf_path):
    """In a job of its own srun sets what salloc would; in one that exists it takes most of that from
    its environment, and where that was cleared, SLURM_JOB_NODELIST is the step's (seen on 22.05.8)."""
    job, share = step.job, step.shares[task.node]
    known = job_variables(job, conf, conf_path)
    own_job = job.script is None and job.client is step.client
    if own_job:
        values = {name: value for name, value in known.items() if name != "SLURM_NODE_ALIASES"}
    else:
        kept = ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_NODELIST", "SLURM_JOB_PARTITION", "SLURM_CONF", "SLURM_JOB_USER",
                "SLURM_JOB_UID", "SLURM_JOB_GID", "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME")
        values = {name: known[name] for name in kept if name in known}
        values.update(SLURM_DISTRIBUTION="cyclic", SLURM_JOB_CPUS_PER_NODE_PACK_GROUP_0=known["SLURM_JOB_CPUS_PER_NODE"])
    values.update(step_variables(step, task, share))
    if share.gpus:
        values["SLURM_STEP_GPUS"] = values["CUDA_VISIBLE_DEVICES"]
    return {"SLURM_JOB_NODELIST": fold(step.nodes), "SLURM_JOB_NAME": step.name, **login_defaults(conf),
            **environment, **written(values)}


def step_variables(step, task, share):
    ntasks = len(step.tasks)
    local = [str(other.procid) for other in step.tasks if other.node == task.node]
    tasks_per_node = counts([share.tasks for share in step.shares.values()])
    gpus = gpu_variables(share.gpus)
    gpus.pop("SLURM_JOB_GPUS", None)
    return {
        "SLURM_NNODES": len(step.nodes), "SLURM_NTASKS": ntasks, "SLURM_NPROCS": ntasks,
        "SLURM_TASKS_PER_NODE": tasks_per_node, "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
        "SLURM_STEP_ID": step.id, "SLURM_STEPID": step.id, "SLURM_STEP_NODELIST": fold(step.nodes),
        "SLURM_STEP_NUM_NODES": len(step.nodes), "SLURM_STEP_NUM_TASKS": ntasks,
        "SLURM_STEP_LAUNCHER_PORT": 40000, "SLURM_SRUN_COMM_HOST": "127.0.0.1", "SLURM_SRUN_COMM_PORT": 40001,
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_PRIO_PROCESS": 0,
        **node_variables(task.node, task.nodeid, task.procid, task.localid, ",".join(local), share), **gpus}


def login_defaults(conf):
    return {"TMPDIR": "/tmp", "SLURM_WORKING_CLUSTER": "%s:127.0.0.1:6817:9728:109" % conf.values["ClusterName"]}
