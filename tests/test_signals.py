"""Signals that ask to stop are noted inside a block, and answered as before it outside."""

import os
import signal
import threading

import pytest

from slmjax import signals

pytestmark = pytest.mark.fast


def test_what_is_received_inside_is_noted_in_order_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in signals.STOPS]
    sent = [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    with signals.noted() as received:
        for number in sent:
            os.kill(os.getpid(), number)
    assert received == sent
    assert [signal.getsignal(number) for number in signals.STOPS] == before


def test_handlers_are_put_back_after_an_error():
    before = [signal.getsignal(number) for number in signals.STOPS]
    with pytest.raises(KeyError), signals.noted():
        raise KeyError
    assert [signal.getsignal(number) for number in signals.STOPS] == before


def test_another_thread_notes_nothing():
    seen = []

    def work():
        with signals.noted() as received:
            seen.append((signal.getsignal(signal.SIGUSR1), received))

    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, [])]
