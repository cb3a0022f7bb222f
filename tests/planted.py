"""Checks that end in every way a check can: functions of a module, as other processes import them."""

import os
import signal
import time

from inflora.isolated import Bench, Failed, NotTried


def passes(bench: Bench) -> str:
    return f"all is well on {bench.device}"


def finds_something(bench: Bench) -> str:
    print("the loss is", float("nan"))
    raise Failed("the loss is nan")


def breaks(bench: Bench) -> str:
    raise RuntimeError("CUDA error:\nno kernel image is available")


def has_nothing_to_try(bench: Bench) -> str:
    raise NotTried("1 GPU")


def crashes(bench: Bench) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "unreachable"


def leaves(bench: Bench) -> str:
    os._exit(3)


def hangs(bench: Bench) -> str:
    time.sleep(600)
    return "unreachable"
