"""The first import of the data workers' server: it ends with the main process, and its workers with it.

Python's own server waits for a pipe to close that every worker holds, too.
"""

import os
import signal

from esc_basicsr.common.signals import sent_with_parent

sent_with_parent(signal.SIGKILL)
os.register_at_fork(after_in_child=lambda: sent_with_parent(signal.SIGKILL))
