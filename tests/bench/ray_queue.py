"""The baseline of `redis_queue`, for a Python that has Ray and NumPy and need not have RollMesh: no import of ours.

This process puts, a Ray task gets, and the queue's actor lies between them, each a process of its own.
"""

import json
import sys
import time


def main(num_samples: int, num_prompt_tokens: int, num_response_tokens: int) -> None:
    """For each line that names a number of groups, move so many and say how fast that was."""
    import numpy as np
    import ray  # type: ignore[import-not-found]
    from ray.util.queue import Queue  # type: ignore[import-not-found]

    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _node_ip_address="127.0.0.1"
    )
    generator = np.random.default_rng(0)
    group = [
        {
            "prompt_token_ids": generator.integers(0, 150_000, num_prompt_tokens).astype(np.int32),
            "response_token_ids": generator.integers(0, 150_000, num_response_tokens).astype(np.int32),
            "behaviour_logprobs": generator.random(num_response_tokens, dtype=np.float32),
            "reference_logprobs": generator.random(num_response_tokens, dtype=np.float32),
            "reward": 1.0,
        }
        for _ in range(num_samples)
    ]
    queue = Queue(maxsize=64)

    @ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
    def take(source: Queue, num_groups: int) -> int:
        return sum(len(source.get(timeout=60)) for _ in range(num_groups))

    print(json.dumps({"is_ready": True}), flush=True)
    for line in sys.stdin:
        num_groups = json.loads(line)["num_groups"]
        ray.get(take.remote(queue, 0))  # its process is there before the clock runs
        started = time.perf_counter()
        taken = take.remote(queue, num_groups)
        for _ in range(num_groups):
            queue.put(group, timeout=60)
        if ray.get(taken, timeout=60) != num_groups * num_samples:
            raise RuntimeError("samples were lost")
        seconds = time.perf_counter() - started
        print(json.dumps({"groups_per_s": num_groups / seconds}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
