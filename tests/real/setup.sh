#!/bin/bash
# Installs what `make test-real` needs on a Debian machine, as root. Quick when all is there.
# The packages' own daemons are not started: the tests start theirs.
set -euo pipefail

PROGRAMS=(
    slurmctld:slurm-wlm slurmd:slurm-wlm sbatch:slurm-wlm munged:munge   # the cluster
    cmake:cmake ninja:ninja-build g++:g++ strip:binutils                 # llama.cpp
    prometheus:prometheus nginx:nginx-light ip:iproute2 nft:nftables curl:curl        # what users put beside it
)

export PATH="$PATH:/usr/sbin:/sbin" DEBIAN_FRONTEND=noninteractive
missing=()
for pair in "${PROGRAMS[@]}"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
done
# the modules of Debian's own Python that its python3 package leaves out
if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    missing+=(python3-venv)
fi
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "setup.sh: missing: ${missing[*]}; install them, or run this as root on Debian" >&2
    exit 1
fi

no_daemons=/usr/sbin/policy-rc.d
if [ ! -e "$no_daemons" ]; then
    trap 'rm -f "$no_daemons"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$no_daemons"
    chmod 755 "$no_daemons"
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}"
