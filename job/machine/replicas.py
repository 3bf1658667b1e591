"""The devices and workers that train as one."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.python.eager import context

from job import stopping
from job.errors import ConfigError, Stopped, UnavailableError, first_line
from job.machine.peers import Watch, meet
from job.settings.cluster import Cluster

logger = logging.getLogger(__name__)

# From when all workers are there until TensorFlow has joined them: it first takes hold of the GPUs.
_SECONDS_TO_JOIN = 60
_LONGEST_JOIN = 80.0  # in case that TensorFlow does not keep to it
_SECONDS_TO_HEAR = 0.1  # until a thread has run that could not meanwhile
# Until all have heard of a stop that is told to them.
_SECONDS_TO_SPREAD = 0.5
_STOP = "job/stop"  # its name in TensorFlow's coordination service
# What TensorFlow raises, from whatever call comes next, once a worker has gone.
_LOSSES = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)

_Numbers = npt.NDArray[np.int64]
Tensors = list[tf.Tensor]
_OnEach = Callable[[Tensors], list[Tensors]]
Function = Callable[[tf.Tensor], tf.Tensor | Sequence[tf.Tensor]]


class Replicas:
    """Every device of every worker holds a copy of the model; this is what they do together.

    A function that each replica runs is pure: it returns tensors, which are added up over all replicas, and only then,
    once for all, variables change. So a step has one reduction, and every copy stays equal to every other.

    workers: how many processes there are. worker: which of them this is, from 0. local: devices of each.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy | None = None,
        cluster: Cluster | None = None,
        devices: Sequence[str | None] = (None,),
        watch: Watch | None = None,
    ) -> None:
        """Take a strategy over the ``devices`` of every worker of ``cluster``; none for one device of one worker.

        With a cluster there is a ``watch`` over the other workers.
        """
        self._strategy = strategy
        self.workers = len(cluster.addresses) if cluster else 1
        self.worker = cluster.index if cluster else 0
        self.local = len(devices)
        self._devices = devices
        self._compiled: dict[Function, _OnEach] = {}
        self._watch = watch
        if strategy and watch:
            self._exchange = self._exchanger(strategy)

    @property
    def count(self) -> int:
        """Return the number of devices of all workers."""
        return self.workers * self.local

    @property
    def is_chief(self) -> bool:
        """Return whether this worker publishes, and saves checkpoints."""
        return self.worker == 0

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Return the scope in which the model's variables are made, in the same order by every worker."""
        return self._strategy.scope() if self._strategy else contextlib.nullcontext()

    def total(self, function: Callable[[int], tuple[Tensors, Tensors]]) -> list[tuple[Tensors, Tensors]]:
        """Return the sums over all replicas of the first tensors of ``function``, and the second ones as they are.

        One pair for each replica of this worker, on its device: the sums are equal, and none goes through the host.
        For use in a tf.function, in the same order by every worker.

        Args:
            function: is given the number of a replica of this worker, from 0. It returns float32 tensors to add up, and
                tensors that are the same on every replica. Where there are several, it assigns to no variable.
        """
        if self._strategy is None:
            return [function(0)]
        strategy, shapes = self._strategy, list[tf.TensorShape]()

        def replica() -> tuple[tf.Tensor, Tensors]:
            summed, own = function(self._number())
            shapes[:] = [tensor.shape for tensor in summed]
            # one long vector: each reduction costs a round trip of the network
            joined = tf.concat([tf.reshape(tensor, [-1]) for tensor in summed], axis=0)
            return sum_over_replicas(joined), own

        joined, own = strategy.run(replica)
        found = []
        for number, total in enumerate(strategy.experimental_local_results(joined)):
            with tf.device(self._devices[number]):
                parts = tf.split(total, [shape.num_elements() for shape in shapes])
                sums = [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
            found.append((sums, [strategy.experimental_local_results(tensor)[number] for tensor in own]))
        return found

    def on_each_device(self) -> Iterator[int]:
        """Yield the number of each replica of this worker, from 0, within the scope of its device."""
        for number, device in enumerate(self._devices):
            with tf.device(device):
                yield number

    def own(self, variable: keras.Variable, number: int) -> tf.Variable:
        """Return the copy of a variable of the model that replica ``number`` of this worker holds."""
        if self._strategy is None:
            return variable.value
        return self._strategy.experimental_local_results(variable.value)[number]

    def each(self, function: Function, batches: Tensors) -> list[Tensors]:
        """Return the tensors that ``function`` makes of each of ``batches``, one for each device of this worker.

        They run at once, and exchange nothing, so any thread may call it at any time.
        """
        if self._strategy is None or self.local == 1:
            return [tf.nest.flatten(function(batch)) for batch in batches]
        if function not in self._compiled:
            self._compiled[function] = self._on_each(self._strategy, function)
        on_each: _OnEach = self._compiled[function]
        return on_each(batches)

    def _on_each(self, strategy: tf.distribute.Strategy, function: Function) -> _OnEach:
        def on_each(batches: Tensors) -> list[Tensors]:
            def replica() -> Tensors:
                flat: Tensors = tf.nest.flatten(function(tf.identity(batches[self._number()])))
                return flat

            results = [strategy.experimental_local_results(tensor) for tensor in strategy.run(replica)]
            return [list(of_one) for of_one in zip(*results, strict=True)]

        compiled: _OnEach = tf.function(on_each, autograph=False, reduce_retracing=True)
        return compiled

    def _number(self) -> int:
        """Return which of this worker's replicas is being traced."""
        number = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
        return int(number) - self.worker * self.local

    def gather(self, data: bytes) -> list[bytes]:
        """Return what every worker gives, in their order. All workers call it, as often and in the same order.

        It goes through an all-reduce of whole numbers, where each adds to a place of its own: exact, whatever the bytes
        mean. It costs as many times the traffic as there are workers, so it is for what is small beside the photos.
        """
        if self.workers == 1:
            return [data]
        sizes = np.zeros(self.workers, np.int64)
        sizes[self.worker] = len(data)
        sizes = self._exchange(sizes)
        ends = np.cumsum(-(-sizes // 8))
        if not ends[-1]:
            return [b""] * self.workers
        words = np.zeros(ends[-1], np.int64)
        mine = np.frombuffer(data + bytes(-len(data) % 8), np.int64)
        words[ends[self.worker] - len(mine) : ends[self.worker]] = mine
        parts = np.split(self._exchange(words), ends[:-1])
        return [part.tobytes()[:size] for part, size in zip(parts, sizes, strict=True)]

    def from_chief(self, data: bytes) -> bytes:
        """Return what the chief gives, whatever the others give. All workers call it."""
        return self.gather(data if self.is_chief else b"")[0]

    def agree(self, variable: str, what: str, value: str) -> None:
        """Check that ``value`` is the same on every worker.

        Raises:
            ConfigError: it is not; ``variable`` is to blame, and the message tells each worker's.
        """
        values = [each.decode() for each in self.gather(value.encode())]
        if len(set(values)) > 1:
            told = ", ".join(f"worker {number}: {each}" for number, each in enumerate(values))
            raise ConfigError.of(
                variable, f"{what} differs between the workers of TF_CONFIG ({told}); start all with the same settings"
            )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the block with the other workers, and leave it when all do; to be called once, as the last."""
        yield
        if self._watch:
            # the chief may publish for minutes: whoever left before would be missed
            self._watch.end()
            self.gather(b"")

    @contextlib.contextmanager
    def ending_alike(self) -> Iterator[None]:
        """Run a block that the other workers run too, and end as they do where they are lost or one is asked to stop.

        Raises:
            UnavailableError: a worker has gone. TensorFlow finds it while it waits for it; where nothing is waited for,
                a thread does, and has this process stop.
            Stopped: this worker or another was asked to stop.
        """
        if self._watch is None:
            yield
            return
        try:
            with stopping.when_asked(self._tell):
                yield
        except (*_LOSSES, RuntimeError) as error:
            if not _is_loss(error):
                raise
            # who was asked to stop does not wait for the others
            if stopping.asked_to_stop() and not self._watch.lost:
                self._tell()
                stopping.stop()
            raise _lost(first_line(error)) from error
        except Stopped as stop:
            if self._watch.lost:
                raise _lost("it no longer answers") from stop
            self._tell()
            raise

    def _tell(self) -> None:
        """Have the other workers stop too, if this one was asked to."""
        if stopping.asked_to_stop() and self._watch and not self._watch.lost:
            _tell_stop(self.worker)

    def _exchanger(self, strategy: tf.distribute.Strategy) -> Callable[[_Numbers], _Numbers]:
        def add(numbers: tf.Tensor) -> tf.Tensor:
            def replica() -> tf.Tensor:
                # of a worker's devices, the first speaks for it
                return tf.zeros_like(numbers) if self._number() else tf.identity(numbers)

            return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(replica), axis=None)

        added = tf.function(add, input_signature=[tf.TensorSpec([None], tf.int64)], autograph=False)
        return lambda numbers: np.asarray(added(tf.constant(numbers)))


def sum_over_replicas(tensor: tf.Tensor) -> tf.Tensor:
    """Return the sum of ``tensor`` over all replicas, with gradients, within a function of :meth:`Replicas.total`."""
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tensor)


def connect(cluster: Cluster | None, devices: Sequence[str]) -> Replicas:
    """Return the replicas on ``devices`` of this process, and on those of the other workers, once all are there.

    With workers, it has to come before anything that TensorFlow computes.

    Raises:
        ConfigError: this worker's port cannot be used, or the others have another number of devices.
        UnavailableError: a worker is missing, or went away meanwhile.
        Stopped: this worker was asked to stop, or another that has joined.
    """
    if cluster is not None:
        found = meet(cluster)
        watch = Watch({peer: found[peer] for peer in cluster.peers})
        # TensorFlow holds Python's lock while it joins: no thread of ours runs, and a signal is heeded afterwards
        with _ended_after(_LONGEST_JOIN):
            try:
                strategy = _join(cluster)
                time.sleep(_SECONDS_TO_HEAR)
            except (*_LOSSES, RuntimeError) as error:
                if not _is_loss(error):
                    raise
                time.sleep(_SECONDS_TO_HEAR)
                stopping.stop_if_asked()
                raise _lost(first_line(error)) from error
            except Stopped:
                _tell_stop(cluster.index)
                raise
        threading.Thread(target=_heed_others, args=[cluster.index], name="stop of others", daemon=True).start()
        watch.start()
        replicas = Replicas(strategy, cluster, strategy.extended.worker_devices, watch)
        with replicas.ending_alike():
            replicas.agree("TF_CONFIG", "the number of devices", str(replicas.local))
        return replicas
    if len(devices) > 1:
        return Replicas(tf.distribute.MirroredStrategy(list(devices)), None, devices)
    return Replicas()


def _join(cluster: Cluster) -> tf.distribute.Strategy:
    # chief and workers become one job, in which worker 0 is the chief: it is the same to TensorFlow
    spec = tf.train.ClusterSpec({"worker": list(cluster.addresses)})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        spec, task_type="worker", task_id=cluster.index, rpc_layer="grpc"
    )
    # as the strategy does where nobody has, but for the time: it would wait for an hour
    job = context.coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=len(cluster.addresses))
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        cluster_register_timeout_in_ms=1000 * _SECONDS_TO_JOIN,
        coordinated_jobs=[job],
    )
    context.context().coordination_service.cluster_register_with_barrier = True
    return tf.distribute.MultiWorkerMirroredStrategy(resolver)


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End the process with a traceback and exit code 1 if the block takes longer, by a thread that is not Python's."""
    if sys.stderr is not None:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _tell_stop(worker: int) -> None:
    # whoever is not joined has nobody to tell, and a second one has nothing new to tell
    with contextlib.suppress(tf.errors.OpError):
        with contextlib.suppress(tf.errors.AlreadyExistsError):
            context.context().set_config_key_value(_STOP, str(worker))
        time.sleep(_SECONDS_TO_SPREAD)


def _heed_others(worker: int) -> None:
    # the call ends when somebody is told to stop, or TensorFlow gives up
    with contextlib.suppress(tf.errors.OpError):
        told = context.context().get_config_key_value(_STOP)
        if int(told) != worker and not stopping.asked_to_stop():
            logger.info("worker %s was asked to stop, so this one stops too", told)
            stopping.ask(f"worker {told} was asked to stop", stopping.GRACE_SECONDS)


def _is_loss(error: Exception) -> bool:
    # pybind11 makes an error of its own of a stop that comes while TensorFlow's is made
    return isinstance(error, _LOSSES) or Stopped.__name__ in str(error)


def _lost(found: str) -> UnavailableError:
    return UnavailableError(
        "another worker has gone, so this one ends too: start all of them again with the same settings, and they go on "
        f"from the last checkpoint ({found[:200]})"
    )
