"""Processes that train one run together, each on the devices of its own machine.

They all run the same program and wait for each other wherever their devices exchange something. So
what one of them alone knows, like a signal or an error, has to be agreed on before any of them acts
on it. The first process alone writes to the run's folder, except for the arrays in checkpoints.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinyvgg_jax.errors import (
    AgreedError,
    DivergedError,
    InterruptedRunError,
    LostProcessError,
    UserError,
)

# Time for all processes to find each other.
_START_SECONDS = 50
# A process that has not been heard of for so long is lost, and all others end. Mostly they notice
# it at once, because its connections are closed.
_SILENCE_SECONDS = 30
# Calls of a pipeline between two questions whether any process was asked to stop.
_CALLS_PER_QUESTION = 16
# Libraries' words for a process that is gone.
_LOST = re.compile("Gloo |NCCL|[Cc]oordination ?[Ss]ervice|[Hh]eartbeat|Socket closed|[Bb]arrier")

Result = TypeVar("Result")


def start(
    address: str | None,
    num_processes: int | None,
    process_id: int | None,
    abandon: Callable[[str], object],
) -> None:
    """Connects this process with the others of its run, if there are any.

    Args:
        address: `HOST:PORT` of the first process. None for all three to find them in the
            environment, as JAX does under SLURM, Open MPI and Kubernetes and on TPUs.
        num_processes: number of processes.
        process_id: number of this process, counted from 0.
        abandon: ends the process with a message. It is called from another thread if the others
            are not found in time, for which JAX has no exception.

    Raises:
        UserError: if the arguments are not right.
    """
    given = {
        "coordinator_address": address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if num_processes == 1 and process_id in (None, 0):
        return
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if not _is_one_of_several():
            return
        who = "the other processes, of which the environment tells,"
        advice = " To train alone, pass --num_processes 1."
    elif missing:
        raise UserError(f"{' and '.join(missing)} must be passed, too.")
    else:
        assert address is not None and num_processes is not None and process_id is not None
        _check(address, num_processes, process_id)
        who = f"the coordinator, {address}," if process_id else "the other processes"
        advice = ""
    words = f"{who} did not answer within {_START_SECONDS} seconds.{advice}"
    alarm = threading.Timer(_START_SECONDS, abandon, [words])
    alarm.daemon = True
    alarm.start()
    # It would take SIGTERM for itself, also where nothing asks it for what it has taken.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _default_ctrl_c():
            jax.distributed.initialize(
                address,
                num_processes,
                process_id,
                initialization_timeout=10 * _START_SECONDS,
                heartbeat_timeout_seconds=_SILENCE_SECONDS,
            )
            _keep_standard_output()
            require_same("flags", {"num_processes": num_processes})
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot connect with the other processes: {reason}") from error
    finally:
        alarm.cancel()


def _check(address: str, num_processes: int, process_id: int) -> None:
    """Checks the flags, and that the coordinator's host is known and its port free.

    Raises:
        UserError: if they are not right.
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 1 <= int(port) <= 65535):
        raise UserError(f"--coordinator_address must be HOST:PORT, not {address!r}.")
    if num_processes < 1:
        raise UserError(f"--num_processes must be at least 1, not {num_processes}.")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id must be from 0 to {num_processes - 1}, not {process_id}.")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise UserError(f"--coordinator_address {address}: {error.strerror}.") from error
    except UnicodeError as error:
        raise UserError(f"--coordinator_address {address} names no host.") from error
    if process_id == 0:
        # JAX would end by a signal.
        try:
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(("", int(port)))
        except OSError as error:
            raise UserError(
                f"--coordinator_address {address}: port {port} cannot be used here: "
                f"{(error.strerror or str(error)).lower()}. Pass another one to all processes."
            ) from error


@contextlib.contextmanager
def _default_ctrl_c() -> Iterator[None]:
    """Lets Ctrl-C end the process at once, since JAX waits where Python cannot handle it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_one_of_several() -> bool:
    """Tells whether JAX finds in the environment that this is one process of several."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        return True
    # JAX has no public way to ask. A version without these names needs the flags.
    with contextlib.suppress(ImportError, AttributeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax._src.clusters import ClusterEnv

        for environment in ClusterEnv._cluster_types:
            # A single process may run in such an environment, too, where its number is not known.
            with contextlib.suppress(Exception):
                if not environment.opt_in_only_method and environment.is_env_present():
                    return environment.get_process_count() > 1
    return False


def _keep_standard_output() -> None:
    """Keeps standard output for Python, since Gloo prints a line about each connection there."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    stdout = sys.stdout
    sys.stdout = os.fdopen(kept, "w", encoding=stdout.encoding, errors=stdout.errors)


def count() -> int:
    """Returns the number of processes of this run."""
    return jax.process_count()


def is_first() -> bool:
    """Tells whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """Gathers a value of each process.

    Args:
        value: what this process contributes, JSON-serialisable.

    Returns:
        The values of all processes, in order; every process gets the same list.
    """
    if count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = max(multihost_utils.process_allgather(np.int32(len(content))).tolist())
    # Powers of 2 keep the number of programs small, which JAX compiles for each size.
    padded = np.full(1 << (size - 1).bit_length(), ord(" "), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row.tobytes()) for row in np.asarray(rows)]


