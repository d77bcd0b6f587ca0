"""Functions called on several ranks: processes that form one gloo group."""

import multiprocessing
import pickle
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)


class Ranks:
    """The processes, which are started once because that takes seconds."""

    def __init__(self, size, folder):
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, size, folder, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *arguments):
        """What the function, a test module's, returns on each rank."""
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((function, arguments)))
        results, errors = zip(*map(self._answer, self.connections), strict=True)
        for rank, error in enumerate(errors):
            assert error is None, f"rank {rank}: {error}"
        return list(results)

    def _answer(self, connection):
        # Longer than a collective waits, so that its error is what comes back.
        assert connection.poll(2 * TIMEOUT.seconds), "a rank does not answer"
        return pickle.loads(connection.recv_bytes())

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank, size, folder, connection):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=TIMEOUT)
    while True:
        function, arguments = pickle.loads(connection.recv_bytes())
        try:
            answer = function(*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        # Plain pickle: a multiprocessing pipe would send tensors as shared memory.
        connection.send_bytes(pickle.dumps(answer))
