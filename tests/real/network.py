"""A network of hosts on one machine: one bridge, and for each node a network namespace with an address of its own.

A program started `inside` a node has its own interfaces, ports, host name and /etc/hosts, and, if asked, its own
/tmp. The machine itself is .254 on the bridge: the login node."""

import json
import subprocess
import zlib
from pathlib import Path

NUMBERS = 200

# As one namespace of mounts a node: its names, then its own /tmp with the shared folders bound back into it.
# Not `ip netns exec`, which mounts /sys anew: slurmd 22.05.8 then stops with "Unable to initialize cgroup plugin".
ENTER = """\
node=$1 hosts=$2 folders=$3; shift 3
hostname "$node"
mount --bind "$hosts" /etc/hosts
if [ -n "$folders" ]; then
    mount --bind /tmp /mnt
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    IFS=:
    for folder in $folders; do
        case $folder in /tmp/?*) mkdir -p "$folder"; mount --bind "/mnt/${folder#/tmp/}" "$folder";; esac
    done
    umount -l /mnt
fi
exec "$@"
"""


class Network:
    """`shared`: folders that all nodes see; None leaves the whole of /tmp common to them."""

    def __init__(self, folder, number, nodes, shared=None):
        self.folder, self.number, self.nodes, self.shared = Path(folder), number, nodes, shared
        self.bridge = "llmrun%d" % number
        self.login = "10.77.%d.254" % number
        self.address = {node: "10.77.%d.%d" % (number, place) for place, node in enumerate(nodes, 1)}

    @classmethod
    def new(cls, folder, nodes, shared):
        first = zlib.crc32(str(folder).encode())
        numbers = ((first + step) % NUMBERS for step in range(NUMBERS))
        number = next(number for number in numbers if not Path("/sys/class/net/llmrun%d" % number).exists())
        network = cls(folder, number, nodes, None if shared is None else [str(path) for path in [folder, *shared]])
        network.file.write_text(json.dumps({"number": number, "nodes": nodes, "shared": network.shared}))
        return network

    @classmethod
    def of(cls, folder):
        """The network of a cluster's folder; None if its nodes are not hosts."""
        file = cls.file_in(folder)
        return cls(folder, **json.loads(file.read_text())) if file.exists() else None

    @staticmethod
    def file_in(folder):
        return Path(folder) / "state" / "network.json"

    @property
    def file(self):
        return self.file_in(self.folder)

    def namespace(self, node):
        return "%s-%s" % (self.bridge, node)

    def link(self, node):
        """The end of a node's cable at the bridge."""
        return "lr%d%s" % (self.number, node)

    def up(self):
        lines = ["link add %s type bridge" % self.bridge, "addr add %s/24 dev %s" % (self.login, self.bridge),
                 "link set %s up" % self.bridge]
        for node in self.nodes:
            subprocess.run(["ip", "netns", "add", self.namespace(node)], check=True)
            lines += ["link add %s type veth peer name eth0 netns %s" % (self.link(node), self.namespace(node)),
                      "link set %s master %s up" % (self.link(node), self.bridge)]
        ip_batch(lines)
        for node in self.nodes:
            ip_batch(["addr add %s/24 dev eth0" % self.address[node], "link set eth0 up", "link set lo up"],
                     "-n", self.namespace(node))
        names = "".join("%s %s\n" % (address, node) for node, address in self.address.items())
        self.hosts_file().write_text("127.0.0.1 localhost\n%s login\n%s" % (self.login, names))

    def down(self):
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", self.namespace(node)], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", self.bridge], stderr=subprocess.DEVNULL)

    def cut(self, node):
        subprocess.run(["ip", "link", "set", self.link(node), "down"], check=True)

    def mend(self, node):
        subprocess.run(["ip", "link", "set", self.link(node), "up"], check=True)

    def firewall(self, closed, to, but):
        """A node drops the connections of another, but those to one port."""
        rule = "ip saddr %s tcp dport != %d tcp flags & (syn|ack) == syn drop" % (self.address[to], but)
        subprocess.run(["nsenter", "--net=/run/netns/" + self.namespace(closed), "nft", "-f", "-"], check=True, text=True,
                       input="table inet wall { chain in { type filter hook input priority 0; %s; }; }" % rule)

    def inside(self, node, argv):
        """The command line that runs argv on a node; every program in it replaces itself by the next."""
        return ["nsenter", "--net=/run/netns/" + self.namespace(node),
                "unshare", "--mount", "--uts", "--propagation", "private",
                "bash", "-ec", ENTER, "enter", node, str(self.hosts_file()), ":".join(self.shared or []), *argv]

    def hosts_file(self):
        return self.folder / "state" / "hosts"


def ip_batch(lines, *options):
    subprocess.run(["ip", *options, "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True)
