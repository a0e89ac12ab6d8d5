"""Nodes that are hosts of their own: addresses, ports, host names and /tmp, a firewall, a pulled cable, a power failure."""

import pytest
from conftest import Site
from real.cluster import RealCluster


@pytest.fixture
def hosts(tmp_path, engine):
    """A user's folder on four hosts that have nothing in common but it, and the engine's folders."""
    for name in ("cluster", "home"):
        (tmp_path / name).mkdir()
    build, model = engine
    shared = [tmp_path, model.parent] + [build] * str(build).startswith("/tmp/")
    with RealCluster(tmp_path / "cluster", kill_wait=3, hosts=True, shared=shared, SlurmdTimeout=15) as cluster:
        site = Site(tmp_path / "home", cluster, engine)
        site.config()
        yield site


def test_workers_are_reached_by_their_hosts_addresses(hosts):
    hosts.config(slurm={"nodes": 3})
    hosts.llmrun("submit", "config.json", "--wait")
    command = hosts.wait_for_event("engine_started")["command"]
    for node in hosts.events()[0]["nodes"][1:]:
        assert hosts.cluster.address(node) + ":" in command
    assert len(hosts.results()) == 6


def test_a_firewall_between_head_and_worker_is_named_with_both_nodes(hosts):
    hosts.cluster.firewall("node2", to="node1")
    hosts.config(slurm={"nodes": 2, "nodelist": "node[1-2]"})
    said = hosts.llmrun("submit", "config.json", "--wait", code=3)
    assert "node1 cannot reach the RPC worker on node2, port " in said and "is a firewall between the nodes?" in said


def test_a_pulled_cable_and_a_power_failure_cost_no_prompt(hosts):
    hosts.slow()
    hosts.config(slurm={"jobs": 4, "cpus_per_node": 4})
    hosts.llmrun("submit", "config.json")
    hosts.answering(10, 120)
    where = [event["nodes"][0] for event in hosts.events() if event["event"] == "start"]
    assert len(set(where)) == 4
    hosts.cluster.cut(where[1])
    hosts.cluster.lose_node(where[2])
    hosts.ended(timeout_s=200)
