#!/bin/bash
#SBATCH --job-name=handwritten
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:10:00
# The job script people write for themselves before they find llmrun: what benchmarks of overhead compare with.
# Fixed sleeps and one prompt at a time are what such scripts have; they are not slips of this one.
#
#     LLAMA=FOLDER MODEL=FILE PROMPTS=FOLDER RESULTS=FOLDER sbatch --wait -N3 tests/real/overhead_handwritten.sh
#
# CLIENT: overhead_handwritten.py, from the folder of submission by default (Slurm runs a copy of this script).

LLAMA=${LLAMA:?folder with llama-server and the RPC worker}
MODEL=${MODEL:?GGUF file}
PROMPTS=${PROMPTS:?folder of text files}
RESULTS=${RESULTS:?folder for the answers}
CLIENT=${CLIENT:-tests/real/overhead_handwritten.py}
PYTHON=${PYTHON:-python3}
PORT_RPC=${PORT_RPC:-$((50052 + SLURM_JOB_ID % 100 * 10))}
PORT_SERVER=${PORT_SERVER:-$((18080 + SLURM_JOB_ID % 100))}

mkdir -p "$RESULTS"
RPC_SERVER=$LLAMA/ggml-rpc-server
[ -x "$RPC_SERVER" ] || RPC_SERVER=$LLAMA/rpc-server

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
address() { scontrol show node -o "$1" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2; }

workers=()
for i in $(seq 1 $((${#nodes[@]} - 1))); do
    ip=$(address "${nodes[$i]}")
    srun --overlap -N1 -n1 -w "${nodes[$i]}" "$RPC_SERVER" -H "$ip" -p $((PORT_RPC + i)) > "$RESULTS/rpc-${nodes[$i]}.log" 2>&1 &
    workers+=("$ip:$((PORT_RPC + i))")
done
sleep 5

ip=$(address "${nodes[0]}")
rpc=$(IFS=,; echo "${workers[*]}")
"$LLAMA/llama-server" -m "$MODEL" --host "$ip" --port "$PORT_SERVER" -ngl 99 ${rpc:+--rpc "$rpc"} > "$RESULTS/server.log" 2>&1 &
server=$!
sleep 5
until curl -sf "http://$ip:$PORT_SERVER/health" > /dev/null; do
    kill -0 $server 2> /dev/null || exit 1
    sleep 1
done

"$PYTHON" "$CLIENT" "http://$ip:$PORT_SERVER/v1" "$PROMPTS" "$RESULTS"
status=$?

kill $server
wait $server
kill $(jobs -p) 2> /dev/null
wait
exit $status