def together(function: Callable[[], Result], takes_part: bool = True) -> Result | None:
    """Calls a function in every process, or in some, so that all of them fail if one does.

    Args:
        function: what to call.
        takes_part: whether this process calls it.

    Returns:
        The result of this process's call; None if it takes no part.

    Raises:
        UserError: if any process raised one, or another process was interrupted by a signal.
        InterruptedRunError: if this one was.
    """
    if count() == 1:
        return function()
    result, message, interruption = None, None, None
    if takes_part:
        try:
            result = function()
        except UserError as error:
            message = str(error)
        except InterruptedRunError as error:
            message, interruption = str(error), error
    messages = exchange(message)
    if interruption is not None:
        raise interruption
    _raise_first(messages)
    return result


def _raise_first(messages: list[str | None]) -> None:
    failed = [(number, message) for number, message in enumerate(messages) if message is not None]
    if failed:
        number, message = failed[0]
        raise AgreedError(message if number == 0 else f"process {number}: {message}")


def on_first(function: Callable[[], Result]) -> Result | None:
    """Calls a function in the first process only; see `together`."""
    return together(function, is_first())


def first_then_others(function: Callable[[], Result]) -> Result:
    """Calls a function in the first process, and then in all others; see `together`.

    So the others find what the first one leaves in a folder that they share.
    """
    result = on_first(function)
    if count() == 1:
        return result  # type: ignore[return-value]
    other = together(function, not is_first())
    return result if is_first() else other  # type: ignore[return-value]


def require_same(words: str, value: dict[str, Any]) -> None:
    """Checks that every process has the same values.

    Args:
        words: names the values, for the message.
        value: the values by name, JSON-serialisable.

    Raises:
        UserError: naming the first process and value that differ from the first process's.
    """
    first, *others = exchange(value)
    for number, theirs in enumerate(others, start=1):
        for name in first | theirs:
            if first.get(name) != theirs.get(name):
                raise AgreedError(
                    f"the processes have different {words}: {name} is {first.get(name)!r} in "
                    f"process 0, and {theirs.get(name)!r} in process {number}."
                )


class Stop:
    """Agreement of all processes on whether to stop, since a signal may reach only one of them."""

    def __init__(self, received: list[int]):
        """Prepares the agreement.

        Args:
            received: the signals of this process, to which others may be added later.
        """
        self._received, self._calls = received, 0

    def signal(self) -> int:
        """Returns the number of the signal that any process has received; 0 for none."""
        return max(exchange(self._received[0] if self._received else 0))

    def after_call(self) -> bool:
        """Tells, after a pipeline's call, whether to stop; every process gets the same answer."""
        self._calls += 1
        if count() > 1 and self._calls % _CALLS_PER_QUESTION:
            return False
        return self.signal() > 0


def is_agreed(error: BaseException | None) -> bool:
    """Tells whether every process raises the same error, so that all end in an orderly way."""
    return isinstance(error, AgreedError | DivergedError | InterruptedRunError)


@contextlib.contextmanager
def reporting_losses() -> Iterator[None]:
    """Turns the errors of libraries into a LostProcessError if another process is gone."""
    try:
        yield
    except UserError as error:
        # Such a library's error may be part of an error of Orbax.
        if count() > 1 and not is_agreed(error) and _LOST.search(str(error)):
            raise _lost(error) from error
        raise
    except Exception as error:
        if count() > 1 and not is_agreed(error) and _LOST.search(str(error)):
            raise _lost(error) from error
        raise


def _lost(error: Exception) -> LostProcessError:
    return LostProcessError(
        f"process {jax.process_index()} of {count()} lost another one. What was saved is kept; run "
        f"the same command in all processes again to go on from there. "
        f"({str(error).strip().splitlines()[0]})"
    )
