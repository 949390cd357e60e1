"""The command line of a run that signals itself at a moment which a test chooses.

    python killed_run.py SIGKILL EVENT PATTERN COUNT --config=... --workdir=...

The moment is the COUNT-th audit event (see `sys.addaudithook`) whose name matches EVENT and of
whose arguments one matches PATTERN: such as os.rename, just before a file or a checkpoint gets its
name. A step is the event "step", with the argument "LEARNERS STEP".
"""

import os
import re
import runpy
import signal
import sys
import weakref


def signal_at(name: str, event: str, pattern: str, count: int) -> None:
    """Arranges for the signal; SIGKILL leaves no time for another instruction."""
    events, arguments, left = re.compile(event), re.compile(pattern), count

    def hook(happened, values):
        nonlocal left
        if events.fullmatch(happened) and any(arguments.search(str(value)) for value in values):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.Signals[name])

    sys.addaudithook(hook)


def audit_steps() -> None:
    """Makes each step an audit event."""
    from abkd_jax.run.log.progress import Progress

    begin, update = Progress.__init__, Progress.update
    labels = weakref.WeakKeyDictionary()

    def labelled(self, label, *args, **options):
        labels[self] = label
        begin(self, label, *args, **options)

    def audited(self, step, **shown):
        sys.audit("step", f"{labels[self]} {step}")
        update(self, step, **shown)

    Progress.__init__, Progress.update = labelled, audited


if __name__ == "__main__":
    name, event, pattern, count = sys.argv[1:5]
    del sys.argv[1:5]
    # As in a shell: one in the background has its processes ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["torch"] = None  # which tensorboardX would import, for a second or two
    audit_steps()
    signal_at(name, event, pattern, int(count))
    runpy.run_module("abkd_jax.main", run_name="__main__", alter_sys=True)
