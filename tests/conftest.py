"""Ctrl-C is as in a terminal: what a shell starts in the background ignores SIGINT, and its children with it.

Peers have no witness unless a test asks for one: some tests have hundreds of peers in one process.
"""

import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("ELASTIC_WITNESS", "0")
