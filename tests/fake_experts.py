"""Experts as a user plugs them in: `tests/fake_experts.py:Walker`."""

import os
import signal
import time


class Walker:
    def get_action(self, obs, info):
        return {"action": "right"}


class Waverer(Walker):
    """Does something else in step 5 of episodes with an odd seed."""

    def seed(self, seed):
        self.odd = seed % 2

    def get_action(self, obs, info):
        if self.odd and info["steps"] == 5:
            return self.other()
        return "RIGHT"

    def other(self):
        raise RuntimeError("no answer\nfrom the agent")


class Nonsense(Waverer):
    def other(self):
        return "no_op"


class Failing(Walker):
    def reset(self, info):
        raise RuntimeError("no key")


class Killed(Waverer):
    """Its process is gone at once."""

    def other(self):
        os.kill(os.getpid(), signal.SIGKILL)


class CtrlC(Waverer):
    """A person presses Ctrl-C, in the process that collects."""

    collector = staticmethod(os.getpid)

    def other(self):
        os.kill(self.collector(), signal.SIGINT)
        time.sleep(0.2)  # longer than a worker plays on its own
        return "RIGHT"


class CtrlCFromWorker(CtrlC):
    collector = staticmethod(os.getppid)


not_an_expert = dict
