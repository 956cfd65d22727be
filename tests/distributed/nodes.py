"""A cluster on this machine whose nodes come and go on command; a process of its own, since Ray wants the main thread.

Reads one JSON object a line and answers each: {"add": resources}, {"kill": node}, {"drain": node, "seconds": s}.
"""

import json
import sys
import time

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason


def main() -> None:
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = {}
    try:
        answer({"address": cluster.address})
        for line in sys.stdin:
            command = json.loads(line)
            if "add" in command:
                node = cluster.add_node(num_cpus=1, resources=command["add"])
                nodes[node.node_id] = node
                answer({"node": node.node_id})
            elif "kill" in command:
                at = time.time()
                cluster.remove_node(nodes.pop(command["kill"]), allow_graceful=False)
                answer({"at": at})
            else:
                at = time.time()
                drained, reason = GcsClient(cluster.address).drain_node(
                    command["drain"],
                    DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
                    "taken back",
                    int(1000 * (at + command["seconds"])),
                )
                assert drained, reason
                answer({"at": at})
    finally:
        cluster.shutdown()


def answer(content: dict[str, object]) -> None:
    sys.__stdout__.write(json.dumps(content) + "\n")
    sys.__stdout__.flush()


if __name__ == "__main__":
    main()
