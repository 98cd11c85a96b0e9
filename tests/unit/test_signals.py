import os
import signal
import subprocess
import sys
import time

import pytest

from hope.train.signals import StopRequest

LOOP = """
import sys, time
from hope.train.signals import StopRequest
with StopRequest(usr1=True, grace_s=0.1) as stop:
    print("ready", flush=True)
    for step in range(2000):
        time.sleep(0.01)
        if stop.requested and "stubborn" not in sys.argv:
            print("saved on", stop.name, flush=True)
            sys.exit(85)
"""


def start(*arguments):
    child = subprocess.Popen([sys.executable, "-c", LOOP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    return child


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1"])
def test_a_signal_ends_a_real_process_between_steps(name):
    child = start()
    child.send_signal(signal.Signals[f"SIG{name}"])
    out, _ = child.communicate(timeout=30)
    assert out == f"saved on {name}\n".encode()
    assert child.returncode == 85


def test_a_second_interrupt_breaks_a_step_that_hangs():
    child = start("stubborn")
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert child.poll() is None, "the first one only asks"
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=30)
    assert b"KeyboardInterrupt" in error


def test_one_ctrl_c_may_arrive_twice():
    """The terminal signals every process of the group, and torchrun its workers once more."""
    with StopRequest(grace_s=60.0) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "INT"


def test_nothing_is_requested_without_a_signal():
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.name is None


def test_the_first_signal_is_remembered_and_term_may_come_twice():
    with StopRequest(usr1=True) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "USR1"
    assert stop.requested, "still readable after the block"


def fail_after_a_signal(usr1):
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGUSR1) is usr1, "not asked for"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        raise RuntimeError("step failed")


def test_previous_handlers_come_back_even_after_an_error():
    heard = []
    mine = lambda number, frame: heard.append(number)
    before = signal.signal(signal.SIGTERM, mine)
    try:
        usr1 = signal.getsignal(signal.SIGUSR1)
        with pytest.raises(RuntimeError, match="step failed"):
            fail_after_a_signal(usr1)
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
